"""Codecs: how a row becomes named planes of stored bytes, and back.

A codec is two pure functions and what they need to be judged by; the manifest names it. To add one, write the
functions and enter it in `CODECS`.

Shapes: L positions of a row, S segments, k head entries, n draws, G grid temperatures.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import DTypeLike, NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import NO_ID, Row, TeacherRecord

ZSTD_LEVEL = 1
"""Higher levels are slower and, on these planes, not smaller: only the entropy coder finds anything."""

TOKEN_PLANES = ("token_ids", "loss_mask", "segment_starts", "segment_documents")


class PlaneError(Exception):
    """A stored plane cannot be decoded.

    Attributes:
        plane: its name.
    """

    def __init__(self, plane: str, reason: str) -> None:
        super().__init__(reason)
        self.plane = plane


@dataclass(frozen=True)
class Codec:
    """One way to store rows.

    Attributes:
        planes: names of the planes of every row under a manifest, in stored order.
        encode: a row that passed `check_row` -> the stored bytes of each plane. Equal rows give equal bytes.
        decode: the stored bytes of each plane -> the row. Raises PlaneError; never allocates more than the
            manifest's shapes ask for.
        check_parameters: raises StoreError for parameters that the codec does not know.
        mass_tolerance: by how much decoded probabilities of a position may sum to more than 1.
    """

    planes: Callable[[Manifest], tuple[str, ...]]
    encode: Callable[[Row, Manifest], dict[str, bytes]]
    decode: Callable[[Mapping[str, Any], Manifest], Row]
    check_parameters: Callable[[Mapping[str, Any]], None]
    mass_tolerance: float


def codec_of(manifest: Manifest) -> Codec:
    """Returns the codec that a manifest names.

    Raises:
        StoreError: there is none of that name, or it does not know the parameters.
    """
    spec = manifest.codec
    if spec.name not in CODECS:
        raise StoreError(
            f"The store's codec is {spec.name!r}, but this sparsekd knows {', '.join(sorted(CODECS))}: name "
            "one of these when writing, or update sparsekd to read."
        )
    CODECS[spec.name].check_parameters(spec.parameters)
    return CODECS[spec.name]


_contexts = threading.local()  # zstd contexts may not be shared between threads, and are dear to make


def compress_frame(plain: bytes) -> bytes:
    """Returns one zstd frame with content size and content checksum."""
    if not hasattr(_contexts, "compressor"):
        _contexts.compressor = zstandard.ZstdCompressor(
            level=ZSTD_LEVEL, write_checksum=True, write_content_size=True
        )
    return _contexts.compressor.compress(plain)


def decompress_frame(stored: Any, plane: str, size: int | None, *, at_most: int) -> bytes:
    """Returns the content of a zstd frame.

    Args:
        stored: buffer of the whole frame and nothing else.
        plane: its name, for messages.
        size: bytes that the content must have; None when the caller judges it.
        at_most: bytes that it may have; more is refused before anything is allocated.

    Raises:
        PlaneError: it is no such frame, or its checksum differs.
    """
    try:
        header = zstandard.get_frame_parameters(stored)
        found = header.content_size
        if not header.has_checksum:
            raise PlaneError(plane, "its zstd frame has no checksum")
        if found > at_most or (size is not None and found != size):
            raise PlaneError(plane, f"its zstd frame holds {found} bytes, expected {size or at_most}")
        if not hasattr(_contexts, "decompressor"):
            _contexts.decompressor = zstandard.ZstdDecompressor()
        return _contexts.decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PlaneError(plane, f"its zstd frame cannot be read ({error})") from error


def smallest_unsigned(largest: int) -> np.dtype[Any]:
    """Returns the narrowest of the little-endian uint8, uint16 and uint32 that holds `largest`."""
    return next(np.dtype(name) for name in ("u1", "<u2", "<u4") if largest <= np.iinfo(name).max)


def exact_planes(manifest: Manifest) -> tuple[str, ...]:
    """Returns the planes of the `exact` codec; those of no width are not stored."""
    if manifest.teacher is None:
        return TOKEN_PLANES
    head = ("head_ids", "head_logprobs") if manifest.record.k else ()
    tail = ("tail_ids", "tail_counts") if manifest.record.n else ()
    return (*TOKEN_PLANES, *head, *tail, "log_rest", "rest_entropy", "true_logprob", "entropy")


def exact_encode(row: Row, manifest: Manifest) -> dict[str, bytes]:
    """Stores ids and counts in the narrowest unsigned type and values in float32: lossless."""
    ids = smallest_unsigned(manifest.tokenizer.vocabulary_size - 1)
    counts = smallest_unsigned(manifest.record.n)
    plain: dict[str, NDArray[Any]] = {
        "token_ids": row.token_ids.astype(ids),
        "loss_mask": np.packbits(row.loss_mask, bitorder="little"),
        "segment_starts": row.segment_starts.astype("<u4"),
        "segment_documents": row.segment_documents.astype("<i8"),
    }
    if row.teacher is not None:
        teacher = row.teacher
        plain |= {
            "head_ids": teacher.head_ids.astype(ids),
            "head_logprobs": teacher.head_logprobs.astype("<f4"),
            # The count of 0 marks an unused entry, so its id need not be told from id 0.
            "tail_ids": np.maximum(teacher.tail_ids, 0).astype(ids),
            "tail_counts": teacher.tail_counts.astype(counts),
            "log_rest": teacher.log_rest.astype("<f4"),
            "rest_entropy": teacher.rest_entropy.astype("<f4"),
            "true_logprob": teacher.true_logprob.astype("<f4"),
            "entropy": teacher.entropy.astype("<f4"),
        }
    return {name: compress_frame(plain[name].tobytes()) for name in exact_planes(manifest)}


def exact_decode(planes: Mapping[str, Any], manifest: Manifest) -> Row:
    """Reads what `exact_encode` stored."""
    length = manifest.sequence_length
    spec = manifest.record
    ids = smallest_unsigned(manifest.tokenizer.vocabulary_size - 1)

    def array(name: str, stored: DTypeLike, shape: tuple[int, ...], wanted: DTypeLike) -> NDArray[Any]:
        if 0 in shape:
            return np.zeros(shape, wanted)
        size = math.prod(shape) * np.dtype(stored).itemsize
        plain = decompress_frame(planes[name], name, size, at_most=size)
        # A copy even where the type is the same: the caller gets arrays that can be written to.
        return np.frombuffer(plain, stored).reshape(shape).astype(wanted)

    def segments(name: str, stored: DTypeLike, wanted: DTypeLike) -> NDArray[Any]:
        width = np.dtype(stored).itemsize
        plain = decompress_frame(planes[name], name, None, at_most=length * width)
        if len(plain) % width:
            raise PlaneError(name, f"it holds {len(plain)} bytes, expected a multiple of {width}")
        return np.frombuffer(plain, stored).astype(wanted)

    bits = array("loss_mask", "u1", ((length + 7) // 8,), np.uint8)
    teacher = None
    if manifest.teacher is not None:
        grid = len(spec.temperatures)
        counts = array("tail_counts", smallest_unsigned(spec.n), (length, spec.n), np.int32)
        tail_ids = array("tail_ids", ids, (length, spec.n), np.int32)
        tail_ids[counts == 0] = NO_ID
        teacher = TeacherRecord(
            head_ids=array("head_ids", ids, (length, spec.k), np.int32),
            head_logprobs=array("head_logprobs", "<f4", (length, spec.k), np.float32),
            tail_ids=tail_ids,
            tail_counts=counts,
            log_rest=array("log_rest", "<f4", (length, grid), np.float32),
            rest_entropy=array("rest_entropy", "<f4", (length,), np.float32),
            true_logprob=array("true_logprob", "<f4", (length,), np.float32),
            entropy=array("entropy", "<f4", (length,), np.float32),
        )
    return Row(
        token_ids=array("token_ids", ids, (length,), np.int32),
        loss_mask=np.unpackbits(bits, count=length, bitorder="little").astype(np.bool_),
        segment_starts=segments("segment_starts", "<u4", np.int32),
        segment_documents=segments("segment_documents", "<i8", np.int64),
        teacher=teacher,
    )


def _no_parameters(parameters: Mapping[str, Any]) -> None:
    if parameters:
        raise StoreError(
            f"The codec has no parameter {', '.join(sorted(parameters))}: leave its parameters empty."
        )


CODECS = {
    "exact": Codec(
        planes=exact_planes,
        encode=exact_encode,
        decode=exact_decode,
        check_parameters=_no_parameters,
        mass_tolerance=1e-4,
    ),
}
