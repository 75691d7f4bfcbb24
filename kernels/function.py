"""The autograd Function of the default mode: gradients made in forward, scaled in backward.

The weight's own is one product away: it waits for the upstream gradient, and is written once. Reading
the weight in forward alone, and handing its gradient back through autograd, is what keeps ZeRO-3,
tied embeddings and gradient accumulation right: nothing is gathered again, nothing writes `.grad`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekd.kernels.blocks import Implementation
from sparsekd.kernels.gemm import plain_precision, product_into
from sparsekd.kernels.inputs import LossInputs
from sparsekd.kernels.memory import SCALE_ELEMENTS
from sparsekd.kernels.slabs import loss_in_slabs
from sparsekd.kernels.slices import SliceLoss


class SlabLoss(torch.autograd.Function):
    """Summed loss of hidden, weight and bias; every other output is detached."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: LossInputs,
        implementation: Implementation,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make loss and gradients; keep the gradients, not the inputs."""
        parts = loss_in_slabs(inputs, implementation)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.weight_rows = weight.shape[0]
        operand = None if parts.logit_gradient is None else hidden
        made = (parts.hidden_gradient, parts.weight_gradient, parts.bias_gradient)
        ctx.save_for_backward(*made, parts.logit_gradient, operand)
        ctx.mark_non_differentiable(parts.kd, parts.ce, parts.agreement)
        return parts.loss, parts.kd, parts.ce, parts.agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Upstream times the saved gradients, rounded to the parameter's dtype."""
        hidden_gradient, weight_gradient, bias_gradient, logit_gradient, hidden = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.dtypes
        of_hidden = scaled_gradient(hidden_gradient, upstream, of_hidden)
        of_bias = scaled_gradient(bias_gradient, upstream, of_bias)
        # Unless the graph is retained, what is done with goes before the largest one comes.
        ctx.maybe_clear_saved_tensors()
        del hidden_gradient, bias_gradient
        if logit_gradient is None:
            of_weight = scaled_gradient(weight_gradient, upstream, of_weight)
        else:
            of_weight = scaled_product(logit_gradient, hidden, upstream, ctx.weight_rows)
        return of_hidden, of_weight, of_bias, None, None


def scaled_gradient(gradient: Tensor | None, upstream: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """gradient * upstream, both wide, rounded to `dtype` once; None where there is none.

    The saved gradient stays as it is, since backward may run again (`retain_graph`).
    """
    if gradient is None:
        return None
    scaled = torch.empty_like(gradient, dtype=dtype)
    step = max(1, SCALE_ELEMENTS // max(1, gradient[:1].numel()))
    for start in range(0, gradient.shape[0], step):
        rows = slice(start, start + step)
        torch.mul(gradient[rows], upstream, out=scaled[rows])
    return scaled


def scaled_product(logit_gradient: Tensor, hidden: Tensor, upstream: Tensor, rows: int) -> Tensor:
    """logit_gradient.T @ (upstream * hidden) as one product: [rows, H] in the dtype of `hidden`.

    Rounded once where the upstream gradient is a power of 2, such as the 1 of whoever puts its denominator
    into the weights of the positions; else the scaled hidden states are rounded besides.

    Args:
        logit_gradient: [N, V], dtype of `hidden`.
        hidden: [N, H]; stays as it is.
        upstream: wide scalar.
        rows: of the weight; those from V on are padding and get exactly 0.
    """
    size, width = logit_gradient.shape[1], hidden.shape[1]
    # In the wide dtype: of two dtypes a scalar's would give way, and the upstream gradient itself be rounded.
    scaled = hidden.to(upstream.dtype, copy=True).mul_(upstream).to(hidden.dtype)
    gradient = hidden.new_empty(rows, width)
    gradient[size:] = 0.0
    with plain_precision(hidden.device, hidden.dtype):
        product_into(gradient[:size], logit_gradient.T, scaled)
    return gradient


def run_fused(implementation: Implementation, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, kd, ce, agreement) through autograd; only the gradients that can be asked for are made."""
    hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
    asked = inputs._replace(
        # Detached by reference: the implementation must not record a graph of its own.
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
    )
    mode = SliceLoss if inputs.plan.slice_columns else SlabLoss
    return mode.apply(hidden, weight, bias, asked, implementation)
