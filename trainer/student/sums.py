"""Sums of losses over positions, kept on the device until a line of metrics is due.

A float64 vector of nine: loss, kd, ce, agreement, each weighted; three sums of weights: the loss's
denominator, kd_weights, ce_weights; load-balancing losses of micro-batches, and how many. Nothing here waits
for the device, except `means`.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.trainer.data.batches import MicroBatch
from sparsekd.trainer.student.head import WeightedLoss

_SUMS = 9


def no_sums(device: torch.device) -> Tensor:
    """The empty sums, float64 (9,)."""
    return torch.zeros(_SUMS, dtype=torch.float64, device=device)


def sums_of(output: WeightedLoss, batch: MicroBatch) -> Tensor:
    """The sums of one micro-batch, float64 (9,), without its scale."""
    weights = [batch.weight_sum.double(), batch.kd_weights.double().sum(), batch.ce_weights.double().sum()]
    loss = output.loss.detach().double()
    if batch.scale is not None:
        loss = loss / batch.scale.double()
    nothing = torch.zeros_like(loss)
    router = [nothing, nothing] if output.router is None else [output.router.detach().double(), nothing + 1]
    return torch.cat([loss.reshape(1), output.parts, torch.stack([*weights, *router])])


def all_reduced(sums: Tensor) -> Tensor:
    """The sums over all ranks, on every rank, as a new tensor."""
    total = sums.clone()
    dist.all_reduce(total)
    return total


def means(
    total: Tensor, *, has_teacher: bool, has_head: bool, heldout: bool, router_coefficient: float = 0.0
) -> dict[str, float | None]:
    """Means per counted position; what the run does not measure is None, not 0. Waits for the device.

    In training `kd` has the denominator of the loss, so that loss = kd_weight * kd + ce_weight * ce (without
    label smoothing and z-loss), and is the mean over counted positions in expectation where only some are
    recorded. Held-out positions weigh 1 each, and `kd` is the mean over those with a record. `agreement`, a
    share, always is the mean over those with a record, by their weights. `router_loss`, the mean over
    micro-batches, is there only where it was computed, and `loss` then holds it, too, times its coefficient.

    Args:
        total: Sums over all ranks.
        has_teacher: Whether the distillation term is in use.
        has_head: Whether the records know the teacher's most likely token.
        heldout: Whether the sums are of held-out rows.
        router_coefficient: Weight of the load-balancing loss.
    """
    loss, kd, ce, agreement, weight, of_kd, of_ce, router, batches = total.tolist()

    def mean(value: float, weight: float) -> float | None:
        return value / weight if weight else None

    found = {
        "loss": mean(loss, weight),
        "kd": mean(kd, of_kd if heldout else weight) if has_teacher else None,
        "ce": mean(ce, of_ce),
        "agreement": mean(agreement, of_kd) if has_teacher and has_head else None,
    }
    if batches:
        found["router_loss"] = router / batches
        found["loss"] = (found["loss"] or 0.0) + router_coefficient * router / batches
    return found
