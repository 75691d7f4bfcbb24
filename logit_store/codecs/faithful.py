"""Does what was stored decode to what was given? Asked of every row that is written.

Ids, counts, masks and everything else of the text must come back exactly; a value within the error that the
codec states for it. Nothing of an encoder's own work is believed: entries of a head are matched by id.

Shapes: M recorded positions of a row, E entries of each.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.codec import CODECS, Arrays, stored_record
from sparsekd.logit_store.codecs.quantise import HALF_ROUNDING, LAST_CODE, LEAST_SPAN, running_sums
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import planes_of
from sparsekd.logit_store.row import NO_ID, Row, planes_of_row


def first_difference(row: Row, decoded: Arrays, manifest: Manifest) -> str | None:
    """Returns the plane and place where a decoded row is not the one that was written; None where it is.

    Args:
        row: that passed `check_row`.
        decoded: its arrays, from the stored bytes.
        manifest: of the store.
    """
    given, codec = planes_of_row(row), CODECS[manifest.codec.name]
    if row.teacher is not None:
        given |= vars(stored_record(row.teacher, manifest))
    for plane in planes_of(manifest):
        left, right = given[plane.name], decoded[plane.name]
        if left.shape != right.shape:
            return f"{plane.name}, whose shape is {list(right.shape)}, expected {list(left.shape)}"
        in_steps = plane.is_rounded and codec.drops_deep and plane.coding in ("head", "tail")
        if in_steps and _range_holds(left, right, descending=plane.coding == "head"):
            continue
        same = left == right
        if same.all():
            continue
        if plane.name == "head_ids":
            left = _ordered_as_stored(left, decoded["head_logprobs"], manifest)
            same = left == right
        if plane.is_rounded:
            same |= _within(left, right, codec.error_of(plane, right, manifest))
        if not same.all():
            place = tuple(int(index) for index in np.argwhere(~same)[0])
            return f"{plane.name}{list(place)}, which is {right[place]}, expected {left[place]}"
    return None


def _ordered_as_stored(
    given: NDArray[np.int32], values: NDArray[np.float32], manifest: Manifest
) -> NDArray[np.int32]:
    """Returns the given head ids [M, k] as they must stand beside the decoded values.

    Entries whose stored values are equal stand by ascending id, those cut off behind all; nothing else may
    have moved.
    """
    beyond = manifest.outcome_count  # stands for -1
    bits, k = beyond.bit_length(), given.shape[1]
    kind = np.uint32 if bits + k.bit_length() <= 32 else np.uint64
    differs = np.empty(values.shape, np.bool_)
    flat = values.reshape(-1)
    np.not_equal(flat[1:], flat[:-1], out=differs.reshape(-1)[1:])
    steps = differs[:, 1:].view(np.uint8)
    # Groups of equal values are numbered.
    groups = running_sums(steps, k) if k <= 256 else np.pad(np.cumsum(steps, axis=1), ((0, 0), (1, 0)))
    above: NDArray[Any] = groups.astype(kind)
    np.left_shift(above, kind(bits), out=above)
    is_short = int(given.min(initial=0)) < 0
    ids = np.where(given == NO_ID, beyond, given) if is_short else given
    keys: NDArray[Any] = np.bitwise_or(above, ids.view(np.uint32))
    keys.sort(axis=1)
    # At each place stands an entry of the same group as before.
    np.subtract(keys, above, out=keys)
    found = keys.astype(np.int32, copy=False)
    if is_short:
        found[found == beyond] = NO_ID
    return found


def _range_holds(given: NDArray[np.float32], decoded: NDArray[np.float32], *, descending: bool) -> bool:
    """Returns whether values [M, E] in steps of their range are all within half a step and the common shift.

    False asks for a closer look (`Codec.error`), which takes five times as long: here the shift is read off
    the highest entry, and squares are compared, so that no root is taken. NaN and infinities are not within.

    Args:
        given: as they were written.
        decoded: as they are read.
        descending: whether the given ones descend, which saves the search for the highest and the lowest.
    """
    highest = given[:, 0] if descending else given.max(axis=1)
    lowest = given[:, -1] if descending else given.min(axis=1)
    found = decoded[:, 0] if descending else decoded.max(axis=1)
    if not np.isfinite(lowest).all():
        return False
    span = np.maximum(highest - lowest, np.abs(highest) * np.float32(LEAST_SPAN))
    shift = np.abs(found - highest)
    rounding = np.abs(highest) * np.float32(2 * HALF_ROUNDING) + np.float32(1e-5)
    if not (shift <= span * np.float32(1.2 / LAST_CODE) + rounding).all():
        return False
    step = span * np.float32((1 + 4 * HALF_ROUNDING) / LAST_CODE**2)
    excess = np.subtract(decoded, given)
    np.abs(excess, out=excess)
    np.subtract(excess, (shift + rounding + step)[:, None], out=excess)
    np.clip(excess, 0, np.inf, out=excess)
    np.multiply(excess, excess, out=excess)
    allowed = np.subtract(highest[:, None], given)
    np.multiply(allowed, step[:, None], out=allowed)
    return bool((excess <= allowed).all())


def _within(given: NDArray[Any], decoded: NDArray[Any], error: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns where values differ by at most the error; an infinity differs from everything."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(given.astype(np.float64) - decoded)
    return np.asarray((difference <= error) & (difference < np.inf))
