"""How much of the logits exists at one time, and the memory that follows: plain numbers, no torch.

The implementations take their sizes from here and `plan` its figures, so that the two cannot part.

N positions, C positions of a slab of logits, B positions of the gradient's buffer, W columns of a slice,
V vocabulary (of this rank), H hidden.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

# `torch` on a CPU: one slab of float32 logits is to stay in a core's second-level cache (2 MB), but with
# fewer than 256 positions the products read the weight too often (bfloat16, V = 32768, H = 256, 256 positions
# in all: 162, 142 and 133 ms in slabs of 64, 128 and 256); more than 1024 gain nothing. Measured on one core.
CACHED_LOGITS = 512 * 1024
CACHED_POSITIONS = (256, 1024)

# On a GPU: up to H/2 positions of float32 logits are no larger than the bfloat16 weight gradient; 512 to 2048
# keep cuBLAS busy; gradients of 8192 positions amortise the weight gradient's passes.
SLAB_POSITIONS = (512, 2048)
BUFFER_POSITIONS = 8192
BUFFER_BYTES = 4 * 1024 * 1024 * 1024
# Rows start at multiples of 128 elements, so an odd vocabulary keeps aligned products.
ROW_ALIGNMENT = 128

# Low-memory mode: columns of a slice, the widest that fits first.
SLICE_COLUMNS = (8192, 4096, 2048, 1024, 512, 256, 128, 64)

# Elements of a gradient that are float32 at one time on their way to low precision: 16 MiB.
SCALE_ELEMENTS = 4 * 1024 * 1024


class LossShape(NamedTuple):
    """What the memory of one call of the loss depends on.

    Attributes:
        positions: N.
        vocabulary_size: V, true rows of the weight; a rank's fair share where they are split over ranks.
        hidden_size: H.
        element_bytes: of hidden states and weight: 2, 4 or 8.
        temperature: T of the objective.
        softcap: whether the head has one.
        on_cpu: whether it runs on the CPU.
    """

    positions: int
    vocabulary_size: int
    hidden_size: int
    element_bytes: int
    temperature: float
    softcap: bool
    on_cpu: bool


class MemoryPlan(NamedTuple):
    """How one call of the loss is cut.

    Attributes:
        slab_positions: C, positions whose logits exist at one time; all of them where there are slices.
        buffer_positions: B, positions whose gradient goes into one product.
        separate_buffer: whether the gradient has memory of its own, or takes that of the logits.
        weight_in_backward: whether the weight's gradient is made from the one buffer in the backward pass.
        slice_columns: W of the low-memory mode, in which logits are made twice; 0 for whole rows.
        peak_bytes: most bytes alive at one time in forward and backward, beyond the arguments. The gradients
            that are left are counted. What is K wide, or a number per position, comes on top: far less.
            Where the graph is retained in backward, so does the hidden states' float32 gradient.
    """

    slab_positions: int
    buffer_positions: int
    separate_buffer: bool
    weight_in_backward: bool
    slice_columns: int
    peak_bytes: int


def plan_memory(
    impl: str, shape: LossShape, *, chunk_positions: int | None = None, memory_budget: int | None = None
) -> MemoryPlan:
    """The fastest cut whose peak stays within a budget.

    Args:
        impl: "torch" or "triton".
        shape: of the call.
        chunk_positions: C; None takes the implementation's rule. Does not go with a budget.
        memory_budget: bytes for `peak_bytes`; None takes the rule whatever it needs.

    Raises:
        ValueError: an unknown implementation, both arguments, or a budget that no cut keeps.
    """
    if impl not in ("torch", "triton"):
        raise ValueError(f"impl is {impl!r}, expected 'torch' or 'triton': no other has a formula")
    if chunk_positions is not None and memory_budget is not None:
        raise ValueError(
            f"memory_budget is {memory_budget} and chunk_positions {chunk_positions}, expected one of them: "
            "a budget chooses the chunks"
        )
    tried = []
    for plan in _plans(impl, shape, chunk_positions):
        if memory_budget is None or plan.peak_bytes <= memory_budget:
            return plan
        tried.append(plan.peak_bytes)
    raise ValueError(
        f"memory_budget is {memory_budget} bytes, expected at least {min(tried)}, the least that "
        f"impl='{impl}' needs for {shape.positions} positions, a vocabulary of {shape.vocabulary_size} and "
        f"hidden size {shape.hidden_size}: raise it, or take fewer positions in a micro-batch"
    )


DENSE = MemoryPlan(0, 0, False, False, 0, 0)
"""No cut: whole logits, as `reference` has them."""


def dense_bytes(positions: int, vocabulary_size: int) -> int:
    """Peak of distilling with whole logits: student's, teacher's and one gradient, float32 [N, V] each."""
    return 3 * 4 * positions * vocabulary_size


def _plans(impl: str, shape: LossShape, chunk_positions: int | None) -> Iterator[MemoryPlan]:
    """Yields cuts, the fastest first; each smaller than the one before in what it holds of the logits."""
    in_place = impl == "torch" and shape.on_cpu
    lowest, highest = CACHED_POSITIONS if in_place else SLAB_POSITIONS
    rule = CACHED_LOGITS // shape.vocabulary_size if in_place else shape.hidden_size // 2
    slab = chunk_positions or min(max(rule, lowest), highest)
    if in_place:
        yield _slabs(impl, shape, slab, slab, separate=False)
    else:
        stride_bytes = row_stride(shape.vocabulary_size) * shape.element_bytes
        most = max(slab, min(BUFFER_POSITIONS, BUFFER_BYTES // stride_bytes))
        buffer = balanced(shape.positions, most, slab)
        yield _slabs(impl, shape, slab, buffer, separate=True)
        # Each halving adds a pass over the weight gradient; several are cheaper than a fourth product.
        while buffer > lowest:
            buffer = balanced(shape.positions, max(buffer // 2, lowest), lowest)
            yield _slabs(impl, shape, lowest, buffer, separate=True)
    for columns in SLICE_COLUMNS:
        if columns < shape.vocabulary_size or columns == SLICE_COLUMNS[-1]:
            yield _slices(impl, shape, columns)


def row_stride(vocabulary_size: int) -> int:
    """Elements from one row of a GPU's slab and buffer to the next."""
    return math.ceil(vocabulary_size / ROW_ALIGNMENT) * ROW_ALIGNMENT


