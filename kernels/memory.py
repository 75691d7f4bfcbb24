"""How many positions an implementation takes at a time, and the memory that follows: plain numbers, no torch.

The implementations read their chunks from here and `plan` its figures, so that the two cannot part.

N positions, C positions of a chunk or slab, B positions of the gradient buffer, V vocabulary, H hidden.
"""

import math

# `torch`: one chunk of float32 logits is to stay in a core's second-level cache (2 MB); fewer than 128
# positions make the weight gradient's product slow, more than 1024 gain nothing. Measured on one core,
# V = 2048, H = 256.
CHUNK_LOGITS = 512 * 1024
CHUNK_RANGE = (128, 1024)

# `triton`: up to H/2 positions of float32 logits are no larger than the bfloat16 weight gradient; 512 to 2048
# keep cuBLAS busy; gradients of 8192 positions amortise the weight gradient's passes.
SLAB_RANGE = (512, 2048)
BUFFER_POSITIONS = 8192
BUFFER_BYTES = 2560 * 1024 * 1024
# Rows start at multiples of 128 elements, so an odd vocabulary keeps aligned products.
ROW_ALIGNMENT = 128

# Elements widened at one time when a low-precision gradient is scaled: bounds each temporary to 64 MiB.
SCALE_ELEMENTS = 16 * 1024 * 1024

WIDE = 4  # bytes of a float32


def chunk_rule(vocabulary_size: int) -> int:
    """C of `torch`: positions per chunk when the caller does not say."""
    return min(max(CHUNK_LOGITS // vocabulary_size, CHUNK_RANGE[0]), CHUNK_RANGE[1])


def slab_rule(hidden_size: int) -> int:
    """C of `triton`: positions whose float32 logits exist at one time when the caller does not say."""
    return min(max(hidden_size // 2, SLAB_RANGE[0]), SLAB_RANGE[1])


def row_stride(vocabulary_size: int) -> int:
    """Elements from one row of `triton`'s slab and buffer to the next."""
    return math.ceil(vocabulary_size / ROW_ALIGNMENT) * ROW_ALIGNMENT


def buffer_rule(count: int, slab: int, row_bytes: int) -> int:
    """B of `triton`: positions whose gradient exists at one time, a multiple of C; buffers of like size.

    Args:
        count: N.
        slab: C.
        row_bytes: of one position's gradient.
    """
    most = max(slab, min(BUFFER_POSITIONS, BUFFER_BYTES // row_bytes))
    count = max(count, 1)
    buffers = math.ceil(count / most)
    return math.ceil(math.ceil(count / buffers) / slab) * slab


def chunk_of(
    impl: str, *, positions: int, vocabulary_size: int, hidden_size: int, chunk_positions: int | None
) -> int:
    """C: positions whose logits exist at one time in `torch` or `triton`."""
    rule = chunk_rule(vocabulary_size) if impl == "torch" else slab_rule(hidden_size)
    return min(chunk_positions or rule, max(positions, 1))


def peak_bytes(
    impl: str,
    *,
    positions: int,
    vocabulary_size: int,
    hidden_size: int,
    element_bytes: int,
    temperature: float,
    softcap: bool,
    chunk_positions: int | None,
) -> int:
    """Most bytes alive at one time in forward and backward of the loss, beyond its arguments.

    The gradients that it leaves are counted. What is K wide, or a number per position, is left out: far less.

    Args:
        impl: "torch" (on the CPU, some positions dropped) or "triton".
        positions: N.
        vocabulary_size: V.
        hidden_size: H.
        element_bytes: of hidden states and weight: 2 or 4.
        temperature: T of the objective.
        softcap: whether the head has one.
        chunk_positions: C; None takes the implementation's rule.

    Raises:
        ValueError: no formula for this implementation.
    """
    chunk = chunk_of(
        impl,
        positions=positions,
        vocabulary_size=vocabulary_size,
        hidden_size=hidden_size,
        chunk_positions=chunk_positions,
    )
    of_weight, of_hidden = vocabulary_size * hidden_size, positions * hidden_size
    if impl == "torch":
        # Logits, which become their gradient; at T != 1 the powers at T and their operand; a softcap's slope.
        slabs = 1 + (2 if temperature != 1.0 else 0) + (1 if softcap else 0)
        # Low-precision weights are widened as a whole. Kept positions are copied.
        widened = WIDE * of_weight if element_bytes < WIDE else 0
        forward = slabs * WIDE * chunk * vocabulary_size + widened + element_bytes * of_hidden
        forward += WIDE * (of_weight + of_hidden)
        # Both float32 gradients, the scaled one of hidden, and that of weight before and after its rounding.
        rounded = element_bytes * of_weight if element_bytes < WIDE else 0
        backward = WIDE * (of_weight + of_hidden) + element_bytes * of_hidden + WIDE * of_weight + rounded
        return max(forward, backward)
    if impl != "triton":
        raise ValueError(f"impl is {impl!r}, expected 'torch' or 'triton'")
    stride = row_stride(vocabulary_size)
    buffer = buffer_rule(positions, chunk, stride * element_bytes)
    # One buffer makes the weight's gradient at once; several add up in float32, which is rounded at the end.
    sums = (WIDE if element_bytes < WIDE else 0) if positions > buffer else 0
    gradients = element_bytes * (of_weight + of_hidden)
    forward = stride * (WIDE * chunk + element_bytes * min(buffer, max(positions, 1)))
    forward += gradients + sums * of_weight
    # The widened part of a low-precision gradient and its multiple.
    scaling = 2 * WIDE * min(SCALE_ELEMENTS, max(of_weight, of_hidden)) if element_bytes < WIDE else 0
    return max(forward, 2 * gradients + scaling)


def dense_bytes(positions: int, vocabulary_size: int) -> int:
    """Peak of distilling with whole logits: student's, teacher's and one gradient, float32 [N, V] each."""
    return 3 * WIDE * positions * vocabulary_size
