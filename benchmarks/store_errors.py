"""How far a layout's decoded rows are from those that were written.

L positions of a row, k head entries, G grid temperatures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from store_data import record_of
from store_layout import Read

from sparsekd.logit_store.row import Row

LEAST_REST = 2.0**-24
"""Rest where a layout keeps none and its head sums to 1 or more: one step of float32 below 1."""

ROUNDING = 1e-6
"""By how much a sum of float32 values may exceed 1 without meaning it."""


@dataclass
class Errors:
    """How far decoded records are from those that were written, over all positions.

    Attributes:
        kl: nats, KL of decoded head and rest from the exact ones, at T = 1.
        kl_hot: the same at the other temperatures of the grid; empty where the layout has no rest at them.
        kl_head: the same of the head alone, both sides renormalised.
        overfull: share of positions whose decoded head sums to more than 1.
        exact_ids: whether head ids, drawn ids and counts are all the written ones.
    """

    kl: NDArray[np.float64]
    kl_hot: NDArray[np.float64]
    kl_head: NDArray[np.float64]
    overfull: float
    exact_ids: bool


def errors_of(rows: Sequence[Row], read: Read, temperatures: Sequence[float]) -> Errors:
    """Reads every row and compares it with what was written."""
    kl: list[NDArray[np.float64]] = []
    hot: list[NDArray[np.float64]] = []
    alone: list[NDArray[np.float64]] = []
    overfull: list[NDArray[np.bool_]] = []
    exact = True
    for index, row in enumerate(rows):
        decoded, record = read(index), record_of(row)
        size = decoded.head_ids.shape[1]
        used = decoded.head_ids >= 0
        # The decoded head lists the most likely ids; what it does not list belongs to the rest on both sides.
        ids = np.where(used, record.head_ids[:, :size], -1)
        exact &= bool((np.sort(ids, axis=1) == np.sort(decoded.head_ids, axis=1)).all())
        if decoded.tail_ids.shape[1]:
            exact &= bool((record.tail_ids == decoded.tail_ids).all())
            exact &= bool((record.tail_counts == decoded.tail_counts).all())
        if not size:
            continue
        left = _by_id(ids, np.where(used, record.head_logprobs[:, :size], -np.inf))
        right = _by_id(decoded.head_ids, decoded.head_logprobs)
        cut = record.head_logprobs.astype(np.float64)
        cut[:, :size][used] = -np.inf
        for column, temperature in enumerate(temperatures):
            rest = np.logaddexp(record.log_rest[:, column], _log_sum(cut / temperature))
            if decoded.log_rest is not None:
                found = decoded.log_rest[:, column].astype(np.float64)
            elif temperature == 1:
                found = np.log(np.maximum(1 - np.exp(right).sum(axis=1), LEAST_REST))
            else:
                continue
            divergence = _divergence(
                np.column_stack([left / temperature, rest]), np.column_stack([right / temperature, found])
            )
            (kl if temperature == 1 else hot).append(divergence)
        alone.append(_divergence(left, right))
        overfull.append(np.exp(right).sum(axis=1) > 1 + ROUNDING)

    def together(parts: list[NDArray]) -> NDArray:
        return np.concatenate(parts) if parts else np.zeros(0)

    share = float(together(overfull).mean()) if overfull else 0.0
    return Errors(together(kl), together(hot), together(alone), share, exact)


def _by_id(ids: NDArray[np.int32], values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Values [L, k] in the order of their ids: two that tie may have changed places."""
    return np.take_along_axis(values, np.argsort(ids, axis=1, kind="stable"), axis=1).astype(np.float64)


def _log_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values).sum(axis=1))


def _divergence(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL in nats, float64 [L], of the distribution `right` from `left`, both given as logarithms and
    normalised here."""
    left = left - _log_sum(left)[:, None]
    right = right - _log_sum(right)[:, None]
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(left), 0, np.exp(left) * (left - right))
    return terms.sum(axis=1)


def nats(value: float) -> str:
    """An error for a table: `0.023`, `1.4e-5`."""
    if value == 0 or value >= 0.01:
        return f"{value:.2g}"
    return f"{value:.1e}".replace("e-0", "e-")
