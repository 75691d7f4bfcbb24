"""Heads cut short where their probabilities reach a mass; what is cut off joins the rest, exactly.

Shapes: L positions of a row, k head entries, G grid temperatures.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.manifest import RecordSpec
from sparsekd.logit_store.row import NO_ID, TeacherRecord


def cut_to_mass(record: TeacherRecord, spec: RecordSpec, mass: float) -> TeacherRecord:
    """Returns a record whose heads end with the entry that brings their sum to `mass`, or with the k-th.

    Entries of probability 0 are cut off, too. With l the log-probabilities at temperature 1, D what is cut
    off, R and H the old rest's mass and entropy:

        R'_T = R_T + sum_D exp(l / T)
        H'   = log R'_1 - (sum_D exp(l) l + R_1 (log R_1 - H)) / R'_1

    the second because the sum of p log p over a rest is R_1 (log R_1 - H).

    Args:
        record: with draws from no rest, that is n = 0.
        spec: what it holds; 1 is on its grid.
        mass: above 0, at most 1.
    """
    values = record.head_logprobs.astype(np.float64)
    shares = np.exp(values)
    before = np.cumsum(shares, axis=1) - shares
    kept = (before < mass) & (shares > 0) & (record.head_ids != NO_ID)
    # A cut leaves no hole: values descend, so only rounding could make one.
    kept = np.logical_and.accumulate(kept, axis=1)
    lost = ~kept & (shares > 0)
    rest = record.log_rest.astype(np.float64)
    changed: NDArray[np.bool_] = np.any(lost, axis=1)
    with np.errstate(divide="ignore"):
        grown = np.stack(
            [
                np.log(np.exp(rest[:, column]) + (np.exp(values / temperature) * lost).sum(axis=1))
                for column, temperature in enumerate(spec.temperatures)
            ],
            axis=1,
        )
    grown = np.where(changed[:, None], grown, rest)
    one = spec.temperatures.index(1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        old_mass, new_mass = np.exp(rest[:, one]), np.exp(grown[:, one])
        old_sum = np.where(old_mass > 0, old_mass * (rest[:, one] - record.rest_entropy), 0)
        cut_sum = np.where(lost, shares * values, 0).sum(axis=1)
        entropy = np.where(new_mass > 0, grown[:, one] - (cut_sum + old_sum) / new_mass, 0)
    return dataclasses.replace(
        record,
        head_ids=np.where(kept, record.head_ids, np.int32(NO_ID)),
        head_logprobs=np.where(kept, record.head_logprobs, np.float32(-np.inf)),
        log_rest=grown.astype(np.float32),
        rest_entropy=np.where(changed, np.maximum(entropy, 0), record.rest_entropy).astype(np.float32),
    )
