"""What both implementations of the teacher's record take, give and share.

N positions, V vocabulary (true), H hidden, k head, n draws, G grid temperatures.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.kernels.objective import HeadTransform
from sparsekd.kernels.shard import VocabularyShard


class TeacherStatistics(NamedTuple):
    """The record of N positions (docs/losses.md, 7).

    Attributes:
        head_ids: int32 [N, k], by descending log-probability, ties by ascending id.
        head_logprobs: float32 [N, k], of the full vocabulary at temperature 1.
        tail_ids: int32 [N, n], distinct drawn ids, ascending; -1 pads.
        tail_counts: int32 [N, n], draws of that id; 0 pads; a position sums to n, or to 0 without a rest.
        log_rest: float32 [N, G], log of the sum of exp(l_v / T) outside the head; -inf where that is empty.
        rest_entropy: float32 [N], nats, of the rest renormalised at temperature 1; 0 where it is empty.
        true_logprob: float32 [N], of the label; 0 where there is none.
        entropy: float32 [N], nats, of the whole distribution at the draw temperature.
        tail_logprobs: float32 [N, n], of the drawn ids, as those of the head; -inf pads.
    """

    head_ids: Tensor
    head_logprobs: Tensor
    tail_ids: Tensor
    tail_counts: Tensor
    log_rest: Tensor
    rest_entropy: Tensor
    true_logprob: Tensor
    entropy: Tensor
    tail_logprobs: Tensor


class TeacherInputs(NamedTuple):
    """The checked arguments of `teacher_statistics`, its chunk size decided."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    head: HeadTransform
    k: int
    temperatures: Sequence[float]
    draw_temperature: float
    uniforms: Tensor
    chunk_positions: int
    shard: VocabularyShard | None = None


class SumsOfRest(NamedTuple):
    """Which sums over the rest are made.

    Attributes:
        temperatures: descending, each once: the grid's, 1 and the draw temperature.
        squares: whether each is half of the one before: then its power is the square of that one's.
        entropies: indices of 1 and the draw temperature among them.
        drawn: index of the draw temperature.
    """

    temperatures: tuple[float, ...]
    squares: tuple[bool, ...]
    entropies: tuple[int, ...]
    drawn: int

    @property
    def number(self) -> int:
        """S."""
        return len(self.temperatures) + len(self.entropies)


def sums_of_rest(temperatures: Sequence[float], draw_temperature: float) -> SumsOfRest:
    """The sums for a grid and a draw temperature."""
    ordered = tuple(sorted({*temperatures, 1.0, draw_temperature}, reverse=True))
    squares = (False, *(a == 2 * b for a, b in pairwise(ordered)))
    entropies = tuple(dict.fromkeys((ordered.index(1.0), ordered.index(draw_temperature))))
    return SumsOfRest(ordered, squares, entropies, ordered.index(draw_temperature))


def coalesce_draws(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids and how often each was drawn.

    Args:
        drawn: int [N, n], ids in any order; a position without a rest holds -1 alone.

    Returns:
        (ids int32 [N, n] distinct, ascending, padded with -1; counts int32 [N, n] padded with 0).
    """
    ids = torch.full(drawn.shape, -1, dtype=torch.int32, device=drawn.device)
    counts = torch.zeros(drawn.shape, dtype=torch.int32, device=drawn.device)
    if drawn.numel() == 0:
        return ids, counts
    drawn = drawn.sort(dim=1).values
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = is_new.cumsum(1) - 1
    ids.scatter_(1, place, drawn.int())
    counts.scatter_add_(1, place, (drawn >= 0).int())
    return ids, counts


def first_above(cumulative: Tensor, points: Tensor) -> Tensor:
    """Index of the first sum that exceeds a point: its own summand is above 0.

    A point that rounds up to the total has none such; it belongs to the last summand above 0.

    Args:
        cumulative: float64 [..., S], sums of what is 0 or more.
        points: float64 [..., n].

    Returns:
        int64 [..., n].
    """
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, points.contiguous(), right=True), last)


def values_of_draws(ids: Tensor, drawn: Tensor, values: Tensor) -> Tensor:
    """What each distinct id was drawn with, float [N, n]; -inf where there is none.

    Args:
        ids: int32 [N, n], from `coalesce_draws`.
        drawn: int32 [N, n], the draws that it was given.
        values: float [N, n], one for each draw, equal for equal ids.
    """
    if drawn.numel() == 0:
        return values
    ordered, order = drawn.sort(dim=1)
    place = torch.searchsorted(ordered, ids.clamp_min(0)).clamp_max(drawn.shape[1] - 1)
    return torch.where(ids >= 0, values.gather(1, order.gather(1, place)), -torch.inf)


def whole_entropy(
    head_logprobs: Tensor, log_rest: Tensor, rest_entropy: Tensor, temperature: float
) -> Tensor:
    """Entropy in nats of the whole distribution at T, [N]: that of its parts, plus the rest's own.

    Args:
        head_logprobs: [N, k], at temperature 1.
        log_rest: [N], log R_T, -inf where the rest is empty.
        rest_entropy: [N], of the rest renormalised at T.
        temperature: T.
    """
    parts = torch.cat([head_logprobs / temperature, log_rest[:, None]], dim=1)
    logs = parts - parts.logsumexp(1, keepdim=True)
    probabilities = logs.exp()
    own = torch.where(logs > -torch.inf, logs, 0.0)
    return 0.0 - (probabilities * own).sum(1) + probabilities[:, -1] * rest_entropy
