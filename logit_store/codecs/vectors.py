"""Hidden states: a vector of d numbers at each of its positions, as int8 with a scale or as halves.

The manifest says which, whatever the codec is; a codec that compresses puts each part into a frame.

Shapes: F positions of the plane, d numbers of a vector.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.frames import PlaneError, join_parts
from sparsekd.logit_store.codecs.pieces import read_parts, word_parts, words_from_parts
from sparsekd.logit_store.codecs.quantise import HALF_ROUNDING, HALF_SMALLEST, half_above, to_half
from sparsekd.logit_store.codecs.room import Coding, Room, Stored
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import Plane, Planes, feature_spec

LARGEST_CODE = 127
"""Codes run from -127 to 127."""

LARGEST_VALUE = 65504.0
"""Of a number in either kind: the largest half, and far below what 127 times the largest scale holds."""


def encode_int8(values: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    """Returns (scale [F], codes [F, d]): value = code * scale, the scale being the largest number over 127,
    rounded up to a half."""
    largest = np.abs(values).max(axis=1, initial=0)
    scale = half_above((largest / np.float32(LARGEST_CODE)).astype(np.float32))
    wide = scale.astype(np.float32)[:, None]
    codes = np.rint(np.divide(values, wide, out=np.zeros_like(values), where=wide > 0))
    return scale, np.clip(codes, -LARGEST_CODE, LARGEST_CODE).astype(np.int8)


def _parts(values: NDArray[np.float32], kind: str) -> list[NDArray[Any]]:
    if kind == "float16":
        return word_parts(to_half(values))
    scale, codes = encode_int8(values)
    return [*word_parts(scale), codes]


def _encode(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    return {
        plane.name: join_parts(_parts(planes[plane.name], feature_spec(plane, manifest).kind))
        for plane in members
    }


def _decode(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    for plane in members:
        out = room.new(plane)
        if feature_spec(plane, room.manifest).kind == "float16":
            low, high = read_parts(stored[plane.name], plane.name, [out.size, out.size])
            out[:] = words_from_parts(low, high, "<f2").reshape(out.shape)
            continue
        low, high, codes = read_parts(stored[plane.name], plane.name, [len(out), len(out), out.size])
        _spread(words_from_parts(low, high, "<f2"), np.frombuffer(codes, np.int8), plane, out)


def _encode_plain(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    stored = {}
    for plane in members:
        if feature_spec(plane, manifest).kind == "float16":
            stored[plane.name] = to_half(planes[plane.name]).tobytes()
        else:
            scale, codes = encode_int8(planes[plane.name])
            stored[plane.name] = scale.tobytes() + codes.tobytes()
    return stored


def _decode_plain(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    for plane in members:
        out, view = room.new(plane), memoryview(stored[plane.name]).cast("B")
        halves = feature_spec(plane, room.manifest).kind == "float16"
        size = 2 * out.size if halves else 2 * len(out) + out.size
        if len(view) != size:
            raise PlaneError(plane.name, f"it has {len(view)} bytes, expected {size}")
        if halves:
            out[:] = np.frombuffer(view, "<f2").reshape(out.shape)
        else:
            scale = np.frombuffer(view[: 2 * len(out)], "<f2")
            _spread(scale, np.frombuffer(view[2 * len(out) :], np.int8), plane, out)


def _spread(
    scale: NDArray[np.float16], codes: NDArray[np.int8], plane: Plane, out: NDArray[np.float32]
) -> None:
    """Writes code * scale into `out` [F, d], in float32."""
    wide = scale.astype(np.float32)
    if wide.size and not (wide.min() >= 0 and wide.max() < np.inf):
        raise PlaneError(plane.name, "a scale is not a finite number, 0 or more")
    if codes.size and int(codes.min()) < -LARGEST_CODE:
        raise PlaneError(plane.name, f"a code is {codes.min()}, expected -{LARGEST_CODE} or above")
    np.multiply(codes.reshape(out.shape), wide[:, None], out=out)


def error(plane: Plane, values: NDArray[np.float32], manifest: Manifest) -> NDArray[np.float32]:
    """Returns by how much decoded numbers may differ from those that were written, [F, d].

    int8: half a step. The largest code of a vector is 127, but for the rounding of the scale (2^-10 of it, or
    the smallest half), so that the step is at most the largest decoded number over 126. float16: half of the
    last bit.
    """
    if feature_spec(plane, manifest).kind == "float16":
        return (np.abs(values) * np.float32(HALF_ROUNDING * 1.01) + np.float32(HALF_SMALLEST)).astype(
            np.float32
        )
    largest = np.abs(values).max(axis=1, keepdims=True, initial=0)
    step = largest / np.float32(LARGEST_CODE - 1) + np.float32(HALF_SMALLEST)
    return np.broadcast_to(step * np.float32(0.51), values.shape).astype(np.float32)


FRAMED = Coding(_encode, _decode)
PLAIN = Coding(_encode_plain, _decode_plain)
