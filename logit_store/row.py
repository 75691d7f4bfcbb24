"""One row of a store: a packed sequence of tokens and what the teacher said where a record stands.

Shapes: L positions of a row, S segments of it, W runs of equal weight, C counted positions (those of the loss
mask), M recorded positions, k head entries, n draws, G grid temperatures. `planes` declares every array.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

PADDING_DOCUMENT = -1
"""Document number of a segment that is padding."""

NO_ID = -1
"""Fills `tail_ids` behind the distinct draws of a position, and `head_ids` behind a head cut short; in
`labels`, a counted position without a label."""

IGNORED_LABEL = -100
"""Label of a position whose cross-entropy does not count, as torch has it."""


@dataclass(frozen=True)
class TeacherRecord:
    """The teacher's distribution p at each recorded position of a row, in the order of the positions.

    Attributes:
        head_ids: int32 [M, k], the k most likely ids by descending log-probability, ties by ascending id. A
            codec that cuts heads short (`compact` with a mass) fills it with -1 at the end.
        head_logprobs: float32 [M, k], their full-vocabulary log-probabilities at temperature 1, in nats; -inf
            where there is no id.
        tail_ids: int32 [M, n], distinct drawn ids in ascending order, filled with -1 at the end.
        tail_counts: int32 [M, n], how often each id was drawn, filled with 0. A position sums to n, or to 0
            where the rest (the vocabulary without the head) is empty.
        log_rest: float32 [M, G], log R_T for each temperature of the manifest's grid, where R_T is the sum
            over the rest of exp(log-probability / T); -inf where the rest is empty.
        rest_entropy: float32 [M], nats, of the rest renormalised at temperature 1; 0 where it is empty.
        true_logprob: float32 [M], log-probability of the label; 0 where there is none.
        entropy: float32 [M], nats, of p at the manifest's draw temperature.
        tail_logprobs: float32 [M, n], log-probabilities of `tail_ids` as those of the head, -inf where there
            is no id; [M, 0] (the default, or None given) where the manifest does not ask for them.
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
            object.__setattr__(self, "tail_logprobs", np.zeros((len(self.tail_ids), 0), np.float32))


@dataclass(frozen=True)
class Row:
    """One packed sequence.

    Attributes:
        token_ids: int32 [L], the inputs (for `masked_token`: with the mask token in its places).
        loss_mask: bool [L], where the loss counts. For `next_token` the mask at t belongs to the label t + 1:
            False at the last position of each document, at padding and at prompts.
        segment_starts: int32 [S], first position of each document (or piece of one); the first is 0.
        segment_documents: int64 [S], the document's number in the corpus; -1 is padding.
        teacher: what the teacher said at the recorded positions; None in a token store.
        recorded: bool [L], where a record stands; None without a teacher, and where one is given without it,
            the loss mask.
        optional: the other planes that the manifest declares, by name: `weight_starts` and `weights`,
            `labels`, `token_types`, features.
    """

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    segment_starts: NDArray[np.int32]
    segment_documents: NDArray[np.int64]
    teacher: TeacherRecord | None = None
    recorded: NDArray[np.bool_] | None = None
    optional: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.teacher is None:
            object.__setattr__(self, "recorded", None)
        elif self.recorded is None:
            object.__setattr__(self, "recorded", self.loss_mask)


RECORD_NAMES = tuple(item.name for item in fields(TeacherRecord))
_LISTS: dict[str, type[np.generic]] = {
    "head_ids": np.int32,
    "head_logprobs": np.float32,
    "tail_ids": np.int32,
    "tail_counts": np.int32,
    "tail_logprobs": np.float32,
}
TEXT_NAMES = ("token_ids", "loss_mask", "segment_starts", "segment_documents")


def planes_of_row(row: Row) -> dict[str, NDArray[Any]]:
    """Returns every array of a row by the name of its plane."""
    planes: dict[str, NDArray[Any]] = {name: getattr(row, name) for name in TEXT_NAMES}
    planes |= row.optional
    if row.teacher is not None:
        assert row.recorded is not None
        planes["recorded"] = row.recorded
        planes |= {name: getattr(row.teacher, name) for name in RECORD_NAMES}
    return planes


def row_of_planes(planes: Mapping[str, NDArray[Any]]) -> Row:
    """Returns the row of its arrays; without any of a record it has no teacher.

    Heads, draws and their values that are not there have no width; other planes of a record that are not
    there, because they were not decoded, have no positions.
    """
    own = {*TEXT_NAMES, "recorded", *RECORD_NAMES}
    teacher = None
    if not planes.keys().isdisjoint(RECORD_NAMES):
        empty = np.empty((int(np.count_nonzero(planes["recorded"])), 0))
        record = {name: planes.get(name, empty.astype(kind)) for name, kind in _LISTS.items()}
        none = np.empty(0, np.float32)
        record |= {name: planes.get(name, none) for name in RECORD_NAMES if name not in _LISTS}
        teacher = TeacherRecord(**record)
    return Row(
        **{name: planes[name] for name in TEXT_NAMES},
        teacher=teacher,
        recorded=planes.get("recorded"),
        optional={name: value for name, value in planes.items() if name not in own},
    )


