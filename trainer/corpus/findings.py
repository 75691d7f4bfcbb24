"""What `prepare` met and says: how many documents look like something else than plain text, and the first."""

import json
import re
from collections import Counter

from transformers import PreTrainedTokenizerBase

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.documents import Document
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


class Formats:
    """What documents are written in, where that is not what the configuration says."""

    def __init__(self, config: CorpusConfig) -> None:
        self._config = config
        self._documents = 0
        self._json, self._markup, self._csv = Tally(), Tally(), Tally()

    def look(self, document: Document) -> None:
        """Looks at one document with text."""
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
        self._in_documents: Counter[str] = Counter()

    def look(self, document: Document) -> None:
        """Looks at one document."""
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
        part = ""
        # Not in a chat, where the end of a document and of a turn are one token.
        if self._config.format == "text" and set(self._in_documents) == {self._end}:
            part = f", or part the files there with corpus.separator='{self._end}'"
        return [
            f"{found}these stay text, several ids each, and none became a control token; if a chat template "
            f"wrote them, set corpus.split_special_tokens=false{part}"
        ]
