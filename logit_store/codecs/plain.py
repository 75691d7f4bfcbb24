"""The codec `plain`: nothing is compressed, every position has the same stride, k' < k entries are a prefix.

For local disks, for readers that decode on a device, and as a second opinion on `tkq8`, whose values it has.

Shapes: L positions of a row, k head entries, n draws, G grid temperatures.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.exact import record_planes
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
from sparsekd.logit_store.codecs.tkq8 import BLOCK_POSITIONS, sorted_by_depth
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import NO_ID, Row, TeacherRecord


def encode(row: Row, manifest: Manifest) -> dict[str, bytes]:
    """Returns the stored planes of a row."""
    vocabulary, spec = manifest.tokenizer.vocabulary_size, manifest.record
    stored = {
        "token_ids": _id_bytes(row.token_ids, vocabulary),
        "loss_mask": np.packbits(row.loss_mask, bitorder="little").tobytes(),
        "segment_starts": row.segment_starts.astype("<u4").tobytes(),
        "segment_documents": row.segment_documents.astype("<i8").tobytes(),
    }
    record = row.teacher
    if record is None:
        return stored
    if spec.k:
        ids = np.empty_like(record.head_ids)
        ranges, codes = np.empty((2, len(ids)), "<f2"), np.empty(ids.shape, np.uint8)
        for start in range(0, len(ids), BLOCK_POSITIONS):
            block = slice(start, start + BLOCK_POSITIONS)
            ranges[0, block], ranges[1, block], unsorted = encode_range(
                record.head_logprobs[block], descending=True
            )
            codes[block], ids[block] = sorted_by_depth(unsorted, record.head_ids[block], vocabulary)
        stored["head_ids"] = _id_bytes(ids, vocabulary)
        stored["head_logprobs"] = ranges.tobytes() + codes.tobytes()
    if spec.n:
        stored["tail_ids"] = _id_bytes(np.maximum(record.tail_ids, 0), vocabulary)
        stored["tail_counts"] = record.tail_counts.astype(smallest_unsigned(spec.n)).tobytes()
    if spec.tail_logprobs:
        top, span, codes = encode_range(np.minimum(record.tail_logprobs, 0), descending=False)
        stored["tail_logprobs"] = top.tobytes() + span.tobytes() + codes.tobytes()
    values = {
        "log_rest": to_half(record.log_rest),
        "rest_entropy": entropy_codes(record.rest_entropy, vocabulary),
        "true_logprob": to_half(np.minimum(record.true_logprob, 0)),
        "entropy": entropy_codes(record.entropy, vocabulary),
    }
    stored |= {name: value.tobytes() for name, value in values.items()}
    return {name: stored[name] for name in record_planes(manifest)}


def _id_bytes(ids: NDArray[np.int32], vocabulary: int) -> bytes:
    """Returns the lower bytes of each id as one number, then the planes of the bits above 16."""
    low, bit_planes = id_widths(vocabulary)
    whole = ids.astype("<u2" if low == 2 else "u1").tobytes()
    return whole + pack_high_bits(ids, bit_planes).tobytes() if bit_planes else whole


def _read_ids(planes: Mapping[str, Any], name: str, vocabulary: int, out: NDArray[np.int32]) -> None:
    low, bit_planes = id_widths(vocabulary)
    view = memoryview(planes[name]).cast("B")
    begin = low * out.size
    _require_size(view, name, begin + bit_planes * -(-out.size // 8))
    numbers = np.frombuffer(view[:begin], "<u2" if low == 2 else "u1").reshape(out.shape)
    join_high_bits(numbers, view[begin:], bit_planes, out)


def _require_size(view: memoryview, name: str, size: int) -> None:
    if len(view) != size:
        raise PlaneError(name, f"it has {len(view)} bytes, expected {size}")


def decode(planes: Mapping[str, Any], manifest: Manifest, out: TeacherRecord) -> Row:
    """Reads what `encode` stored; writes the record into `out`.

    Raises:
        PlaneError: a plane is not as the manifest's shapes ask.
    """
    length, vocabulary, spec = manifest.sequence_length, manifest.tokenizer.vocabulary_size, manifest.record

    def array(name: str, kind: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        view = memoryview(planes[name]).cast("B")
        _require_size(view, name, int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize)
        return np.frombuffer(view, kind).reshape(shape)

    def segments(name: str, kind: str) -> NDArray[Any]:
        view = memoryview(planes[name]).cast("B")
        width = np.dtype(kind).itemsize
        if len(view) % width or len(view) > length * width:
            raise PlaneError(name, f"it has {len(view)} bytes, expected at most {length} times {width}")
        return np.frombuffer(view, kind)

    tokens = np.empty(length, np.int32)
    _read_ids(planes, "token_ids", vocabulary, tokens)
    bits = array("loss_mask", "u1", (-(-length // 8),))
    mask = np.unpackbits(bits, count=length, bitorder="little").view(np.bool_)
    starts = segments("segment_starts", "<u4").astype(np.int32)
    documents = segments("segment_documents", "<i8").astype(np.int64)
    if manifest.teacher is None:
        return Row(tokens, mask, starts, documents, None)
    if spec.k:
        _read_ids(planes, "head_ids", vocabulary, out.head_ids)
        _read_values(planes, "head_logprobs", out.head_logprobs)
    if spec.n:
        _read_ids(planes, "tail_ids", vocabulary, out.tail_ids)
        out.tail_counts[:] = array("tail_counts", smallest_unsigned(spec.n), (length, spec.n))
        np.copyto(out.tail_ids, NO_ID, where=out.tail_counts == 0)
    if spec.tail_logprobs:
        _read_values(planes, "tail_logprobs", out.tail_logprobs)
        np.copyto(out.tail_logprobs, -np.inf, where=out.tail_counts == 0)
    out.log_rest[:] = array("log_rest", "<f2", out.log_rest.shape)
    out.true_logprob[:] = array("true_logprob", "<f2", (length,))
    entropies(array("rest_entropy", "<u2", (length,)), out.rest_entropy)
    entropies(array("entropy", "<u2", (length,)), out.entropy)
    return Row(tokens, mask, starts, documents, out)


def _read_values(planes: Mapping[str, Any], name: str, out: NDArray[np.float32]) -> None:
    """Writes values of top [L], span [L] and codes [L, entries] into `out`."""
    length = len(out)
    view = memoryview(planes[name]).cast("B")
    _require_size(view, name, 4 * length + out.size)
    top, span = np.frombuffer(view[: 4 * length], "<f2").reshape(2, length).astype(np.float32)
    good = (span >= 0) & (span < np.inf) & (top <= 0)
    if not good.all():
        position = int(np.flatnonzero(~good)[0])
        raise PlaneError(name, f"position {position} has top {top[position]} and span {span[position]}")
    codes = np.frombuffer(view[4 * length :], np.uint8).reshape(out.shape)
    for start in range(0, length, BLOCK_POSITIONS):
        block = slice(start, start + BLOCK_POSITIONS)
        decode_range(top[block], span[block], codes[block], out[block])
