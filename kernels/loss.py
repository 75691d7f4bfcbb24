"""The public loss: one function, three implementations, one contract.

N positions, K stored entries, k head, n draws, V rows of the head's weight, H hidden.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.kernels.chunked import chunked_loss
from sparsekd.kernels.function import LossInputs, run_fused
from sparsekd.kernels.objective import HeadTransform, Objective, check_combination
from sparsekd.kernels.reference import reference_loss
from sparsekd.kernels.targets import SparseTargets

IMPLEMENTATIONS: tuple[str, ...] = ("reference", "torch", "triton")


class LossOutput(NamedTuple):
    """The summed loss and what it is made of.

    loss = sum over positions of weights * (kd_weight * kd + ce_weight * ce), with label smoothing and z-loss
    inside `loss` alone, so that `ce` compares between runs whatever they were trained with.

    Attributes:
        loss: float32 scalar, the weighted sum; differentiable in hidden, weight and bias.
        kd: float32 [N], nats times T^2, detached, unweighted; 0 where dropped and where kd_weight is 0.
        ce: float32 [N], -log q(label), nats, without label smoothing and z-loss, detached, unweighted; 0
            where dropped or where the label is ignored.
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
    _check_tensors(hidden, weight, bias, targets, labels, weights, head)
    _check_objective(objective, targets)
    _check_implementation(impl, hidden, chunk_positions)
    inputs = LossInputs(
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        labels=labels,
        weights=weights,
        objective=objective,
        head=head,
        chunk_positions=chunk_positions,
        hidden_gradient=hidden.requires_grad,
        weight_gradient=weight.requires_grad,
        bias_gradient=bias is not None and bias.requires_grad,
    )
    if impl == "reference":
        return LossOutput(*reference_loss(inputs))
    if impl == "torch":
        return LossOutput(*run_fused(chunked_loss, inputs))
    # Imported on use: Triton is not installed everywhere, and reads TRITON_INTERPRET when imported.
    from sparsekd.kernels.triton_loss import triton_loss

    return LossOutput(*run_fused(triton_loss, inputs))


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


def _expect(good: bool, argument: str, found: object, expected: str) -> None:
    if not good:
        raise ValueError(f"{argument} is {found}, expected {expected}")


def _check_tensors(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: SparseTargets | None,
    labels: Tensor,
    weights: Tensor,
    head: HeadTransform,
) -> None:
    """Shapes, dtypes, devices; nothing that reads values from the device."""
    _expect(hidden.ndim == 2, "hidden's shape", tuple(hidden.shape), "[positions, hidden size]")
    count, size = hidden.shape
    float_kinds = (torch.float32, torch.float64, torch.bfloat16)
    _expect(hidden.dtype in float_kinds, "hidden's dtype", hidden.dtype, "bfloat16, float32 or float64")
    _expect(
        weight.ndim == 2 and weight.shape[1] == size, "weight's shape", tuple(weight.shape), f"[rows, {size}]"
    )
    rows = weight.shape[0]
    _expect(
        0 < head.vocabulary_size <= rows,
        "head.vocabulary_size",
        head.vocabulary_size,
        f"a number from 1 to the weight's {rows} rows",
    )
    _expect(head.scale > 0, "head.scale", head.scale, "a number > 0")
    _expect(head.softcap is None or head.softcap > 0, "head.softcap", head.softcap, "None or a number > 0")
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("weight", weight, (rows, size), hidden.dtype),
        ("labels", labels, (count,), torch.int64),
        ("weights", weights, (count,), torch.float32),
    ]
    if bias is not None:
        expected.append(("bias", bias, (rows,), hidden.dtype))
    if targets is not None:
        _expect(targets.ids.ndim == 2, "targets.ids' shape", tuple(targets.ids.shape), "[positions, entries]")
        _expect(
            targets.head_logprobs.ndim == 2 and targets.head_size <= targets.ids.shape[1],
            "targets.head_logprobs' shape",
            tuple(targets.head_logprobs.shape),
            f"[{count}, k] with k <= {targets.ids.shape[1]}, the columns of targets.ids",
        )
        draws = targets.ids.shape[1] - targets.head_size
        expected += [
            ("targets.ids", targets.ids, (count, targets.ids.shape[1]), torch.int64),
            ("targets.head_logprobs", targets.head_logprobs, (count, targets.head_size), torch.float32),
            ("targets.tail_counts", targets.tail_counts, (count, draws), torch.float32),
            ("targets.log_rest", targets.log_rest, (count,), torch.float32),
            ("targets.entropy", targets.entropy, (count,), torch.float32),
        ]
    for name, tensor, shape, dtype in expected:
        _expect(tuple(tensor.shape) == shape, f"{name}'s shape", tuple(tensor.shape), str(shape))
        _expect(tensor.dtype == dtype, f"{name}'s dtype", tensor.dtype, str(dtype))
        _expect(
            tensor.device == hidden.device, f"{name}'s device", tensor.device, f"{hidden.device} as hidden"
        )


def _check_objective(objective: Objective, targets: SparseTargets | None) -> None:
    """The objective is resolved and the record holds what it reads."""
    if objective.kd_weight == 0:
        return
    _expect(targets is not None, "targets", None, f"a record, since kd_weight is {objective.kd_weight}")
    assert targets is not None
    k, n = targets.head_size, targets.tail_counts.shape[1]
    # The temperature was checked against the store's grid when the objective was resolved.
    check_combination(objective, k=k, n=n)


def _check_implementation(impl: str, hidden: Tensor, chunk_positions: int | None) -> None:
    """The implementation exists and runs on this device and dtype."""
    _expect(impl in IMPLEMENTATIONS, "impl", repr(impl), f"one of {', '.join(IMPLEMENTATIONS)}")
    _expect(
        chunk_positions is None or chunk_positions > 0,
        "chunk_positions",
        chunk_positions,
        "None or a number > 0",
    )
    if impl != "triton":
        return
    _expect(
        hidden.dtype != torch.float64, "hidden's dtype", hidden.dtype, "bfloat16 or float32 for impl='triton'"
    )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    _expect(
        hidden.is_cuda or interpreted,
        "hidden's device",
        hidden.device,
        "cuda for impl='triton' (or TRITON_INTERPRET=1 before the start): use impl='torch' elsewhere",
    )
