"""Sums of losses over positions, kept on the device until a line of metrics is due.

A float64 vector of seven: loss, kd, ce, agreement, each weighted, and three sums of weights: the loss's
denominator, kd_weights, ce_weights. Nothing here waits for the device, except `means`.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.trainer.data.batches import MicroBatch
from sparsekd.trainer.student.head import WeightedLoss

_SUMS = 7


def no_sums(device: torch.device) -> Tensor:
    """The empty sums, float64 (7,)."""
    return torch.zeros(_SUMS, dtype=torch.float64, device=device)


def sums_of(output: WeightedLoss, batch: MicroBatch) -> Tensor:
    """The sums of one micro-batch, float64 (7,)."""
    weights = [batch.weight_sum.double(), batch.kd_weights.double().sum(), batch.ce_weights.double().sum()]
    return torch.cat([output.loss.detach().double().reshape(1), output.parts, torch.stack(weights)])


def all_reduced(sums: Tensor) -> Tensor:
    """The sums over all ranks, on every rank, as a new tensor."""
    total = sums.clone()
    dist.all_reduce(total)
    return total


def means(total: Tensor, *, has_teacher: bool, has_head: bool, heldout: bool) -> dict[str, float | None]:
    """Means per counted position; what the run does not measure is None, not 0. Waits for the device.

    In training `kd` has the denominator of the loss, so that loss = kd_weight * kd + ce_weight * ce (without
    label smoothing and z-loss), and is the mean over counted positions in expectation where only some are
    recorded. Held-out positions weigh 1 each, and `kd` is the mean over those with a record. `agreement`, a
    share, always is the mean over those with a record, by their weights.

    Args:
        total: Sums over all ranks.
        has_teacher: Whether the distillation term is in use.
        has_head: Whether the records know the teacher's most likely token.
        heldout: Whether the sums are of held-out rows.
    """
    loss, kd, ce, agreement, weight, of_kd, of_ce = total.tolist()

    def mean(value: float, weight: float) -> float | None:
        return value / weight if weight else None

    return {
        "loss": mean(loss, weight),
        "kd": mean(kd, of_kd if heldout else weight) if has_teacher else None,
        "ce": mean(ce, of_ce),
        "agreement": mean(agreement, of_kd) if has_teacher and has_head else None,
    }
