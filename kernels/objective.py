"""What is minimised, as plain data: the objective, the head's transform, and which combinations are legal.

No torch here: configuration is checked with these types before anything heavy is imported. The formulas
behind the names are in docs/losses.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsekd.kernels.temperature import check_temperature, same_temperature

DIVERGENCES: tuple[str, ...] = (
    "forward_kl",
    "reverse_kl",
    "total_variation",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
)
# Those that compare with a mixture of teacher and student, and so read `Objective.mixture`.
MIXTURE_DIVERGENCES: tuple[str, ...] = ("jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl")
TARGET_MODES: tuple[str, ...] = ("tail_bucket", "sampled", "renormalized", "truncated")
# `sampled` would be biased for a divergence that is not linear in the teacher; the sum over the head alone is
# no divergence at all, and only its forward form is in use.
FORWARD_KL_ONLY: tuple[str, ...] = ("sampled", "truncated")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of one position: kd_weight * KD + ce_weight * CE (docs/losses.md, 1).

    Attributes:
        kd_weight: factor of the distillation term; 0 makes the same program the CE-only baseline.
        ce_weight: factor of the cross-entropy with the true next token.
        divergence: one of `DIVERGENCES`.
        mixture: beta of Jensen-Shannon, in (0, 1); alpha of the skewed divergences, in [0, 1); not read by
            the others (docs/losses.md, 4).
        target_mode: one of `TARGET_MODES`, or "auto" until `resolve_objective` has seen the store.
        temperature: T of teacher and student in the distillation term; T^2 multiplies its value and gradient.
        label_smoothing: share of the label's mass spread evenly over the vocabulary, in [0, 1).
        z_loss: factor of the squared logsumexp of the logits, in the cross-entropy.
    """

    kd_weight: float
    ce_weight: float
    divergence: str
    mixture: float
    target_mode: str
    temperature: float
    label_smoothing: float
    z_loss: float


@dataclass(frozen=True, kw_only=True)
class HeadTransform:
    """How logits come from the head's matrix product: z = softcap(scale * (hidden @ weight.T + bias)).

    softcap(y) = c * tanh(y / c) with c = `softcap`, or y where `softcap` is None (Gemma caps, Cohere and
    Granite scale). Columns at and beyond `vocabulary_size` are padding of the embedding: they do not exist.
    """

    vocabulary_size: int
    scale: float
    softcap: float | None


def resolve_objective(
    objective: Objective, *, k: int, n: int, temperatures: Sequence[float], draw_temperature: float
) -> Objective:
    """Check an objective against a store's record and settle its "auto" target mode.

    Args:
        objective: what the user asked for.
        k: entries of the record's exact head.
        n: draws of the record's sampled tail.
        temperatures: the record's grid, at which it holds the rest's mass; between 1 and its highest
            temperature that mass is interpolated.
        draw_temperature: temperature at which the tail was drawn.

    Returns:
        The objective, its target mode one of `TARGET_MODES` whenever kd_weight > 0. "auto" becomes `sampled`
        for a record with draws and `tail_bucket` for one without. With kd_weight = 0 any store will do and
        the target mode stays as it is.

    Raises:
        ValueError: an illegal value or combination; the message names the argument and a legal alternative.
    """
    _check_numbers(objective)
    if objective.kd_weight == 0:
        return objective
    if k == 0 and n == 0:
        raise ValueError(
            f"kd_weight is {objective.kd_weight} but the store holds tokens only (k=0, n=0): "
            "capture a teacher first, or set kd_weight=0"
        )
    mode = objective.target_mode
    if mode == "auto":
        mode = "sampled" if n > 0 else "tail_bucket"
    resolved = replace(objective, target_mode=mode)
    check_combination(resolved, k=k, n=n)
    _check_draw_temperature(resolved, k=k, draw_temperature=draw_temperature)
    check_temperature(resolved.temperature, temperatures)
    return resolved


