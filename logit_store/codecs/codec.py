"""Codecs: how a row becomes named planes of stored bytes, and back.

A codec is two pure functions and what they need to be judged by; the manifest names it and holds its
parameters. To add one, write the functions and enter it in `CODECS`.

Shapes: L positions of a row, S segments, k head entries, n draws, G grid temperatures.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.checks import MASS_TOLERANCE
from sparsekd.logit_store.codecs import exact as codec_exact
from sparsekd.logit_store.codecs import plain as codec_plain
from sparsekd.logit_store.codecs import tkq8 as codec_tkq8
from sparsekd.logit_store.codecs.frames import ZSTD_LEVEL, PlaneError, compress_frame, decompress_frame
from sparsekd.logit_store.codecs.frequency import check_compact, mass_of
from sparsekd.logit_store.codecs.pieces import TOKEN_PLANES, smallest_unsigned
from sparsekd.logit_store.codecs.quantise import without_deep
from sparsekd.logit_store.codecs.ragged import cut_to_mass
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import Row, TeacherRecord, empty_record

__all__ = [
    "CODECS",
    "DEFAULT_CODEC",
    "TOKEN_PLANES",
    "ZSTD_LEVEL",
    "Codec",
    "PlaneError",
    "codec_of",
    "compress_frame",
    "decompress_frame",
    "new_record",
    "smallest_unsigned",
    "stored_record",
]


@dataclass(frozen=True)
class Codec:
    """One way to store rows.

    Attributes:
        planes: names of the planes of every row under a manifest, in stored order.
        encode: a row that passed `check_row` -> the stored bytes of each plane. Equal rows give equal bytes.
        decode_into: the stored bytes of each plane -> the row, whose record is the arrays that are given.
            Raises PlaneError; never allocates more than the manifest's shapes ask for.
        check_parameters: raises StoreError for parameters that the codec does not know or cannot use here.
        errors: a decoded record -> for each plane of values, by how much (nats, float32 of the plane's shape)
            an entry may differ from what was written; what was written is `stored_record` of it.
        mass_tolerance: by how much decoded probabilities of a position may sum to more than 1.
        drops_deep: whether entries far below the first of their position are stored as -inf.
    """

    planes: Callable[[Manifest], tuple[str, ...]]
    encode: Callable[[Row, Manifest], dict[str, bytes]]
    decode_into: Callable[[Mapping[str, Any], Manifest, TeacherRecord], Row]
    check_parameters: Callable[[Mapping[str, Any], Manifest], None]
    errors: Callable[[TeacherRecord, Manifest], dict[str, NDArray[np.float32]]]
    mass_tolerance: float = MASS_TOLERANCE
    drops_deep: bool = False

    def decode(self, planes: Mapping[str, Any], manifest: Manifest, out: TeacherRecord | None = None) -> Row:
        """Returns the row of stored planes.

        Args:
            planes: name -> buffer.
            manifest: of the store.
            out: arrays of the manifest's shapes, as `new_record` makes them, that the record is written to;
                None makes new ones.

        Raises:
            PlaneError: a plane cannot be decoded.
        """
        return self.decode_into(planes, manifest, new_record(manifest) if out is None else out)


def new_record(manifest: Manifest) -> TeacherRecord:
    """Returns a record of the manifest's shapes whose arrays are not filled yet."""
    spec = manifest.record
    return empty_record(
        manifest.sequence_length, spec.k, spec.n, len(spec.temperatures), tail_logprobs=spec.tail_logprobs
    )


def stored_record(record: TeacherRecord, manifest: Manifest) -> TeacherRecord:
    """Returns what a store keeps of a record before it rounds, as far as its codec leaves entries out.

    Heads end where a codec has a mass; entries too deep for a codec's steps are -inf.
    """
    mass = mass_of(manifest)
    if mass is not None:
        record = cut_to_mass(record, manifest.record, mass)
    if not CODECS[manifest.codec.name].drops_deep:
        return record
    return replace(
        record,
        head_logprobs=without_deep(record.head_logprobs),
        tail_logprobs=without_deep(record.tail_logprobs),
    )


def codec_of(manifest: Manifest) -> Codec:
    """Returns the codec that a manifest names.

    Raises:
        StoreError: there is none of that name, or it cannot use the parameters.
    """
    spec = manifest.codec
    if spec.name not in CODECS:
        raise StoreError(
            f"The store's codec is {spec.name!r}, but this sparsekd knows {', '.join(sorted(CODECS))}: name "
            "one of these when writing, or update sparsekd to read."
        )
    CODECS[spec.name].check_parameters(spec.parameters, manifest)
    return CODECS[spec.name]


def _no_parameters(parameters: Mapping[str, Any], manifest: Manifest) -> None:
    if parameters:
        raise StoreError(
            f"The codec {manifest.codec.name} has no parameter {', '.join(sorted(parameters))}: leave its "
            "parameters empty."
        )


DEFAULT_CODEC = "tkq8"

CODECS = {
    "tkq8": Codec(
        planes=codec_exact.record_planes,
        encode=codec_tkq8.encode,
        decode_into=codec_tkq8.decode,
        check_parameters=_no_parameters,
        errors=codec_tkq8.errors,
        drops_deep=True,
    ),
    "plain": Codec(
        planes=codec_exact.record_planes,
        encode=codec_plain.encode,
        decode_into=codec_plain.decode,
        check_parameters=_no_parameters,
        errors=codec_tkq8.errors,
        drops_deep=True,
    ),
    "compact": Codec(
        planes=codec_exact.record_planes,
        encode=codec_tkq8.encode,
        decode_into=codec_tkq8.decode,
        check_parameters=check_compact,
        errors=codec_tkq8.errors,
        drops_deep=True,
    ),
    "fp16": Codec(
        planes=codec_exact.record_planes,
        encode=codec_tkq8.encode,
        decode_into=codec_tkq8.decode,
        check_parameters=_no_parameters,
        errors=codec_tkq8.errors,
    ),
    "exact": Codec(
        planes=codec_exact.record_planes,
        encode=codec_exact.encode,
        decode_into=codec_exact.decode,
        check_parameters=_no_parameters,
        errors=codec_exact.errors,
    ),
}
