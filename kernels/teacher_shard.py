"""The teacher's head split over ranks by vocabulary: what they tell one another for the record.

Maxima, sums and what one rank alone holds are reduced; the head is the largest of all ranks' largest. A draw
is found by the ranks' masses first and then among one rank's columns, so that it is the id that one process
would draw, but for a point that rounding moves over the edge between two ids. With shard=None nothing is
sent.

N positions, W ranks, v ids of this rank, k head, n draws.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.kernels.shard import VocabularyShard
from sparsekd.kernels.teacher_record import first_above


class HeadOfAll(NamedTuple):
    """The head of N positions, and what of it is this rank's.

    Attributes:
        ids: int64 [N, k], of the whole vocabulary.
        values: [N, k], their logits.
        columns: int64 [N, c], of this rank's columns, each at most once in a row.
        is_in: bool [N, c], whether the column is in the head.
    """

    ids: Tensor
    values: Tensor
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


def highest(values: Tensor, shard: VocabularyShard | None) -> Tensor:
    """The largest over all ranks, in place. It may pass over NaN, which the sums behind it do not."""
    if shard is not None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=shard.group)
    return values


def added(values: Tensor, shard: VocabularyShard | None) -> Tensor:
    """The sum over all ranks, in place."""
    if shard is not None:
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=shard.group)
    return values


def values_at(values: Tensor, ids: Tensor, shard: VocabularyShard | None) -> Tensor:
    """values[row, id] from the rank that holds the id.

    Args:
        values: [N, v], of this rank's columns.
        ids: int64 [N, m], of the whole vocabulary.

    Returns:
        [N, m].
    """
    if shard is None:
        return values.gather(1, ids)
    columns = ids - shard.start
    is_here = (columns >= 0) & (columns < values.shape[1])
    here = values.gather(1, columns.clamp(0, values.shape[1] - 1))
    return highest(torch.where(is_here, here, -torch.inf), shard)


def whole_head(columns: Tensor, values: Tensor, k: int, shard: VocabularyShard | None) -> HeadOfAll:
    """The head of all ranks, descending, ties by ascending id.

    Args:
        columns: int64 [N, c], the min(k, v) largest of this rank's columns, in the head's order.
        values: [N, c], theirs.
        k: Of the head.
    """
    if shard is None:
        return HeadOfAll(columns, values, columns, torch.ones_like(columns, dtype=torch.bool))
    count, held = columns.shape
    world, rank = dist.get_world_size(shard.group), dist.get_rank(shard.group)
    if k == 0:
        return HeadOfAll(columns, values, columns, torch.ones_like(columns, dtype=torch.bool))
    # All ranks send k entries, of which those beyond a rank's own columns come last.
    ids = columns.new_zeros(count, k)
    ids[:, :held] = columns + shard.start
    sent = values.new_full((count, k), -torch.inf)
    sent[:, :held] = values
    everyones = torch.cat(_of_all(ids, shard), dim=1)  # (N, W * k)
    whole = torch.cat(_of_all(sent, shard), dim=1)
    # Stable: ranks follow one another by id, so that equal values stay in the order of theirs.
    order = whole.sort(dim=1, descending=True, stable=True).indices[:, :k]
    is_chosen = torch.zeros(count, world * k, dtype=torch.bool, device=ids.device).scatter_(1, order, True)
    return HeadOfAll(
        everyones.gather(1, order),
        whole.gather(1, order),
        columns,
        is_chosen[:, rank * k : rank * k + held],
    )


def points_here(mass: Tensor, uniforms: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
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
    owner = first_above(ends, points)
    rank = dist.get_rank(shard.group)
    start = ends[:, rank - 1 : rank] if rank else torch.zeros_like(ends[:, :1])
    return (owner == rank) & (ends[:, -1:] > 0), (points - start).clamp_min(0.0)


def drawn_by_all(drawn: Tensor, is_here: Tensor, shard: VocabularyShard) -> Tensor:
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
