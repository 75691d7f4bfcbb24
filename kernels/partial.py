"""What one block of the vocabulary tells about positions, and how blocks come together exactly.

A block is all columns of the vocabulary, a slice of them (low-memory mode) or what one rank holds
(vocabulary-parallel): the same two small records, and the same few lines, serve all three.

C positions, K support entries, T temperature.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """The logits z at chosen ids.

    Attributes:
        support: [C, K], z at the support ids; -inf at padding and where another block holds the id.
        label: [C], z at the label; -inf where it is ignored or another block holds it.
    """

    support: Tensor
    label: Tensor


class RestSums(NamedTuple):
    """Sums over a block's logits z outside the support, relative to their maximum.

    Attributes:
        maximum: [C], the largest z; -inf where nothing is outside.
        sum_t: [C], sum of exp((z - maximum) / T); sum_1: [C], of exp(z - maximum).
        total: [C], sum of z; 0 where no label smoothing asks for it.
    """

    maximum: Tensor
    sum_t: Tensor
    sum_1: Tensor
    total: Tensor


def combine_readings(one: Reading, other: Reading) -> Reading:
    """The reading of two blocks together: at most one of them holds an id, the other says -inf."""
    return Reading(*(torch.maximum(a, b) for a, b in zip(one, other, strict=True)))


def rebased(sums: RestSums, maximum: Tensor, temperature: float) -> RestSums:
    """The same sums relative to a maximum [C] that is no smaller."""
    # -inf - -inf is NaN: a block with nothing outside the support has sums of 0, whatever it is based on.
    distance = sums.maximum - torch.where(maximum > -torch.inf, maximum, 0.0)
    return RestSums(
        maximum=maximum,
        sum_t=sums.sum_t * (distance / temperature).exp(),
        sum_1=sums.sum_1 * distance.exp(),
        total=sums.total,
    )


def combine_sums(one: RestSums, other: RestSums, temperature: float) -> RestSums:
    """The sums of two blocks together."""
    maximum = torch.maximum(one.maximum, other.maximum)
    one, other = rebased(one, maximum, temperature), rebased(other, maximum, temperature)
    return RestSums(maximum, one.sum_t + other.sum_t, one.sum_1 + other.sum_1, one.total + other.total)
