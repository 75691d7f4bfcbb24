"""Log-probabilities in 8 bits each: square-law steps inside each position's own range, and half floats.

A position has a `top` and a `span`, both half precision, and a code c for each entry:
value = top - (span / 64516) * c^2, or -inf for c = 255; 64516 is 254^2. The steps are fine where the
probability is, and there is no fixed floor. `top` is chosen so that the decoded probabilities have the sum of
the exact ones.

Shapes: N positions, E entries of each.
"""

import numpy as np
from numpy.typing import NDArray

LAST_CODE = 254
"""Code of a value at top - span."""

INFINITE_CODE = 255
"""Code of -inf."""

HALF_LARGEST = 65504.0
"""Largest finite half. Finite values beyond it are stored as it: e^-65504 is 0 in any arithmetic."""

HALF_ROUNDING = 2.0**-11
"""Relative error of a value rounded to the nearest half."""

HALF_SMALLEST = 2.0**-24
"""Distance of the halves next to 0."""

_SIGN, _MAGNITUDE, _INFINITE_BITS = np.uint16(0x8000), np.uint16(0x7FFF), 0x7C00
"""Of the bits of a half: its sign, all others, and what they are for an infinity (more for NaN)."""

DEEPEST = np.float32(128)
"""Entries more nats below the first of their position are stored as -inf: e^-128 is 0 in float32, and a
masked logit of -1e9 would leave no code for the others."""

LEAST_SPAN = 1 / 64
"""Smallest span as a share of |top|: below 1 / 126 two codes could decode to the same float32."""

_ONES = np.uint64(0x0101010101010101)

SLACK = 2.0**-20
"""Relative distance by which `half_below` may exceed a value, so that a half is its own rounding."""


def to_half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Returns the nearest halves; finite values stay finite, -0 becomes 0."""
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    # numpy works on the bits of halves far faster than on halves.
    bits = halves.view("<u2")
    if int((bits & _MAGNITUDE).max(initial=0)) >= _INFINITE_BITS:
        limited = np.clip(values, -HALF_LARGEST, HALF_LARGEST).astype("<f2").view("<u2")
        bits = np.where(np.isinf(values), bits, limited)
    return np.where(bits == _SIGN, np.uint16(0), bits).view("<f2")


def within_halves(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns values with the finite ones beyond the largest half at it, as halves keep them."""
    if values.min(initial=0) >= -HALF_LARGEST and values.max(initial=0) <= HALF_LARGEST:
        return values
    limit = np.float32(HALF_LARGEST)
    return np.where(np.isinf(values), values, np.clip(values, -limit, limit))


def half_above(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Returns the smallest halves that values of 0 or more do not exceed by more than `SLACK`."""
    nearest = to_half(values)
    wide = nearest.astype(np.float32)
    too_low = (wide < values * np.float32(1 - SLACK)) & (wide < HALF_LARGEST)
    return (nearest.view("<u2") + too_low.astype("<u2")).view("<f2")


def half_below(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Returns the largest halves that do not exceed values of 0 or less, see `half_above`."""
    bits = half_above(np.negative(values)).view("<u2")
    return np.where(bits > 0, bits | _SIGN, bits).view("<f2")


def encode_range(
    values: NDArray[np.float32], *, descending: bool
) -> tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.uint8]]:
    """Returns (top [N], span [N], codes uint8 [N, E]) of log-probabilities.

    Args:
        values: float32 [N, E], E > 0, at most 0 but for rounding, no NaN. Entries to be left out are -inf.
        descending: whether each position's values descend but for rounding, which saves the search for the
            highest and the lowest.
    """
    highest = values[:, 0] if descending else values.max(axis=1)
    lowest = values[:, -1] if descending else values.min(axis=1)
    infinite = None
    if (np.isneginf(lowest) | too_deep(lowest, highest)).any():
        highest = np.where(np.isneginf(highest), np.float32(0), highest)
        infinite = np.isneginf(values) | too_deep(values, highest[:, None])
        # An entry of -inf takes no part in the range; its code is set at the end.
        values = np.where(infinite, highest[:, None], values)
        lowest = values.min(axis=1)
    # Many passes over one buffer, so that a block of positions stays in the processor's cache.
    buffer = np.subtract(values, highest[:, None])
    np.clip(buffer, -np.inf, 0, out=buffer)  # three times as fast as `np.minimum`
    true_sum = _sum_of_exp(buffer, infinite)
    span = half_above(np.maximum(highest - lowest, np.abs(highest) * np.float32(LEAST_SPAN)))
    step = _step_of(span.astype(np.float32))
    np.multiply(buffer, np.divide(-1, step, out=np.zeros_like(step), where=step > 0), out=buffer)
    np.sqrt(buffer, out=buffer)
    np.rint(buffer, out=buffer)
    codes = buffer.astype(np.uint8)
    np.multiply(buffer, buffer, out=buffer)
    np.multiply(buffer, -step, out=buffer)
    decoded_sum = _sum_of_exp(buffer, infinite)
    if infinite is not None:
        codes[infinite] = INFINITE_CODE
    with np.errstate(divide="ignore", invalid="ignore"):
        top = np.where(true_sum > 0, highest + np.log(true_sum / decoded_sum), -np.inf)
    return half_below(np.minimum(top, 0).astype(np.float32)), span, codes


