"""The head split over ranks by vocabulary: what they tell one another, and nothing else differs.

Per position one maximum and the support's and the label's logits (K + 1) go into one MAX; two sums, or three
with label smoothing, into one SUM (docs/losses.md, 11). The hidden states' gradient is summed in float32.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.kernels.objective import Objective
from sparsekd.kernels.partial import Reading, RestSums, rebased


@dataclass(frozen=True, kw_only=True)
class VocabularyShard:
    """The rows of the head that this rank holds: ids `start` to `start` + the weight's rows.

    Every rank of `group` calls the loss with the same positions; together their shards are the vocabulary,
    each id on one rank. Rows at and beyond the true vocabulary are padding, on whatever rank they lie.

    Attributes:
        group: the ranks among which the head is split.
        start: the id of the first row.
    """

    group: dist.ProcessGroup
    start: int


def whole_vocabulary(
    reading: Reading, sums: RestSums, objective: Objective, shard: VocabularyShard | None
) -> tuple[Reading, RestSums]:
    """Reading and sums over the whole vocabulary, from those of this rank's columns."""
    if shard is None:
        return reading, sums
    columns = reading.support.shape[1]
    highest = torch.cat([reading.support, reading.label[:, None], sums.maximum[:, None]], dim=1)
    # Whether a MAX over ranks passes over NaN is the backend's affair. No sum with inf ends in a number.
    highest = torch.where(highest.isnan(), torch.inf, highest)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.group)
    # Contiguous, as the row kernels read them.
    support, label, maximum = (
        part.contiguous() for part in (highest[:, :columns], highest[:, columns], highest[:, columns + 1])
    )

    sums = rebased(sums, maximum, objective.temperature)
    # Without label smoothing every total is 0 and stays at home.
    parts = [sums.sum_t, sums.sum_1] + ([sums.total] if objective.label_smoothing else [])
    added = torch.stack(parts)
    dist.all_reduce(added, op=dist.ReduceOp.SUM, group=shard.group)
    total = added[2] if objective.label_smoothing else sums.total
    whole = RestSums(maximum=sums.maximum, sum_t=added[0], sum_1=added[1], total=total)
    return Reading(support, label), whole


def sum_over_ranks(gradient: Tensor, shard: VocabularyShard | None) -> None:
    """Add up, in place, what each rank's part of the vocabulary says of the hidden states."""
    if shard is not None:
        dist.all_reduce(gradient, op=dist.ReduceOp.SUM, group=shard.group)
