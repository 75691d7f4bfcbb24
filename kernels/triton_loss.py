"""The `triton` implementation: products by cuBLAS, the elementwise part by the row kernels, no host wait.

Two chunk sizes, because the logits and the weight gradient want different ones: C positions of float32
logits in a slab (a staging area; any few hundred keep the product busy), and up to B positions of gradient in
a buffer of the parameters' dtype, because each addition to the weight gradient passes over all of it.

N positions, C positions of the slab, B positions of the buffer, K support entries, V vocabulary (true),
H hidden.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from sparsekd.kernels.divergence import differentiate, support_columns, top_agreement
from sparsekd.kernels.function import LossInputs, LossParts
from sparsekd.kernels.gemm import add_product, plain_precision, wide_product
from sparsekd.kernels.memory import buffer_rule, chunk_of, row_stride
from sparsekd.kernels.statistics import LogitGradient, Statistics
from sparsekd.kernels.targets import SparseTargets, take_rows
from sparsekd.kernels.triton_rows import fix_kernel, grad_kernel, prep_kernel, stats_kernel

BLOCK_V = 2048
WARPS = 8


def triton_loss(inputs: LossInputs) -> LossParts:
    """Loss and gradients for an upstream gradient of 1, which `FusedLoss` scales.

    Dropped positions stay where they are, since taking them out would wait for the device: they get value and
    gradient 0, but their hidden states must be finite.
    """
    hidden, head = inputs.hidden, inputs.head
    hidden = hidden.contiguous()
    weight = inputs.weight[: head.vocabulary_size]
    count, size = hidden.shape[0], head.vocabulary_size
    stride = row_stride(size)
    slab_size = chunk_of(
        "triton",
        positions=count,
        vocabulary_size=size,
        hidden_size=hidden.shape[1],
        chunk_positions=inputs.chunk_positions,
    )
    buffer_size = buffer_rule(count, slab_size, stride * hidden.element_size())

    values = torch.zeros(3, count, dtype=torch.float32, device=hidden.device)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    hidden_gradient = torch.empty_like(hidden) if inputs.hidden_gradient else None
    bias_gradient = (
        torch.zeros(inputs.weight.shape[0], dtype=torch.float32, device=hidden.device)
        if inputs.bias_gradient
        else None
    )
    weight_gradient: Tensor | None = None
    if inputs.weight_gradient:
        # One buffer: its product is the gradient, rounded once. Several: a float32 sum.
        several = count > buffer_size
        weight_gradient = torch.zeros_like(inputs.weight, dtype=torch.float32 if several else None)
    bias = None if inputs.bias is None else inputs.bias[:size].float().contiguous()
    slab = torch.empty(slab_size, stride, dtype=torch.float32, device=hidden.device)
    buffer = None
    if inputs.needs_gradient:
        buffer = torch.empty(
            min(buffer_size, max(count, 1)), stride, dtype=hidden.dtype, device=hidden.device
        )

    with plain_precision(hidden.device, hidden.dtype):
        for start in range(0, count, buffer_size):
            stop = min(start + buffer_size, count)
            for first in range(start, stop, slab_size):
                rows = slice(first, min(first + slab_size, stop))
                products = slab[: rows.stop - first, :size]
                wide_product(hidden[rows], weight.T, out=products)
                target = None if buffer is None else buffer[first - start : rows.stop - start, :size]
                chunk_loss, *chunk_values = _one_slab(inputs, products, bias, rows, target)
                loss += chunk_loss
                values[:, rows] = torch.stack(chunk_values)
            if buffer is None:
                continue
            gradient = buffer[: stop - start, :size]
            if bias_gradient is not None:
                bias_gradient[:size] += gradient.sum(0, dtype=torch.float32)
            if hidden_gradient is not None:
                torch.mm(gradient, weight, out=hidden_gradient[start:stop])
            if weight_gradient is None:
                continue
            if count > buffer_size:
                add_product(weight_gradient[:size], gradient.T, hidden[start:stop])
            else:
                torch.mm(gradient.T, hidden[start:stop], out=weight_gradient[:size])
    if weight_gradient is not None:
        weight_gradient = weight_gradient.to(inputs.weight.dtype)
    kd, ce, agreement = values
    return LossParts(loss, kd, ce, agreement, hidden_gradient, weight_gradient, bias_gradient)


def _one_slab(
    inputs: LossInputs, products: Tensor, bias: Tensor | None, rows: slice, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, kd, ce, agreement) of one slab; writes d loss / d product [C, V] into `target` where given."""
    objective, head = inputs.objective, inputs.head
    count, size = products.shape
    weights = inputs.weights[rows]
    kept = weights != 0
    targets = _without_dropped(take_rows(inputs.targets, rows), kept)
    # A dropped position reads as one without label.
    labels = torch.where(kept, inputs.labels[rows], -100)
    columns = support_columns(targets, objective)
    ids = labels.new_empty(count, 0) if targets is None else targets.ids[:, :columns].contiguous()

    support, support_slope = products.new_empty(2, count, columns)
    label, label_slope, maximum, rest_t, rest_1, rest_sum = products.new_empty(6, count)
    # Only its dtype is read where a model has no bias.
    bias_or_none = products if bias is None else bias
    shared: dict[str, Any] = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": head.softcap is not None}
    softcap = 1.0 if head.softcap is None else head.softcap
    inverse_temperature = 1.0 / objective.temperature
    unit = objective.temperature == 1.0
    entries_block = triton.next_power_of_2(max(columns, 1))
    prep_kernel[(count,)](
        products,
        bias_or_none,
        ids,
        labels,
        support,
        support_slope,
        label,
        label_slope,
        products.stride(0),
        columns,
        head.scale,
        softcap,
        BLOCK_K=entries_block,
        **shared,
    )
    block = min(BLOCK_V, triton.next_power_of_2(size))
    stats_kernel[(count,)](
        products,
        bias_or_none,
        maximum,
        rest_t,
        rest_1,
        rest_sum,
        products.stride(0),
        size,
        head.scale,
        softcap,
        inverse_temperature,
        UNIT_TEMPERATURE=unit,
        NEEDS_SUM=objective.label_smoothing > 0,
        BLOCK_V=block,
        num_warps=WARPS,
        **shared,
    )
    inside_sum = torch.where(ids >= 0, support, 0.0).sum(1)
    statistics = Statistics(
        support=support / objective.temperature,
        rest_t=rest_t,
        rest_1=rest_1,
        label=label,
        mean=(rest_sum + inside_sum) / size,
    )
    agreement = top_agreement(statistics, maximum, targets, objective.temperature)
    statistics = _finite_where_dropped(statistics, kept)
    loss, kd, ce, gradient = differentiate(
        statistics,
        ids,
        targets,
        labels,
        weights,
        objective,
        vocabulary_size=size,
        needs_gradient=target is not None,
    )
    if gradient is not None and target is not None:
        gradient = LogitGradient(*(value.contiguous() for value in gradient))
        grad_kernel[(count, triton.cdiv(size, block))](
            products,
            bias_or_none,
            target,
            rest_t,
            rest_1,
            gradient.rest_t,
            gradient.rest_1,
            gradient.uniform,
            products.stride(0),
            target.stride(0),
            size,
            head.scale,
            softcap,
            inverse_temperature,
            UNIT_TEMPERATURE=unit,
            BLOCK_V=block,
            num_warps=WARPS,
            **shared,
        )
        fix_kernel[(count,)](
            target,
            ids,
            labels,
            gradient.support,
            support_slope,
            label,
            label_slope,
            rest_t,
            rest_1,
            gradient.rest_t,
            gradient.rest_1,
            gradient.uniform,
            gradient.label,
            target.stride(0),
            columns,
            inverse_temperature,
            BLOCK_K=entries_block,
        )
    return loss, torch.where(kept, kd, 0.0), torch.where(kept, ce, 0.0), torch.where(kept, agreement, 0.0)


def _without_dropped(targets: SparseTargets | None, kept: Tensor) -> SparseTargets | None:
    """The record with something finite where a position is dropped: whatever stands there must not spread."""
    if targets is None:
        return None
    return targets._replace(
        head_logprobs=torch.where(kept[:, None], targets.head_logprobs, 0.0),
        log_rest=torch.where(kept, targets.log_rest, 0.0),
        entropy=torch.where(kept, targets.entropy, 0.0),
    )


def _finite_where_dropped(statistics: Statistics, kept: Tensor) -> Statistics:
    """The statistics with 0 where a position is dropped."""
    return Statistics(
        support=torch.where(kept[:, None], statistics.support, 0.0),
        rest_t=torch.where(kept, statistics.rest_t, 0.0),
        rest_1=torch.where(kept, statistics.rest_1, 0.0),
        label=torch.where(kept, statistics.label, 0.0),
        mean=torch.where(kept, statistics.mean, 0.0),
    )
