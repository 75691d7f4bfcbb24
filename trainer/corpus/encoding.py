"""Documents into token ids, in memory that does not grow with a document's length.

Tokenizers keep some hundred bytes of each token for as long as a text is encoded. So short documents go to
them in batches, and long ones in windows that overlap. Where two windows come together, both must have made
the same tokens of the same characters on both sides of the seam: then what stands before it is what the whole
text gives, and so is what stands behind. Where they do not agree, as in a run of spaces that is longer than
the overlap, the window is made longer; one that then denies what it has said before a seam is refused.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.documents import Document
from sparsekd.trainer.corpus.examples import Example, ExampleEncoder
from sparsekd.trainer.corpus.fields import RecordError
from sparsekd.trainer.corpus.findings import Records
from sparsekd.trainer.corpus.split import split_of_document
from sparsekd.trainer.corpus.tokenizer import end_token_id, special_frame, tokenize
from sparsekd.trainer.run.errors import DataError

# Documents that are tokenized together: enough for the tokenizer's threads, little beside its own memory.
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1_000_000

WINDOW_CHARACTERS = 1 << 18
OVERLAP_CHARACTERS = 1 << 12
AGREEING_TOKENS = 16
"""Tokens on each side of a seam of which two windows must have made the same."""


Block = list[tuple[int, Document]]
"""Documents that are encoded together, each with its place in the corpus; a long one is alone."""


class Encoded(NamedTuple):
    """A document's token ids, or the next of them.

    Attributes:
        number: The document's place in the corpus.
        split: The store's split to which it belongs.
        weight: Of the document in the loss; float32 [N] where it is not that of all that is predicted: of
            what is predicted at each token.
        token_ids: int32 [N]; a long document comes in parts, which follow one another.
        counted: bool [N], which of the tokens are learned; None for all.
    """

    number: int
    split: str
    weight: float | NDArray[np.float32]
    token_ids: NDArray[np.int32]
    counted: NDArray[np.bool_] | None = None


def blocks_of(documents: Iterable[tuple[int, Document]]) -> Iterator[Block]:
    """Parts numbered documents, in their order, into blocks."""
    block: Block = []
    size = 0
    for number, document in documents:
        if _is_long(document):
            if block:
                yield block
            yield [(number, document)]
            block, size = [], 0
            continue
        block.append((number, document))
        size += size_of(document)
        if len(block) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def size_of(document: Document) -> int:
    """About how many characters are encoded."""
    return len(document.text) if document.body is None else len(document.content)


def _is_long(document: Document) -> bool:
    return document.body is None and len(document.text) > WINDOW_CHARACTERS


class Encoder:
    """Makes token ids of documents.

    Args:
        tokenizer: The store's tokenizer.
        config: What is learned of documents, and what happens to those that are longer than a row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: CorpusConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._examples = ExampleEncoder(tokenizer, config)
        self._how: dict[str, Any] = {
            "split_special_tokens": config.split_special_tokens,
            "end": end_token_id(tokenizer, config.end_token),
        }

    def encode(self, block: Block, records: Records) -> Iterator[list[Encoded]]:
        """Yields the tokens of a block's documents in their order, a long document's in parts.

        Args:
            block: The documents.
            records: Is told of those that are left out, cut, or not as expected. Documents of plain text that
                give no token are left out without a word.

        Raises:
            DataError: A document cannot be encoded and is not to be skipped.
        """
        places = {number: document.place for number, document in block}
        number, document = block[0]
        batches = self._long(number, document) if _is_long(document) else iter([self._batch(block, records)])
        if self._config.truncation != "split":
            batches = iter([self._shortened(batches, places, records)])
        for batch in batches:
            kept = []
            for part in batch:
                # The first token of a document is no label.
                if part.counted is None or part.counted[1:].any():
                    kept.append(part)
                else:
                    records.skip("nothing to learn", places[part.number])
            yield kept

    def _encoded(
        self,
        number: int,
        document: Document,
        token_ids: NDArray[np.int32],
        example: Example | None = None,
    ) -> Encoded:
        split = split_of_document(document, self._config)
        if example is None:
            return Encoded(number, split, document.weight, token_ids)
        if example.factors is None:
            return Encoded(number, split, document.weight, token_ids, example.counted)
        # The weight at a token is that of the next one, its label.
        weights = np.float32(document.weight) * np.append(example.factors[1:], np.float32(1))
        return Encoded(number, split, weights, token_ids, example.counted)

    def _long(self, number: int, document: Document) -> Iterator[list[Encoded]]:
        for part in tokenize_long(self._tokenizer, document.text, **self._how):
            yield [self._encoded(number, document, part)]

    def _batch(self, block: Block, records: Records) -> list[Encoded]:
        made: dict[int, Encoded] = {}
        texts = [(number, document) for number, document in block if document.body is None]
        if texts:
            encoded = tokenize(self._tokenizer, [document.text for _, document in texts], **self._how)
            made = {
                number: self._encoded(number, document, ids)
                for (number, document), ids in zip(texts, encoded, strict=True)
                if len(ids)
            }
        others = [(number, document) for number, document in block if document.body is not None]
        for (number, document), example in zip(
            others, self._examples.encode([document for _, document in others]), strict=True
        ):
            if isinstance(example, RecordError):
                if self._config.invalid == "refuse":
                    raise example
                records.skip(example.reason, document.place)
                continue
            records.look(example, document.place)
            made[number] = self._encoded(number, document, example.token_ids, example)
        return [made[number] for number, _ in block if number in made]

    def _shortened(
        self, batches: Iterable[list[Encoded]], places: Mapping[int, str], records: Records
    ) -> list[Encoded]:
        """Cuts or drops documents that are longer than a row, as `corpus.truncation` says."""
        length = self._config.sequence_length
        kept: dict[int, list[Encoded]] = {}
        for part in chain.from_iterable(batches):
            parts = kept.setdefault(part.number, [])
            # A row's tokens and one more say all; the rest of a long text need not be kept.
            if sum(len(before.token_ids) for before in parts) <= length:
                parts.append(part)
        shortened = []
        for number, parts in kept.items():
            if sum(len(part.token_ids) for part in parts) <= length:
                shortened += parts
            elif self._config.truncation == "drop":
                records.skip("longer than a row", places[number])
            else:
                records.cut.add(places[number])
                ids = np.concatenate([part.token_ids for part in parts])[:length]
                counted = None if parts[0].counted is None else parts[0].counted[:length]
                weight = parts[0].weight
                weight = weight[:length] if isinstance(weight, np.ndarray) else weight
                shortened.append(parts[0]._replace(token_ids=ids, counted=counted, weight=weight))
        return shortened


