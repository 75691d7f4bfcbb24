"""The codecs `tkq8`, `compact` and `fp16`: bytes of one kind stand together, in a zstd frame with checksum.

`tkq8` keeps head values as 8-bit codes in rank order and stores their differences. `fp16` keeps them as half
floats. `compact` is `tkq8` with ids renumbered by frequency and, where a mass is set, heads cut short.

Shapes: L positions of a row, k head entries, n draws, G grid temperatures, D entries of all positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.exact import record_planes
from sparsekd.logit_store.codecs.frames import PlaneError, join_parts
from sparsekd.logit_store.codecs.frequency import Renumbering, mass_of, renumbering_of
from sparsekd.logit_store.codecs.pieces import (
    ENTROPY_STEPS,
    decode_mask_and_segments,
    encode_mask_and_segments,
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
    range_error,
    running_sums,
    steps_fit,
)
from sparsekd.logit_store.codecs.ragged import cut_to_mass
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import NO_ID, Row, TeacherRecord

BLOCK_POSITIONS = 4096
"""Positions whose values are worked on together, which bounds their arrays. Measured at k = 64 on one core:
encoding a row of 4,096 took 1.96 ms (`plain`) so, 2.18 in blocks of 1,024 and 2.53 of 512."""

HALVES = "fp16"
"""Name of the codec whose values are halves."""


def encode(row: Row, manifest: Manifest) -> dict[str, bytes]:
    """Returns the stored planes of a row under the manifest's codec."""
    vocabulary = manifest.tokenizer.vocabulary_size
    renumbering = renumbering_of(manifest)
    tokens = row.token_ids if renumbering is None else renumbering.new[row.token_ids]
    stored = {"token_ids": join_parts(id_parts(tokens, vocabulary)), **encode_mask_and_segments(row)}
    if row.teacher is None:
        return stored
    record = row.teacher
    mass = mass_of(manifest)
    sizes = None
    if mass is not None:
        record = cut_to_mass(record, manifest.record, mass)
        sizes = (record.head_ids != NO_ID).sum(axis=1)
    parts: dict[str, Sequence[Any]] = {}
    if manifest.record.k:
        parts |= _encode_head(record, manifest, sizes, renumbering)
    if manifest.record.n:
        parts |= _encode_tail(record, manifest)
    rest_steps = entropy_codes(record.rest_entropy, vocabulary)
    steps = entropy_codes(record.entropy, vocabulary)
    parts |= {
        "log_rest": half_columns(record.log_rest),
        "rest_entropy": word_parts(rest_steps),
        "true_logprob": half_columns(np.minimum(record.true_logprob, 0)),
        # Without a head the rest is everything, and at temperature 1 both are the same number.
        "entropy": word_parts(steps if manifest.record.k else steps - rest_steps),
    }
    return stored | {name: join_parts(parts[name]) for name in record_planes(manifest) if name in parts}


def _encode_head(
    record: TeacherRecord, manifest: Manifest, sizes: NDArray[Any] | None, renumbering: Renumbering | None
) -> dict[str, Sequence[Any]]:
    """Returns the parts of the head's planes; `sizes` [L] where heads are cut short."""
    vocabulary, k = manifest.tokenizer.vocabulary_size, manifest.record.k
    ids = np.empty_like(record.head_ids)
    if manifest.codec.name == HALVES:
        halves = half_below(np.minimum(record.head_logprobs, 0))
        # The bits of negative halves ascend as their values descend.
        depth, ids = sorted_by_depth(halves.view("<u2") & np.uint16(0x7FFF), record.head_ids, vocabulary)
        signed = np.where(depth > 0, depth | np.uint16(0x8000), depth)
        return {"head_ids": id_parts(ids, vocabulary), "head_logprobs": word_parts(signed)}
    tops, spans = np.empty(len(ids), "<f2"), np.empty(len(ids), "<f2")
    steps = np.empty((len(ids), k - 1), np.uint8)
    for start in range(0, len(ids), BLOCK_POSITIONS):
        block = slice(start, start + BLOCK_POSITIONS)
        tops[block], spans[block], codes = encode_range(record.head_logprobs[block], descending=True)
        codes, ids[block] = sorted_by_depth(codes, record.head_ids[block], vocabulary)
        np.subtract(codes[:, 1:], codes[:, :-1], out=steps[block])
    ranges = [*word_parts(tops), *word_parts(spans)]
    if sizes is None:
        numbers = ids if renumbering is None else renumbering.new[ids]
        return {"head_ids": id_parts(numbers, vocabulary), "head_logprobs": [*ranges, steps]}
    used = used_places(sizes, k)
    flat = ids[used]
    numbers = flat if renumbering is None else renumbering.new[flat]
    stored_sizes = sizes.astype(smallest_unsigned(k))
    return {
        "head_ids": [stored_sizes, *id_parts(numbers, vocabulary)],
        "head_logprobs": [*ranges, steps[used[:, 1:]]],
    }


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
    keys = np.left_shift(depth, kind(bits), dtype=kind)
    np.bitwise_or(keys, unsigned, out=keys)
    keys.sort(axis=1)
    found = (keys & mask).view(signed).astype(np.int32, copy=False)
    if short:
        found[found == signed(mask)] = NO_ID
    return np.right_shift(keys, kind(bits), out=keys).astype(depth.dtype), found


