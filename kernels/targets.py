"""The teacher's record as the losses take it.

N positions, K stored entries, k head, K = k + d with d columns for the distinct ids of draws.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class SparseTargets(NamedTuple):
    """What the teacher said at N positions. Ids of one position are distinct; -1 pads.

    Attributes:
        ids: int64 [N, K], the k head ids (most likely first), then the draws' distinct ids.
        head_logprobs: float32 [N, k], full-vocabulary log-probabilities at temperature 1.
        tail_counts: float32 [N, d], how often each id was drawn; 0 at padding. Their sum is the position's n,
            which may differ between positions and is 0 where nothing is outside the head.
        log_rest: float32 [N], log R_T at the objective's temperature: the sum of exp(l_v / T) over every id
            outside the head; -inf where there is none.
        entropy: float32 [N], nats, of the teacher at the draw temperature (used by `sampled` alone).
    """

    ids: Tensor
    head_logprobs: Tensor
    tail_counts: Tensor
    log_rest: Tensor
    entropy: Tensor

    @property
    def head_size(self) -> int:
        """k, the number of head columns."""
        return self.head_logprobs.shape[1]


NOTHING = {"ids": -1, "head_logprobs": -math.inf, "tail_counts": 0, "log_rest": 0, "entropy": 0}
"""By name, what fills the targets of a position without a record, whose `kd_weights` is 0."""


def drawn_shares(tail_counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Each id's share of its position's draws, count / n, [N, d]; 0 where nothing was drawn."""
    counts = tail_counts.to(dtype)
    drawn = counts.sum(1, keepdim=True)
    return counts / torch.where(drawn > 0, drawn, 1.0)


def take_rows(targets: SparseTargets | None, rows: slice | Tensor) -> SparseTargets | None:
    """The record of some positions."""
    return None if targets is None else SparseTargets(*(value[rows] for value in targets))