def tokenize_long(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    split_special_tokens: bool = True,
    end: int | None = None,
) -> Iterator[NDArray[np.int32]]:
    """Yields in parts what `tokenize` gives for one text."""
    frame = special_frame(tokenizer) if tokenizer.is_fast else None
    if frame is None:
        # No places of tokens, by which to find a seam.
        yield tokenize(tokenizer, [text], split_special_tokens=split_special_tokens, end=end)[0]
        return
    before, behind = frame
    end = tokenizer.eos_token_id if end is None else end
    last: int | None = None
    for part in _parts(tokenizer, text, split_special_tokens):
        if len(part):
            last_id = int(part[-1])
            if last is None:
                head = np.concatenate([before, part])
                twice = head[0] == part[0] == tokenizer.bos_token_id and len(head) > len(part)
                part = part if twice and not split_special_tokens else head
            yield part
            last = last_id
    if last is None:
        return
    last = int(behind[-1]) if len(behind) else last
    yield behind if last == end else np.append(behind, np.int32(end))


class _Window(NamedTuple):
    """Tokens of a part of a text: ids, and the characters of the text from which each was made.

    Attributes:
        start: Where the part begins.
        stop: Where it ends.
        tokens: int64 [N, 3]: first character, the one behind the last, id.
    """

    start: int
    stop: int
    tokens: NDArray[np.int64]

    def ids(self, first: int, last: int) -> NDArray[np.int32]:
        return self.tokens[first:last, 2].astype(np.int32)


