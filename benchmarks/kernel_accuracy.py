"""How far a contestant's results are from float64, and how far exact ones are once they are rounded."""

from collections.abc import Sequence

import kernel_dense as dense
import torch
from kernel_cases import GRID, Inputs, Setting
from torch import Tensor


def exact_results(truth: str, wide: Inputs, setting: Setting) -> tuple[Tensor, ...]:
    """What a truth computes, in float64: gradients dH and dW of its loss, or head and log R of the record."""
    if truth == "record":
        return _exact_record(wide, setting)
    return torch.autograd.grad(dense.TRUTHS[truth](wide, setting), (wide.hidden, wide.weight))


def rounding_alone(
    truth: str, wide: Inputs, setting: Setting, exact: Sequence[Tensor]
) -> tuple[list[float], list[float]]:
    """Errors of the exact gradients rounded once to the dtype, and of those made with the gradient of the
    logits rounded as well."""
    once = relative_errors([gradient.to(setting.dtype) for gradient in exact], exact)
    return once, relative_errors(_rounded_inside(truth, wide, setting), exact)


def relative_errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Norm of the difference over norm of the truth; where fewer columns were made, over those."""
    errors = []
    for one, truth in zip(found, exact, strict=True):
        truth = truth[:, : one.shape[1]]
        errors.append(float((one.double() - truth).norm() / truth.norm()))
    return errors


def _rounded_inside(truth: str, wide: Inputs, setting: Setting) -> list[Tensor]:
    """Exact gradients but for two roundings: of the logits' gradient, and of the results."""
    tapped: list[Tensor] = []
    original = dense.wide_logits

    def tap(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = original(hidden, weight)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: tapped.append(gradient.to(setting.dtype).double()))
        return logits

    dense.wide_logits = tap
    try:
        exact_results(truth, wide, setting)
    finally:
        dense.wide_logits = original
    products = (tapped[0] @ wide.weight.detach(), tapped[0].T @ wide.hidden.detach())
    return [product.to(setting.dtype) for product in products]


def _exact_record(wide: Inputs, setting: Setting) -> tuple[Tensor, ...]:
    """Log-probabilities of the head, and log R at every T of the grid."""
    with torch.no_grad():
        log_p = dense.wide_logits(wide.teacher_hidden, wide.weight).log_softmax(1)
        head, ids = log_p.topk(setting.k, dim=1)
        rest = log_p.scatter(1, ids, -torch.inf)
        return head, torch.stack([(rest / temperature).logsumexp(1) for temperature in GRID], 1)
