"""Heads cut short where their probabilities reach a mass; what leaves a head joins the rest, exactly.

Shapes: M recorded positions of a row, k head entries, D entries that join the rest, G grid temperatures.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.quantise import too_deep
from sparsekd.logit_store.manifest import RecordSpec
from sparsekd.logit_store.row import NO_ID, TeacherRecord


def cut_to_mass(record: TeacherRecord, spec: RecordSpec, mass: float) -> TeacherRecord:
    """Returns a record whose heads end with the entry that brings their sum to `mass`, or with the k-th.

    Entries of probability 0 are cut off, too, and those that would be stored as it. The others join the rest.

    Args:
        record: with draws from no rest, that is n = 0.
        spec: what it holds; 1 is on its grid.
        mass: above 0, at most 1.
    """
    values = record.head_logprobs.astype(np.float64)
    shares = np.exp(values)
    before = np.cumsum(shares, axis=1) - shares
    deep = too_deep(record.head_logprobs, record.head_logprobs[:, :1])
    kept = (before < mass) & (shares > 0) & ~deep & (record.head_ids != NO_ID)
    # A cut leaves no hole: values descend, so only rounding could make one.
    kept = np.logical_and.accumulate(kept, axis=1)
    log_rest, rest_entropy = join_rest(record, np.where(kept, -np.inf, values), spec.temperatures)
    return dataclasses.replace(
        record,
        head_ids=np.where(kept, record.head_ids, np.int32(NO_ID)),
        head_logprobs=np.where(kept, record.head_logprobs, np.float32(-np.inf)),
        log_rest=log_rest,
        rest_entropy=rest_entropy,
    )


def join_rest(
    record: TeacherRecord, joining: NDArray[np.float64], temperatures: Sequence[float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns log R [M, G] and entropy [M] of a record's rest together with entries that join it.

    With l the log-probabilities at temperature 1 of the entries D that join, R and H the old rest's mass and
    entropy:

        R'_T = R_T + sum_D exp(l / T)                                       for each T of the grid
        H'   = log R'_1 - (sum_D exp(l) l + R_1 (log R_1 - H)) / R'_1

    the second because the sum of p log p over a rest is R_1 (log R_1 - H).

    Args:
        record: whose rest it is.
        joining: log-probabilities [M, D], -inf for none. A position where none joins stays as it is.
        temperatures: the grid; 1 is on it.
    """
    rest = record.log_rest.astype(np.float64)
    columns = [
        np.logaddexp(rest[:, column], log_sum_exp(joining / temperature))
        for column, temperature in enumerate(temperatures)
    ]
    one = temperatures.index(1.0)
    old, new = rest[:, one], columns[one]
    # Shares of the new rest, which are numbers also where its mass is none.
    whole = _finite(new)
    terms = (np.exp(joining - whole[:, None]) * _finite(joining)).sum(axis=1)
    terms += np.exp(old - whole) * (_finite(old) - record.rest_entropy)
    entropy = np.where(np.isneginf(new), 0, np.maximum(whole - terms, 0))
    changed: NDArray[np.bool_] = np.any(joining > -np.inf, axis=1)
    return (
        np.where(changed[:, None], np.stack(columns, axis=1), rest).astype(np.float32),
        np.where(changed, entropy, record.rest_entropy).astype(np.float32),
    )


def log_sum_exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns log sum exp over the last axis, [..., D] -> [...]; -inf where there is nothing but -inf."""
    if values.shape[-1] == 0:
        return np.full(values.shape[:-1], -np.inf)
    highest = values.max(axis=-1)
    shift = np.where(np.isneginf(highest), 0.0, highest)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - shift[..., None]).sum(axis=-1)) + shift


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the values with 0 for -inf, whose factor exp(-inf) is 0."""
    return np.where(np.isneginf(values), 0.0, values)
