"""What `prepare` met and says: how many documents look like something else than plain text, and the first."""

import json
import re
from collections import Counter

import numpy as np
from transformers import PreTrainedTokenizerBase

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.documents import Document
from sparsekd.trainer.corpus.examples import Example
from sparsekd.trainer.run.errors import DataError

HEAD_CHARACTERS = 1 << 16
"""What is looked at of a document, to see what its format is."""

CSV_LINES = 8
"""So many lines with equally many delimiters are a table."""

_BEGIN_OF_JSON = re.compile(r'(?:\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:')
_BEGIN_OF_MARKUP = re.compile(r"<(?:!doctype\s|html[\s>]|\?xml\s)", re.IGNORECASE)
_CLOSING_TAG = re.compile(r"</[A-Za-z][\w:.-]*>")


class Tally:
    """Counts things of one kind and keeps the first as an example."""

    def __init__(self) -> None:
        self.count = 0
        self.first = ""

    def add(self, example: str) -> None:
        """Counts one thing, which `example` describes."""
        self.first = self.first if self.count else example
        self.count += 1

    def take_in(self, later: "Tally") -> None:
        """Counts what another one has counted, of things that come later."""
        self.first = self.first if self.count else later.first
        self.count += later.count


class Records:
    """Records and documents that are left out, cut, or of which less is learned than it seems."""

    def __init__(self) -> None:
        self.cut = Tally()
        self._skipped: dict[str, Tally] = {}
        self._across, self._rewritten, self._unwritten = Tally(), Tally(), Tally()
        self._tokens_across = 0
        self._rationales, self._tokens_of_rationales = Tally(), 0

    @property
    def skipped(self) -> dict[str, int]:
        """How many were left out, by reason, in the order of the reasons' names."""
        return {reason: self._skipped[reason].count for reason in sorted(self._skipped)}

    def skip(self, reason: str, place: str) -> None:
        """Counts a record that is left out."""
        self._skipped.setdefault(reason, Tally()).add(place)

    def look(self, example: Example, place: str) -> None:
        """Looks at what became of a record."""
        if example.across:
            self._tokens_across += example.across
            self._across.add(place)
        if example.rewritten:
            self._rewritten.add(place)
        if example.unwritten:
            self._unwritten.add(place)
        if example.factors is not None:
            self._rationales.add(place)
            self._tokens_of_rationales += int(np.count_nonzero(example.counted & (example.factors != 1)))

    def take_in(self, later: "Records") -> None:
        """Counts what another one has counted, of documents that come later."""
        for reason, tally in later._skipped.items():
            self._skipped.setdefault(reason, Tally()).take_in(tally)
        self.cut.take_in(later.cut)
        self._across.take_in(later._across)
        self._rewritten.take_in(later._rewritten)
        self._unwritten.take_in(later._unwritten)
        self._tokens_across += later._tokens_across
        self._rationales.take_in(later._rationales)
        self._tokens_of_rationales += later._tokens_of_rationales

    def lines(self) -> list[str]:
        """What is to be said of them."""
        lines = [
            f"{tally.count:,} left out: {reason}, the first {tally.first}"
            for reason, tally in sorted(self._skipped.items())
        ]
        if self.cut.count:
            lines.append(f"{self.cut.count:,} documents cut at a row's length, the first {self.cut.first}")
        if self._across.count:
            lines.append(
                f"{self._tokens_across:,} tokens of {self._across.count:,} documents join what is "
                f"learned with what is not, and are not learned, the first in {self._across.first}: a prompt "
                "that ends with a space, or an answer that begins with a line break, does so"
            )
        if self._rationales.count:
            lines.append(
                f"{self._tokens_of_rationales:,} tokens of rationales in {self._rationales.count:,} records, "
                f"the first {self._rationales.first}, weigh what corpus.rationale_weight says"
            )
        if self._rewritten.count:
            lines.append(
                f"{self._rewritten.count:,} conversations have turns that the chat template writes "
                f"otherwise once others follow, the first {self._rewritten.first}: they are learned as they "
                "stand in the whole conversation"
            )
        if self._unwritten.count:
            lines.append(
                f"{self._unwritten.count:,} conversations have messages that the chat template does not "
                f"write as they are, the first {self._unwritten.first}"
            )
        return lines