def balanced(positions: int, most: int, slab: int) -> int:
    """B: a multiple of C, at most about `most`, so that all buffers are of like size."""
    count = max(positions, 1)
    buffers = math.ceil(count / max(most, 1))
    return math.ceil(math.ceil(count / buffers) / slab) * slab


class _Widths(NamedTuple):
    """Bytes per element of what an implementation makes."""

    wide: int  # logits and sums
    operand: int  # what enters the products
    widened: int  # of an operand's wide copy: 0 where it enters as it is
    logits: int  # of everything as large as the logits at one time, `wide` and its multiples


def _widths(impl: str, shape: LossShape) -> _Widths:
    wide = max(shape.element_bytes, 4)
    # On a CPU `torch` widens low-precision operands; Triton's interpreter does not.
    widens = impl == "torch" and shape.on_cpu and shape.element_bytes < wide
    # `torch` keeps the powers at T beside those at 1, and the slope of a softcap.
    tensors = 1 + (impl == "torch") * ((shape.temperature != 1.0) + shape.softcap)
    return _Widths(wide, wide if widens else shape.element_bytes, wide if widens else 0, wide * tensors)


def _slabs(impl: str, shape: LossShape, slab: int, buffer: int, *, separate: bool) -> MemoryPlan:
    """The default mode, whole rows of the vocabulary."""
    widths, element = _widths(impl, shape), shape.element_bytes
    of_weight = shape.vocabulary_size * shape.hidden_size
    of_hidden = shape.positions * shape.hidden_size
    stride = row_stride(shape.vocabulary_size) if separate else shape.vocabulary_size
    held = max(min(slab, shape.positions), 1)
    buffered = max(min(buffer, shape.positions), 1) * stride * widths.operand if separate else 0
    # The product of several buffers, or of wide operands, is a wide sum made in forward.
    in_backward = shape.positions <= buffer and widths.operand < widths.wide
    kept = buffered if in_backward else widths.wide * of_weight

    # `torch` takes the positions that count out first: a copy of the hidden states.
    arguments = widths.widened * of_weight + (element * of_hidden if impl == "torch" else 0)
    forward = arguments + widths.logits * held * stride + buffered + widths.wide * of_hidden
    forward += 0 if in_backward else kept
    if in_backward:
        # The hidden states once more, scaled, by way of wide ones that go before the weight's gradient comes.
        backward = 2 * element * of_hidden + max(widths.wide * of_hidden, element * of_weight)
    else:
        # A part of the weight's gradient is wide before its rounding.
        scaled = element * of_weight
        scaled += widths.wide * min(SCALE_ELEMENTS, of_weight) if element < widths.wide else 0
        backward = element * of_hidden + max(widths.wide * of_hidden, scaled)
    backward += kept
    return MemoryPlan(slab, buffer, separate, in_backward, 0, max(forward, backward))


def _slices(impl: str, shape: LossShape, columns: int) -> MemoryPlan:
    """The low-memory mode, slices of the vocabulary."""
    widths, element = _widths(impl, shape), shape.element_bytes
    held = min(columns, shape.vocabulary_size)
    of_hidden = shape.positions * shape.hidden_size
    separate = widths.operand < widths.wide
    logits = (widths.logits + (widths.operand if separate else 0)) * shape.positions * held
    # A slice of the weight, and of its gradient before the rounding.
    widened = widths.widened * (of_hidden + 2 * held * shape.hidden_size)
    arguments = element * of_hidden if impl == "torch" else 0
    gradients = element * shape.vocabulary_size * shape.hidden_size + widths.wide * of_hidden
    gradients += element * of_hidden if element < widths.wide else 0
    peak = arguments + logits + widened + gradients
    positions = max(shape.positions, 1)
    return MemoryPlan(positions, positions, separate, True, columns, peak)
