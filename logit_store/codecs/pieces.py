"""The pieces that several codecs are made of: ids in planes of bytes and bits, half floats, flattened lists.

Shapes: M recorded positions of a row, E entries of each, D entries of all positions together.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.frames import (
    PlaneError,
    decompress_frame,
    split_parts,
)
from sparsekd.logit_store.codecs.quantise import to_half

_BIT_16 = (
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.int32) << 16
)
"""int32 [256, 8]: the eight bits of a byte, lowest first, each as the 17th bit of an id."""

ENTROPY_STEPS = 512
"""Entropies are stored in steps of 1 / 512 nat."""

ENTROPY_SLACK = 1e-3
"""Nats by which an entropy may exceed log V and still be stored as it is."""


def smallest_unsigned(largest: int) -> np.dtype[Any]:
    """Returns the narrowest of the little-endian uint8, uint16 and uint32 that holds `largest`."""
    return next(np.dtype(name) for name in ("u1", "<u2", "<u4") if largest <= np.iinfo(name).max)


def id_widths(vocabulary: int) -> tuple[int, int]:
    """Returns (byte planes, bit planes) of an id below `vocabulary`: at most two bytes, then single bits."""
    bits = max(1, (vocabulary - 1).bit_length())
    return min(2, -(-bits // 8)), max(0, bits - 16)


def id_parts(ids: NDArray[np.int32], vocabulary: int) -> list[NDArray[np.uint8]]:
    """Returns the planes of ids: byte planes as long as `ids` is, then all bit planes, packed, as one.

    Args:
        ids: int32 of any shape.
        vocabulary: every id is below it.
    """
    byte_planes, bit_planes = id_widths(vocabulary)
    low = ids.astype("<u2").reshape(-1)  # casts keep the lowest bytes
    parts = [(low >> 8 * plane).astype(np.uint8) for plane in range(byte_planes)]
    if bit_planes:
        parts.append(pack_high_bits(ids, bit_planes))
    return parts


def pack_high_bits(ids: NDArray[np.int32], bit_planes: int) -> NDArray[np.uint8]:
    """Returns the bits from the 17th on, a packed plane for each, one behind the other."""
    planes = [np.packbits(ids & (1 << 16 + plane) != 0, bitorder="little") for plane in range(bit_planes)]
    return planes[0] if bit_planes == 1 else np.concatenate(planes)


def id_part_sizes(count: int, vocabulary: int) -> list[int]:
    """Returns the bytes of each of `id_parts`."""
    byte_planes, bit_planes = id_widths(vocabulary)
    return [count] * byte_planes + ([bit_planes * -(-count // 8)] if bit_planes else [])


def ids_from_parts(parts: Sequence[Any], vocabulary: int, out: NDArray[np.int32]) -> None:
    """Writes the ids of `id_parts` into `out`, int32 of any shape."""
    byte_planes, bit_planes = id_widths(vocabulary)
    low = np.frombuffer(parts[0], np.uint8).reshape(out.shape)
    if byte_planes == 1:
        np.copyto(out, low)
        return
    two = np.left_shift(np.frombuffer(parts[1], np.uint8).reshape(out.shape), 8, dtype=np.uint16)
    np.bitwise_or(two, low, out=two)
    join_high_bits(two, parts[2] if bit_planes else None, bit_planes, out)


def join_high_bits(low: NDArray[np.uint16], bits: Any, bit_planes: int, out: NDArray[np.int32]) -> None:
    """Writes ids into `out` from their lower 16 bits, of the same shape, and `pack_high_bits`."""
    if not bit_planes:
        np.copyto(out, low)
        return
    width = -(-low.size // 8)
    packed = np.frombuffer(bits, np.uint8).reshape(bit_planes, width)
    if low.size % 8 == 0 and out.flags.c_contiguous:
        np.take(_BIT_16, packed[0], axis=0, out=out.reshape(-1, 8), mode="clip")
    else:
        bits_16 = np.take(_BIT_16, packed[0], axis=0, mode="clip")
        out[...] = bits_16.reshape(-1)[: low.size].reshape(out.shape)
    for plane in range(1, bit_planes):
        ones = np.left_shift(_BIT_16[packed[plane]], plane).reshape(-1)[: low.size]
        np.bitwise_or(out, ones.reshape(out.shape), out=out)
    np.bitwise_or(out, low, out=out)


def word_parts(words: NDArray[Any]) -> list[NDArray[np.uint8]]:
    """Returns the low bytes and the high bytes of 16-bit numbers of any kind."""
    pairs = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 2)
    return [np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])]


def words_from_parts(low: Any, high: Any, kind: str) -> NDArray[Any]:
    """Returns 16-bit numbers of a kind ("<f2" or "<u2") from `word_parts`."""
    pairs = np.empty((len(low), 2), np.uint8)
    pairs[:, 0] = np.frombuffer(low, np.uint8)
    pairs[:, 1] = np.frombuffer(high, np.uint8)
    return pairs.reshape(-1).view(kind)


def half_columns(values: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
    """Returns the byte planes of each column, rounded to halves, of values [M] or [M, columns]."""
    columns = values[:, None] if values.ndim == 1 else values
    return [part for column in columns.T for part in word_parts(to_half(column))]


def entropy_codes(nats: NDArray[np.float32], vocabulary: int) -> NDArray[np.uint16]:
    """Returns entropies as whole steps, from 0 to log V (and its slack)."""
    highest = np.floor((np.log(vocabulary) + ENTROPY_SLACK) * ENTROPY_STEPS)
    return np.clip(np.rint(nats.astype(np.float64) * ENTROPY_STEPS), 0, highest).astype("<u2")


def entropies(codes: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """Writes nats into `out`."""
    np.divide(codes, np.float32(ENTROPY_STEPS), out=out, dtype=np.float32)


def read_parts(stored: Any, plane: str, sizes: Sequence[int], *, skip: int = 0) -> list[bytes]:
    """Returns the content of each part of a plane, which must have these sizes in bytes.

    Args:
        stored: the plane.
        plane: its name.
        sizes: of all its parts.
        skip: how many of the first parts to leave out, whose content the caller has.

    Raises:
        PlaneError: it has others, or a frame is bad.
    """
    frames = split_parts(stored, plane, len(sizes))
    pairs = list(zip(frames, sizes, strict=True))[skip:]
    return [decompress_frame(frame, plane, size, at_most=size) for frame, size in pairs]


def read_flattened_ids(
    stored: Any, plane: str, positions: int, vocabulary: int, width: int
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Returns (number of entries [M], unsigned; int32 [D] ids) of a plane of sizes and flattened ids.

    Raises:
        PlaneError: a frame is bad, or a position has more than `width` entries.
    """
    kind = smallest_unsigned(width)
    frames = split_parts(stored, plane, 1 + len(id_part_sizes(0, vocabulary)))
    size = positions * kind.itemsize
    sizes = np.frombuffer(decompress_frame(frames[0], plane, size, at_most=size), kind)
    if int(sizes.max(initial=0)) > width:
        position = int(sizes.argmax())
        raise PlaneError(plane, f"record {position} has {sizes[position]} entries, at most {width} fit")
    ids = np.empty(int(sizes.sum(dtype=np.int64)), np.int32)
    parts = read_parts(stored, plane, [size, *id_part_sizes(ids.size, vocabulary)], skip=1)
    ids_from_parts(parts, vocabulary, ids)
    return sizes, ids


def used_places(sizes: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """Returns bool [M, width], true for the first `sizes[m]` entries of each position."""
    return np.arange(width, dtype=sizes.dtype) < sizes[:, None]
