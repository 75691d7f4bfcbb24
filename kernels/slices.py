"""The loss in slices of the vocabulary, for little memory: four products instead of three.

The forward pass keeps a few numbers per position; the backward pass makes each slice's logits once more and
from them its part of every gradient, for the upstream gradient that it is given. A slice of the weight's
gradient is final at once, so no second copy of it ever exists.

N positions, W columns of a slice, K support entries, V vocabulary (true, of this rank), H hidden.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekd.kernels.blocks import Assessment, Block, Implementation, Rest
from sparsekd.kernels.gemm import add_product, plain_precision, product_into, wide_dtype, wide_product
from sparsekd.kernels.inputs import LossInputs, positions_of
from sparsekd.kernels.partial import combine_readings, combine_sums
from sparsekd.kernels.shard import sum_over_ranks, whole_vocabulary
from sparsekd.kernels.statistics import LogitGradient

# Positions whose objective is taken at one time: its temporaries are a dozen tensors [positions, K].
ASSESSED_POSITIONS = 1024


class SliceLoss(torch.autograd.Function):
    """Summed loss of hidden, weight and bias; every other output is detached.

    The weight is read again in the backward pass. It is saved as the Parameter that it is: under ZeRO-3 its
    module's hooks gather it again, and nothing keeps the gathered copy alive in between.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: LossInputs,
        implementation: Implementation,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The values, and of the gradient what is small."""
        found = _assess_slices(inputs, implementation)
        ctx.implementation = implementation
        if found.gradient is not None:
            nothing = hidden.new_empty(0)
            ctx.inputs = inputs._replace(hidden=nothing, weight=nothing, bias=None)
            ctx.save_for_backward(hidden, weight, bias, *found.rest, *found.gradient)
        ctx.mark_non_differentiable(found.kd, found.ce, found.agreement)
        return found.loss, found.kd, found.ce, found.agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that were asked for, rounded once."""
        hidden, weight, bias, *numbers = ctx.saved_tensors
        inputs = ctx.inputs._replace(
            hidden=hidden.detach(), weight=weight.detach(), bias=None if bias is None else bias.detach()
        )
        fields = len(Rest._fields)
        gradient = LogitGradient(*(value * upstream for value in numbers[fields:]))
        made = _gradients(inputs, ctx.implementation, Rest(*numbers[:fields]), gradient)
        return (*made, None, None)


def _slices(
    inputs: LossInputs, implementation: Implementation, operand: Tensor, slab: Tensor
) -> Iterator[tuple[slice, Tensor, Block]]:
    """Yields (rows of the weight, those rows [W, H] as the products take them, their block [N, W]).

    Whoever takes them lets go of one before the next is made.
    """
    held = inputs.columns
    positions = positions_of(inputs)
    for first in range(0, len(held), inputs.plan.slice_columns):
        rows = slice(first, min(first + inputs.plan.slice_columns, len(held)))
        matrix = implementation.prepare(inputs.weight[rows])
        products = slab[:, : rows.stop - first]
        wide_product(operand, matrix.T, out=products)
        ids, labels = positions.within(held[rows])
        bias = inputs.wide_bias(rows)
        block = implementation.block(products, bias, ids, labels, inputs.objective, inputs.head)
        yield rows, matrix, block
        del matrix, block


def _slab(inputs: LossInputs, dtype: torch.dtype) -> Tensor:
    """Memory for one slice, [N, W]."""
    shape = (inputs.hidden.shape[0], inputs.plan.slice_columns)
    return torch.empty(shape, dtype=dtype, device=inputs.hidden.device)


def _assess_slices(inputs: LossInputs, implementation: Implementation) -> Assessment:
    """The objective at N positions, its logits made a slice at a time."""
    objective, positions = inputs.objective, positions_of(inputs)
    with plain_precision(inputs.hidden.device, inputs.hidden.dtype):
        operand = implementation.prepare(inputs.hidden.contiguous())
        slab = _slab(inputs, wide_dtype(inputs.hidden.dtype))
        together = None
        for _, _, block in _slices(inputs, implementation, operand, slab):
            reading, sums = block.reading, block.rest_sums()
            if together is not None:
                reading = combine_readings(together[0], reading)
                sums = combine_sums(together[1], sums, objective.temperature)
            together = reading, sums
            del block
        del operand, slab
    assert together is not None
    reading, sums = whole_vocabulary(*together, objective, inputs.shard)

    # One empty part where there are no positions, so that shapes and dtypes come out all the same.
    starts = range(0, max(inputs.hidden.shape[0], 1), ASSESSED_POSITIONS)
    parts = []
    for rows in (slice(start, start + ASSESSED_POSITIONS) for start in starts):
        part = implementation.assess(
            type(reading)(*(value[rows] for value in reading)),
            type(sums)(*(value[rows] for value in sums)),
            positions.take(rows),
            objective,
            vocabulary_size=inputs.head.vocabulary_size,
            needs_gradient=inputs.needs_gradient,
        )
        parts.append(part)
    return _joined(parts)


def _joined(parts: list[Assessment]) -> Assessment:
    """Assessments of successive positions as one."""
    gradients = [part.gradient for part in parts if part.gradient is not None]
    return Assessment(
        loss=torch.stack([part.loss for part in parts]).sum(),
        kd=torch.cat([part.kd for part in parts]),
        ce=torch.cat([part.ce for part in parts]),
        agreement=torch.cat([part.agreement for part in parts]),
        rest=Rest(*(torch.cat(values) for values in zip(*(part.rest for part in parts), strict=True))),
        gradient=LogitGradient(*(torch.cat(values) for values in zip(*gradients, strict=True)))
        if gradients
        else None,
    )


def _gradients(
    inputs: LossInputs, implementation: Implementation, rest: Rest, gradient: LogitGradient
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(hidden's, weight's, bias's gradient), None where not asked for; the logits are made once more."""
    hidden, weight = inputs.hidden, inputs.weight
    wide = wide_dtype(hidden.dtype)
    of_hidden = hidden.new_zeros(hidden.shape, dtype=wide) if inputs.hidden_gradient else None
    # Rows beyond the true vocabulary keep exactly 0.
    of_weight = torch.zeros_like(weight) if inputs.weight_gradient else None
    of_bias = weight.new_zeros(weight.shape[0]) if inputs.bias_gradient else None
    with plain_precision(hidden.device, hidden.dtype):
        operand = implementation.prepare(hidden.contiguous())
        slab = _slab(inputs, wide)
        buffer = None if operand.dtype == wide else _slab(inputs, operand.dtype)
        for rows, matrix, block in _slices(inputs, implementation, operand, slab):
            out = None if buffer is None else buffer[:, : rows.stop - rows.start]
            dense = block.gradient(rest, gradient, out)
            if of_bias is not None:
                of_bias[rows] = dense.sum(0, dtype=wide)
            if of_hidden is not None:
                add_product(of_hidden, dense, matrix)
            if of_weight is not None and operand.dtype == weight.dtype:
                product_into(of_weight[rows], dense.T, operand)
            elif of_weight is not None:
                of_weight[rows] = wide_product(dense.T, operand)
            del matrix, block, dense
        del operand, slab, buffer
    if of_hidden is not None:
        sum_over_ranks(of_hidden, inputs.shard)
        of_hidden = of_hidden.to(hidden.dtype)
    return of_hidden, of_weight, of_bias
