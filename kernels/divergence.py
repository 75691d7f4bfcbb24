"""The objectives as plain functions of the statistics; numbers in brackets are formulas of docs/losses.md.

Nothing here knows about vocabularies or chunks. -inf stands for probability 0 and is masked in the operand,
before the operation that would make it NaN (docs/losses.md, 9).

N positions, K support entries, J outcomes, k head, n draws, T temperature.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsekd.kernels.inputs import Positions
from sparsekd.kernels.objective import MIXTURE_DIVERGENCES, Objective
from sparsekd.kernels.statistics import LogitGradient, Statistics, logit_gradient
from sparsekd.kernels.targets import SparseTargets, drawn_shares

# Reverse KL is infinite where the teacher has probability 0; its log is held at this floor instead, about the
# log of the smallest normal float32.
LOG_PROBABILITY_FLOOR = -87.0


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_j p_j (log p_j - log q_j) over outcomes [N, J] -> [N]  (4.1)."""
    present = log_p > -torch.inf
    log_p = torch.where(present, log_p, 0.0)
    log_q = torch.where(present, log_q, 0.0)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_j q_j (log q_j - log p_j), log p floored -> [N]  (4.2)."""
    present = log_q > -torch.inf
    log_q = torch.where(present, log_q, 0.0)
    log_p = torch.where(present, log_p, 0.0).clamp_min(LOG_PROBABILITY_FLOOR)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_j |p_j - q_j| / 2 -> [N]  (4.3)."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def jensen_shannon(log_p: Tensor, log_q: Tensor, *, mixture: float) -> Tensor:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q, b the mixture, in (0, 1) -> [N]  (4.4)."""
    log_m = log_mixture(log_p, log_q, share=mixture)
    return mixture * forward_kl(log_p, log_m) + (1 - mixture) * forward_kl(log_q, log_m)


def skewed_forward_kl(log_p: Tensor, log_q: Tensor, *, mixture: float) -> Tensor:
    """KL(p || a p + (1 - a) q), a the mixture, in [0, 1) -> [N]  (4.5)."""
    if mixture == 0:
        return forward_kl(log_p, log_q)
    return forward_kl(log_p, log_mixture(log_p, log_q, share=mixture))


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, *, mixture: float) -> Tensor:
    """KL(q || (1 - a) p + a q), a the mixture, in [0, 1) -> [N]  (4.6)."""
    if mixture == 0:
        return reverse_kl(log_p, log_q)
    return forward_kl(log_q, log_mixture(log_q, log_p, share=mixture))


def log_mixture(log_a: Tensor, log_b: Tensor, *, share: float) -> Tensor:
    """log(share * a + (1 - share) * b) of outcomes [N, J], share in (0, 1); finite where both are 0."""
    # The gradient of logaddexp(-inf, -inf) is NaN; what neither has adds nothing to any divergence.
    present = (log_a > -torch.inf) | (log_b > -torch.inf)
    log_a = torch.where(present, log_a, 0.0)
    log_b = torch.where(present, log_b, 0.0)
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


DIVERGENCE_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
    "jensen_shannon": jensen_shannon,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
}


def divergence_function(objective: Objective) -> Callable[[Tensor, Tensor], Tensor]:
    """The objective's divergence, its mixture bound: (log_p [N, J], log_q [N, J]) -> [N]."""
    function = DIVERGENCE_FUNCTIONS[objective.divergence]
    if objective.divergence in MIXTURE_DIVERGENCES:
        return functools.partial(function, mixture=objective.mixture)
    return function


def teacher_head(targets: SparseTargets, temperature: float, dtype: torch.dtype) -> Tensor:
    """l_i / T of the k head ids, [N, k]; -inf at padding."""
    present = targets.ids[:, : targets.head_size] >= 0
    return torch.where(present, targets.head_logprobs.to(dtype) / temperature, -torch.inf)


def teacher_outcomes(targets: SparseTargets, temperature: float, dtype: torch.dtype) -> Tensor:
    """log p at T of the k head ids and of the rest as one outcome, [N, k + 1]  (3.1)."""
    head = teacher_head(targets, temperature, dtype)
    return normalised(torch.cat([head, targets.log_rest.to(dtype)[:, None]], dim=1))


def normalised(logits: Tensor) -> Tensor:
    """Log-probabilities of outcomes [N, J], not all of them -inf."""
    return logits - logits.logsumexp(1, keepdim=True)


def sampled_cross_entropy(statistics: Statistics, targets: SparseTargets, temperature: float) -> Tensor:
    """-entropy - sum_v w_v log q_v: unbiased for the forward KL at the draw temperature -> [N]  (5.2)."""
    log_p = teacher_outcomes(targets, temperature, statistics.support.dtype)
    drawn = log_p[:, -1:].exp() * drawn_shares(targets.tail_counts, log_p.dtype)
    target = torch.cat([log_p[:, :-1].exp(), drawn], dim=1)
    log_total = torch.cat([statistics.support, statistics.rest_t[:, None]], dim=1).logsumexp(1, keepdim=True)
    present = targets.ids >= 0
    log_q = torch.where(present, torch.where(present, statistics.support, 0.0) - log_total, 0.0)
    return -targets.entropy - (target * log_q).sum(1)


