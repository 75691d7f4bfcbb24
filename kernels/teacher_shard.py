"""The teacher's head split over ranks by vocabulary: what they tell one another for the record.

Maxima, sums and what one rank alone holds are reduced; the head is the largest of all ranks' largest. A draw
is found by the ranks' masses first and then among one rank's columns, so that it is the id that one process
would draw, but for a point that rounding moves over the edge between two ids.

N positions, C positions of a slice, W ranks, v true ids of this rank, k head, n draws.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.kernels.shard import VocabularyShard
from sparsekd.kernels.teacher_record import (
    SumsOfRest,
    TeacherInputs,
    TeacherStatistics,
    coalesce_draws,
    whole_entropy,
)


class HeadPart(NamedTuple):
    """The head of N positions, and what of it is this rank's.

    Attributes:
        ids: int64 [N, k], of the whole vocabulary.
        logprobs: [N, k].
        columns: int64 [N, c], of this rank's columns, each at most once in a row.
        is_in: bool [N, c], whether the column is in the head.
    """

    ids: Tensor
    logprobs: Tensor
    columns: Tensor
    is_in: Tensor


def own_columns(shard: VocabularyShard | None, rows: int, vocabulary_size: int) -> int:
    """How many of a weight's rows are ids of the true vocabulary.

    Args:
        shard: Of the head that this rank holds.
        rows: Of the weight.
        vocabulary_size: The true one, of all ranks.
    """
    start = 0 if shard is None else shard.start
    return min(max(vocabulary_size - start, 0), rows)


def slice_of_shard(
    logits: Tensor,
    labels: Tensor,
    uniforms: Tensor,
    inputs: TeacherInputs,
    sums: SumsOfRest,
    scratch: Tensor,
) -> TeacherStatistics:
    """The record of C positions, equal on all ranks, from this rank's logits of them.

    Args:
        logits: [C, v], used up.
        labels: int64 [C].
        uniforms: float64 [C, n].
        inputs: of the whole call, with its shard.
        sums: which are made.
        scratch: [2, C or more, v], used up.
    """
    assert inputs.shard is not None
    powers, products = scratch[:, : logits.shape[0]]
    shard = inputs.shard
    normaliser = _logsumexp(logits, powers, shard)
    true_logprob = (_values_at(logits, labels.clamp_min(0)[:, None], shard) - normaliser)[:, 0]
    columns = _top_columns(logits, normaliser, min(inputs.k, logits.shape[1]))
    entries = logits.gather(1, columns)
    head = _whole_head(columns, entries - normaliser, inputs.k, shard)
    rest = logits.scatter_(1, columns, torch.where(head.is_in, -torch.inf, entries))
    maximum = _highest(rest.amax(1, keepdim=True), shard)
    reference = torch.where(maximum > -torch.inf, maximum, 0.0)  # an empty rest has no largest entry
    # Now the largest of each rest is 0; NaN stays. What is outside is held finite: 0 times -inf is NaN.
    rest.sub_(reference + 0.0 * normaliser).clamp_(min=torch.finfo(rest.dtype).min)
    offset = (reference - normaliser)[:, 0]
    sums_of_rank, weighted_of_rank = [], []
    tail = coalesce_draws(uniforms.int()[:, :0])
    for index, temperature in enumerate(sums.temperatures):
        if sums.squares[index]:
            powers.square_()
        else:
            torch.div(rest, temperature, out=powers).exp_()
        sums_of_rank.append(powers.sum(1))
        if index in sums.entropies:
            weighted_of_rank.append(torch.mul(powers, rest, out=products).sum(1) / temperature)
        if index == sums.drawn:
            tail = _draw_tail(powers, uniforms, shard)
    totals = _added(torch.stack([*sums_of_rank, *weighted_of_rank]), shard)
    log_sums, entropies = {}, {}
    weighted = iter(totals[len(sums_of_rank) :])
    for index, (temperature, total) in enumerate(zip(sums.temperatures, totals, strict=False)):
        some = total != 0  # NaN is no empty rest
        log_total = torch.where(some, total, 1.0).log()
        log_sums[temperature] = torch.where(some, log_total + offset / temperature, -torch.inf)
        if index in sums.entropies:
            # -sum p log p = log total - sum of powers * rest / T / total.
            entropies[temperature] = torch.where(
                some, log_total - next(weighted) / torch.where(some, total, 1.0), 0.0
            )
    tail_ids, tail_counts = tail
    tail_logprobs = _values_at(rest, tail_ids.clamp_min(0).long(), shard) + offset[:, None]
    log_rest = [log_sums[temperature] for temperature in inputs.temperatures]
    drawn_at = inputs.draw_temperature
    return TeacherStatistics(
        head_ids=head.ids.int(),
        head_logprobs=head.logprobs.float(),
        tail_ids=tail_ids,
        tail_counts=tail_counts,
        log_rest=torch.stack(log_rest, 1).float() if log_rest else rest.new_empty(rest.shape[0], 0).float(),
        rest_entropy=entropies[1.0].float(),
        true_logprob=torch.where(labels >= 0, true_logprob, 0.0).float(),
        entropy=whole_entropy(head.logprobs, log_sums[drawn_at], entropies[drawn_at], drawn_at).float(),
        tail_logprobs=torch.where(tail_ids >= 0, tail_logprobs, -torch.inf).float(),
    )


def _logsumexp(logits: Tensor, scratch: Tensor, shard: VocabularyShard) -> Tensor:
    """torch.logsumexp over V, [C, 1], without memory of its own; uses up `scratch`, both [C, V].

    NaN where the largest entry is no finite number: such a row is no distribution, and every plane says so.
    """
    maximum = _highest(logits.amax(1, keepdim=True), shard)
    powers = torch.sub(logits, maximum, out=scratch).exp_()
    return _added(powers.sum(1, keepdim=True), shard).log_().add_(maximum)


def _top_columns(logits: Tensor, normaliser: Tensor, k: int) -> Tensor:
    """The k most likely of this rank's columns, descending, ties by ascending id: int64 [C, k].

    Ranked after normalisation: two logits may round to one log-probability, and the tie rule is of those.
    `torch.topk` leaves the order of equal values open, and which of them it takes at the edge. So it is asked
    for one more; rows whose edge is tied are sorted whole.

    Args:
        logits: [C, v].
        normaliser: [C, 1], the logsumexp over all ranks.
        k: 0 to v.
    """
    size = logits.shape[1]
    if k == 0:
        return torch.empty(logits.shape[0], 0, dtype=torch.int64, device=logits.device)
    top, places = (logits - normaliser).topk(min(k + 1, size), dim=1)
    edge_tied = top[:, k - 1] == top[:, k] if k < size else torch.zeros_like(top[:, 0], dtype=torch.bool)
    ids = places[:, :k].sort(dim=1).values
    values = logits.gather(1, ids) - normaliser
    ids = ids.gather(1, values.sort(dim=1, descending=True, stable=True).indices)
    tied = edge_tied.nonzero()[:, 0]
    if tied.numel():
        whole = logits[tied] - normaliser[tied]
        ids[tied] = whole.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return ids


def _draw_tail(powers: Tensor, uniforms: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Draws with replacement from powers / their sum over all ranks by inverse CDF, coalesced.

    Args:
        powers: [C, v] unnormalised probabilities of this rank's columns.
        uniforms: float64 [C, n] in [0, 1).

    Returns:
        (ids int32 [C, n] distinct, ascending, padded with -1; counts int32 [C, n] padded with 0).
    """
    if uniforms.numel() == 0:
        return coalesce_draws(uniforms.int())
    # float64: in float32 a cumulative sum over 10^5 entries loses those below its 10^-7.
    cumulative = powers.to(torch.float64, copy=True).cumsum_(1)
    is_here, points = _points_here(cumulative[:, -1], uniforms, shard)
    return coalesce_draws(_drawn_by_all(_first_above(cumulative, points), is_here, shard))