class Formats:
    """What documents are written in, where that is not what the configuration says."""

    def __init__(self, config: CorpusConfig) -> None:
        self._config = config
        self._documents = 0
        self._json, self._markup, self._csv = Tally(), Tally(), Tally()

    def look(self, document: Document) -> None:
        """Looks at one document with text."""
        if document.body is not None:
            return
        self._documents += 1
        is_text = self._config.format == "text"
        if is_text and is_json(document.text):
            self._json.add(document.place)
        elif is_markup(document.text):
            self._markup.add(document.place)
        elif is_text and (document.place.endswith((".csv", ".tsv")) or is_csv(document.text)):
            self._csv.add(document.place)

    def check(self) -> None:
        """Refuses a corpus whose format is another one than configured.

        Raises:
            DataError: Most documents of text files are JSON, and `corpus.allow` does not have it so.
        """
        if 2 * self._json.count > self._documents and "json" not in self._config.allow:
            raise DataError(
                f"{self._json.count:,} of {self._documents:,} documents are JSON, the first "
                f"{self._json.first}, and with corpus.format=text their braces and field names would be "
                "trained on; read JSON lines with corpus=jsonl and corpus.text_field, or set "
                "corpus.allow=[json] to learn JSON itself."
            )

    def lines(self) -> list[str]:
        """What is to be said of documents that are read as they are."""
        told = (
            (self._json, "are JSON", "read JSON lines with corpus=jsonl"),
            (self._markup, "look like HTML or XML", "take the text out of it before"),
            (self._csv, "look like CSV", "read it with corpus=csv and corpus.text_field"),
        )
        return [
            f"{tally.count:,} of {self._documents:,} documents {what}, the first {tally.first}: the markup "
            f"is part of the training text; if it should not be, {remedy}"
            for tally, what, remedy in told
            if tally.count
        ]


def is_json(text: str) -> bool:
    """Whether a text begins with a JSON object, or a list of them."""
    head = text[:HEAD_CHARACTERS].lstrip()
    if not _BEGIN_OF_JSON.match(head):
        return False
    try:
        json.JSONDecoder().raw_decode(head)
    except (ValueError, RecursionError):
        return len(text) > HEAD_CHARACTERS  # the rest of a long one was not looked at
    return True


def is_markup(text: str) -> bool:
    """Whether a text is a page or a document of HTML or XML, not just some tags."""
    head = text[:HEAD_CHARACTERS].lstrip()
    if not head.startswith("<"):
        return False
    return bool(_BEGIN_OF_MARKUP.match(head)) or len(set(_CLOSING_TAG.findall(head))) >= 3


def is_csv(text: str) -> bool:
    """Whether a text's first lines all have the same number of delimiters, two or more."""
    lines = text[:HEAD_CHARACTERS].splitlines()[:CSV_LINES]
    if len(lines) < CSV_LINES:
        return False
    return any(
        lines[0].count(delimiter) >= 2 and len({line.count(delimiter) for line in lines}) == 1
        for delimiter in (",", ";", "\t")
    )


class SpecialTokens:
    """Documents whose text spells special tokens, as text from a chat template does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: CorpusConfig) -> None:
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._spellings = {spelling for spelling in added | set(tokenizer.all_special_tokens) if spelling}
        longest_first = sorted(self._spellings, key=lambda spelling: (-len(spelling), spelling))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._end = tokenizer.eos_token
        self._config = config
        self._documents = Tally()
        self._has_bodies = False
        self._in_documents: Counter[str] = Counter()

    def look(self, document: Document) -> None:
        """Looks at one document."""
        self._has_bodies |= document.body is not None
        found = {match[0] for match in self._pattern.finditer(document.text)} - {""}
        if found:
            self._documents.add(document.place)
            self._in_documents.update(found)

    def lines(self) -> list[str]:
        """What is to be said of them."""
        if not self._documents.count:
            return []
        by_count = sorted(self._in_documents.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{spelling} in {count:,}" for spelling, count in by_count[:5])
        found = (
            f"{self._documents.count:,} documents spell special tokens of the tokenizer ({shown}), the first "
            f"{self._documents.first}: "
        )
        if not self._config.split_special_tokens:
            return [f"{found}these became control tokens, as corpus.split_special_tokens=false asks"]
        if self._has_bodies:
            return [f"{found}these stay text, several ids each; only the chat template writes control tokens"]
        part = ""
        # Not in a chat, where the end of a document and of a turn are one token.
        if self._config.format == "text" and set(self._in_documents) == {self._end}:
            part = f", or part the files there with corpus.separator='{self._end}'"
        return [
            f"{found}these stay text, several ids each, and none became a control token; if a chat template "
            f"wrote them, set corpus.split_special_tokens=false{part}"
        ]