def too_deep(values: NDArray[np.float32], highest: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns where values are so far below the highest of their position that they are stored as -inf.

    With some slack, so that an entry which was decoded at the end of its range is not too deep.
    """
    return values < highest - DEEPEST * np.float32(1 + SLACK)


def without_deep(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns values [N, E] with -inf for those that `encode_range` stores as it."""
    if not values.size or values.min() >= values.max() - DEEPEST:
        return values  # nor is any so far below the highest of its own position
    highest = values.max(axis=1, keepdims=True)
    deep = too_deep(values, highest)
    return np.where(deep, np.float32(-np.inf), values) if deep.any() else values


def _step_of(span: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns float32 [N, 1], what the square of a code is multiplied by."""
    return (span / np.float32(LAST_CODE**2))[:, None]


def _sum_of_exp(values: NDArray[np.float32], infinite: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    """Returns the sum over entries of exp, float64 [N]; entries that are `infinite` count as 0.

    In float64, whose exp differs between processors by 1e-16, because `top` is rounded to a half afterwards:
    equal rows give equal bytes everywhere, but once in 10^12 positions.
    """
    terms = np.exp(values, dtype=np.float64)
    if infinite is not None:
        terms[infinite] = 0
    return np.einsum("ij->i", terms)


def decode_range(
    top: NDArray[np.float32], span: NDArray[np.float32], codes: NDArray[np.uint8], out: NDArray[np.float32]
) -> None:
    """Writes the values of codes [N, E] into `out`, float32 [N, E]; every operation is one of float32.

    Args:
        top: float32 [N].
        span: float32 [N], finite, 0 or more.
        codes: uint8 [N, E].
        out: written to.
    """
    np.copyto(out, codes)
    np.multiply(out, out, out=out)
    np.multiply(out, _step_of(span), out=out)
    np.subtract(top[:, None], out, out=out)
    if codes.size and int(codes.max()) == INFINITE_CODE:
        np.copyto(out, -np.inf, where=codes == INFINITE_CODE)


def range_error(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns float32 [N, E]: by how much decoded values may differ from those that were encoded.

    Half a step at the entry's depth, the half steps of the whole range for the common shift of `top`, and the
    rounding of `top` (at most one half, downward) and `span`. No bound for -inf, which may have been anything
    too deep, of a probability below e^-128; but 0 in a position of -inf alone, which was just that.
    """
    with np.errstate(invalid="ignore"):
        highest = values.max(axis=1, keepdims=True, initial=-np.inf)
        depth = np.where(np.isneginf(values), 0, highest - values).astype(np.float64)
        lowest = depth.max(axis=1, keepdims=True, initial=0)
        span = np.maximum(lowest, np.abs(highest) * LEAST_SPAN) * (1 + 2 * HALF_ROUNDING) + HALF_SMALLEST
        half_step = np.sqrt(depth * span) / LAST_CODE + span / LAST_CODE**2 + span * HALF_ROUNDING
        weights = np.exp(-depth) * ~np.isneginf(values)
        shift = (weights * half_step).sum(axis=1, keepdims=True) / np.maximum(
            weights.sum(1, keepdims=True), 1e-30
        )
        rounding = 2 * HALF_ROUNDING * np.abs(highest) + HALF_SMALLEST + 2e-6 * (1 + np.abs(values))
        error = half_step + 1.2 * shift + rounding
        unknown = np.where(np.isneginf(highest), 0, np.inf)
    return np.where(np.isneginf(values), unknown, error).astype(np.float32)


def running_sums(steps: NDArray[np.uint8], entries: int) -> NDArray[np.uint8]:
    """Returns the sums of each position's first 0, 1, ... steps, uint8 [N, entries].

    Eight sums at a time: multiplying eight bytes, read as one number, by 0x0101010101010101 adds each to all
    that follow. A sum above 255 carries into those behind it; see `never_falls`.

    Args:
        steps: uint8 [N, entries - 1], from each entry to the next.
        entries: E.
    """
    count = -(-entries // 8)
    padded = np.zeros((len(steps), 8 * count), np.uint8)
    padded[:, 1:entries] = steps
    words = padded.view("<u8")
    words *= _ONES
    if count > 1:
        # The last byte of a word is the sum of its own steps: a word begins with the sum of those before it.
        words += running_sums(padded[:, 7:-8:8], count) * _ONES
    return padded[:, :entries]


def never_falls(codes: NDArray[np.uint8]) -> bool:
    """Returns whether no entry of codes [N, E] is below the one before it in its position.

    Of `running_sums` this says that none exceeds 255: before the first that does all are right, and it loses
    256, which is more than its step.
    """
    flat = codes.reshape(-1)
    falls = flat[1:] < flat[:-1]
    falls[codes.shape[1] - 1 :: codes.shape[1]] = False
    return not falls.any()