def distillation(statistics: Statistics, targets: SparseTargets, objective: Objective) -> Tensor:
    """The distillation term without its T^2, nats, [N]  (5.1 to 5.4)."""
    if objective.target_mode == "sampled":
        return sampled_cross_entropy(statistics, targets, objective.temperature)
    temperature, dtype = objective.temperature, statistics.support.dtype
    divergence = divergence_function(objective)
    if objective.target_mode == "renormalized":
        # From the head alone: the rest, which a record may not know, is not read.
        return divergence(
            normalised(teacher_head(targets, temperature, dtype)), normalised(statistics.support)
        )
    log_p = teacher_outcomes(targets, temperature, dtype)
    log_q = normalised(torch.cat([statistics.support, statistics.rest_t[:, None]], dim=1))
    if objective.target_mode == "truncated":
        log_p, log_q = log_p[:, :-1], log_q[:, :-1]
    return divergence(log_p, log_q)


def cross_entropy(statistics: Statistics, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(smoothed cross-entropy plus z-loss, the plain one); 0 where ignored, nats, [N] each  (6.1, 6.2)."""
    logits = torch.cat([statistics.support * objective.temperature, statistics.rest_1[:, None]], dim=1)
    log_total = logits.logsumexp(1)
    smoothing = objective.label_smoothing
    plain = log_total - statistics.label
    value = log_total - (1 - smoothing) * statistics.label
    if smoothing:
        value = value - smoothing * statistics.mean
    if objective.z_loss:
        value = value + objective.z_loss * log_total.square()
    return torch.where(labels >= 0, value, 0.0), torch.where(labels >= 0, plain, 0.0)


def position_losses(
    statistics: Statistics, positions: Positions, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """(KD with its T^2, CE of the loss, plain CE) of each position, unweighted, [N] each  (1.1).

    KD is 0 where the record does not count: its statistics are masked before the distillation, since a record
    of nothing has no logarithm.
    """
    trained, plain = cross_entropy(statistics, positions.labels, objective)
    if positions.targets is None or objective.kd_weight == 0:
        return torch.zeros_like(plain), trained, plain
    recorded = positions.recorded
    kd = distillation(statistics.where(recorded), positions.targets, objective) * objective.temperature**2
    return torch.where(recorded, kd, 0.0), trained, plain


def differentiate(
    statistics: Statistics,
    positions: Positions,
    objective: Objective,
    *,
    vocabulary_size: int,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, LogitGradient | None]:
    """The weighted sum of the objective, its parts per position, and its gradient for every logit.

    Args:
        statistics: of N positions, detached.
        positions: these positions.
        objective: resolved.
        vocabulary_size: V, the true one.
        needs_gradient: whether to make the gradient.

    Returns:
        (scalar loss, kd [N], plain ce [N], gradient or None), all detached.
    """
    # The forward of an autograd Function runs without gradients; these small tensors want them.
    with torch.set_grad_enabled(needs_gradient):
        leaves = Statistics(*(value.detach().requires_grad_(needs_gradient) for value in statistics))
        kd, trained_ce, ce = position_losses(leaves, positions, objective)
        per_position = objective.ce_weight * positions.ce_weights * trained_ce
        if objective.kd_weight:
            per_position = per_position + objective.kd_weight * positions.kd_weights * kd
        loss = per_position.sum()
    if not needs_gradient:
        return loss, kd, ce, None
    found = torch.autograd.grad(loss, list(leaves), allow_unused=True)
    gradients = Statistics(
        *(
            torch.zeros_like(leaf) if value is None else value
            for leaf, value in zip(leaves, found, strict=True)
        )
    )
    gradient = logit_gradient(
        gradients, positions.ids, temperature=objective.temperature, vocabulary_size=vocabulary_size
    )
    return loss.detach(), kd.detach(), ce.detach(), gradient


def top_agreement(
    statistics: Statistics, rest_maximum: Tensor, targets: SparseTargets | None, temperature: float
) -> Tensor:
    """1 where the student's most likely id is the teacher's, [N]; 0 where the record has no head.

    Args:
        statistics: of these positions; column 0 of the support is the teacher's most likely id.
        rest_maximum: [N], the largest logit outside the support, -inf where nothing is outside.
        targets: the record, or None.
        temperature: T.
    """
    support = statistics.support
    if targets is None or targets.head_size == 0:
        return torch.zeros_like(statistics.rest_t)
    best = torch.maximum(support.amax(1), rest_maximum / temperature)
    return ((targets.ids[:, 0] >= 0) & (support[:, 0] >= best)).to(support.dtype)