def segment_lengths(row: Row) -> NDArray[np.int64]:
    """Returns the number of positions of each segment, int64 [S]."""
    return run_lengths(row.segment_starts, len(row.token_ids))


def run_lengths(starts: NDArray[np.int32], length: int) -> NDArray[np.int64]:
    """Returns the lengths of runs that begin at `starts`, the last of which ends at `length`."""
    return np.diff(starts, append=np.int64(length)).astype(np.int64)


def position_ids(row: Row) -> NDArray[np.int32]:
    """Returns int32 [L], restarting at 0 at each segment; padding counts as a segment."""
    starts = np.repeat(row.segment_starts, segment_lengths(row))
    return np.arange(len(row.token_ids), dtype=np.int32) - starts.astype(np.int32)


def document_of_position(row: Row) -> NDArray[np.int64]:
    """Returns int64 [L], the document number at each position; -1 is padding."""
    return np.repeat(row.segment_documents, segment_lengths(row))


def is_real(row: Row) -> NDArray[np.bool_]:
    """Returns bool [L], False at padding."""
    return np.repeat(row.segment_documents != PADDING_DOCUMENT, segment_lengths(row))


def segment_lasts(row: Row) -> NDArray[np.int64]:
    """Returns the last position of each segment, int64 [S]."""
    return np.append(row.segment_starts[1:].astype(np.int64), len(row.token_ids)) - 1


def weights_of_positions(row: Row) -> NDArray[np.float32]:
    """Returns float32 [L], the weight of each position's document or span; 1 where the row says nothing."""
    weights = row.optional.get("weights")
    if weights is None or not weights.size:
        return np.ones(len(row.token_ids), np.float32)
    return np.repeat(weights, run_lengths(row.optional["weight_starts"], len(row.token_ids)))


def weight_runs(weights: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Returns the planes `weight_starts` and `weights` of weights at L positions; empty where all are 1."""
    if (weights == 1).all():
        return {"weight_starts": np.empty(0, np.int32), "weights": np.empty(0, np.float32)}
    starts = np.append(0, np.flatnonzero(weights[1:] != weights[:-1]) + 1).astype(np.int32)
    return {"weight_starts": starts, "weights": weights[starts].astype(np.float32)}


def next_tokens(row: Row) -> NDArray[np.int64]:
    """Returns int64 [L], the token that follows each position in its document; `IGNORED_LABEL` where none
    does.

    The loss mask plays no part: a prompt's tokens are not trained on, yet their successors are known.
    """
    following = np.append(row.token_ids[1:].astype(np.int64), IGNORED_LABEL)
    following[segment_lasts(row)] = IGNORED_LABEL
    following[~is_real(row)] = IGNORED_LABEL
    return following


def labels_of(row: Row, target: str) -> NDArray[np.int64]:
    """Returns int64 [L], the label of each counted position; `IGNORED_LABEL` elsewhere and where there is
    none.

    Args:
        row: of a store.
        target: the manifest's.
    """
    if target == "next_token":
        return np.where(row.loss_mask, next_tokens(row), IGNORED_LABEL)
    labels = np.full(len(row.token_ids), IGNORED_LABEL, np.int64)
    stored = row.optional["labels"].astype(np.int64)
    labels[row.loss_mask] = np.where(stored == NO_ID, IGNORED_LABEL, stored)
    return labels


def labels_of_records(row: Row, target: str) -> NDArray[np.int64]:
    """Returns int64 [L], the label of which a record at each position would speak; `IGNORED_LABEL` for none.

    For `next_token` that is the next token also where the loss does not count.
    """
    return next_tokens(row) if target == "next_token" else labels_of(row, target)


def labels_at_records(row: Row, target: str) -> NDArray[np.int64]:
    """Returns `labels_of_records` at the recorded positions, int64 [M]."""
    assert row.recorded is not None
    return labels_of_records(row, target)[row.recorded]


def take_records(record: TeacherRecord, kept: NDArray[np.bool_]) -> TeacherRecord:
    """Returns the records of some of the recorded positions; `kept` is bool [M]."""
    return TeacherRecord(**{name: getattr(record, name)[kept] for name in RECORD_NAMES})


def records_at(row: Row, positions: NDArray[np.bool_]) -> TeacherRecord:
    """Returns the records at some of the recorded positions, given as bool [L]."""
    assert row.teacher is not None and row.recorded is not None
    return take_records(row.teacher, positions[row.recorded])


def narrowed(row: Row, kept: NDArray[np.bool_], of_records: Collection[str] = ()) -> Row:
    """Returns the row with loss, labels and records at the positions `kept`, bool [L], alone.

    Args:
        row: of a store.
        kept: positions.
        of_records: names of optional planes that stand at the recorded positions.
    """
    optional = dict(row.optional)
    for name in of_records:
        assert row.recorded is not None
        optional[name] = optional[name][kept[row.recorded]]
    if "labels" in optional:
        optional["labels"] = optional["labels"][kept[row.loss_mask]]
    teacher, recorded = row.teacher, row.recorded
    if teacher is not None and recorded is not None:
        teacher, recorded = take_records(teacher, kept[recorded]), recorded & kept
    return replace(row, loss_mask=row.loss_mask & kept, teacher=teacher, recorded=recorded, optional=optional)