def _check_numbers(objective: Objective) -> None:
    """Raise for a value that is illegal with every store."""
    for name in ("kd_weight", "ce_weight", "z_loss"):
        value = getattr(objective, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, expected a finite number >= 0")
    if objective.kd_weight == 0 and objective.ce_weight == 0:
        raise ValueError(
            "kd_weight and ce_weight are both 0, so there is nothing to train: raise one of them"
        )
    if not (math.isfinite(objective.temperature) and objective.temperature > 0):
        raise ValueError(f"temperature is {objective.temperature}, expected a finite number > 0")
    if not 0 <= objective.label_smoothing < 1:
        raise ValueError(f"label_smoothing is {objective.label_smoothing}, expected a number in [0, 1)")
    if objective.divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {objective.divergence!r}, expected one of {', '.join(DIVERGENCES)}")
    if objective.target_mode not in (*TARGET_MODES, "auto"):
        raise ValueError(
            f"target_mode is {objective.target_mode!r}, expected one of auto, {', '.join(TARGET_MODES)}"
        )


def check_combination(objective: Objective, *, k: int, n: int) -> None:
    """Raise for a target mode that the record or the divergence does not allow, or an illegal mixture.

    Args:
        objective: its target mode settled.
        k: entries of the record's exact head.
        n: draws of the record's sampled tail.

    Raises:
        ValueError: naming the argument, what was found and a legal alternative.
    """
    mode = objective.target_mode
    if mode not in TARGET_MODES:
        raise ValueError(
            f"target_mode is {mode!r}, expected one of {', '.join(TARGET_MODES)}; "
            "resolve_objective settles 'auto'"
        )
    if mode == "sampled" and n == 0:
        raise ValueError(
            "target_mode is 'sampled' but the store holds no draws (n=0): use target_mode=tail_bucket"
        )
    if mode != "sampled" and k == 0:
        raise ValueError(
            f"target_mode is {mode!r} but the store has no exact head (k=0): use target_mode=sampled"
        )
    if mode in FORWARD_KL_ONLY and objective.divergence != "forward_kl":
        raise ValueError(
            f"divergence {objective.divergence!r} is not defined in target_mode {mode!r}: "
            f"use divergence=forward_kl{'' if k == 0 else ', or target_mode=tail_bucket'}"
        )
    if objective.divergence in MIXTURE_DIVERGENCES:
        _check_mixture(objective)


def needed_planes(objective: Objective, *, k: int, n: int, on_grid: bool) -> frozenset[str]:
    """Which planes of a store's teacher record the loss reads; a reader may leave the others undecoded.

    Args:
        objective: resolved.
        k: entries of the record's exact head.
        n: draws of the record's sampled tail.
        on_grid: whether the record's grid holds the objective's temperature; log R at another is interpolated
            with the rest's entropy.

    Returns:
        Some of head_ids, head_logprobs, tail_ids, tail_counts, log_rest, rest_entropy, entropy. None of them
        with kd_weight 0: the CE-only baseline is the same on a store with a teacher and on one without, and
        reports no agreement with a teacher.

    Raises:
        ValueError: the record does not allow the objective (`check_combination`).
    """
    if objective.kd_weight == 0:
        return frozenset()
    check_combination(objective, k=k, n=n)
    # The head's ids serve the agreement, too.
    planes = {"head_ids", "head_logprobs"} if k else set()
    if objective.target_mode == "sampled":
        # The gradient does without the entropy, the reported value does not.
        planes |= {"tail_ids", "tail_counts", "entropy"}
    # Without a head the rest is everything, whatever its sum.
    if k and objective.target_mode != "renormalized":
        planes |= {"log_rest"} if on_grid else {"log_rest", "rest_entropy"}
    return frozenset(planes)


def _check_mixture(objective: Objective) -> None:
    """Raise for a mixture at which the objective's divergence does not exist."""
    # At 0 a skewed divergence is the plain one, while Jensen-Shannon is 0 for every student.
    zero_is_legal = objective.divergence != "jensen_shannon"
    value = objective.mixture
    if not (0 < value < 1 or (zero_is_legal and value == 0)):
        raise ValueError(
            f"mixture is {value}, expected a number in {'[' if zero_is_legal else '('}0, 1) for divergence "
            f"{objective.divergence!r}"
        )


def _check_draw_temperature(objective: Objective, *, k: int, draw_temperature: float) -> None:
    """Raise where draws made at one temperature are asked to speak for another."""
    if objective.target_mode == "sampled" and not same_temperature(objective.temperature, draw_temperature):
        raise ValueError(
            f"target_mode 'sampled' needs temperature={draw_temperature:g}, at which the store's tail was "
            f"drawn, found {objective.temperature:g}: set temperature={draw_temperature:g}, or capture again "
            f"with that draw temperature{'' if k == 0 else ', or use target_mode=tail_bucket'}"
        )
