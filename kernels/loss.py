"""The public loss: one function, three implementations, one contract.

N positions, K stored entries, k head, n draws, V rows of the head's weight, H hidden.
"""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.kernels.blocks import Implementation
from sparsekd.kernels.function import run_fused
from sparsekd.kernels.inputs import LossInputs
from sparsekd.kernels.memory import DENSE, LossShape, MemoryPlan, plan_memory
from sparsekd.kernels.objective import HeadTransform, Objective, check_combination
from sparsekd.kernels.reference import reference_loss
from sparsekd.kernels.shard import VocabularyShard
from sparsekd.kernels.targets import SparseTargets, take_rows
from sparsekd.kernels.torch_block import TORCH
from sparsekd.kernels.values import check_values

IMPLEMENTATIONS: tuple[str, ...] = ("reference", "torch", "triton")


class LossOutput(NamedTuple):
    """The summed loss and what it is made of.

    loss = sum over positions of kd_weight * kd_weights * kd + ce_weight * ce_weights * ce, with label
    smoothing and z-loss inside `loss` alone, so that `ce` compares between runs whatever they were trained
    with.

    Of float32; for float64 inputs of float64.

    Attributes:
        loss: scalar, the weighted sum; differentiable in hidden, weight and bias.
        kd: [N], nats times T^2, detached, unweighted; 0 where kd_weights is 0 and where the
            objective's kd_weight is.
        ce: [N], -log q(label), nats, without label smoothing and z-loss, detached, unweighted; 0
            where ce_weights is 0 or the label is ignored.
        agreement: [N], 1 where the student's most likely id is the teacher's; 0 where kd_weights is 0
            and where the record has no head.
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
    ce_weights: Tensor,
    kd_weights: Tensor,
    objective: Objective,
    head: HeadTransform,
    impl: str,
    chunk_positions: int | None = None,
    memory_budget: int | None = None,
    shard: VocabularyShard | None = None,
    debug: bool = False,
) -> LossOutput:
    """Distillation from sparse teacher records plus cross-entropy, fused with the head.

    Args:
        hidden: [N, H], bfloat16 or float32 (float64 for `reference` and `torch`).
        weight: [V, H], the head's matrix, dtype of `hidden`; rows from head.vocabulary_size on are padding.
            With `shard` the rows of this rank.
        bias: [V], dtype of `hidden`, or None.
        targets: the teacher's record; None only with kd_weight 0. What stands in it where kd_weights is 0 is
            not read (`targets.NOTHING` is what to fill it with).
        labels: int64 [N], the true token; -100 leaves a position out of the cross-entropy.
        ce_weights: float32 [N], >= 0, of the cross-entropy; 0 leaves a position out of it.
        kd_weights: float32 [N], >= 0, of the distillation; 0 leaves a position out of it. Where both are 0 a
            position is dropped from everything.
        objective: resolved (`resolve_objective`).
        head: softcap, scale and true vocabulary size.
        impl: "reference" (dense, for checking), "torch" (any device) or "triton" (CUDA).
        chunk_positions: positions whose logits exist at one time; None takes the implementation's rule.
        memory_budget: bytes that the loss may take beyond its arguments, its gradients included; the fastest
            way that keeps it is chosen (`plan_memory`, which says what comes on top). None takes the rule,
            whatever it needs.
        shard: which rows of the vocabulary this rank holds, where the head is split over ranks; every rank
            gets the whole loss, the whole gradient of `hidden`, and the gradient of its own rows.
        debug: check also the values of record, labels and weights, which waits for the device.

    Returns:
        `LossOutput`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, named with what was expected.
    """
    _check_tensors(hidden, weight, bias, targets, labels, ce_weights, kd_weights, head, shard)
    _check_objective(objective, targets)
    _check_implementation(impl, hidden, chunk_positions, memory_budget, shard)
    if debug:
        check_values(
            targets,
            labels,
            ce_weights,
            kd_weights,
            vocabulary_size=head.vocabulary_size,
            objective=objective,
        )
    plan = _plan(impl, hidden, weight, objective, head, shard, chunk_positions, memory_budget)
    inputs = LossInputs(
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        labels=labels,
        ce_weights=ce_weights,
        kd_weights=kd_weights,
        objective=objective,
        head=head,
        shard=shard,
        plan=plan,
        hidden_gradient=hidden.requires_grad and torch.is_grad_enabled(),
        weight_gradient=weight.requires_grad and torch.is_grad_enabled(),
        bias_gradient=bias is not None and bias.requires_grad and torch.is_grad_enabled(),
    )
    if impl == "reference":
        return LossOutput(*reference_loss(inputs))
    if impl == "torch":
        return _of_kept_positions(inputs, TORCH)
    # Imported on use: Triton is not installed everywhere, and reads TRITON_INTERPRET when imported.
    from sparsekd.kernels.triton_block import TRITON

    # Dropped positions stay where they are, since taking them out would wait for the device: they get value
    # and gradient 0, but their hidden states must be finite, and they cost what the others do. The trainer
    # leaves them out beforehand, by indices made on the CPU, but for the few that fill up its batch.
    return LossOutput(*run_fused(TRITON, inputs))


def _of_kept_positions(inputs: LossInputs, implementation: Implementation) -> LossOutput:
    """The loss of the positions that are not dropped, taken out first: the others cost nothing, nor harm."""
    kept = inputs.kept.nonzero()[:, 0]
    count = inputs.hidden.shape[0]
    if kept.numel() == count:
        return LossOutput(*run_fused(implementation, inputs))
    loss, *values = run_fused(
        implementation,
        inputs._replace(
            hidden=inputs.hidden.index_select(0, kept),
            targets=take_rows(inputs.targets, kept),
            labels=inputs.labels[kept],
            ce_weights=inputs.ce_weights[kept],
            kd_weights=inputs.kd_weights[kept],
        ),
    )
    return LossOutput(loss, *(value.new_zeros(count).index_copy_(0, kept, value) for value in values))


def _plan(
    impl: str,
    hidden: Tensor,
    weight: Tensor,
    objective: Objective,
    head: HeadTransform,
    shard: VocabularyShard | None,
    chunk_positions: int | None,
    memory_budget: int | None,
) -> MemoryPlan:
    """How the call is cut; `reference` is not."""
    if impl == "reference":
        return DENSE
    columns = head.vocabulary_size
    if shard is not None:
        # A rank's fair share and not its own rows: all ranks must cut alike, to meet at every exchange.
        columns = -(-columns // dist.get_world_size(shard.group))
    shape = LossShape(
        positions=hidden.shape[0],
        vocabulary_size=columns,
        hidden_size=hidden.shape[1],
        element_bytes=hidden.element_size(),
        temperature=objective.temperature,
        softcap=head.softcap is not None,
        on_cpu=hidden.device.type == "cpu",
    )
    return plan_memory(impl, shape, chunk_positions=chunk_positions, memory_budget=memory_budget)


def default_impl(device: torch.device) -> str:
    """The implementation for a device: "triton" on CUDA where Triton is installed, else "torch".

    The caller announces what it got; `sparse_kd_loss` itself never falls back.
    """
    if device.type != "cuda":
        return "torch"
    try:
        import triton  # noqa: F401, whether it can be imported is the question
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
    ce_weights: Tensor,
    kd_weights: Tensor,
    head: HeadTransform,
    shard: VocabularyShard | None,
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
    if shard is None:
        _expect(
            0 < head.vocabulary_size <= rows,
            "head.vocabulary_size",
            head.vocabulary_size,
            f"a number from 1 to the weight's {rows} rows",
        )
    else:
        _expect(
            0 <= shard.start < head.vocabulary_size,
            "shard.start",
            shard.start,
            f"a number from 0 to {head.vocabulary_size - 1}: each rank holds a part of the true vocabulary",
        )
    _expect(head.scale > 0, "head.scale", head.scale, "a number > 0")
    _expect(head.softcap is None or head.softcap > 0, "head.softcap", head.softcap, "None or a number > 0")
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("weight", weight, (rows, size), hidden.dtype),
        ("labels", labels, (count,), torch.int64),
        ("ce_weights", ce_weights, (count,), torch.float32),
        ("kd_weights", kd_weights, (count,), torch.float32),
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


def _check_implementation(
    impl: str,
    hidden: Tensor,
    chunk_positions: int | None,
    memory_budget: int | None,
    shard: VocabularyShard | None,
) -> None:
    """The implementation exists and runs on this device and dtype."""
    _expect(impl in IMPLEMENTATIONS, "impl", repr(impl), f"one of {', '.join(IMPLEMENTATIONS)}")
    _expect(
        chunk_positions is None or chunk_positions > 0,
        "chunk_positions",
        chunk_positions,
        "None or a number > 0",
    )
    if impl == "reference":
        _expect(shard is None, "shard", shard, "None for impl='reference', which is dense in one process")
        _expect(memory_budget is None, "memory_budget", memory_budget, "None for impl='reference'")
        _expect(chunk_positions is None, "chunk_positions", chunk_positions, "None for impl='reference'")
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
