"""The codec `exact`: ids and counts in the narrowest type, values in float32, one zstd frame each. Lossless.

Shapes: L positions of a row, M recorded positions, k head entries, n draws, G grid temperatures.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sparsekd.logit_store.codecs.frames import compress_frame, decompress_frame
from sparsekd.logit_store.codecs.pieces import smallest_unsigned
from sparsekd.logit_store.codecs.room import Coding, Room, Stored
from sparsekd.logit_store.codecs.text import FRAMED_TEXT
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import Plane, Planes
from sparsekd.logit_store.row import NO_ID


def _kind(plane: Plane, manifest: Manifest) -> DTypeLike:
    """Returns the type that a plane's numbers are stored in."""
    if plane.dtype is np.float32:
        return "<f4"
    if plane.rule == "count":
        return smallest_unsigned(manifest.record.n)
    size = manifest.tokenizer.vocabulary_size if plane.rule == "token" else manifest.outcome_count
    return smallest_unsigned(size - 1)


def _encode(planes: Planes, members: tuple[Plane, ...], manifest: Manifest) -> dict[str, bytes]:
    stored = {}
    for plane in members:
        # The count of 0 marks an unused entry, so its id need not be told from id 0.
        values = np.maximum(planes[plane.name], 0) if plane.rule == "tail_id" else planes[plane.name]
        stored[plane.name] = compress_frame(values.astype(_kind(plane, manifest)).tobytes())
    return stored


def _decode(stored: Stored, members: tuple[Plane, ...], room: Room) -> None:
    for plane in members:
        array, kind = room.new(plane), _kind(plane, room.manifest)
        np.copyto(array, _numbers(stored, plane.name, kind, array.shape), casting="unsafe")
    if members[0].coding != "tail" or "tail_ids" not in room.planes:
        return
    ids, counts = room.planes["tail_ids"], room.planes.get("tail_counts")
    if counts is None:
        counts = _numbers(stored, "tail_counts", smallest_unsigned(room.manifest.record.n), ids.shape)
    np.copyto(ids, NO_ID, where=counts == 0)


def _numbers(stored: Stored, name: str, kind: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    size = math.prod(shape) * np.dtype(kind).itemsize
    return np.frombuffer(decompress_frame(stored[name], name, size, at_most=size), kind).reshape(shape)


_ANY = Coding(_encode, _decode)

CODINGS = FRAMED_TEXT | {"ids": _ANY, "head": _ANY, "tail": _ANY, "halves": _ANY, "entropies": _ANY}
