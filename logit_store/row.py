"""One row of a store: a packed sequence of tokens and what the teacher said about each.

Shapes: L positions of a row, S segments of a row, k head entries, n draws, G grid temperatures.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

PADDING_DOCUMENT = -1
"""Document number of a segment that is padding."""

NO_ID = -1
"""Fills `tail_ids` behind the distinct draws of a position, and `head_ids` behind a head cut short."""


@dataclass(frozen=True)
class TeacherRecord:
    """The teacher's distribution p at each position of a row; position t speaks of token t + 1.

    Attributes:
        head_ids: int32 [L, k], the k most likely ids by descending log-probability, ties by ascending id. A
            codec that cuts heads short (`compact` with a mass) fills it with -1 at the end.
        head_logprobs: float32 [L, k], their full-vocabulary log-probabilities at temperature 1, in nats; -inf
            where there is no id.
        tail_ids: int32 [L, n], distinct drawn ids in ascending order, filled with -1 at the end.
        tail_counts: int32 [L, n], how often each id was drawn, filled with 0. A position sums to n, or to 0
            where the rest (the vocabulary without the head) is empty.
        log_rest: float32 [L, G], log R_T for each temperature of the manifest's grid, where R_T is the sum
            over the rest of exp(log-probability / T); -inf where the rest is empty.
        rest_entropy: float32 [L], nats, of the rest renormalised at temperature 1; 0 where it is empty.
        true_logprob: float32 [L], log-probability of token t + 1; 0 where there is no such token.
        entropy: float32 [L], nats, of p at the manifest's draw temperature.
        tail_logprobs: float32 [L, n], log-probabilities of `tail_ids` as those of the head, -inf where there
            is no id; [L, 0] (the default, or None given) where the manifest does not ask for them.
    """

    head_ids: NDArray[np.int32]
    head_logprobs: NDArray[np.float32]
    tail_ids: NDArray[np.int32]
    tail_counts: NDArray[np.int32]
    log_rest: NDArray[np.float32]
    rest_entropy: NDArray[np.float32]
    true_logprob: NDArray[np.float32]
    entropy: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def __post_init__(self) -> None:
        if self.tail_logprobs is None or self.tail_logprobs.shape == (0, 0):
            object.__setattr__(self, "tail_logprobs", np.zeros((len(self.entropy), 0), np.float32))


@dataclass(frozen=True)
class Row:
    """One packed sequence.

    Attributes:
        token_ids: int32 [L].
        loss_mask: bool [L]. The mask at t belongs to the record at t, which predicts token t + 1: False at
            the last position of the row and of each document, at padding and at prompts.
        segment_starts: int32 [S], first position of each document (or piece of one); the first is 0.
        segment_documents: int64 [S], the document's number in the corpus; -1 is padding.
        teacher: what the teacher said; None in a token store.
    """

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    segment_starts: NDArray[np.int32]
    segment_documents: NDArray[np.int64]
    teacher: TeacherRecord | None


def empty_record(length: int, k: int, n: int, grid: int, *, tail_logprobs: bool = False) -> TeacherRecord:
    """Returns a record of arrays that are allocated but not filled.

    Args:
        length: L.
        k: entries of the head.
        n: draws.
        grid: G.
        tail_logprobs: whether the draws' log-probabilities are kept.
    """
    return TeacherRecord(
        head_ids=np.empty((length, k), np.int32),
        head_logprobs=np.empty((length, k), np.float32),
        tail_ids=np.empty((length, n), np.int32),
        tail_counts=np.empty((length, n), np.int32),
        log_rest=np.empty((length, grid), np.float32),
        rest_entropy=np.empty(length, np.float32),
        true_logprob=np.empty(length, np.float32),
        entropy=np.empty(length, np.float32),
        tail_logprobs=np.empty((length, n if tail_logprobs else 0), np.float32),
    )


def segment_lengths(row: Row) -> NDArray[np.int64]:
    """Returns the number of positions of each segment, int64 [S]."""
    ends = np.append(row.segment_starts[1:], len(row.token_ids))
    return ends.astype(np.int64) - row.segment_starts


def position_ids(row: Row) -> NDArray[np.int32]:
    """Returns int32 [L], restarting at 0 at each segment; padding counts as a segment."""
    starts = np.repeat(row.segment_starts, segment_lengths(row))
    return np.arange(len(row.token_ids), dtype=np.int32) - starts.astype(np.int32)


def document_of_position(row: Row) -> NDArray[np.int64]:
    """Returns int64 [L], the document number at each position; -1 is padding."""
    return np.repeat(row.segment_documents, segment_lengths(row))