def _highest(values: Tensor, shard: VocabularyShard) -> Tensor:
    """The largest over all ranks, in place. It may pass over NaN, which the sums behind it do not."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=shard.group)
    return values


def _added(values: Tensor, shard: VocabularyShard) -> Tensor:
    """The sum over all ranks, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.SUM, group=shard.group)
    return values


def _values_at(values: Tensor, ids: Tensor, shard: VocabularyShard) -> Tensor:
    """values[row, id] from the rank that holds the id.

    Args:
        values: [N, v], of this rank's columns.
        ids: int64 [N, m], of the whole vocabulary.

    Returns:
        [N, m].
    """
    columns = ids - shard.start
    is_here = (columns >= 0) & (columns < values.shape[1])
    here = values.gather(1, columns.clamp(0, values.shape[1] - 1))
    return _highest(torch.where(is_here, here, -torch.inf), shard)


def _whole_head(columns: Tensor, logprobs: Tensor, k: int, shard: VocabularyShard) -> HeadPart:
    """The head of all ranks, descending, ties by ascending id.

    Args:
        columns: int64 [N, c], the min(k, v) largest of this rank's columns, in the head's order.
        logprobs: [N, c], theirs.
        k: Of the head.
    """
    count, held = columns.shape
    world, rank = dist.get_world_size(shard.group), dist.get_rank(shard.group)
    if k == 0:
        return HeadPart(columns, logprobs, columns, torch.ones_like(columns, dtype=torch.bool))
    # All ranks send k entries, of which those beyond a rank's own columns come last.
    ids = columns.new_zeros(count, k)
    ids[:, :held] = columns + shard.start
    values = logprobs.new_full((count, k), -torch.inf)
    values[:, :held] = logprobs
    everyones = torch.cat(_of_all(ids, shard), dim=1)  # (N, W * k)
    whole = torch.cat(_of_all(values, shard), dim=1)
    # Stable: ranks follow one another by id, so that equal values stay in the order of theirs.
    order = whole.sort(dim=1, descending=True, stable=True).indices[:, :k]
    is_chosen = torch.zeros(count, world * k, dtype=torch.bool, device=ids.device).scatter_(1, order, True)
    return HeadPart(
        everyones.gather(1, order),
        whole.gather(1, order),
        columns,
        is_chosen[:, rank * k : rank * k + held],
    )


