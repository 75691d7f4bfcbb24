"""The one autograd Function of the fused implementations: gradients made in forward, scaled in backward.

Reading the weight in forward alone, and handing its gradient back through autograd, is what keeps ZeRO-3,
tied embeddings and gradient accumulation right: nothing is gathered again, nothing writes `.grad`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekd.kernels.gemm import LOW_PRECISION
from sparsekd.kernels.memory import SCALE_ELEMENTS
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.targets import SparseTargets


class LossInputs(NamedTuple):
    """What an implementation is given: checked arguments of `sparse_kd_loss`, and what wants a gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: SparseTargets | None
    labels: Tensor
    weights: Tensor
    objective: Objective
    head: HeadTransform
    chunk_positions: int | None
    hidden_gradient: bool
    weight_gradient: bool
    bias_gradient: bool

    @property
    def needs_gradient(self) -> bool:
        """Whether any gradient is asked for."""
        return self.hidden_gradient or self.weight_gradient or self.bias_gradient


class LossParts(NamedTuple):
    """What an implementation gives back: values and gradients for an upstream gradient of 1."""

    loss: Tensor
    kd: Tensor
    ce: Tensor
    agreement: Tensor
    hidden_gradient: Tensor | None
    weight_gradient: Tensor | None
    bias_gradient: Tensor | None


class FusedLoss(torch.autograd.Function):
    """Summed loss of hidden, weight and bias; every other output is detached."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: LossInputs,
        implementation: Callable[[LossInputs], LossParts],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the implementation and keep its gradients, not its inputs."""
        parts = implementation(inputs)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(parts.hidden_gradient, parts.weight_gradient, parts.bias_gradient)
        ctx.mark_non_differentiable(parts.kd, parts.ce, parts.agreement)
        return parts.loss, parts.kd, parts.ce, parts.agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Upstream times the saved gradients, rounded once to the parameter's dtype where they are wide."""
        gradients = tuple(
            None if gradient is None else scaled_gradient(gradient, upstream, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None)


def scaled_gradient(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream in `dtype`, multiplied wide: a bfloat16 upstream would be off by up to 0.4 %."""
    if gradient.dtype not in LOW_PRECISION:
        return (gradient * upstream).to(dtype)
    scaled = torch.empty_like(gradient, dtype=dtype)
    step = max(1, SCALE_ELEMENTS // max(1, gradient[0].numel() if gradient.numel() else 1))
    for start in range(0, gradient.shape[0], step):
        rows = slice(start, start + step)
        scaled[rows] = gradient[rows].float() * upstream
    return scaled


def run_fused(
    implementation: Callable[[LossInputs], LossParts], inputs: LossInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, kd, ce, agreement) through autograd; only the gradients that can be asked for are made."""
    enabled = torch.is_grad_enabled()
    hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
    asked = inputs._replace(
        # Detached by reference: the implementation must not record a graph of its own.
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        hidden_gradient=enabled and hidden.requires_grad,
        weight_gradient=enabled and weight.requires_grad,
        bias_gradient=enabled and bias is not None and bias.requires_grad,
    )
    return FusedLoss.apply(hidden, weight, bias, asked, implementation)
