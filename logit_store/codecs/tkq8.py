"""The codecs `tkq8`, `compact` and `fp16`: bytes of one kind stand together, in a zstd frame with checksum.

`tkq8` keeps head values as 8-bit codes in rank order and stores their differences. `fp16` keeps them as half
floats. `compact` is `tkq8` with ids renumbered by frequency and, where a mass is set, heads cut short.

Shapes: M recorded positions of a row, k head entries, n draws, G grid temperatures, D entries of all
positions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.frames import PlaneError, join_parts
from sparsekd.logit_store.codecs.frequency import Renumbering, mass_of, renumbering_of
from sparsekd.logit_store.codecs.pieces import (
    ENTROPY_STEPS,
    entropies,
    entropy_codes,
    half_columns,
    id_part_sizes,
    id_parts,
    ids_from_parts,
    read_flattened_ids,
    read_parts,
    smallest_unsigned,
    used_places,
    word_parts,
    words_from_parts,
)
from sparsekd.logit_store.codecs.quantise import (
    HALF_ROUNDING,
    HALF_SMALLEST,
    decode_range,
    encode_range,
    half_below,
    never_falls,
    range_error,
    running_sums,
)
from sparsekd.logit_store.codecs.room import Coding, Room, Stored
from sparsekd.logit_store.codecs.text import FRAMED_TEXT
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import Plane, Planes
from sparsekd.logit_store.row import NO_ID

BLOCK_POSITIONS = 4096
"""Positions whose values are worked on together, which bounds their arrays. Measured at k = 64 on one core:
encoding a row of 4,096 took 1.96 ms (`plain`) so, 2.18 in blocks of 1,024 and 2.53 of 512."""

HALVES = "fp16"
"""Name of the codec whose values are halves."""


def _encode_ids(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    renumbering, vocabulary = renumbering_of(manifest), manifest.tokenizer.vocabulary_size
    arrays = {plane.name: planes[plane.name] for plane in members}
    return {
        name: join_parts(id_parts(ids if renumbering is None else renumbering.new[ids], vocabulary))
        for name, ids in arrays.items()
    }


def _decode_ids(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    renumbering, vocabulary = renumbering_of(room.manifest), room.manifest.tokenizer.vocabulary_size
    for plane in members:
        ids = room.new(plane)
        parts = read_parts(stored[plane.name], plane.name, id_part_sizes(ids.size, vocabulary))
        ids_from_parts(parts, vocabulary, ids)
        if renumbering is not None:
            room.keep(plane, renumbering.old_ids(ids, plane.name))


def _encode_head(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    parts = _head_parts(planes, manifest)
    return {name: join_parts(part) for name, part in parts.items()}


def _head_parts(planes: Planes, manifest: Manifest) -> dict[str, Sequence[Any]]:
    vocabulary, k = manifest.outcome_count, manifest.record.k
    given, values = planes["head_ids"], planes["head_logprobs"]
    ids = np.empty_like(given)
    if manifest.codec.name == HALVES:
        halves = half_below(np.minimum(values, 0))
        # The bits of negative halves ascend as their values descend.
        depth, ids = sorted_by_depth(halves.view("<u2") & np.uint16(0x7FFF), given, vocabulary)
        signed = np.where(depth > 0, depth | np.uint16(0x8000), depth)
        return {"head_ids": id_parts(ids, vocabulary), "head_logprobs": word_parts(signed)}
    tops, spans = np.empty(len(ids), "<f2"), np.empty(len(ids), "<f2")
    steps = np.empty((len(ids), k - 1), np.uint8)
    for start in range(0, len(ids), BLOCK_POSITIONS):
        block = slice(start, start + BLOCK_POSITIONS)
        tops[block], spans[block], codes = encode_range(values[block], descending=True)
        codes, ids[block] = sorted_by_depth(codes, given[block], vocabulary)
        np.subtract(codes[:, 1:], codes[:, :-1], out=steps[block])
    ranges = [*word_parts(tops), *word_parts(spans)]
    renumbering = _head_renumbering(manifest)
    if mass_of(manifest) is None:
        numbers = ids if renumbering is None else renumbering.new[ids]
        return {"head_ids": id_parts(numbers, vocabulary), "head_logprobs": [*ranges, steps]}
    sizes = (given != NO_ID).sum(axis=1)
    used = used_places(sizes, k)
    flat = ids[used]
    numbers = flat if renumbering is None else renumbering.new[flat]
    stored_sizes = sizes.astype(smallest_unsigned(k))
    return {
        "head_ids": [stored_sizes, *id_parts(numbers, vocabulary)],
        "head_logprobs": [*ranges, steps[used[:, 1:]]],
    }


def _head_renumbering(manifest: Manifest) -> Renumbering | None:
    """Returns the renumbering of head ids; classes are no ids of the tokenizer."""
    return renumbering_of(manifest) if manifest.outcomes is None else None


def sorted_by_depth(
    depth: NDArray[Any], ids: NDArray[np.int32], vocabulary: int
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Returns both sorted within each position: by depth (unsigned codes), those of equal depth by id.

    An id of -1 stands behind all others of its depth.
    """
    bits = vocabulary.bit_length()  # one value above every id, for -1
    kind, signed = (np.uint32, np.int32) if bits + 8 * depth.itemsize <= 32 else (np.uint64, np.int64)
    mask = kind((1 << bits) - 1)
    short = int(ids.min(initial=0)) < 0
    unsigned = ids.view(np.uint32) & np.uint32(mask) if short else ids.view(np.uint32)
    keys: NDArray[Any] = depth.astype(kind)
    np.left_shift(keys, kind(bits), out=keys)
    np.bitwise_or(keys, unsigned, out=keys)
    keys.sort(axis=1)
    found = (keys & mask).view(signed).astype(np.int32, copy=False)
    if short:
        found[found == signed(mask)] = NO_ID
    return np.right_shift(keys, kind(bits), out=keys).astype(depth.dtype), found