def _points_here(mass: Tensor, uniforms: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Which draws fall among this rank's columns, and where.

    Args:
        mass: float64 [N], the sum of this rank's powers.
        uniforms: float64 [N, n] in [0, 1).

    Returns:
        (bool [N, n] whether a draw is this rank's; float64 [N, n] its point on the sum of the rank's powers).
    """
    masses = torch.stack(_of_all(mass, shard), dim=1)  # (N, W)
    ends = masses.cumsum(1)
    points = uniforms * ends[:, -1:]
    owner = _first_above(ends, points)
    rank = dist.get_rank(shard.group)
    start = ends[:, rank - 1 : rank] if rank else torch.zeros_like(ends[:, :1])
    return (owner == rank) & (ends[:, -1:] > 0), (points - start).clamp_min(0.0)


def _drawn_by_all(drawn: Tensor, is_here: Tensor, shard: VocabularyShard) -> Tensor:
    """Each draw's id, int64 [N, n], from the rank whose column it is; -1 where no rank has one.

    Args:
        drawn: int64 [N, n], columns of this rank.
        is_here: bool [N, n], whether the draw is this rank's.
    """
    ids = torch.where(is_here, drawn + shard.start, -1)
    dist.all_reduce(ids, op=dist.ReduceOp.MAX, group=shard.group)
    return ids


def _of_all(values: Tensor, shard: VocabularyShard) -> list[Tensor]:
    """The tensor of each rank, in the order of ranks."""
    everyones = [torch.empty_like(values) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(everyones, values.contiguous(), group=shard.group)
    return everyones


def _first_above(cumulative: Tensor, points: Tensor) -> Tensor:
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
