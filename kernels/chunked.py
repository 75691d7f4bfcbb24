"""The `torch` implementation: chunks of positions, gradients made in the forward pass, any device.

N positions, C positions of a chunk, K support entries, V vocabulary (true), H hidden, T temperature.

One chunk: logits in float32; the support's logits are read, then replaced by -inf ("punched out"), so that
the logsumexp of all the others is a direct sum and never 1 minus something; the objective and its gradient
for the statistics; then the logits' memory becomes their gradient and two products take it to hidden and
weight.
"""

import math

import torch
from torch import Tensor

from sparsekd.kernels.divergence import differentiate, support_columns, top_agreement
from sparsekd.kernels.function import LossInputs, LossParts
from sparsekd.kernels.gemm import (
    add_product,
    plain_precision,
    prepare_operand,
    transform_logits,
    wide_dtype,
    wide_product,
)
from sparsekd.kernels.memory import chunk_rule
from sparsekd.kernels.statistics import LogitGradient, Statistics
from sparsekd.kernels.targets import take_rows


def chunked_loss(inputs: LossInputs) -> LossParts:
    """Loss and gradients, a chunk of positions at a time.

    Positions of weight 0 are taken out first, so they cost nothing and cannot harm.
    """
    kept = inputs.weights.nonzero()[:, 0]
    count = inputs.hidden.shape[0]
    if kept.numel() == count:
        return _all_positions(inputs)
    parts = _all_positions(
        inputs._replace(
            hidden=inputs.hidden[kept],
            targets=take_rows(inputs.targets, kept),
            labels=inputs.labels[kept],
            weights=inputs.weights[kept],
        )
    )

    def spread(value: Tensor) -> Tensor:
        return value.new_zeros(count, *value.shape[1:]).index_copy_(0, kept, value)

    return parts._replace(
        kd=spread(parts.kd),
        ce=spread(parts.ce),
        agreement=spread(parts.agreement),
        hidden_gradient=None if parts.hidden_gradient is None else spread(parts.hidden_gradient),
    )


def _all_positions(inputs: LossInputs) -> LossParts:
    hidden, weight, head = inputs.hidden, inputs.weight, inputs.head
    count, vocabulary_size, wide = hidden.shape[0], head.vocabulary_size, wide_dtype(hidden.dtype)
    kd, ce, agreement = torch.zeros(3, count, dtype=wide, device=hidden.device)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    # Rows beyond the true vocabulary are never touched: their gradient stays exactly 0.
    hidden_gradient = torch.empty_like(hidden, dtype=wide) if inputs.hidden_gradient else None
    weight_gradient = torch.zeros_like(weight, dtype=wide) if inputs.weight_gradient else None
    bias_gradient = (
        torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if inputs.bias_gradient else None
    )
    bias = None if inputs.bias is None else inputs.bias[:vocabulary_size].to(wide)
    chunk = inputs.chunk_positions or chunk_rule(vocabulary_size)

    with plain_precision(hidden.device, hidden.dtype):
        matrix = prepare_operand(weight[:vocabulary_size])
        for start in range(0, count, chunk):
            rows = slice(start, min(start + chunk, count))
            part = prepare_operand(hidden[rows])
            chunk_loss, kd[rows], ce[rows], agreement[rows], gradient = _one_chunk(
                inputs, wide_product(part, matrix.T), bias, rows
            )
            loss += chunk_loss
            if gradient is None:
                continue
            if bias_gradient is not None:
                bias_gradient[:vocabulary_size] += gradient.sum(0)
            gradient = gradient.to(part.dtype)
            if hidden_gradient is not None:
                wide_product(gradient, matrix, out=hidden_gradient[rows])
            if weight_gradient is not None:
                add_product(weight_gradient[:vocabulary_size], gradient.T, part)
            # Not to be alive beside the next chunk's logits.
            del gradient
    return LossParts(loss, kd, ce, agreement, hidden_gradient, weight_gradient, bias_gradient)


def _one_chunk(
    inputs: LossInputs, products: Tensor, bias: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(loss, kd, ce, agreement, gradient [C, V] of the products or None); uses up `products` [C, V]."""
    objective, head = inputs.objective, inputs.head
    temperature = objective.temperature
    targets = take_rows(inputs.targets, rows)
    labels, weights = inputs.labels[rows], inputs.weights[rows].to(products.dtype)
    logits, slope = transform_logits(products, bias, head)

    if targets is None:
        ids = labels.new_empty(labels.shape[0], 0)
    else:
        ids = targets.ids[:, : support_columns(targets, objective)]
    columns, present = ids.clamp_min(0), ids >= 0
    label_columns, labelled = labels.clamp_min(0)[:, None], labels >= 0
    support = torch.where(present, logits.gather(1, columns) / temperature, -math.inf)
    label = torch.where(labelled, logits.gather(1, label_columns)[:, 0], 0.0)
    mean = logits.mean(1) if objective.label_smoothing else torch.zeros_like(label)

    # The minimum with -inf punches out; the minimum with +inf, at padding, changes nothing.
    logits.scatter_reduce_(1, columns, torch.where(present, -math.inf, math.inf).to(logits.dtype), "amin")
    maximum = logits.amax(1)
    shift = torch.where(maximum > -math.inf, maximum, 0.0)
    logits.sub_(shift[:, None])
    powers_t = torch.exp(logits / temperature) if temperature != 1.0 else None
    powers_1 = logits.exp_()
    if powers_t is None:
        powers_t = powers_1
    sum_t, sum_1 = powers_t.sum(1), powers_1.sum(1)
    statistics = Statistics(
        support=support,
        rest_t=sum_t.log() + shift / temperature,
        rest_1=sum_1.log() + shift,
        label=label,
        mean=mean,
    )
    agreement = top_agreement(statistics, maximum, targets, temperature)
    loss, kd, ce, gradient = differentiate(
        statistics,
        ids,
        targets,
        labels,
        weights,
        objective,
        vocabulary_size=head.vocabulary_size,
        needs_gradient=inputs.needs_gradient,
    )
    if gradient is None:
        return loss, kd, ce, agreement, None
    dense = _spread_gradient(gradient.scaled(head.scale), powers_t, powers_1, sum_t, sum_1)
    # Support entries are exactly the uniform part so far (exp(-inf) = 0): the rest of theirs is added.
    in_support = torch.where(present, gradient.support - gradient.uniform[:, None], 0.0) * head.scale
    dense.scatter_add_(1, columns, in_support)
    dense.scatter_add_(1, label_columns, torch.where(labelled, gradient.label, 0.0)[:, None] * head.scale)
    return loss, kd, ce, agreement, dense if slope is None else dense.mul_(slope)


def _spread_gradient(
    gradient: LogitGradient, powers_t: Tensor, powers_1: Tensor, sum_t: Tensor, sum_1: Tensor
) -> Tensor:
    """The dense terms of the identity, in the memory of `powers_t`; 0 * exp where nothing is outside."""
    by_sum_t = torch.where(sum_t > 0, gradient.rest_t / sum_t, 0.0)
    by_sum_1 = torch.where(sum_1 > 0, gradient.rest_1 / sum_1, 0.0)
    if powers_t is powers_1:
        dense = powers_t.mul_((by_sum_t + by_sum_1)[:, None])
    else:
        dense = powers_t.mul_(by_sum_t[:, None]).addcmul_(powers_1, by_sum_1[:, None])
    return dense.add_(gradient.uniform[:, None])
