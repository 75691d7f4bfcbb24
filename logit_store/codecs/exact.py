"""The codec `exact`: ids and counts in the narrowest type, values in float32, one zstd frame each. Lossless.

Shapes: L positions of a row, S segments, k head entries, n draws, G grid temperatures.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sparsekd.logit_store.codecs.frames import compress_frame, decompress_frame
from sparsekd.logit_store.codecs.pieces import (
    TOKEN_PLANES,
    decode_mask_and_segments,
    encode_mask_and_segments,
    smallest_unsigned,
)
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import NO_ID, Row, TeacherRecord

VALUE_PLANES = ("head_logprobs", "log_rest", "rest_entropy", "true_logprob", "entropy", "tail_logprobs")
"""Planes of real numbers: those that a codec may round."""


def record_planes(manifest: Manifest) -> tuple[str, ...]:
    """Returns the planes of every codec; those of no width are not stored."""
    if manifest.teacher is None:
        return TOKEN_PLANES
    head = ("head_ids", "head_logprobs") if manifest.record.k else ()
    tail = ("tail_ids", "tail_counts") if manifest.record.n else ()
    drawn = ("tail_logprobs",) if manifest.record.tail_logprobs else ()
    return (*TOKEN_PLANES, *head, *tail, *drawn, "log_rest", "rest_entropy", "true_logprob", "entropy")


def encode(row: Row, manifest: Manifest) -> dict[str, bytes]:
    """Stores ids and counts in the narrowest unsigned type and values in float32: lossless."""
    ids = smallest_unsigned(manifest.tokenizer.vocabulary_size - 1)
    counts = smallest_unsigned(manifest.record.n)
    stored = {"token_ids": compress_frame(row.token_ids.astype(ids)), **encode_mask_and_segments(row)}
    teacher = row.teacher
    if teacher is None:
        return stored
    plain: dict[str, NDArray[Any]] = {
        "head_ids": teacher.head_ids.astype(ids),
        "head_logprobs": teacher.head_logprobs.astype("<f4"),
        # The count of 0 marks an unused entry, so its id need not be told from id 0.
        "tail_ids": np.maximum(teacher.tail_ids, 0).astype(ids),
        "tail_counts": teacher.tail_counts.astype(counts),
        "log_rest": teacher.log_rest.astype("<f4"),
        "rest_entropy": teacher.rest_entropy.astype("<f4"),
        "true_logprob": teacher.true_logprob.astype("<f4"),
        "entropy": teacher.entropy.astype("<f4"),
        "tail_logprobs": teacher.tail_logprobs.astype("<f4"),
    }
    for name in record_planes(manifest)[len(TOKEN_PLANES) :]:
        stored[name] = compress_frame(plain[name].tobytes())
    return stored


def decode(planes: Mapping[str, Any], manifest: Manifest, out: TeacherRecord) -> Row:
    """Reads what `encode` stored; writes the record into `out`."""
    length = manifest.sequence_length
    spec = manifest.record
    ids = smallest_unsigned(manifest.tokenizer.vocabulary_size - 1)

    def array(name: str, stored: DTypeLike, target: NDArray[Any]) -> None:
        if target.size == 0:
            return
        size = math.prod(target.shape) * np.dtype(stored).itemsize
        plain = decompress_frame(planes[name], name, size, at_most=size)
        np.copyto(target, np.frombuffer(plain, stored).reshape(target.shape), casting="unsafe")

    tokens = np.empty(length, np.int32)
    array("token_ids", ids, tokens)
    mask, starts, documents = decode_mask_and_segments(planes, manifest)
    if manifest.teacher is None:
        return Row(tokens, mask, starts, documents, None)
    array("head_ids", ids, out.head_ids)
    array("tail_ids", ids, out.tail_ids)
    array("tail_counts", smallest_unsigned(spec.n), out.tail_counts)
    np.copyto(out.tail_ids, NO_ID, where=out.tail_counts == 0)
    for name in VALUE_PLANES:
        array(name, "<f4", getattr(out, name))
    return Row(tokens, mask, starts, documents, out)


def errors(record: TeacherRecord, manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """Returns zeros: the codec is lossless."""
    return {name: np.zeros_like(getattr(record, name)) for name in VALUE_PLANES}
