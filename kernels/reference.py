"""The `reference` implementation: the formulas written down over dense [N, V] tensors, gradients by autograd.

For checking, in float64 where asked. It shares the divergences between outcomes with the fused
implementations and nothing else: no statistics, no identity, no chunks.

N positions, K stored entries, k head, V vocabulary (true), H hidden, T temperature.
"""

import torch
from torch import Tensor

from sparsekd.kernels.divergence import divergence_function
from sparsekd.kernels.gemm import wide_dtype
from sparsekd.kernels.inputs import LossInputs
from sparsekd.kernels.objective import Objective
from sparsekd.kernels.targets import SparseTargets, take_rows


def dense_logits(inputs: LossInputs) -> Tensor:
    """z = softcap(scale * (hidden @ weight.T + bias)), [N, V], wide  (2.1)."""
    size, wide = inputs.head.vocabulary_size, wide_dtype(inputs.hidden.dtype)
    logits = inputs.hidden.to(wide) @ inputs.weight[:size].to(wide).T
    if inputs.bias is not None:
        logits = logits + inputs.bias[:size].to(wide)
    logits = inputs.head.scale * logits
    if inputs.head.softcap is not None:
        logits = inputs.head.softcap * torch.tanh(logits / inputs.head.softcap)
    return logits


def dense_distillation(logits: Tensor, targets: SparseTargets, objective: Objective) -> Tensor:
    """The distillation term of each position without its T^2, [N]  (5.1 to 5.4)."""
    temperature, k = objective.temperature, targets.head_size
    log_q = (logits / temperature).log_softmax(1)

    ids, present = targets.ids.clamp_min(0), targets.ids >= 0
    head_ids, head_present = ids[:, :k], present[:, :k]
    head_logits = torch.where(head_present, targets.head_logprobs.to(logits.dtype) / temperature, -torch.inf)
    log_rest = targets.log_rest.to(logits.dtype)[:, None]
    log_p = torch.cat([head_logits, log_rest], 1).log_softmax(1)
    log_p_head, log_p_rest = log_p[:, :k], log_p[:, k:]

    if objective.target_mode == "sampled":
        # By division and not by `drawn_shares`: nothing but the divergences is shared.
        draws = targets.tail_counts.to(logits.dtype).sum(1, keepdim=True).clamp_min(1.0)
        weights = torch.cat([log_p_head.exp(), log_p_rest.exp() * targets.tail_counts / draws], 1)
        return -targets.entropy - (torch.where(present, weights, 0.0) * log_q.gather(1, ids)).sum(1)

    log_q_head = torch.where(head_present, log_q.gather(1, head_ids), -torch.inf)
    divergence = divergence_function(objective)
    if objective.target_mode == "truncated":
        return divergence(log_p_head, log_q_head)
    if objective.target_mode == "renormalized":
        return divergence(head_logits.log_softmax(1), log_q_head.log_softmax(1))

    hits = torch.zeros_like(logits).scatter_add(1, head_ids, head_present.to(logits.dtype))
    in_head = hits > 0
    # Where the head is the whole vocabulary there is no rest to sum: masked before the logsumexp.
    some_rest = ~in_head.all(1, keepdim=True)
    rest = torch.where(some_rest, log_q.masked_fill(in_head, -torch.inf), 0.0).logsumexp(1, keepdim=True)
    log_q_rest = torch.where(some_rest, rest, -torch.inf)
    return divergence(torch.cat([log_p_head, log_p_rest], 1), torch.cat([log_q_head, log_q_rest], 1))


def dense_cross_entropy(logits: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(smoothed cross-entropy plus z-loss, the plain one), 0 where ignored, [N] each  (6.1, 6.2)."""
    log_q = logits.log_softmax(1)
    smoothing = objective.label_smoothing
    plain = -log_q.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    value = (1 - smoothing) * plain - smoothing * log_q.mean(1)
    value = value + objective.z_loss * logits.logsumexp(1).square()
    return torch.where(labels >= 0, value, 0.0), torch.where(labels >= 0, plain, 0.0)


def reference_loss(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, kd, ce, agreement); the loss carries its graph, the rest is detached."""
    count, objective = inputs.hidden.shape[0], inputs.objective
    kept = inputs.kept.nonzero()[:, 0]
    ce_weights, kd_weights = inputs.ce_weights[kept], inputs.kd_weights[kept]
    recorded = kd_weights.nonzero()[:, 0]
    targets = take_rows(inputs.targets, kept[recorded])
    labels = torch.where(ce_weights != 0, inputs.labels[kept], -1)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        logits = dense_logits(inputs._replace(hidden=inputs.hidden[kept]))
        trained_ce, ce = dense_cross_entropy(logits, labels, objective)
        kd = torch.zeros_like(ce)
        if targets is not None and objective.kd_weight:
            of_record = dense_distillation(logits[recorded], targets, objective) * objective.temperature**2
            kd = kd.index_copy(0, recorded, of_record.to(kd.dtype))
        loss = objective.ce_weight * (ce_weights.to(logits.dtype) * trained_ce).sum()
        loss = loss + objective.kd_weight * (kd_weights.to(logits.dtype) * kd).sum()

    agreement = torch.zeros_like(ce)
    if targets is not None and targets.head_size:
        top, own = targets.ids[:, :1], logits[recorded]
        agrees = (top >= 0) & (own.gather(1, top.clamp_min(0)) >= own.amax(1, keepdim=True))
        agreement = agreement.index_copy(0, recorded, agrees[:, 0].to(ce.dtype))

    def spread(value: Tensor) -> Tensor:
        return logits.new_zeros(count).index_copy_(0, kept, value.detach().to(logits.dtype))

    return loss, spread(kd), spread(ce), spread(agreement)
