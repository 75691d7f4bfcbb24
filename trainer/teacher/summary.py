"""What a teacher's records say on the mean: of a store at its end, and of some rows before there is one.

Shapes: M recorded positions of a row, k entries of the head, n draws.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.manifest import RecordSpec
from sparsekd.logit_store.row import Row, TeacherRecord


class Summary(NamedTuple):
    """Means over the positions that the loss counts, of those that are recorded.

    Attributes:
        loss: negative log-likelihood of the true token, in nats.
        tail: probability outside the head at temperature 1.
        noise: see `draws_noise`; None without draws.
    """

    loss: float
    tail: float
    noise: float | None


def summary_of(rows: Iterable[Row], record: RecordSpec) -> Summary | None:
    """The means over some rows with records; None where none of their recorded positions counts."""
    losses: list[NDArray[np.float32]] = [np.empty(0, np.float32)]
    tails: list[NDArray[np.float64]] = [np.empty(0)]
    for row in rows:
        assert row.teacher is not None and row.recorded is not None  # the caller's rows are a teacher's
        counted = row.loss_mask[row.recorded]
        losses.append(-row.teacher.true_logprob[counted])
        tails.append(tail_mass(row.teacher, record.temperatures)[counted])
    loss, tail = np.concatenate(losses), np.concatenate(tails)
    if not len(loss):
        return None
    return Summary(float(loss.mean()), float(tail.mean()), draws_noise(tail, record.n))


def draws_noise(tail: NDArray[np.float64], n: int) -> float | None:
    """How well n draws know the tail: the root mean square of R / sqrt(n), in nats.

    The tail's part of a divergence is R times the mean of a difference of log-probabilities over the rest of
    the distribution. By n draws with replacement that mean has the standard error s / sqrt(n), s the
    difference's own spread over the rest. This is the error of one position where s is 1 nat; over the
    positions of a batch it goes down with the root of their number, as the draws of different positions are
    independent.

    Args:
        tail: R, the mass outside the head, float64 [M].
        n: Draws of a position.
    """
    return float(np.sqrt(np.square(tail).mean() / n)) if n and len(tail) else None


def tail_mass(record: TeacherRecord, temperatures: Sequence[float]) -> NDArray[np.float64]:
    """Probability outside the head at temperature 1, float64 [M].

    Exact where the grid has temperature 1. Elsewhere 1 minus the head's mass, which knows a tail only down to
    the rounding of the head's float32 entries.
    """
    if 1.0 in temperatures:
        return np.exp(record.log_rest[:, list(temperatures).index(1.0)].astype(np.float64))
    return np.maximum(1.0 - np.exp(record.head_logprobs.astype(np.float64)).sum(axis=1), 0.0)
