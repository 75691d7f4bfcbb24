"""The objective between the two reads of a slab, in one kernel where it is forward KL and cross-entropy.

The plain functions (kernels/blocks.py, kernels/divergence.py) do the same in some sixty launches a slab. A
test holds the two equal.

C positions, K support entries, k head, n draws, T temperature.
"""

# Annotations of a kernel's arguments are instructions to Triton's compiler, so they cannot serve the checker.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from sparsekd.kernels.blocks import Assessment, Rest, assess
from sparsekd.kernels.inputs import Positions
from sparsekd.kernels.objective import Objective
from sparsekd.kernels.partial import Reading, RestSums
from sparsekd.kernels.statistics import LogitGradient
from sparsekd.kernels.triton_rows import warps_of_support

FUSED_MODES = ("tail_bucket", "sampled")


@triton.jit
def _log_sum(terms, other):
    """log(sum(exp(terms)) + exp(other)); 0 where all are -inf, as at a dropped position; NaN where one is."""
    # These maxima know nothing of NaN, which the sum keeps: so it alone says whether there is anything.
    highest = tl.maximum(tl.max(terms, 0), other)
    shift = tl.where(highest > float("-inf"), highest, 0.0)
    total = tl.sum(tl.exp(terms - shift), 0) + tl.exp(other - shift)
    return tl.where(total == 0, 0.0, tl.log(tl.where(total == 0, 1.0, total)) + shift)


