"""The loss in slabs of positions, the logits' gradient made in the forward pass: three products, the default.

Two chunk sizes, because the logits and the weight gradient want different ones: C positions of logits in a
slab (a staging area; any few hundred keep a GPU's product busy), and up to B positions of gradient in a
buffer of the operands' dtype, because each addition to the weight gradient passes over all of it.

N positions, C positions of the slab, B positions of the buffer, V vocabulary (true, of this rank), H hidden.
"""

import torch
from torch import Tensor

from sparsekd.kernels.blocks import Assessment, Block, Implementation
from sparsekd.kernels.gemm import add_product, plain_precision, wide_dtype, wide_product
from sparsekd.kernels.inputs import LossInputs, LossParts, Positions, positions_of
from sparsekd.kernels.memory import row_stride
from sparsekd.kernels.shard import sum_over_ranks, whole_vocabulary


def loss_in_slabs(inputs: LossInputs, implementation: Implementation) -> LossParts:
    """Loss and gradients for an upstream gradient of 1; of the weight's perhaps only what it is made from."""
    plan, hidden = inputs.plan, inputs.hidden.contiguous()
    count, size, device = hidden.shape[0], len(inputs.columns), hidden.device
    wide = wide_dtype(hidden.dtype)
    positions = positions_of(inputs)
    ids, labels = positions.within(inputs.columns)
    bias = inputs.wide_bias(slice(0, size))

    with plain_precision(device, hidden.dtype):
        matrix = implementation.prepare(inputs.weight[:size])
        loss = torch.zeros((), dtype=wide, device=device)
        values = torch.zeros(3, count, dtype=wide, device=device)
        hidden_gradient = weight_gradient = bias_gradient = None
        if inputs.hidden_gradient:
            hidden_gradient = torch.empty_like(hidden, dtype=wide)
        # One buffer of low precision is left to the backward pass, whose product is scaled before it is
        # rounded, once. Several add up to a wide sum.
        if inputs.weight_gradient and not plan.weight_in_backward:
            weight_gradient = torch.zeros_like(inputs.weight, dtype=wide)
        if inputs.bias_gradient:
            bias_gradient = torch.zeros(inputs.weight.shape[0], dtype=wide, device=device)
        stride = row_stride(size) if plan.separate_buffer else size
        slab = torch.empty(min(plan.slab_positions, count), stride, dtype=wide, device=device)
        # Without a buffer of its own the gradient stays where the logits were.
        buffer = slab
        if plan.separate_buffer and inputs.needs_gradient:
            rows_held = min(plan.buffer_positions, count)
            buffer = torch.empty(rows_held, stride, dtype=matrix.dtype, device=device)

        for start in range(0, count, plan.buffer_positions):
            stop = min(start + plan.buffer_positions, count)
            for first in range(start, stop, plan.slab_positions):
                rows = slice(first, min(first + plan.slab_positions, stop))
                products = slab[: rows.stop - first, :size]
                wide_product(implementation.prepare(hidden[rows]), matrix.T, out=products)
                target = None if buffer is slab else buffer[first - start : rows.stop - start, :size]
                block = implementation.block(
                    products, bias, ids[rows], labels[rows], inputs.objective, inputs.head
                )
                found = _assess_block(inputs, implementation, positions.take(rows), block, target)
                del block
                loss += found.loss
                values[:, rows] = torch.stack([found.kd, found.ce, found.agreement])
            if not inputs.needs_gradient:
                continue
            gradient = buffer[: stop - start, :size]
            if bias_gradient is not None:
                bias_gradient[:size] += gradient.sum(0, dtype=wide)
            if hidden_gradient is not None:
                wide_product(gradient, matrix, out=hidden_gradient[start:stop])
            if weight_gradient is not None:
                add_product(weight_gradient[:size], gradient.T, implementation.prepare(hidden[start:stop]))

    if hidden_gradient is not None:
        sum_over_ranks(hidden_gradient, inputs.shard)
    kd, ce, agreement = values
    left = inputs.weight_gradient and plan.weight_in_backward
    logit_gradient = buffer[:count, :size] if left else None
    return LossParts(loss, kd, ce, agreement, hidden_gradient, weight_gradient, bias_gradient, logit_gradient)


def _assess_block(
    inputs: LossInputs,
    implementation: Implementation,
    positions: Positions,
    block: Block,
    target: Tensor | None,
) -> Assessment:
    """The objective at the C positions of a block; writes d loss / d product [C, V] into `target`."""
    reading, sums = whole_vocabulary(block.reading, block.rest_sums(), inputs.objective, inputs.shard)
    found = implementation.assess(
        reading,
        sums,
        positions,
        inputs.objective,
        vocabulary_size=inputs.head.vocabulary_size,
        needs_gradient=inputs.needs_gradient,
    )
    if found.gradient is not None:
        block.gradient(found.rest, found.gradient, target)
    return found
