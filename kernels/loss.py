"""The public loss: one function, three implementations, one contract.

N positions, K stored entries, k head, n draws, V rows of the head's weight, H hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.targets import SparseTargets

IMPLEMENTATIONS: tuple[str, ...] = ("reference", "torch", "triton")


class LossOutput(NamedTuple):
    """The summed loss and what it is made of.

    loss = sum over positions of weights * (kd_weight * kd + ce_weight * ce).

    Attributes:
        loss: float32 scalar, the weighted sum; differentiable in hidden, weight and bias.
        kd: float32 [N], nats times T^2, detached, unweighted; 0 where dropped and where kd_weight is 0.
        ce: float32 [N], nats, with label smoothing and z-loss, detached, unweighted; 0 where dropped or
            where the label is ignored.
        agreement: float32 [N], 1 where the student's most likely id is the teacher's; 0 where dropped and
            where the record has no head.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    agreement: Tensor


def sparse_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    targets: SparseTargets | None,
    labels: Tensor,
    weights: Tensor,
    objective: Objective,
    head: HeadTransform,
    impl: str,
    chunk_positions: int | None = None,
) -> LossOutput:
    """Distillation from sparse teacher records plus cross-entropy, fused with the head.

    Args:
        hidden: [N, H], bfloat16 or float32 (float64 for `reference` and `torch`).
        weight: [V, H], the head's matrix, dtype of `hidden`; rows from head.vocabulary_size on are padding.
        bias: [V], dtype of `hidden`, or None.
        targets: the teacher's record; None only with kd_weight 0.
        labels: int64 [N], the true next token; -100 leaves a position out of the cross-entropy.
        weights: float32 [N], >= 0; 0 drops a position from everything.
        objective: resolved (`resolve_objective`).
        head: softcap, scale and true vocabulary size.
        impl: "reference" (dense, for checking), "torch" (chunked, any device) or "triton" (CUDA).
        chunk_positions: positions whose logits exist at one time; None takes the implementation's rule.

    Returns:
        `LossOutput`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, named with what was expected.
    """
    raise ValueError(f"impl is {impl!r}: being built")


def default_impl(device: torch.device) -> str:
    """The implementation for a device: "triton" on CUDA where Triton is installed, else "torch".

    The caller announces what it got; `sparse_kd_loss` itself never falls back.
    """
    if device.type != "cuda":
        return "torch"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "torch"
    return "triton"
