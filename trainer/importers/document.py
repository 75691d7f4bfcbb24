"""What every importer gives: documents with the most likely ids that their source lists at each position.

An importer is one file with a `Format`, and one entry in `formats.FORMATS`.

Shapes: T tokens of a document, K most ids listed at a position, D most samples of one, S documents inside a
document.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.run.streams import without_compression

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsekd.logit_store.protocol.reader import LogitStore

NOT_LISTED = -1
"""Fills `head_ids` behind the ids that a position lists, and `drawn_ids` behind its samples."""

LINES = (".jsonl", ".json")
"""How names of files of JSON end; `.gz`, `.zst`, `.bz2` or `.xz` may follow."""

PADDING_SHARE = 4
"""Arrays [T, K] hold at most this many times what is listed: one long list among short ones would make
them grow without bound."""


@dataclass(frozen=True)
class Document:
    """One sequence of the source. The record at position t speaks of token t + 1, as everywhere.

    Attributes:
        where: its place in the source, for messages.
        token_ids: int64 [T].
        loss_mask: bool [T], where token t + 1 counts; the last is False.
        head_ids: int64 [T, K], the listed ids in any order, then `NOT_LISTED`; a row of these where the
            source has no record.
        head_logprobs: float64 [T, K], their log-probabilities at temperature 1 (logits where the source has
            no normaliser); nobody looks at them where nothing is listed.
        true_logprob: float64 [T], of token t + 1, NaN where the source does not give it; None where it
            never does.
        weights: float32 [T], of the loss at each position; None for 1 everywhere.
        segment_starts: int64 [S], where the sequence holds several documents of a corpus: their first
            positions, the first 0. None for one document.
        segment_documents: int64 [S], their numbers in the corpus, -1 for padding; None for one document.
        drawn_ids: int64 [T, D], ids that the teacher sampled at temperature 1, in the order in which it did
            (an id as often as it came), then `NOT_LISTED`; of sources whose rest is `counts`, which list
            nothing, else None.
    """

    where: str
    token_ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    head_ids: NDArray[np.int64]
    head_logprobs: NDArray[np.float64]
    true_logprob: NDArray[np.float64] | None = None
    weights: NDArray[np.float32] | None = None
    segment_starts: NDArray[np.int64] | None = None
    segment_documents: NDArray[np.int64] | None = None
    drawn_ids: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Source:
    """Somebody else's capture.

    Attributes:
        files: that were read, in order.
        rest: `derived` where values are full-vocabulary log-probabilities, `unknown` where they are not.
        documents: begins to read; each call reads anew, and gives the same documents in the same order.
        gives_true: whether it gives the true tokens' log-probabilities everywhere.
        details: further facts for the manifest, as JSON values.
        tokens: the token store whose rows the documents are, where the source holds no tokens: the new store
            keeps its tokenizer, dataset, splits and lengths.
        split: of the token store.
    """

    files: tuple[Path, ...]
    rest: str
    documents: Callable[[], Iterator[Document]]
    gives_true: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    tokens: "LogitStore | None" = None
    split: str = "train"


@dataclass(frozen=True)
class Options:
    """What a reader may need besides the source.

    Attributes:
        tokenizer: returns the tokenizer that made the ids, loaded at the first call.
        tokens: a token store whose rows are the source's samples.
        split: of the token store.
        compression: DistillKit's settings, where they do not lie beside the data.
        alignment: axolotl's `kd_prepared_targets_alignment`.
    """

    tokenizer: "Callable[[], PreTrainedTokenizerBase]"
    tokens: "LogitStore | None" = None
    split: str = "train"
    compression: Path | None = None
    alignment: str | None = None


@dataclass(frozen=True)
class Format:
    """A layout of captures.

    Attributes:
        name: of `--format`.
        reads: what it reads, for help; one line.
        suffixes: how its files' names end.
        fields: it is recognised by columns or keys with one of these sets of names; empty where the suffix
            alone tells.
        read: opens a file or folder; raises StoreError or ConfigError, with the place and what to do.
        cannot_give: what a store holds and this format does not, besides what its `rest` implies; one phrase
            each. The manifest remembers them.
        flags: of `store import`, beyond those that every format takes.
    """

    name: str
    reads: str
    suffixes: tuple[str, ...]
    fields: tuple[frozenset[str], ...]
    read: Callable[[Path, Options], Source]
    cannot_give: tuple[str, ...]
    flags: tuple[str, ...] = ()


def source_files(path: Path, suffixes: tuple[str, ...], what: str) -> tuple[Path, ...]:
    """Returns the file, or the folder's files with one of the suffixes in natural order (data_2 before
    data_10).

    Raises:
        StoreError: there is none.
    """
    found = [item for item in files_in(path, what) if path.is_file() or has_suffix(item.name, suffixes)]
    if not found:
        raise StoreError(
            f"{path} has no file that ends in {' or '.join(suffixes)}, where {what} is expected."
        )
    return tuple(sorted(found, key=_natural))


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Returns whether a file's name ends with one of the suffixes; files of JSON may be compressed."""
    plain = without_compression(name)
    return name.endswith(suffixes) or (plain.endswith(LINES) and plain.endswith(suffixes))