def _encode_tail(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    """Stores the used entries alone, position by position."""
    n, counts = manifest.record.n, planes["tail_counts"]
    used = counts > 0
    sizes = used.sum(axis=1)
    gaps = np.diff(planes["tail_ids"], axis=1, prepend=np.int32(0))
    told = used_places(_told(sizes), n)
    parts: dict[str, Sequence[Any]] = {
        "tail_ids": [sizes.astype(smallest_unsigned(n)), *id_parts(gaps[used], manifest.outcome_count)],
        "tail_counts": [counts[told].astype(smallest_unsigned(n))],
    }
    if manifest.record.tail_logprobs:
        values = np.minimum(planes["tail_logprobs"], 0)
        if manifest.codec.name == HALVES:
            parts["tail_logprobs"] = word_parts(half_below(values[used]))
        else:
            top, span, codes = encode_range(values, descending=False)
            parts["tail_logprobs"] = [*word_parts(top), *word_parts(span), codes[used]]
    return {name: join_parts(part) for name, part in parts.items()}


def _told(sizes: NDArray[Any]) -> NDArray[Any]:
    """Returns how many counts [M] are stored: all but a position's last, as its counts sum to n."""
    return np.maximum(sizes, 1) - 1


def _decode_head(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    manifest, positions = room.manifest, room.count("recorded")
    vocabulary, k = manifest.outcome_count, manifest.record.k
    used, numbers = None, None
    if mass_of(manifest) is not None:
        sizes, numbers = read_flattened_ids(stored["head_ids"], "head_ids", positions, vocabulary, k)
        used = used_places(sizes, k)
    for plane in members:
        out = room.new(plane)
        if plane.name == "head_logprobs":
            _decode_values(stored[plane.name], plane.name, used, out, halves=manifest.codec.name == HALVES)
            continue
        ids = out if numbers is None else numbers
        if numbers is None:
            parts = read_parts(stored["head_ids"], "head_ids", id_part_sizes(out.size, vocabulary))
            ids_from_parts(parts, vocabulary, out)
        renumbering = _head_renumbering(manifest)
        if renumbering is not None:
            ids = renumbering.old_ids(ids, "head_ids")
        if used is not None:
            out.fill(NO_ID)
            out[used] = ids
        elif ids is not out:
            out[:] = ids


def _decode_values(
    stored: Any, plane: str, used: NDArray[np.bool_] | None, out: NDArray[np.float32], *, halves: bool
) -> None:
    """Writes head values into `out` [M, k]; `used` [M, k] where heads are cut short."""
    positions, k = out.shape
    if halves:
        low, high = read_parts(stored, plane, [out.size, out.size])
        out[:] = words_from_parts(low, high, "<f2").reshape(out.shape)
        return
    told = positions * (k - 1) if used is None else int(used[:, 1:].sum())
    *ranges, plain = read_parts(stored, plane, [positions] * 4 + [told])
    top, span = _ranges(ranges, plane)
    steps = np.frombuffer(plain, np.uint8)
    if used is None:
        steps = steps.reshape(positions, k - 1)
    else:
        padded = np.zeros((positions, k - 1), np.uint8)
        padded[used[:, 1:]] = steps
        steps = padded
    for start in range(0, positions, BLOCK_POSITIONS):
        block = slice(start, start + BLOCK_POSITIONS)
        codes = running_sums(steps[block], k)
        if not never_falls(codes):
            raise PlaneError(plane, "the code differences of a position sum to more than 255")
        decode_range(top[block], span[block], codes, out[block])
    if used is not None:
        np.copyto(out, -np.inf, where=~used)


def _ranges(parts: Sequence[bytes], plane: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns (top [M], span [M]) from their byte planes."""
    top = words_from_parts(parts[0], parts[1], "<f2").astype(np.float32)
    span = words_from_parts(parts[2], parts[3], "<f2").astype(np.float32)
    good = (span >= 0) & (span < np.inf) & (top <= 0)
    if not good.all():
        position = int(np.flatnonzero(~good)[0])
        raise PlaneError(plane, f"record {position} has top {top[position]} and span {span[position]}")
    return top, span


def _decode_tail(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    manifest, positions = room.manifest, room.count("recorded")
    n = manifest.record.n
    sizes, gaps = read_flattened_ids(stored["tail_ids"], "tail_ids", positions, manifest.outcome_count, n)
    used = used_places(sizes, n)
    for plane in members:
        out = room.new(plane)
        if plane.name == "tail_ids":
            out.fill(NO_ID)
            out[used] = _sums_of_positions(gaps, sizes)
        elif plane.name == "tail_counts":
            _decode_counts(stored[plane.name], plane.name, sizes, out)
        else:
            _decode_tail_logprobs(stored[plane.name], plane.name, used, out, manifest)


def _sums_of_positions(gaps: NDArray[np.int32], sizes: NDArray[Any]) -> NDArray[np.int32]:
    """Returns the sum of each entry [D] and those before it in its position, of which there are `sizes` [M].

    The sums of all entries, less those of the positions before: modulo 2^32, and so right where these exceed
    it.
    """
    sums = np.zeros(len(gaps) + 1, np.int32)
    np.cumsum(gaps, out=sums[1:])
    begins = np.cumsum(sizes, dtype=np.int64) - sizes
    return sums[1:] - np.repeat(sums[begins], sizes)


def _decode_counts(stored: Any, plane: str, sizes: NDArray[Any], out: NDArray[np.int32]) -> None:
    n, told = out.shape[1], _told(sizes)
    width = smallest_unsigned(n)
    (plain,) = read_parts(stored, plane, [int(told.sum(dtype=np.int64)) * width.itemsize])
    out.fill(0)
    out[used_places(told, n)] = np.frombuffer(plain, width)
    left = n - np.einsum("ij->i", out, dtype=np.int64, casting="safe")
    drawn = np.flatnonzero(sizes)
    out[drawn, told[drawn]] = np.clip(left[drawn], NO_ID, n)


def _decode_tail_logprobs(
    stored: Any, plane: str, used: NDArray[np.bool_], out: NDArray[np.float32], manifest: Manifest
) -> None:
    count = int(used.sum())
    if manifest.codec.name == HALVES:
        low, high = read_parts(stored, plane, [count, count])
        out[used] = words_from_parts(low, high, "<f2")
    else:
        *ranges, plain = read_parts(stored, plane, [len(out)] * 4 + [count])
        top, span = _ranges(ranges, plane)
        codes = np.zeros(out.shape, np.uint8)
        codes[used] = np.frombuffer(plain, np.uint8)
        decode_range(top, span, codes, out)
    np.copyto(out, -np.inf, where=~used)


def _encode_halves(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    limited = {
        plane.name: np.minimum(planes[plane.name], 0) if plane.rule == "logprob" else planes[plane.name]
        for plane in members
    }
    return {name: join_parts(half_columns(values)) for name, values in limited.items()}


def _decode_halves(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    for plane in members:
        out = room.new(plane)
        columns = out[:, None] if out.ndim == 1 else out
        parts = read_parts(stored[plane.name], plane.name, [len(out)] * (2 * columns.shape[1]))
        for column, (low, high) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            columns[:, column] = words_from_parts(low, high, "<f2")


def _encode_entropies(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    codes = {plane.name: entropy_codes(planes[plane.name], manifest.outcome_count) for plane in members}
    if manifest.record.k == 0:
        # Without a head the rest is everything, and at temperature 1 both are the same number.
        codes["entropy"] = codes["entropy"] - codes["rest_entropy"]
    return {name: join_parts(word_parts(steps)) for name, steps in codes.items()}


def _decode_entropies(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    count = room.count("recorded")

    def steps(name: str) -> NDArray[np.uint16]:
        low, high = read_parts(stored[name], name, [count, count])
        return words_from_parts(low, high, "<u2")

    for plane in members:
        found = steps(plane.name)
        if plane.name == "entropy" and room.manifest.record.k == 0:
            found = found + steps("rest_entropy")
        entropies(found, room.new(plane))


CODINGS = FRAMED_TEXT | {
    "ids": Coding(_encode_ids, _decode_ids),
    "head": Coding(_encode_head, _decode_head),
    "tail": Coding(_encode_tail, _decode_tail),
    "halves": Coding(_encode_halves, _decode_halves),
    "entropies": Coding(_encode_entropies, _decode_entropies),
}


def error(plane: Plane, values: NDArray[np.float32], manifest: Manifest) -> NDArray[np.float32]:
    """Returns by how much decoded values of a rounded plane may differ from those that were written.

    Args:
        plane: a rounded one.
        values: decoded.
        manifest: of their store.
    """
    if plane.coding == "entropies":
        return np.full_like(values, np.float32(0.5 / ENTROPY_STEPS + 2e-6 + HALF_SMALLEST))
    if plane.coding == "halves":
        return _half_error(values, 1)
    return _half_error(values, 2) if manifest.codec.name == HALVES else range_error(values)


def _half_error(values: NDArray[np.float32], halfs: int) -> NDArray[np.float32]:
    size = np.where(np.isinf(values), 0, np.abs(values))
    return (size * np.float32(halfs * HALF_ROUNDING * 1.01) + np.float32(2e-6)).astype(np.float32)