def _encode_tail(record: TeacherRecord, manifest: Manifest) -> dict[str, Sequence[Any]]:
    """Returns the parts of the draws' planes: the used entries alone, position by position."""
    vocabulary, n = manifest.tokenizer.vocabulary_size, manifest.record.n
    used = record.tail_counts > 0
    sizes = used.sum(axis=1)
    gaps = np.diff(record.tail_ids, axis=1, prepend=np.int32(0))
    # The counts of a position sum to n, so its last one goes without saying.
    told = used.copy()
    told[:, :-1] &= used[:, 1:]
    told[:, -1] = False
    parts: dict[str, Sequence[Any]] = {
        "tail_ids": [sizes.astype(smallest_unsigned(n)), *id_parts(gaps[used], vocabulary)],
        "tail_counts": [record.tail_counts[told].astype(smallest_unsigned(n))],
    }
    if not manifest.record.tail_logprobs:
        return parts
    if manifest.codec.name == HALVES:
        parts["tail_logprobs"] = word_parts(half_below(np.minimum(record.tail_logprobs[used], 0)))
    else:
        top, span, codes = encode_range(np.minimum(record.tail_logprobs, 0), descending=False)
        parts["tail_logprobs"] = [*word_parts(top), *word_parts(span), codes[used]]
    return parts


def decode(planes: Mapping[str, Any], manifest: Manifest, out: TeacherRecord) -> Row:
    """Reads what `encode` stored; writes the record into `out`.

    Raises:
        PlaneError: a plane is not as the manifest's shapes ask.
    """
    length, vocabulary = manifest.sequence_length, manifest.tokenizer.vocabulary_size
    renumbering = renumbering_of(manifest)
    tokens = np.empty(length, np.int32)
    parts = read_parts(planes["token_ids"], "token_ids", id_part_sizes(length, vocabulary))
    ids_from_parts(parts, vocabulary, tokens)
    if renumbering is not None:
        tokens = renumbering.old_ids(tokens, "token_ids")
    mask, starts, documents = decode_mask_and_segments(planes, manifest)
    if manifest.teacher is None:
        return Row(tokens, mask, starts, documents, None)
    if manifest.record.k:
        _decode_head(planes, manifest, renumbering, out)
    if manifest.record.n:
        _decode_tail(planes, manifest, out)

    def words(name: str, kind: str, columns: int = 1) -> list[NDArray[Any]]:
        parts = read_parts(planes[name], name, [length] * (2 * columns))
        return [words_from_parts(low, high, kind) for low, high in zip(parts[::2], parts[1::2], strict=True)]

    for column, values in enumerate(words("log_rest", "<f2", out.log_rest.shape[1])):
        out.log_rest[:, column] = values
    out.true_logprob[:] = words("true_logprob", "<f2")[0]
    (rest_steps,), (steps,) = words("rest_entropy", "<u2"), words("entropy", "<u2")
    entropies(rest_steps, out.rest_entropy)
    entropies(steps if manifest.record.k else steps + rest_steps, out.entropy)
    return Row(tokens, mask, starts, documents, out)


