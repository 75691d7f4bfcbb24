"""Documents into token ids, in memory that does not grow with a document's length.

Tokenizers keep some hundred bytes of each token for as long as a text is encoded. So short documents go to
them in batches, and long ones in windows that overlap. Where two windows come together, both must have made
the same tokens of the same characters on both sides of the seam: then what stands before it is what the whole
text gives, and so is what stands behind. Where they do not agree, as in a run of spaces that is longer than
the overlap, the window is made longer; one that then denies what it has said before a seam is refused.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.documents import Document
from sparsekd.trainer.corpus.examples import ExampleEncoder
from sparsekd.trainer.corpus.fields import RecordError
from sparsekd.trainer.corpus.findings import Records
from sparsekd.trainer.corpus.tokenizer import end_token_id, special_frame, tokenize
from sparsekd.trainer.run.errors import DataError

# Documents that are tokenized together: enough for the tokenizer's threads, little beside its own memory.
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1_000_000

WINDOW_CHARACTERS = 1 << 18
OVERLAP_CHARACTERS = 1 << 12
AGREEING_TOKENS = 16
"""Tokens on each side of a seam of which two windows must have made the same."""


class Encoded(NamedTuple):
    """A document's token ids, or the next of them.

    Attributes:
        number: The document's place in the corpus.
        document: The document.
        token_ids: int32 [N]; a long document comes in parts, which follow one another.
        counted: bool [N], which of the tokens are learned; None for all.
    """

    number: int
    document: Document
    token_ids: NDArray[np.int32]
    counted: NDArray[np.bool_] | None = None


def encode(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[tuple[int, Document]],
    config: CorpusConfig,
    records: Records,
) -> Iterator[list[Encoded]]:
    """Yields the tokens of numbered documents in their order.

    Args:
        tokenizer: The store's tokenizer.
        documents: Each with its number.
        config: What is learned of them, and what happens to those that are longer than a row.
        records: Is told of documents that are left out, cut, or not as expected. Documents of plain text that
            give no token are left out without a word.

    Raises:
        DataError: A document cannot be encoded and is not to be skipped.
    """
    for encoded in _shortened(_batches(tokenizer, documents, config, records), config, records):
        yield [part for part in encoded if _has_something_to_learn(part, records)]


def _batches(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[tuple[int, Document]],
    config: CorpusConfig,
    records: Records,
) -> Iterator[list[Encoded]]:
    examples = ExampleEncoder(tokenizer, config)
    how: dict[str, Any] = {
        "split_special_tokens": config.split_special_tokens,
        "end": end_token_id(tokenizer, config.end_token),
    }
    batch: list[tuple[int, Document]] = []
    size = 0
    for number, document in documents:
        if document.body is None and len(document.text) > WINDOW_CHARACTERS:
            if batch:
                yield _encode_batch(tokenizer, how, examples, batch, config, records)
                batch, size = [], 0
            for part in tokenize_long(tokenizer, document.text, **how):
                yield [Encoded(number, document, part)]
            continue
        batch.append((number, document))
        size += len(document.text) if document.body is None else len(document.content)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield _encode_batch(tokenizer, how, examples, batch, config, records)
            batch, size = [], 0
    if batch:
        yield _encode_batch(tokenizer, how, examples, batch, config, records)


def _encode_batch(
    tokenizer: PreTrainedTokenizerBase,
    how: dict[str, Any],
    examples: ExampleEncoder,
    batch: list[tuple[int, Document]],
    config: CorpusConfig,
    records: Records,
) -> list[Encoded]:
    made: dict[int, Encoded] = {}
    texts = [(number, document) for number, document in batch if document.body is None]
    if texts:
        encoded = tokenize(tokenizer, [document.text for _, document in texts], **how)
        made = {
            number: Encoded(number, document, ids)
            for (number, document), ids in zip(texts, encoded, strict=True)
            if len(ids)
        }
    others = [(number, document) for number, document in batch if document.body is not None]
    for (number, document), example in zip(
        others, examples.encode([document for _, document in others]), strict=True
    ):
        if isinstance(example, RecordError):
            if config.invalid == "refuse":
                raise example
            records.skip(example.reason, document.place)
            continue
        records.look(example, document.place)
        made[number] = Encoded(number, document, example.token_ids, example.counted)
    return [made[number] for number, _ in batch if number in made]


def _shortened(
    batches: Iterator[list[Encoded]], config: CorpusConfig, records: Records
) -> Iterator[list[Encoded]]:
    """Cuts or drops documents that are longer than a row, as `corpus.truncation` says."""
    if config.truncation == "split":
        yield from batches
        return
    parts: list[Encoded] = []
    for batch in batches:
        ended: list[Encoded] = []
        for part in batch:
            if parts and part.number != parts[-1].number:
                ended += _within_row(parts, config, records)
                parts = []
            # A row's tokens and one more say all; the rest of a long text need not be kept.
            if sum(len(kept.token_ids) for kept in parts) <= config.sequence_length:
                parts.append(part)
        yield ended
    yield _within_row(parts, config, records)


def _within_row(parts: list[Encoded], config: CorpusConfig, records: Records) -> list[Encoded]:
    length = config.sequence_length
    if sum(len(part.token_ids) for part in parts) <= length:
        return parts
    first = parts[0]
    if config.truncation == "drop":
        records.skip("longer than a row", first.document.place)
        return []
    records.cut.add(first.document.place)
    ids = np.concatenate([part.token_ids for part in parts])[:length]
    counted = None if first.counted is None else first.counted[:length]
    return [first._replace(token_ids=ids, counted=counted)]


def _has_something_to_learn(part: Encoded, records: Records) -> bool:
    # The first token of a document is no label.
    if part.counted is None or part.counted[1:].any():
        return True
    records.skip("nothing to learn", part.document.place)
    return False


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
