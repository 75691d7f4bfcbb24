"""The codec `plain`: nothing is compressed, every record has the same stride, k' < k entries are a prefix.

For local disks, for readers that decode on a device, and as a second opinion on `tkq8`, whose values it has.

Shapes: M recorded positions of a row, k head entries, n draws, G grid temperatures.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.frames import PlaneError
from sparsekd.logit_store.codecs.pieces import (
    entropies,
    entropy_codes,
    id_widths,
    join_high_bits,
    pack_high_bits,
    smallest_unsigned,
)
from sparsekd.logit_store.codecs.quantise import decode_range, encode_range, to_half
from sparsekd.logit_store.codecs.room import Coding, Room, Stored
from sparsekd.logit_store.codecs.text import (
    number_bytes,
    packed_bits,
    packed_recorded,
    unpack_bits,
    unpack_bytes,
    unpack_numbers,
    unpack_recorded,
)
from sparsekd.logit_store.codecs.tkq8 import BLOCK_POSITIONS, sorted_by_depth
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import Plane, Planes
from sparsekd.logit_store.row import NO_ID


def _raw(stored: Stored, plane: str, size: int | None, at_most: int) -> bytes:
    view = memoryview(stored[plane]).cast("B")
    if size is not None:
        _require_size(view, plane, size)
    elif len(view) > at_most:
        raise PlaneError(plane, f"it has {len(view)} bytes, expected at most {at_most}")
    return bytes(view)


def _require_size(view: memoryview, name: str, size: int) -> None:
    if len(view) != size:
        raise PlaneError(name, f"it has {len(view)} bytes, expected {size}")


def _of_text(pack: Any, read: Any) -> Coding:
    def encode(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
        return {plane.name: pack(planes, plane) for plane in members}

    def decode(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
        for plane in members:
            read(stored, plane, room, _raw)

    return Coding(encode, decode)


def _id_bytes(ids: NDArray[np.int32], vocabulary: int) -> bytes:
    """Returns the lower bytes of each id as one number, then the planes of the bits above 16."""
    low, bit_planes = id_widths(vocabulary)
    whole = ids.astype("<u2" if low == 2 else "u1").tobytes()
    return whole + pack_high_bits(ids, bit_planes).tobytes() if bit_planes else whole


def _read_ids(stored: Stored, name: str, vocabulary: int, out: NDArray[np.int32]) -> None:
    low, bit_planes = id_widths(vocabulary)
    view = memoryview(stored[name]).cast("B")
    begin = low * out.size
    _require_size(view, name, begin + bit_planes * -(-out.size // 8))
    numbers = np.frombuffer(view[:begin], "<u2" if low == 2 else "u1").reshape(out.shape)
    join_high_bits(numbers, view[begin:], bit_planes, out)


def _array(stored: Stored, name: str, kind: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    view = memoryview(stored[name]).cast("B")
    _require_size(view, name, int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize)
    return np.frombuffer(view, kind).reshape(shape)


def _encode_ids(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    vocabulary = manifest.tokenizer.vocabulary_size
    return {plane.name: _id_bytes(planes[plane.name], vocabulary) for plane in members}


def _decode_ids(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    for plane in members:
        _read_ids(stored, plane.name, room.manifest.tokenizer.vocabulary_size, room.new(plane))


def _encode_labels(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    count = manifest.outcome_count + 1
    return {plane.name: _id_bytes(planes[plane.name] + np.int32(1), count) for plane in members}


def _decode_labels(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    for plane in members:
        labels = room.new(plane)
        _read_ids(stored, plane.name, room.manifest.outcome_count + 1, labels)
        labels += NO_ID


def _encode_head(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    vocabulary, given, values = manifest.outcome_count, planes["head_ids"], planes["head_logprobs"]
    ids = np.empty_like(given)
    ranges, codes = np.empty((2, len(ids)), "<f2"), np.empty(ids.shape, np.uint8)
    for start in range(0, len(ids), BLOCK_POSITIONS):
        block = slice(start, start + BLOCK_POSITIONS)
        ranges[0, block], ranges[1, block], unsorted = encode_range(values[block], descending=True)
        codes[block], ids[block] = sorted_by_depth(unsorted, given[block], vocabulary)
    return {"head_ids": _id_bytes(ids, vocabulary), "head_logprobs": ranges.tobytes() + codes.tobytes()}


def _decode_head(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    for plane in members:
        if plane.name == "head_ids":
            _read_ids(stored, plane.name, room.manifest.outcome_count, room.new(plane))
        else:
            _read_values(stored, plane.name, room.new(plane))


def _encode_tail(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    counts = planes["tail_counts"].astype(smallest_unsigned(manifest.record.n))
    stored = {
        "tail_ids": _id_bytes(np.maximum(planes["tail_ids"], 0), manifest.outcome_count),
        "tail_counts": counts.tobytes(),
    }
    if manifest.record.tail_logprobs:
        top, span, codes = encode_range(np.minimum(planes["tail_logprobs"], 0), descending=False)
        stored["tail_logprobs"] = top.tobytes() + span.tobytes() + codes.tobytes()
    return stored


def _decode_tail(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    n = room.manifest.record.n
    used = _array(stored, "tail_counts", smallest_unsigned(n), (room.count("recorded"), n))
    for plane in members:
        out = room.new(plane)
        if plane.name == "tail_ids":
            _read_ids(stored, plane.name, room.manifest.outcome_count, out)
            np.copyto(out, NO_ID, where=used == 0)
        elif plane.name == "tail_counts":
            out[:] = used
        else:
            _read_values(stored, plane.name, out)
            np.copyto(out, -np.inf, where=used == 0)


def _read_values(stored: Stored, name: str, out: NDArray[np.float32]) -> None:
    """Writes values of top [M], span [M] and codes [M, entries] into `out`."""
    length = len(out)
    view = memoryview(stored[name]).cast("B")
    _require_size(view, name, 4 * length + out.size)
    top, span = np.frombuffer(view[: 4 * length], "<f2").reshape(2, length).astype(np.float32)
    good = (span >= 0) & (span < np.inf) & (top <= 0)
    if not good.all():
        position = int(np.flatnonzero(~good)[0])
        raise PlaneError(name, f"record {position} has top {top[position]} and span {span[position]}")
    codes = np.frombuffer(view[4 * length :], np.uint8).reshape(out.shape)
    for start in range(0, length, BLOCK_POSITIONS):
        block = slice(start, start + BLOCK_POSITIONS)
        decode_range(top[block], span[block], codes[block], out[block])


def _encode_halves(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    limited = {
        plane.name: np.minimum(planes[plane.name], 0) if plane.rule == "logprob" else planes[plane.name]
        for plane in members
    }
    return {name: to_half(values).tobytes() for name, values in limited.items()}


def _decode_halves(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    for plane in members:
        out = room.new(plane)
        out[:] = _array(stored, plane.name, "<f2", out.shape)


def _encode_entropies(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    return {
        plane.name: entropy_codes(planes[plane.name], manifest.outcome_count).tobytes() for plane in members
    }


def _decode_entropies(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    for plane in members:
        out = room.new(plane)
        entropies(_array(stored, plane.name, "<u2", out.shape), out)


CODINGS = {
    "ids": Coding(_encode_ids, _decode_ids),
    "bits": _of_text(packed_bits, unpack_bits),
    "numbers": _of_text(number_bytes, unpack_numbers),
    "bytes": _of_text(lambda planes, plane: planes[plane.name].tobytes(), unpack_bytes),
    "recorded": _of_text(packed_recorded, unpack_recorded),
    "labels": Coding(_encode_labels, _decode_labels),
    "head": Coding(_encode_head, _decode_head),
    "tail": Coding(_encode_tail, _decode_tail),
    "halves": Coding(_encode_halves, _decode_halves),
    "entropies": Coding(_encode_entropies, _decode_entropies),
}
