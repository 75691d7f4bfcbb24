"""What the store keeps of a teacher: head, draws, log R_T, entropies, true-token log-probability.

N positions, V vocabulary (true), H hidden, k head, n draws, G grid temperatures.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekd.kernels.objective import HeadTransform
from sparsekd.kernels.shard import VocabularyShard
from sparsekd.kernels.teacher_memory import positions_rule
from sparsekd.kernels.teacher_record import TeacherInputs, TeacherStatistics
from sparsekd.kernels.teacher_shard import own_columns
from sparsekd.kernels.teacher_torch import torch_statistics

IMPLEMENTATIONS: tuple[str, ...] = ("torch", "triton")


@torch.no_grad()
def teacher_statistics(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    labels: Tensor,
    head: HeadTransform,
    k: int,
    n: int,
    temperatures: Sequence[float],
    draw_temperature: float,
    uniforms: Tensor,
    chunk_positions: int | None = None,
    impl: str = "torch",
    shard: VocabularyShard | None = None,
) -> TeacherStatistics:
    """The teacher's record of N positions, from float32 logits, a chunk at a time.

    Both implementations follow docs/losses.md, 7, to the rounding of float32. The draws are decided by the
    uniforms alone; a draw differs between them only where its uniform lies that close to the edge between two
    ids. `triton` reads a chunk's logits twice and waits for the device once: positions that its bounds do not
    serve (more ties than its list has room for, a gap of 69 nats inside the rest) are done again by `torch`,
    and so is a whole call with a head of more than 2048 entries.

    Args:
        hidden: [N, H], bfloat16, float32 or float64 (`torch` only).
        weight: [V, H], dtype of `hidden`; rows from head.vocabulary_size on are padding.
        bias: [V], dtype of `hidden`, or None.
        labels: int64 [N], the true next token; -100 where there is none.
        head: softcap, scale and true vocabulary size.
        k: entries of the exact head, 0 to the vocabulary size.
        n: draws with replacement from the rest.
        temperatures: the grid of log R_T.
        draw_temperature: temperature of the draws and of `entropy`.
        uniforms: float64 [N, n] in [0, 1), one per draw; they decide the draws and nothing else does.
        chunk_positions: positions whose logits exist at one time; None takes `teacher_memory.positions_rule`.
        impl: "torch" (any device) or "triton" (CUDA).
        shard: which rows of the head `weight` and `bias` are, where it is split over ranks (`torch` only):
            every rank of the group calls with the same positions, and has the whole record.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value.
    """
    _check(hidden, weight, bias, labels, head, k, n, uniforms, chunk_positions)
    _check_rows(weight, head, shard)
    _expect(shard is None or impl == "torch", "impl", repr(impl), "'torch' for a head split over ranks")
    _check_implementation(impl, hidden)
    inputs = TeacherInputs(
        hidden=hidden,
        weight=weight,
        bias=bias,
        labels=labels,
        head=head,
        k=k,
        temperatures=temperatures,
        draw_temperature=draw_temperature,
        uniforms=uniforms,
        chunk_positions=chunk_positions or positions_rule(impl, head.vocabulary_size),
        shard=shard,
    )
    if impl == "torch":
        return torch_statistics(inputs)
    # Imported on use: Triton is not installed everywhere, and reads TRITON_INTERPRET when imported.
    from sparsekd.kernels.triton_teacher import triton_statistics

    return triton_statistics(inputs)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head: HeadTransform,
    k: int,
    n: int,
    uniforms: Tensor,
    chunk_positions: int | None,
) -> None:
    """Shapes, dtypes and numbers; nothing that reads values from the device."""
    count, rows, size = hidden.shape[0], weight.shape[0], head.vocabulary_size
    _expect(weight.dtype == hidden.dtype, "weight's dtype", weight.dtype, f"{hidden.dtype} as hidden")
    _expect(
        weight.shape[1] == hidden.shape[1], "weight's shape", tuple(weight.shape), f"[V, {hidden.shape[1]}]"
    )
    _expect(
        bias is None or bias.shape == (rows,), "bias", bias is not None and tuple(bias.shape), f"({rows},)"
    )
    _expect(labels.shape == (count,), "labels' shape", tuple(labels.shape), f"({count},)")
    _expect(labels.dtype == torch.int64, "labels' dtype", labels.dtype, "torch.int64")
    _expect(0 <= k <= size, "k", k, f"a number from 0 to the vocabulary size {size}")
    _expect(uniforms.shape == (count, n), "uniforms' shape", tuple(uniforms.shape), f"({count}, {n})")
    _expect(uniforms.dtype == torch.float64, "uniforms' dtype", uniforms.dtype, "torch.float64")
    _expect(
        chunk_positions is None or chunk_positions > 0,
        "chunk_positions",
        chunk_positions,
        "None or a number > 0",
    )


def _check_rows(weight: Tensor, head: HeadTransform, shard: VocabularyShard | None) -> None:
    """The weight has the rows of the true vocabulary, or a part of them."""
    rows, size = weight.shape[0], head.vocabulary_size
    if shard is None:
        _expect(
            0 < size <= rows, "head.vocabulary_size", size, f"a number from 1 to the weight's {rows} rows"
        )
        return
    found = own_columns(shard, rows, size)
    _expect(found > 0, "shard.start", shard.start, f"below the vocabulary size {size}, with rows behind it")


def _check_implementation(impl: str, hidden: Tensor) -> None:
    """The implementation exists and runs on this device and dtype."""
    _expect(impl in IMPLEMENTATIONS, "impl", repr(impl), f"one of {', '.join(IMPLEMENTATIONS)}")
    if impl != "triton":
        return
    _expect(
        hidden.dtype in (torch.bfloat16, torch.float32),
        "hidden's dtype",
        hidden.dtype,
        "bfloat16 or float32 for impl='triton'",
    )
    _expect(
        hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1",
        "hidden's device",
        hidden.device,
        "cuda for impl='triton' (or TRITON_INTERPRET=1 before the start): use impl='torch' elsewhere",
    )


def _expect(good: bool, argument: str, found: object, expected: str) -> None:
    if not good:
        raise ValueError(f"{argument} is {found}, expected {expected}")