def _decode_head(
    planes: Mapping[str, Any], manifest: Manifest, renumbering: Renumbering | None, out: TeacherRecord
) -> None:
    length, vocabulary, k = manifest.sequence_length, manifest.tokenizer.vocabulary_size, manifest.record.k
    used, count = None, length * k
    if mass_of(manifest) is None:
        ids = out.head_ids
        ids_from_parts(
            read_parts(planes["head_ids"], "head_ids", id_part_sizes(count, vocabulary)), vocabulary, ids
        )
    else:
        used, ids = read_flattened_ids(planes["head_ids"], "head_ids", manifest, k)
    if renumbering is not None:
        ids = renumbering.old_ids(ids, "head_ids")
    if used is not None:
        out.head_ids.fill(NO_ID)
        out.head_ids[used] = ids
    elif ids is not out.head_ids:
        out.head_ids[:] = ids
    if manifest.codec.name == HALVES:
        low, high = read_parts(planes["head_logprobs"], "head_logprobs", [count, count])
        out.head_logprobs[:] = words_from_parts(low, high, "<f2").reshape(length, k)
        return
    told = length * (k - 1) if used is None else int(used[:, 1:].sum())
    *ranges, plain = read_parts(planes["head_logprobs"], "head_logprobs", [length] * 4 + [told])
    top, span = _ranges(ranges, "head_logprobs")
    steps = np.frombuffer(plain, np.uint8)
    if used is None:
        steps = steps.reshape(length, k - 1)
    else:
        padded = np.zeros((length, k - 1), np.uint8)
        padded[used[:, 1:]] = steps
        steps = padded
    if not steps_fit(steps):
        raise PlaneError("head_logprobs", "the code differences of a position sum to more than 255")
    for start in range(0, length, BLOCK_POSITIONS):
        block = slice(start, start + BLOCK_POSITIONS)
        decode_range(top[block], span[block], running_sums(steps[block], k), out.head_logprobs[block])
    if used is not None:
        np.copyto(out.head_logprobs, -np.inf, where=~used)


def _ranges(parts: Sequence[bytes], plane: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns (top [L], span [L]) from their byte planes."""
    top = words_from_parts(parts[0], parts[1], "<f2").astype(np.float32)
    span = words_from_parts(parts[2], parts[3], "<f2").astype(np.float32)
    good = (span >= 0) & (span < np.inf) & (top <= 0)
    if not good.all():
        position = int(np.flatnonzero(~good)[0])
        raise PlaneError(plane, f"position {position} has top {top[position]} and span {span[position]}")
    return top, span


def _decode_tail(planes: Mapping[str, Any], manifest: Manifest, out: TeacherRecord) -> None:
    length, n = manifest.sequence_length, manifest.record.n
    used, gaps = read_flattened_ids(planes["tail_ids"], "tail_ids", manifest, n)
    count = gaps.size
    out.tail_ids.fill(0)
    out.tail_ids[used] = gaps
    np.cumsum(out.tail_ids, axis=1, out=out.tail_ids)
    np.copyto(out.tail_ids, NO_ID, where=~used)
    drawn = used.any(axis=1)
    told = used.copy()
    told[:, :-1] &= used[:, 1:]
    told[:, -1] = False
    width = smallest_unsigned(n)
    size = (count - int(drawn.sum())) * width.itemsize
    (plain,) = read_parts(planes["tail_counts"], "tail_counts", [size])
    out.tail_counts.fill(0)
    out.tail_counts[told] = np.frombuffer(plain, width)
    lasts = used & ~told
    left = n - out.tail_counts.sum(axis=1, dtype=np.int64)
    out.tail_counts[lasts] = np.clip(left[drawn], NO_ID, n)
    if not manifest.record.tail_logprobs:
        return
    if manifest.codec.name == HALVES:
        low, high = read_parts(planes["tail_logprobs"], "tail_logprobs", [count, count])
        out.tail_logprobs[used] = words_from_parts(low, high, "<f2")
    else:
        *ranges, plain = read_parts(planes["tail_logprobs"], "tail_logprobs", [length] * 4 + [count])
        top, span = _ranges(ranges, "tail_logprobs")
        codes = np.zeros((length, n), np.uint8)
        codes[used] = np.frombuffer(plain, np.uint8)
        decode_range(top, span, codes, out.tail_logprobs)
    np.copyto(out.tail_logprobs, -np.inf, where=~used)


def errors(record: TeacherRecord, manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """Returns, per value plane, by how much a decoded value may differ from the one that was written.

    Args:
        record: decoded.
        manifest: of its store.
    """
    halves = manifest.codec.name == HALVES

    def half_error(values: NDArray[np.float32], halfs: int = 1) -> NDArray[np.float32]:
        size = np.where(np.isinf(values), 0, np.abs(values))
        return (size * np.float32(halfs * HALF_ROUNDING * 1.01) + np.float32(2e-6)).astype(np.float32)

    def head_error(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return half_error(values, 2) if halves else range_error(values)

    step = np.float32(0.5 / ENTROPY_STEPS + 2e-6 + HALF_SMALLEST)
    return {
        "head_logprobs": head_error(record.head_logprobs),
        "log_rest": half_error(record.log_rest),
        "true_logprob": half_error(record.true_logprob),
        "rest_entropy": np.full_like(record.rest_entropy, step),
        "entropy": np.full_like(record.entropy, step),
        "tail_logprobs": head_error(record.tail_logprobs),
    }
