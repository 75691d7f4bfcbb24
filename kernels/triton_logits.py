"""What the row kernels of the loss and of the teacher's record share: from raw products to logits to sums.

V columns of a row, z = softcap(scale * (product + bias)), T temperature.
"""

# Annotations of a kernel's arguments are instructions to Triton's compiler, so they cannot serve the checker.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def transform_product(product, bias, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """(z, dz/dproduct) of raw products; -inf stays -inf with slope 0."""
    raw = scale * (product + bias)
    slope = tl.full(raw.shape, 1.0, tl.float32) * scale
    if HAS_SOFTCAP:
        # Masked before the operation: tanh(-inf) would bring a punched entry back as -softcap.
        hole = raw == float("-inf")
        scaled = tl.where(hole, 0.0, raw / softcap)
        # exp of a negative number cannot overflow.
        decay = tl.exp(-2.0 * tl.abs(scaled))
        size = (1.0 - decay) / (1.0 + decay)
        tanh = tl.where(scaled < 0, -size, size)
        raw = tl.where(hole, float("-inf"), softcap * tanh)
        slope = tl.where(hole, 0.0, slope * (1.0 - tanh * tanh))
    return raw, slope


@triton.jit
def squared(power, SQUARINGS: tl.constexpr):
    """power^(2^SQUARINGS)."""
    for _ in tl.static_range(SQUARINGS):
        power = power * power
    return power


@triton.jit
def streamed_sums(
    slab_row,
    bias_ptr,
    slab_stride,
    columns,  # V
    bias_columns,  # of the bias that may be read: V, or more where it is padded
    scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SQUARINGS: tl.constexpr,  # log2 T; -1 stands for any other T
    NEEDS_TOTAL: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One read of a row, lane by lane, [BLOCK_V] each; lane j sees every BLOCK_V-th column from the j-th.

    Returns (maximum of z; sum of exp((z - maximum) / T), 0 where T is 1; sum of exp(z - maximum); sum of
    finite z where NEEDS_TOTAL). A lane of nothing but -inf has the maximum -inf and sums of 0. A lane that
    meets NaN has sums of NaN, whatever else it meets.
    """
    lane = tl.arange(0, BLOCK_V)
    maximum = tl.full([BLOCK_V], float("-inf"), tl.float32)
    sum_t = tl.zeros([BLOCK_V], tl.float32)
    sum_1 = tl.zeros([BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, columns, BLOCK_V):
        column = start + lane
        # Read to the end of the padded row, which is aligned, so that an odd vocabulary is read as fast.
        products = tl.load(slab_row + column, mask=column < slab_stride, other=float("-inf"))
        products = tl.where(column < columns, products, float("-inf"))
        bias = tl.zeros([BLOCK_V], tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=column < bias_columns, other=0.0)
        logits, _ = transform_product(products, bias, scale, softcap, HAS_SOFTCAP)
        if NEEDS_TOTAL:
            total += tl.where(logits > float("-inf"), logits, 0.0)
        # One exponential serves a lane, that of the lower less the higher of old maximum and new logit.
        # -inf - -inf is NaN: a lane that has seen nothing yet subtracts 0.
        # Without the propagation the larger of a number and NaN is the number, and a diverged row would look
        # like a sound one.
        higher = tl.maximum(maximum, logits, propagate_nan=tl.PropagateNan.ALL)
        lower = tl.minimum(maximum, logits, propagate_nan=tl.PropagateNan.ALL)
        lower -= tl.where(higher > float("-inf"), higher, 0.0)
        rises = logits > maximum
        power = tl.exp(lower * inverse_temperature)
        if SQUARINGS != 0:
            sum_t = tl.where(rises, sum_t * power + 1.0, sum_t + power)
        power = squared(power, SQUARINGS) if SQUARINGS >= 0 else tl.exp(lower)
        sum_1 = tl.where(rises, sum_1 * power + 1.0, sum_1 + power)
        maximum = higher
    return maximum, sum_t, sum_1, total


@triton.jit
def joined_lanes(maximum, sums, highest, inverse_temperature):
    """A row's sum, relative to `highest`, from its lanes' sums; NaN where one of them is.

    `highest` is the largest of the lanes' maxima that is a number: tl.max passes over NaN.
    """
    shift = tl.where(highest > float("-inf"), highest, 0.0)
    return tl.sum(sums * tl.exp((maximum - shift) * inverse_temperature), 0)