@triton.jit
def assess_kernel(
    support_ptr,  # float32 [C, K], z at the ids; -inf at padding
    label_logit_ptr,  # float32 [C]
    maximum_ptr,  # float32 [C], of the rest
    sum_t_ptr,  # float32 [C], relative to it
    sum_1_ptr,  # float32 [C]
    total_ptr,  # float32 [C], sum of z outside the support
    ids_ptr,  # int64 [C, K], -1 at padding and where the record does not count
    labels_ptr,  # int64 [C]
    ce_weights_ptr,  # float32 [C]
    kd_weights_ptr,  # float32 [C]
    head_logprobs_ptr,  # float32 [C, k]; read where HAS_TEACHER
    tail_counts_ptr,  # float32 [C, draws]; read where SAMPLED
    log_rest_ptr,  # float32 [C]
    entropy_ptr,  # float32 [C]
    loss_ptr,  # float32 [C] out, weighted
    kd_ptr,  # float32 [C] out
    ce_ptr,  # float32 [C] out
    agreement_ptr,  # float32 [C] out
    rest_t_ptr,  # float32 [C] out, logsumexp
    rest_1_ptr,  # float32 [C] out
    by_rest_t_ptr,  # float32 [C] out, the gradient as in LogitGradient
    by_rest_1_ptr,  # float32 [C] out
    uniform_ptr,  # float32 [C] out
    by_support_ptr,  # float32 [C, K] out
    by_label_ptr,  # float32 [C] out
    entries,  # K
    head_size,  # k
    draws,  # columns of the counts
    vocabulary_size,
    kd_weight,
    ce_weight,
    temperature,
    label_smoothing,
    z_loss,
    HAS_TEACHER: tl.constexpr,
    SAMPLED: tl.constexpr,
    HAS_HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # One number of a row is a vector of one: the interpreter takes no scalar conditions.
    one = row + tl.arange(0, 1)
    column = tl.arange(0, BLOCK_K)
    inside = column < entries
    place = row * entries + column
    ids = tl.load(ids_ptr + place, mask=inside, other=-1)
    present = ids >= 0
    of_ce, of_kd = tl.load(ce_weights_ptr + one), tl.load(kd_weights_ptr + one)
    recorded = of_kd != 0
    kept = recorded | (of_ce != 0)
    label = tl.load(labels_ptr + one)

    # A dropped position may hold anything: it reads as zeros, and comes out as zeros.
    support = tl.load(support_ptr + place, mask=inside, other=float("-inf"))
    support = tl.where(kept & present, support, float("-inf"))
    maximum = tl.load(maximum_ptr + one)
    sum_1 = tl.load(sum_1_ptr + one)
    # 0 where nothing is outside, else 1 at least, or NaN, of which the maximum may know nothing.
    some = kept & (sum_1 != 0)
    shift = tl.where(some, maximum, 0.0)
    rest_1 = tl.where(some, tl.log(tl.where(some, sum_1, 1.0)) + shift, float("-inf"))
    log_sum_t = tl.log(tl.where(some, tl.load(sum_t_ptr + one), 1.0))
    rest_t = tl.where(some, log_sum_t + shift / temperature, float("-inf"))
    total = tl.where(kept, tl.load(total_ptr + one), 0.0)
    mean = (total + tl.sum(tl.where(support > float("-inf"), support, 0.0), 0)) / vocabulary_size

    # The student at 1 and the cross-entropy (6.1, 6.2).
    labelled = kept & (label >= 0)
    total_1 = _log_sum(support, rest_1)
    plain = total_1 - tl.where(labelled, tl.load(label_logit_ptr + one), 0.0)
    smoothed = plain + label_smoothing * (total_1 - plain - mean)
    ce = tl.where(labelled, smoothed + z_loss * total_1 * total_1, 0.0)
    by_ce = tl.where(labelled, of_ce * ce_weight, 0.0)
    by_total_1 = by_ce * (1.0 + 2.0 * z_loss * total_1)
    uniform = -by_ce * label_smoothing / vocabulary_size
    by_rest_1 = by_total_1 * tl.exp(rest_1 - total_1)
    by_support = by_total_1 * tl.exp(support - total_1) + uniform

    kd = tl.zeros([1], tl.float32)
    by_rest_t = tl.zeros([1], tl.float32)
    if HAS_TEACHER:
        # The student and the teacher at T (3.1, 3.2).
        scaled = support / temperature
        total_t = _log_sum(scaled, rest_t)
        in_head = present & (column < head_size)
        stored = tl.load(head_logprobs_ptr + row * head_size + column, mask=column < head_size, other=0.0)
        head = tl.where(in_head, stored / temperature, float("-inf"))
        log_rest = tl.load(log_rest_ptr + one)
        total_p = _log_sum(head, log_rest)
        log_p_rest = log_rest - total_p
        p_rest = tl.exp(log_p_rest)
        target = tl.exp(head - total_p)
        log_q = tl.where(kept & present, scaled - total_t, 0.0)
        if SAMPLED:  # (5.2)
            drawn = present & (column >= head_size)
            counts = tl.load(
                tail_counts_ptr + row * draws + column - head_size,
                mask=inside & (column >= head_size),
                other=0.0,
            )
            number = tl.sum(counts, 0)
            target = tl.where(drawn, p_rest * counts / tl.where(number > 0, number, 1.0), target)
            value = -tl.load(entropy_ptr + one) - tl.sum(target * log_q, 0)
            mass = tl.sum(target, 0)
            by_rest = mass * tl.exp(rest_t - total_t)
        else:  # (5.1) with (4.1)
            # Probability 0 adds nothing, and its log is not read.
            log_p = tl.where(head > float("-inf"), head - total_p, 0.0)
            value = tl.sum(target * (log_p - log_q), 0)
            has_rest = log_rest > float("-inf")
            log_ratio = tl.where(has_rest, log_p_rest, 0.0) - tl.where(has_rest, rest_t - total_t, 0.0)
            value += p_rest * log_ratio
            mass = tl.sum(target, 0) + p_rest
            by_rest = mass * tl.exp(rest_t - total_t) - p_rest
        # A record that does not count reads as one of a rest alone: finite, so that its weight of 0 wins.
        kd = tl.where(recorded, value, 0.0) * temperature * temperature
        factor = tl.where(recorded, of_kd * kd_weight, 0.0) * temperature
        by_rest_t = factor * tl.where(some, by_rest, 0.0)
        by_support += factor * (mass * tl.exp(scaled - total_t) - target)

    loss = kd_weight * kd * of_kd + by_ce * ce
    tl.store(loss_ptr + one, tl.where(kept, loss, 0.0))
    tl.store(kd_ptr + one, kd)
    tl.store(ce_ptr + one, tl.where(labelled, plain, 0.0))
    tl.store(rest_t_ptr + one, tl.where(kept, rest_t, 0.0))
    tl.store(rest_1_ptr + one, tl.where(kept, rest_1, 0.0))
    tl.store(by_rest_t_ptr + one, by_rest_t)
    tl.store(by_rest_1_ptr + one, by_rest_1)
    tl.store(uniform_ptr + one, uniform)
    tl.store(by_label_ptr + one, -by_ce * (1.0 - label_smoothing))
    tl.store(by_support_ptr + place, tl.where(present, by_support, 0.0), mask=inside)
    agreement = tl.zeros([1], tl.float32)
    if HAS_HEAD:
        first = tl.max(tl.where(present & (column == 0), support, float("-inf")), 0)
        best = tl.maximum(tl.max(support, 0), tl.where(some, maximum, float("-inf")))
        # No id is the most likely one where a logit is NaN.
        agrees = recorded & (first >= best) & (total_1 == total_1)
        agreement = tl.where(agrees, 1.0, 0.0)
    tl.store(agreement_ptr + one, agreement)


def is_fused(objective: Objective) -> bool:
    """Whether `assess_kernel` knows the objective."""
    plain = objective.divergence == "forward_kl" and objective.target_mode in FUSED_MODES
    return objective.kd_weight == 0 or plain


def assess_fused(
    reading: Reading,
    sums: RestSums,
    positions: Positions,
    objective: Objective,
    *,
    vocabulary_size: int,
    needs_gradient: bool,
) -> Assessment:
    """As `assess`: in one kernel where `is_fused`, else by the plain functions."""
    if not is_fused(objective):
        return assess(
            reading,
            sums,
            positions,
            objective,
            vocabulary_size=vocabulary_size,
            needs_gradient=needs_gradient,
        )
    count, entries = positions.ids.shape
    support, targets = reading.support, positions.targets
    has_teacher = objective.kd_weight != 0
    sampled = has_teacher and objective.target_mode == "sampled"
    head_size = 0 if targets is None else targets.head_size
    # Where there is no record its pointers are not read.
    record = (support,) * 4
    if targets is not None and has_teacher:
        record = (targets.head_logprobs, targets.tail_counts, targets.log_rest, targets.entropy)
    loss, kd, ce, agreement, rest_t, rest_1 = support.new_empty(6, count)
    by_rest_t, by_rest_1, uniform, by_label = support.new_empty(4, count)
    by_support = torch.empty_like(support)
    block_k = triton.next_power_of_2(max(entries, 1))
    assess_kernel[(count,)](
        support,
        reading.label,
        *sums,
        positions.ids,
        positions.labels,
        positions.ce_weights,
        positions.kd_weights,
        *(value.contiguous() for value in record),
        loss,
        kd,
        ce,
        agreement,
        rest_t,
        rest_1,
        by_rest_t,
        by_rest_1,
        uniform,
        by_support,
        by_label,
        entries,
        head_size,
        0 if targets is None else targets.tail_counts.shape[1],
        vocabulary_size,
        objective.kd_weight,
        objective.ce_weight,
        objective.temperature,
        objective.label_smoothing,
        objective.z_loss,
        HAS_TEACHER=has_teacher,
        SAMPLED=sampled,
        HAS_HEAD=head_size > 0,
        BLOCK_K=block_k,
        num_warps=warps_of_support(block_k),
    )
    gradient = LogitGradient(by_rest_t, by_rest_1, uniform, by_support, by_label)
    rest = Rest(rest_t, rest_1, sums.maximum)
    return Assessment(loss.sum(), kd, ce, agreement, rest, gradient if needs_gradient else None)
