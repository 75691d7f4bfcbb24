"""The text's planes as zstd frames: bits, numbers, bytes and labels, for every codec that compresses.

Shapes: L positions of a row, C counted positions.
"""

from collections.abc import Callable

import numpy as np

from sparsekd.logit_store.codecs.frames import PlaneError, compress_frame, decompress_frame, join_parts
from sparsekd.logit_store.codecs.pieces import id_part_sizes, id_parts, ids_from_parts, read_parts
from sparsekd.logit_store.codecs.room import Coding, Room, Stored
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import Plane, Planes
from sparsekd.logit_store.row import NO_ID

STORED_KINDS = {np.int32: "<u4", np.int64: "<i8", np.float32: "<f4"}
"""How numbers of these types are stored."""

Unpack = Callable[[Stored, str, int | None, int], bytes]
"""(stored, plane, bytes that it must hold or None, bytes that it may hold) -> content."""


def packed_bits(planes: Planes, plane: Plane) -> bytes:
    """Returns bits, lowest first, filled with 0 to a byte."""
    return np.packbits(planes[plane.name], bitorder="little").tobytes()


def packed_recorded(planes: Planes, plane: Plane) -> bytes:
    """Returns the bits of the recorded positions; nothing where they are those of the loss mask."""
    same = np.array_equal(planes["recorded"], planes["loss_mask"])
    return b"" if same else packed_bits(planes, plane)


def unpack_bits(stored: Stored, plane: Plane, room: Room, unpack: Unpack) -> None:
    """Reads `packed_bits`."""
    length = room.manifest.sequence_length
    size = -(-length // 8)
    packed = np.frombuffer(unpack(stored, plane.name, size, size), np.uint8)
    if length % 8 and packed[-1] >> length % 8:
        raise PlaneError(plane.name, "bits are set behind the last position")
    room.keep(plane, np.unpackbits(packed, count=length, bitorder="little").view(np.bool_))


def unpack_recorded(stored: Stored, plane: Plane, room: Room, unpack: Unpack) -> None:
    """Reads `packed_recorded`."""
    if len(memoryview(stored[plane.name])) == 0:
        room.keep(plane, room.planes["loss_mask"])
    else:
        unpack_bits(stored, plane, room, unpack)


def unpack_numbers(stored: Stored, plane: Plane, room: Room, unpack: Unpack) -> None:
    """Reads numbers, of which there is at most one for each position."""
    kind = np.dtype(STORED_KINDS[plane.dtype])
    content = unpack(stored, plane.name, None, room.manifest.sequence_length * kind.itemsize)
    if len(content) % kind.itemsize:
        raise PlaneError(plane.name, f"it holds {len(content)} bytes, expected a multiple of {kind.itemsize}")
    room.keep(plane, np.frombuffer(content, kind).astype(plane.dtype))


def unpack_bytes(stored: Stored, plane: Plane, room: Room, unpack: Unpack) -> None:
    """Reads one byte for each position."""
    size = room.count(plane.stands)
    room.keep(plane, np.frombuffer(unpack(stored, plane.name, size, size), np.uint8))


def number_bytes(planes: Planes, plane: Plane) -> bytes:
    """Returns numbers in their stored type."""
    return planes[plane.name].astype(STORED_KINDS[plane.dtype]).tobytes()


def _frame(stored: Stored, plane: str, size: int | None, at_most: int) -> bytes:
    return decompress_frame(stored[plane], plane, size, at_most=at_most)


def _framed(pack: Callable[[Planes, Plane], bytes], read: Callable[..., None]) -> Coding:
    """Returns the coding of planes that are one frame each."""

    def encode(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
        return {plane.name: compress_frame(pack(planes, plane)) for plane in members}

    def decode(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
        for plane in members:
            read(stored, plane, room, _frame)

    return Coding(encode, decode)


def _encode_recorded(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    packed = {plane.name: packed_recorded(planes, plane) for plane in members}
    return {name: compress_frame(bits) if bits else b"" for name, bits in packed.items()}


def _decode_recorded(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    for plane in members:
        unpack_recorded(stored, plane, room, _frame)


def _encode_labels(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    """Labels are stored plus 1, so that 0 is none."""
    count = manifest.outcome_count + 1
    return {plane.name: join_parts(id_parts(planes[plane.name] + np.int32(1), count)) for plane in members}


def _decode_labels(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    count = room.manifest.outcome_count + 1
    for plane in members:
        labels = room.new(plane)
        parts = read_parts(stored[plane.name], plane.name, id_part_sizes(labels.size, count))
        ids_from_parts(parts, count, labels)
        labels += NO_ID


FRAMED_TEXT = {
    "bits": _framed(packed_bits, unpack_bits),
    "numbers": _framed(number_bytes, unpack_numbers),
    "bytes": _framed(lambda planes, plane: planes[plane.name].tobytes(), unpack_bytes),
    "recorded": Coding(_encode_recorded, _decode_recorded),
    "labels": Coding(_encode_labels, _decode_labels),
}
