"""Codecs: how the planes of a row become stored bytes, and back.

A codec is a table of codings, one for each way of storing that the table of planes names, and what they need
to be judged by; the manifest names it and holds its parameters. To add one, enter it in `CODECS`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs import exact, plain, tkq8, vectors
from sparsekd.logit_store.codecs.frequency import check_compact, mass_of
from sparsekd.logit_store.codecs.quantise import within_halves, without_deep
from sparsekd.logit_store.codecs.ragged import cut_to_mass
from sparsekd.logit_store.codecs.room import Coding, Room, Stored
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import Plane, Planes, names_of, needed_for, planes_of
from sparsekd.logit_store.row import RECORD_NAMES, Row, TeacherRecord, planes_of_row, row_of_planes

Arrays = dict[str, NDArray[Any]]
"""Arrays of decoded planes by name."""


@dataclass(frozen=True)
class Codec:
    """One way to store rows.

    Attributes:
        codings: by the name that `planes.TABLE` gives them.
        check_parameters: raises StoreError for parameters that the codec does not know or cannot use here.
        error: (rounded plane of the record, decoded values, manifest) -> by how much (nats, float32 of the
            values' shape) an entry may differ from what was written, which is `stored_record` of it.
        drops_deep: whether entries far below the first of their position are stored as -inf.
        is_lossless: whether values come back as they are.
    """

    codings: Mapping[str, Coding]
    check_parameters: Callable[[Mapping[str, Any], Manifest], None]
    error: Callable[[Plane, NDArray[np.float32], Manifest], NDArray[np.float32]]
    drops_deep: bool = False
    is_lossless: bool = False

    def encode(self, row: Row, manifest: Manifest) -> dict[str, bytes]:
        """Returns the stored bytes of each plane of a row that passed `check_row`, in stored order."""
        arrays: Planes = planes_of_row(row if row.teacher is None else _as_stored(row, manifest))
        stored: dict[str, bytes] = {}
        for coding, members in _by_coding(planes_of(manifest)):
            stored |= self.codings[coding].encode(arrays, members, manifest)
        return {name: stored[name] for name in names_of(planes_of(manifest))}

    def encode_text(self, row: Row, name: str, manifest: Manifest) -> bytes:
        """Returns the stored bytes of one plane of a row's text, without a look at the others."""
        (plane,) = (plane for plane in planes_of(manifest) if plane.is_text and plane.name == name)
        return self.codings[plane.coding].encode(planes_of_row(row), (plane,), manifest)[name]

    def decode_planes(
        self,
        stored: Stored,
        manifest: Manifest,
        wanted: Collection[str] | None = None,
        reuse: Arrays | None = None,
    ) -> Arrays:
        """Returns the decoded arrays of some planes, and of those that say where they stand.

        Args:
            stored: name -> buffer, of all planes.
            manifest: of the store.
            wanted: names of planes; those that a store of this manifest does not have are left out. None for
                all.
            reuse: arrays of a row that was decoded before, whose memory is taken; what is missing is entered.

        Raises:
            PlaneError: a plane cannot be decoded.
        """
        planes = planes_of(manifest)
        if wanted is not None:
            needed = needed_for(wanted, manifest)
            planes = tuple(plane for plane in planes if plane.name in needed)
        room = Room(manifest, reuse)
        present = {plane.name for plane in planes_of(manifest)}
        for coding, members in _by_coding(planes):
            self.codings[coding].decode(stored, members, room)
            if manifest.teacher is not None and "recorded" not in present and "loss_mask" in room.planes:
                room.planes["recorded"] = room.planes["loss_mask"]
        return room.planes

    def decode(self, stored: Stored, manifest: Manifest, reuse: Arrays | None = None) -> Row:
        """Returns the row of stored planes; see `decode_planes`."""
        return row_of_planes(self.decode_planes(stored, manifest, None, reuse))

    def error_of(self, plane: Plane, values: NDArray[np.float32], manifest: Manifest) -> NDArray[np.float32]:
        """Returns `error`, or for hidden states, which every codec stores alike, theirs."""
        if plane.coding == "vectors":
            return vectors.error(plane, values, manifest)
        return self.error(plane, values, manifest)

    def errors(self, record: TeacherRecord, manifest: Manifest) -> dict[str, NDArray[np.float32]]:
        """Returns `error` of each rounded plane of a decoded record."""
        return {
            plane.name: self.error(plane, getattr(record, plane.name), manifest)
            for plane in planes_of(manifest)
            if plane.is_rounded and plane.name in RECORD_NAMES
        }


def _by_coding(planes: tuple[Plane, ...]) -> Iterator[tuple[str, tuple[Plane, ...]]]:
    """Yields neighbours of one coding together, in stored order."""
    for coding, members in groupby(planes, key=lambda plane: plane.coding):
        yield coding, tuple(members)


def stored_record(record: TeacherRecord, manifest: Manifest) -> TeacherRecord:
    """Returns what a store keeps of a record before it rounds, as far as its codec cannot hold all of it.

    Heads end where a codec has a mass; entries too deep for a codec's steps are -inf; what is beyond the
    largest half is that.
    """
    mass = mass_of(manifest)
    if mass is not None:
        record = cut_to_mass(record, manifest.record, mass)
    codec = CODECS[manifest.codec.name]
    if codec.is_lossless:
        return record
    keep = without_deep if codec.drops_deep else within_halves
    return replace(
        record,
        head_logprobs=keep(record.head_logprobs),
        tail_logprobs=keep(record.tail_logprobs),
        log_rest=within_halves(record.log_rest),
        true_logprob=within_halves(record.true_logprob),
    )


def _as_stored(row: Row, manifest: Manifest) -> Row:
    """Returns the row with heads that end where the codec's mass is reached."""
    mass = mass_of(manifest)
    if mass is None or row.teacher is None:
        return row
    return replace(row, teacher=cut_to_mass(row.teacher, manifest.record, mass))


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


def _lossless(plane: Plane, values: NDArray[np.float32], manifest: Manifest) -> NDArray[np.float32]:
    return np.zeros_like(values)


DEFAULT_CODEC = "tkq8"

_FRAMED = tkq8.CODINGS | {"vectors": vectors.FRAMED}

CODECS = {
    "tkq8": Codec(_FRAMED, _no_parameters, tkq8.error, drops_deep=True),
    "plain": Codec(plain.CODINGS | {"vectors": vectors.PLAIN}, _no_parameters, tkq8.error, drops_deep=True),
    "compact": Codec(_FRAMED, check_compact, tkq8.error, drops_deep=True),
    "fp16": Codec(_FRAMED, _no_parameters, tkq8.error),
    "exact": Codec(exact.CODINGS | {"vectors": vectors.FRAMED}, _no_parameters, _lossless, is_lossless=True),
}