def files_in(path: Path, what: str) -> list[Path]:
    """Returns a folder's files, in any order, or the file itself.

    Raises:
        StoreError: nothing is there, or it cannot be looked into.
    """
    try:
        if path.is_dir():
            return [item for item in path.iterdir() if item.is_file()]
        if path.is_file():
            return [path]
    except OSError as error:
        raise StoreError(f"{path} cannot be looked into ({error.strerror}); make it readable.") from error
    raise StoreError(f"{path} is not there; give the folder or the file that holds {what}.")


def padded_lists(flat: NDArray[Any], lengths: NDArray[np.int64], fill: float, where: str) -> NDArray[Any]:
    """Returns lists that stand one behind the other as [T, K], K the longest, filled behind each.

    Args:
        flat: [sum of lengths].
        lengths: int64 [T].
        fill: a value of flat's type.
        where: their place, for messages.

    Raises:
        StoreError: one list is so long beside the others that the array would be mostly filling.
    """
    width = int(lengths.max(initial=1))
    if len(lengths) * width > PADDING_SHARE * (flat.size + len(lengths)) + 65_536:
        raise StoreError(
            f"{where}: position {int(lengths.argmax())} lists {width} ids, the {len(lengths)} positions "
            f"{flat.size / len(lengths):.1f} on average, expected about equal numbers: the file is damaged."
        )
    out = np.full((len(lengths), width), fill, flat.dtype)
    out[np.arange(width) < lengths[:, None]] = flat
    return out


def labelled_document(
    where: str,
    token_ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    loss_mask: NDArray[np.bool_],
    head_ids: NDArray[np.int64],
    head_logprobs: NDArray[np.float64],
    weights: NDArray[np.float32] | None = None,
) -> Document:
    """Returns the document of inputs and labels, [T] and [T, K] each: position t speaks of label t.

    The label of the last position that counts becomes the document's last token. What follows it is left
    away: it is padding, or counts nowhere.

    Raises:
        StoreError: a label that counts is not the next token.
    """
    counted = np.flatnonzero(loss_mask)
    end = int(counted[-1]) + 1 if counted.size else 0
    whole = np.append(token_ids[:end], labels[end - 1 : end])
    moved = counted[whole[counted + 1] != labels[counted]]
    if moved.size:
        place = moved[0]
        raise StoreError(
            f"{where}, position {place}: the label is {labels[place]}, but the next token is "
            f"{whole[place + 1]}: labels must be the tokens moved by one."
        )
    return Document(
        where=where,
        token_ids=whole,
        loss_mask=_behind(loss_mask[:end], False),
        head_ids=_behind(head_ids[:end], NOT_LISTED),
        head_logprobs=_behind(head_logprobs[:end], -np.inf),
        weights=None if weights is None else _behind(weights[:end], 0),
    )


def one_line(error: BaseException) -> str:
    """Returns what somebody else's code says of an error, for the middle of a sentence."""
    return " ".join(str(error).split()) or type(error).__name__


def _behind(values: NDArray[Any], fill: float) -> NDArray[Any]:
    """Returns [T, ...] with one more entry at the end, or nothing for nothing."""
    last = np.full((min(1, len(values)), *values.shape[1:]), fill, values.dtype)
    return np.concatenate([values, last])


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts: list[tuple[int, int, str]] = []
    digits = text = ""
    for letter in path.name + "\0":
        if letter.isdigit():
            if text:
                parts.append((1, 0, text))
                text = ""
            digits += letter
            continue
        if digits:
            parts.append((0, int(digits), ""))
            digits = ""
        text += letter
    return [*parts, (1, 0, text)]