def _parts(tokenizer: PreTrainedTokenizerBase, text: str, split: bool) -> Iterator[NDArray[np.int32]]:
    """Yields the tokens of a text without special tokens, in parts.

    Raises:
        DataError: The tokenizer makes other tokens of a text's beginning, the more of the text it sees.
    """
    windows = _windows(tokenizer, text, split)
    current, taken = next(windows), 0
    for following in windows:
        if following.stop <= current.stop:
            continue
        seam = _seam(current, following)
        if seam is None:  # twice as long, so that the work grows no faster than the text
            stop = min(max(following.stop, 2 * current.stop - current.start), len(text))
            longer = next(_encode_windows(tokenizer, text, [(current.start, stop)], split))
            found = _same_place(current, taken, longer) if taken else 0
            if found is None:
                raise DataError(
                    f"A document of {len(text):,} characters cannot be encoded in parts: what this tokenizer "
                    f"makes of {text[current.tokens[taken, 0] :][:30]!r} depends on what stands far behind. "
                    "Cut it by corpus.sample_by=paragraph or line, or by corpus.separator."
                )
            current, taken = longer, found
            continue
        end, begin = seam
        yield current.ids(taken, end)
        current, taken = following, begin
    yield current.ids(taken, len(current.tokens))


def _windows(tokenizer: PreTrainedTokenizerBase, text: str, split: bool) -> Iterator[_Window]:
    """Yields windows that cover the text and overlap, encoded some at a time for the tokenizer's threads."""
    last = max(len(text) - OVERLAP_CHARACTERS, 1)
    places = [
        (start, min(start + WINDOW_CHARACTERS, len(text)))
        for start in range(0, last, WINDOW_CHARACTERS - OVERLAP_CHARACTERS)
    ]
    together = max(BATCH_CHARACTERS // WINDOW_CHARACTERS, 1)
    for first in range(0, len(places), together):
        yield from _encode_windows(tokenizer, text, places[first : first + together], split)


def _encode_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, places: list[tuple[int, int]], split: bool
) -> Iterator[_Window]:
    encoded: Any = tokenizer(
        [text[start:stop] for start, stop in places],
        add_special_tokens=False,
        split_special_tokens=split,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for (start, stop), ids, offsets in zip(
        places, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2) + start
        yield _Window(start, stop, np.column_stack([spans, np.asarray(ids, dtype=np.int64)]))


def _seam(current: _Window, following: _Window) -> tuple[int, int] | None:
    """Where one window's tokens end and the next one's begin; None where they agree nowhere."""
    left, near = current.tokens, AGREEING_TOKENS
    first, last = np.searchsorted(left[:, 0], [following.start, current.stop])
    middle = (first + last) // 2
    # From the middle of the overlap on: there both windows know the most of what stands around.
    for end in sorted(range(first + near, last - near + 1), key=lambda index: abs(index - middle)):
        begin = _same_place(current, end, following)
        if begin is not None:
            return end, begin
    return None


def _same_place(window: _Window, token: int, other: _Window) -> int | None:
    """Where another window has the same token, with the same ones on both sides; None where it has not."""
    left, right, near = window.tokens, other.tokens, AGREEING_TOKENS
    # Several tokens may begin at one character, whose bytes they share.
    among = token - np.searchsorted(left[:, 0], left[token, 0])
    found = int(np.searchsorted(right[:, 0], left[token, 0]) + among)
    if found < near or found + near > len(right):
        return None
    is_same = np.array_equal(left[token - near : token + near], right[found - near : found + near])
    return found if is_same else None
