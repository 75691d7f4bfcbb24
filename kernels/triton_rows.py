"""Triton kernels for the elementwise part of the loss: no matrix products, no atomics.

They run in this order on a slab of raw products hidden @ weight.T (docs/losses.md, 8):
`prep` reads the support's and the label's logits, then punches the support out of the slab as -inf;
`stats` makes maximum, sums of powers and sum of what remains in one read;
`grad` writes the dense part of the gradient from a second read;
`fix` overwrites the support and the label.
Separate kernels, because none may read what another thread of the same program just wrote.

Where T is 1, 2 or 4 one exponential serves both temperatures: exp(z) = exp(z / T)^T, by SQUARINGS = log2 T
squarings; -1 stands for any other T.

C positions of the slab, K support entries, V columns of the slab, z = softcap(scale * (product + bias)),
u = z / T.
"""

# Annotations of a kernel's arguments are instructions to Triton's compiler, so they cannot serve the checker.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from sparsekd.kernels.triton_logits import joined_lanes, squared, streamed_sums, transform_product


def warps_of_support(block_k: int) -> int:
    """Warps of a kernel that works on the BLOCK_K support entries of a row: two to a thread, four spilled."""
    return min(max(block_k // 64, 1), 32)


@triton.jit
def prep_kernel(
    slab_ptr,  # float32 [C, stride]; support entries become -inf
    bias_ptr,  # float32 [V]
    ids_ptr,  # int64 [C, K], -1 where padded or in no column of the slab
    labels_ptr,  # int64 [C], negative where ignored or in no column of the slab
    support_ptr,  # float32 [C, K] out: z at the ids, -inf at padding
    support_slope_ptr,  # float32 [C, K] out: dz/dproduct there
    label_ptr,  # float32 [C] out: z at the label, -inf where there is none
    label_slope_ptr,  # float32 [C] out
    slab_stride,
    entries,  # K
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slab_row = slab_ptr + row * slab_stride
    column = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * entries + column, mask=column < entries, other=-1)
    present = ids >= 0
    products = tl.load(slab_row + ids, mask=present, other=0.0)
    bias = tl.zeros([BLOCK_K], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + ids, mask=present, other=0.0)
    logits, slope = transform_product(products, bias, scale, softcap, HAS_SOFTCAP)
    out = row * entries + column
    tl.store(support_ptr + out, tl.where(present, logits, float("-inf")), mask=column < entries)
    tl.store(support_slope_ptr + out, tl.where(present, slope, 0.0), mask=column < entries)

    # A label inside the support is taken from the registers above: its slab entry is being punched out.
    # (One lane instead of a scalar: the interpreter takes no scalar masks.)
    lane = tl.arange(0, 1)
    label = tl.load(labels_ptr + row + lane)
    hit = present & (ids == label)
    inside = tl.sum(hit.to(tl.int32), 0) + lane > 0
    outside = (label >= 0) & (lane == 0) & ~inside
    product = tl.load(slab_row + label, mask=outside, other=0.0)
    label_bias = tl.zeros([1], tl.float32)
    if HAS_BIAS:
        label_bias = tl.load(bias_ptr + label, mask=outside, other=0.0)
    lone, lone_slope = transform_product(product, label_bias, scale, softcap, HAS_SOFTCAP)
    from_support = tl.sum(tl.where(hit, logits, 0.0), 0)
    from_support_slope = tl.sum(tl.where(hit, slope, 0.0), 0)
    value = tl.where(inside, from_support, tl.where(outside, lone, float("-inf")))
    value_slope = tl.where(inside, from_support_slope, tl.where(outside, lone_slope, 0.0))
    tl.store(label_ptr + row + lane, value)
    tl.store(label_slope_ptr + row + lane, value_slope)
    tl.store(slab_row + ids, tl.full([BLOCK_K], float("-inf"), tl.float32), mask=present)


@triton.jit
def stats_kernel(
    slab_ptr,  # float32 [C, stride], punched
    bias_ptr,  # float32 [V]
    maximum_ptr,  # float32 [C] out: largest z outside the support, -inf where nothing is outside
    sum_t_ptr,  # float32 [C] out: sum of exp((z - maximum) / T) outside the support
    sum_1_ptr,  # float32 [C] out: sum of exp(z - maximum) outside the support
    total_ptr,  # float32 [C] out: sum of z outside the support; 0 unless NEEDS_TOTAL
    slab_stride,
    columns,  # V
    scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SQUARINGS: tl.constexpr,
    NEEDS_TOTAL: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slab_row = slab_ptr + row * slab_stride
    maximum, sum_t, sum_1, total = streamed_sums(
        slab_row,
        bias_ptr,
        slab_stride,
        columns,
        columns,
        scale,
        softcap,
        inverse_temperature,
        HAS_BIAS,
        HAS_SOFTCAP,
        SQUARINGS,
        NEEDS_TOTAL,
        BLOCK_V,
    )
    highest = tl.max(maximum, 0)
    row_1 = joined_lanes(maximum, sum_1, highest, 1.0)
    row_t = row_1
    if SQUARINGS != 0:
        row_t = joined_lanes(maximum, sum_t, highest, inverse_temperature)
    tl.store(maximum_ptr + row, highest)
    tl.store(sum_t_ptr + row, row_t)
    tl.store(sum_1_ptr + row, row_1)
    tl.store(total_ptr + row, tl.sum(total, 0))


@triton.jit
def grad_kernel(
    slab_ptr,  # float32 [C, stride], punched
    bias_ptr,  # float32 [V]
    gradient_ptr,  # bfloat16 or float32 [C, stride] out: d loss / d product, dense part
    rest_t_ptr,  # float32 [C]
    rest_1_ptr,  # float32 [C]
    by_rest_t_ptr,  # float32 [C], coefficient of exp(u - rest_t)
    by_rest_1_ptr,  # float32 [C], coefficient of exp(z - rest_1)
    uniform_ptr,  # float32 [C], added at every true column
    slab_stride,
    gradient_stride,
    columns,  # V
    scale,
    softcap,
    temperature,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SQUARINGS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = column < columns
    products = tl.load(slab_ptr + row * slab_stride + column, mask=column < slab_stride, other=float("-inf"))
    products = tl.where(inside, products, float("-inf"))
    bias = tl.zeros([BLOCK_V], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    logits, slope = transform_product(products, bias, scale, softcap, HAS_SOFTCAP)
    rest_1 = tl.load(rest_1_ptr + row)
    rest_1 = tl.where(rest_1 > float("-inf"), rest_1, 0.0)
    by_rest_1 = tl.load(by_rest_1_ptr + row)
    by_rest_t = tl.load(by_rest_t_ptr + row)
    uniform = tl.load(uniform_ptr + row)
    # A coefficient of 0 (a dropped position) wins over an exponential that overflowed.
    if SQUARINGS == 0:
        by_rest_1 += by_rest_t
        value = tl.where(by_rest_1 == 0, 0.0, by_rest_1 * tl.exp(logits - rest_1)) + uniform
    else:
        rest_t = tl.load(rest_t_ptr + row)
        rest_t = tl.where(rest_t > float("-inf"), rest_t, 0.0)
        power = tl.exp(logits * inverse_temperature - rest_t)
        value = tl.where(by_rest_t == 0, 0.0, by_rest_t * power) + uniform
        if SQUARINGS < 0:
            power_1 = tl.exp(logits - rest_1)
        else:
            # exp(z - rest_1); the factor is between 1 and V^(T - 1).
            power_1 = squared(power, SQUARINGS) * tl.exp(temperature * rest_t - rest_1)
        value += tl.where(by_rest_1 == 0, 0.0, by_rest_1 * power_1)
    gradient = gradient_ptr + row * gradient_stride + column
    # Beyond the true columns the buffer holds what nobody reads.
    tl.store(gradient, (value * slope).to(gradient_ptr.dtype.element_ty), mask=column < gradient_stride)


@triton.jit
def fix_kernel(
    gradient_ptr,  # bfloat16 or float32 [C, stride]; support and label are overwritten
    ids_ptr,  # int64 [C, K]
    labels_ptr,  # int64 [C]
    support_gradient_ptr,  # float32 [C, K], d loss / dz at the ids
    support_slope_ptr,  # float32 [C, K]
    label_logit_ptr,  # float32 [C]
    label_slope_ptr,  # float32 [C]
    rest_t_ptr,  # float32 [C]
    rest_1_ptr,  # float32 [C]
    by_rest_t_ptr,  # float32 [C]
    by_rest_1_ptr,  # float32 [C]
    uniform_ptr,  # float32 [C]
    by_label_ptr,  # float32 [C], added at the label
    gradient_stride,
    entries,  # K
    inverse_temperature,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gradient_row = gradient_ptr + row * gradient_stride
    column = tl.arange(0, BLOCK_K)
    inside = column < entries
    place = row * entries + column
    ids = tl.load(ids_ptr + place, mask=inside, other=-1)
    lane = tl.arange(0, 1)
    label = tl.load(labels_ptr + row + lane)
    by_label = tl.load(by_label_ptr + row)
    hit = (ids >= 0) & (ids == label)
    value = tl.load(support_gradient_ptr + place, mask=inside, other=0.0)
    slope = tl.load(support_slope_ptr + place, mask=inside, other=0.0)
    value = (value + tl.where(hit, by_label, 0.0)) * slope
    tl.store(gradient_row + ids, value.to(gradient_ptr.dtype.element_ty), mask=ids >= 0)

    # A label outside the support: its dense value again, in float32, so that the sum is rounded once.
    alone = (label >= 0) & (tl.sum(hit.to(tl.int32), 0) + lane == 0)
    logit = tl.load(label_logit_ptr + row)
    rest_t = tl.load(rest_t_ptr + row)
    rest_1 = tl.load(rest_1_ptr + row)
    rest_t = tl.where(rest_t > float("-inf"), rest_t, 0.0)
    rest_1 = tl.where(rest_1 > float("-inf"), rest_1, 0.0)
    dense = tl.load(by_rest_t_ptr + row) * tl.exp(tl.where(alone, logit * inverse_temperature - rest_t, 0.0))
    dense += tl.load(by_rest_1_ptr + row) * tl.exp(tl.where(alone, logit - rest_1, 0.0))
    dense += tl.load(uniform_ptr + row) + by_label
    lone = dense * tl.load(label_slope_ptr + row)
    tl.store(gradient_row + label, lone.to(gradient_ptr.dtype.element_ty), mask=alone)
