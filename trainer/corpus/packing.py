"""Documents into rows of one length, as pure functions over arrays.

Packed, documents follow one another without gaps. One that crosses a row's end continues in the next row as
a new segment with the same document number: its positions restart there, because attention never crosses
rows. Only the very last row of a split is padded. Not packed, for models that do not keep the documents of
a row apart, each document begins a row of its own, and its last row is padded.

Shapes: M tokens of a stream, L positions of a row, S segments of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.row import PADDING_DOCUMENT, Row, weight_runs


class Stream(NamedTuple):
    """Tokens that wait for a row to fill.

    Attributes:
        token_ids: int32 [M].
        documents: int64 [M], the number of the document at each token.
        weights: float32 [M], the weight in the loss of what is predicted there.
        counted: bool [M], whether the token is learned.
    """

    token_ids: NDArray[np.int32]
    documents: NDArray[np.int64]
    weights: NDArray[np.float32]
    counted: NDArray[np.bool_]


EMPTY = Stream(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.bool_))


def append(
    stream: Stream,
    token_ids: Sequence[NDArray[np.int32]],
    numbers: Sequence[int],
    weights: Sequence[float | NDArray[np.float32]] | None = None,
    counted: Sequence[NDArray[np.bool_] | None] | None = None,
) -> Stream:
    """The stream with documents added at its end.

    Args:
        stream: What waits already.
        token_ids: Tokens of each document, int32.
        numbers: Number of each document; neighbours must differ, for that is how borders are found.
        weights: Weight of each document, or of what is predicted at each of its tokens; None for 1.
        counted: Which tokens of each document are learned; None for all.
    """
    lengths = [len(ids) for ids in token_ids]
    masks = [None] * len(lengths) if counted is None else counted
    learned = [
        np.ones(length, np.bool_) if mask is None else mask
        for length, mask in zip(lengths, masks, strict=True)
    ]
    each = [1.0] * len(lengths) if weights is None else weights
    spread = [
        np.broadcast_to(np.float32(weight), length) for weight, length in zip(each, lengths, strict=True)
    ]
    return Stream(
        token_ids=np.concatenate([stream.token_ids, *token_ids]).astype(np.int32, copy=False),
        documents=np.concatenate([stream.documents, np.repeat(np.asarray(numbers, np.int64), lengths)]),
        weights=np.concatenate([stream.weights, *spread]),
        counted=np.concatenate([stream.counted, *learned]),
    )


def take_rows(
    stream: Stream, length: int, *, weighted: bool = False, padding_id: int | None = None
) -> tuple[list[Row], Stream]:
    """Cuts all rows of `length` positions off the stream that can be made yet.

    Args:
        stream: What waits.
        length: L.
        weighted: Whether rows carry weights.
        padding_id: None packs documents; else each begins a row of its own, which is filled with this token.

    Returns:
        The rows (without teacher) and the fewer than `length` tokens that are left, which may go on.
    """
    if padding_id is not None:
        return _rows_of_documents(stream, length, padding_id, weighted=weighted)
    cut = len(stream.token_ids) // length * length
    rows = [
        row_of(_part(stream, start, start + length), weighted=weighted) for start in range(0, cut, length)
    ]
    return rows, _part(stream, cut, len(stream.token_ids))


def _rows_of_documents(
    stream: Stream, length: int, padding_id: int, *, weighted: bool
) -> tuple[list[Row], Stream]:
    """As `take_rows`, a document or piece of one in a row; the last document may go on: full rows of it."""
    borders = np.flatnonzero(stream.documents[1:] != stream.documents[:-1]) + 1
    rows = []
    start = 0
    for stop in [*borders.tolist(), len(stream.token_ids)]:
        while stop - start >= length:
            rows.append(row_of(_part(stream, start, start + length), weighted=weighted))
            start += length
        if stop < len(stream.token_ids):
            rows += take_last_row(_part(stream, start, stop), length, padding_id, weighted=weighted)
            start = stop
    return rows, _part(stream, start, len(stream.token_ids))


def _part(stream: Stream, start: int, stop: int) -> Stream:
    place = slice(start, stop)
    return Stream(
        stream.token_ids[place], stream.documents[place], stream.weights[place], stream.counted[place]
    )


def take_last_row(stream: Stream, length: int, padding_id: int, *, weighted: bool = False) -> list[Row]:
    """The one padded row at the end of a split or document, or none where nothing is left.

    Args:
        stream: Fewer than `length` tokens.
        length: L.
        padding_id: Token that fills the row; it carries no loss and no document sees it.
        weighted: Whether the row carries weights.
    """
    missing = length - len(stream.token_ids)
    if missing == length:
        return []
    padded = Stream(
        token_ids=np.append(stream.token_ids, np.full(missing, padding_id, np.int32)),
        documents=np.append(stream.documents, np.full(missing, PADDING_DOCUMENT, np.int64)),
        weights=np.append(stream.weights, np.ones(missing, np.float32)),
        counted=np.append(stream.counted, np.zeros(missing, np.bool_)),
    )
    return [row_of(padded, weighted=weighted)]


def row_of(stream: Stream, *, weighted: bool = False) -> Row:
    """One row from what stands at each of its positions. A weight of 0 clears the loss mask."""
    documents = stream.documents
    continues = documents[1:] == documents[:-1]  # (L - 1,) the next token belongs to the same document
    starts = np.append(0, np.flatnonzero(~continues) + 1).astype(np.int32)
    # The mask at t is that of the label, token t + 1.
    counts = np.append(continues & (documents[:-1] != PADDING_DOCUMENT) & stream.counted[1:], False)
    return Row(
        token_ids=np.ascontiguousarray(stream.token_ids, dtype=np.int32),
        loss_mask=counts & (stream.weights > 0),
        segment_starts=starts,
        segment_documents=documents[starts].astype(np.int64, copy=False),
        optional=weight_runs(stream.weights) if weighted else {},
    )
