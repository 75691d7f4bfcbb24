"""Sums of losses over positions, kept on the device until a line of metrics is due.

A float64 vector of five: loss, kd, ce, agreement (each weighted) and the weight itself. Nothing here waits
for the device, except `means`.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.trainer.student.batches import MicroBatch
from sparsekd.trainer.student.head import WeightedLoss

NAMES = ("loss", "kd", "ce", "agreement")


def no_sums(device: torch.device) -> Tensor:
    """The empty sums, float64 (5,)."""
    return torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=device)


def sums_of(output: WeightedLoss, batch: MicroBatch) -> Tensor:
    """The sums of one micro-batch, float64 (5,)."""
    loss, weight = output.loss.detach().double(), batch.weights.double().sum()
    return torch.cat([loss.reshape(1), output.parts, weight.reshape(1)])


def all_reduced(sums: Tensor) -> Tensor:
    """The sums over all ranks, on every rank, as a new tensor."""
    total = sums.clone()
    dist.all_reduce(total)
    return total


def means(total: Tensor, *, has_teacher: bool, has_head: bool) -> dict[str, float | None]:
    """Means per counted position; what the run does not measure is None, not 0. Waits for the device."""
    *values, weight = total.tolist()
    found: dict[str, float | None] = {
        name: value / weight if weight else None for name, value in zip(NAMES, values, strict=True)
    }
    if not has_teacher:
        found["kd"] = None
    if not has_teacher or not has_head:
        found["agreement"] = None
    return found
