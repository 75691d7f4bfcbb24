"""Documents into rows of one length, as pure functions over arrays.

Documents follow one another without gaps. One that crosses a row's end continues in the next row as a new
segment with the same document number: its positions restart there, because attention never crosses rows. Only
the very last row of a split is padded.

Shapes: M tokens of a stream, L positions of a row, S segments of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.row import PADDING_DOCUMENT, Row


class Stream(NamedTuple):
    """Tokens that wait for a row to fill.

    Attributes:
        token_ids: int32 [M].
        documents: int64 [M], the number of the document at each token.
    """

    token_ids: NDArray[np.int32]
    documents: NDArray[np.int64]


EMPTY = Stream(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64))


def append(stream: Stream, token_ids: Sequence[NDArray[np.int32]], numbers: Sequence[int]) -> Stream:
    """The stream with documents added at its end.

    Args:
        stream: What waits already.
        token_ids: Tokens of each document, int32.
        numbers: Number of each document; neighbours must differ, for that is how borders are found.
    """
    lengths = [len(ids) for ids in token_ids]
    return Stream(
        token_ids=np.concatenate([stream.token_ids, *token_ids]).astype(np.int32, copy=False),
        documents=np.concatenate([stream.documents, np.repeat(np.asarray(numbers, np.int64), lengths)]),
    )


def take_rows(stream: Stream, length: int) -> tuple[list[Row], Stream]:
    """Cuts all full rows of `length` positions off the stream.

    Returns:
        The rows (without teacher) and the fewer than `length` tokens that are left.
    """
    cut = len(stream.token_ids) // length * length
    rows = [
        row_of(stream.token_ids[start : start + length], stream.documents[start : start + length])
        for start in range(0, cut, length)
    ]
    return rows, Stream(stream.token_ids[cut:], stream.documents[cut:])


def take_last_row(stream: Stream, length: int, padding_id: int) -> list[Row]:
    """The one padded row at a split's end, or none where nothing is left.

    Args:
        stream: Fewer than `length` tokens.
        length: L.
        padding_id: Token that fills the row; it carries no loss and no document sees it.
    """
    missing = length - len(stream.token_ids)
    if missing == length:
        return []
    return [
        row_of(
            np.append(stream.token_ids, np.full(missing, padding_id, dtype=np.int32)),
            np.append(stream.documents, np.full(missing, PADDING_DOCUMENT, dtype=np.int64)),
        )
    ]


def row_of(
    token_ids: NDArray[np.int32],  # (L,)
    documents: NDArray[np.int64],  # (L,)
) -> Row:
    """One row from the tokens and the document number at each position."""
    continues = documents[1:] == documents[:-1]  # (L - 1,) the next token belongs to the same document
    starts = np.append(0, np.flatnonzero(~continues) + 1).astype(np.int32)
    return Row(
        token_ids=np.ascontiguousarray(token_ids, dtype=np.int32),
        loss_mask=np.append(continues & (documents[:-1] != PADDING_DOCUMENT), False),
        segment_starts=starts,
        segment_documents=documents[starts].astype(np.int64, copy=False),
        teacher=None,
    )
