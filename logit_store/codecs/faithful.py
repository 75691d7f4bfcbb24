"""Does what was stored decode to what was given? Asked of every row that is written.

Ids, counts, masks and everything else of the text must come back exactly; a value within the error that the
codec states for it. Nothing of an encoder's own work is believed: entries of a head are matched by id.

Shapes: M recorded positions of a row, E entries of each.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.codec import CODECS, Arrays, stored_record
from sparsekd.logit_store.codecs.quantise import HALF_ROUNDING, LAST_CODE, LEAST_SPAN
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import planes_of
from sparsekd.logit_store.row import Row, planes_of_row


def first_difference(row: Row, decoded: Arrays, manifest: Manifest) -> str | None:
    """Returns the plane and place where a decoded row is not the one that was written; None where it is.

    Args:
        row: that passed `check_row`.
        decoded: its arrays, from the stored bytes.
        manifest: of the store.
    """
    record = row.teacher
    given = planes_of_row(row)
    if record is not None:
        kept = stored_record(record, manifest)
        given |= {name: value for name, value in vars(kept).items() if name in given}
    found = _by_the_same_order(given, decoded) if record is not None else decoded
    codec = CODECS[manifest.codec.name]
    for plane in planes_of(manifest):
        left, right = given[plane.name], found[plane.name]
        if left.shape != right.shape:
            return f"{plane.name}, whose shape is {list(right.shape)}, expected {list(left.shape)}"
        same = left == right
        if plane.is_rounded and not same.all():
            if plane.rule == "logprob" and plane.coding != "halves" and _range_holds(left, right):
                continue
            same |= _within(left, right, codec.error(plane, right, manifest))
        if not same.all():
            place = tuple(int(index) for index in np.argwhere(~same)[0])
            return f"{plane.name}{list(place)}, which is {right[place]}, expected {left[place]}"
    return None


def _by_the_same_order(given: Mapping[str, NDArray[Any]], decoded: Arrays) -> Mapping[str, NDArray[Any]]:
    """Returns the decoded arrays with the entries of each head in the order of the given one.

    Codecs order entries of equal stored values by id. A position whose ids are others stays as it is.
    """
    left, right = given["head_ids"], decoded.get("head_ids")
    if right is None or left.shape != right.shape:
        return decoded
    moved = np.flatnonzero((left != right).any(axis=1))
    if not moved.size:
        return decoded
    ids, values = right.copy(), decoded["head_logprobs"].copy()
    order = np.argsort(right[moved], axis=1, kind="stable")
    back = np.argsort(np.argsort(left[moved], axis=1, kind="stable"), axis=1, kind="stable")
    places = np.take_along_axis(order, back, axis=1)
    # Only what may be told apart by rounding alone may have moved: values must descend as they stand.
    descends = (values[moved][:, 1:] <= values[moved][:, :-1]).all(axis=1, keepdims=True)
    places = np.where(descends, places, np.arange(left.shape[1]))
    ids[moved] = np.take_along_axis(right[moved], places, axis=1)
    values[moved] = np.take_along_axis(values[moved], places, axis=1)
    return decoded | {"head_ids": ids, "head_logprobs": values}


def _range_holds(given: NDArray[np.float32], decoded: NDArray[np.float32]) -> bool:
    """Returns whether values [M, E] in steps of their range are all within half a step and the common shift.

    False asks for a closer look (`Codec.errors`), which takes five times as long: here the shift is read off
    the highest entry, and squares are compared, so that no root is taken.
    """
    if not given.size:
        return True
    highest, lowest = given.max(axis=1), given.min(axis=1)
    if not (np.isfinite(lowest).all() and np.isfinite(decoded).all()):
        return False
    span = np.maximum(highest - lowest, np.abs(highest) * np.float32(LEAST_SPAN))
    shift = np.abs(decoded.max(axis=1) - highest)
    rounding = np.abs(highest) * np.float32(2 * HALF_ROUNDING) + np.float32(1e-5)
    if not (shift <= span * np.float32(1.2 / LAST_CODE) + rounding).all():
        return False
    step = span * np.float32((1 + 4 * HALF_ROUNDING) / LAST_CODE**2)
    excess = np.abs(np.subtract(decoded, given))
    np.subtract(excess, (shift + rounding + step)[:, None], out=excess)
    np.maximum(excess, 0, out=excess)
    np.multiply(excess, excess, out=excess)
    allowed = np.subtract(highest[:, None], given)
    np.multiply(allowed, step[:, None], out=allowed)
    return bool((excess <= allowed).all())


def _within(given: NDArray[Any], decoded: NDArray[Any], error: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns where values differ by at most the error; an infinity differs from everything."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(given.astype(np.float64) - decoded) <= error)
