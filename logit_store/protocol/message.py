"""A row as one Arrow record batch: its bytes, what they decode to, and what is wrong in them."""

import json
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sparsekd.logit_store.checks import check_planes
from sparsekd.logit_store.codecs.codec import Arrays, codec_of
from sparsekd.logit_store.codecs.frames import PlaneError
from sparsekd.logit_store.codecs.frequency import mass_of
from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.manifest import Manifest, manifest_digest
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION, decoded_row_bytes
from sparsekd.logit_store.planes import names_of, planes_of, text_planes
from sparsekd.logit_store.protocol.arrow_layout import (
    batch_message,
    file_footer,
    file_header,
    plane_offsets,
    split_message,
)
from sparsekd.logit_store.protocol.layout import REMEDY
from sparsekd.logit_store.row import Row, row_of_planes


def _shard_metadata(manifest: Manifest, split: str, shard: int) -> list[tuple[str, str]]:
    """Returns a shard's identity, as the metadata of its schema."""
    parameters = json.dumps(manifest.codec.parameters, sort_keys=True, separators=(",", ":"))
    return [
        ("sparsekd.format_version", str(FORMAT_VERSION)),
        ("sparsekd.manifest_sha256", manifest_digest(manifest)),
        ("sparsekd.codec", manifest.codec.name),
        ("sparsekd.codec_parameters", parameters),
        ("sparsekd.split", split),
        ("sparsekd.shard", str(shard)),
    ]


def shard_header(manifest: Manifest, split: str, shard: int) -> bytes:
    """Returns the bytes with which the shard's file must begin."""
    return file_header(names_of(planes_of(manifest)), _shard_metadata(manifest, split, shard))


def shard_footer(manifest: Manifest, split: str, shard: int, batches: Iterable[tuple[int, int]]) -> bytes:
    """Returns the bytes with which the shard's file must end.

    Args:
        manifest: of the store.
        split: name of the row space.
        shard: number of the shard in it.
        batches: (offset, length) of each row's batch in the file.
    """
    return file_footer(names_of(planes_of(manifest)), _shard_metadata(manifest, split, shard), batches)


def row_message(
    index: int, planes: Sequence[bytes | memoryview], crc32: Sequence[int] | None = None
) -> bytes:
    """Returns the bytes of a row's batch with these stored planes, in the codec's order.

    Args:
        index: the row's number.
        planes: their bytes.
        crc32: of each; None makes them.
    """
    return batch_message(index, crc32 or [zlib.crc32(plane) for plane in planes], planes)


def largest_message(manifest: Manifest) -> int:
    """Returns how many bytes a row's batch has at most, under whatever codec.

    No codec stores a plane in more than its decoded arrays take, but for the frames around incompressible
    pieces; twice that and a fixed allowance hold any batch, and are what a reader may be made to allocate.
    """
    return 2 * decoded_row_bytes(manifest) + (1 << 16)


def read_batch(
    message: bytes | memoryview, planes: Sequence[str]
) -> tuple[int, tuple[int, ...], dict[str, memoryview]]:
    """Returns (row number, crc32 of each plane, stored bytes of each plane) of a row's batch.

    Args:
        message: the batch's bytes.
        planes: their names, in stored order.

    Raises:
        ValueError: they are no such batch; says why not.
    """
    row, crc32, stored = split_message(message, len(planes))
    return row, crc32, dict(zip(planes, stored, strict=True))


@dataclass(frozen=True)
class StoredRow(Row):
    """A row that is copied as it is stored: its text, and the bytes of all planes.

    Attributes:
        stored: bytes of each plane by name, in stored order.
        crc32: of each plane, as the row's batch has them.
    """

    stored: Mapping[str, bytes | memoryview] = field(default_factory=dict)
    crc32: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Keeps `recorded`, though the record itself is not decoded."""


def find_damage(message: bytes | memoryview, planes: Sequence[str], offset: int, index: int) -> str:
    """Says what is wrong with a batch that differs from its crc32, and where it lies in the file.

    Args:
        message: the batch's bytes.
        planes: their names, in stored order.
        offset: of the batch in the file.
        index: number of the row that should be there.
    """
    everywhere = f"bytes {offset} to {offset + len(message) - 1} of the file"
    frame = f"no single plane, but the frame around them, {everywhere}"
    try:
        found, crc32, stored = read_batch(message, planes)
    except ValueError:
        return frame
    for (plane, data), expected, begin in zip(
        stored.items(), crc32, plane_offsets(message, len(planes)), strict=True
    ):
        if zlib.crc32(data) != expected:
            first = offset + begin
            return f"plane {plane}, bytes {first} to {first + len(data) - 1} of the file"
    return f"every plane: it is the batch of row {found}, {everywhere}" if found != index else frame


def stored_planes(
    message: bytes | memoryview, manifest: Manifest, index: int, where: str
) -> dict[str, memoryview]:
    """Returns the stored bytes of each plane of a row's batch.

    Its crc32 was right, which says nothing of who made it.

    Raises:
        DamagedStoreError: it is no batch of this store, or another row.
    """
    try:
        found, _, planes = read_batch(message, names_of(planes_of(manifest)))
    except ValueError as error:
        raise DamagedStoreError(f"{where}: its batch cannot be read ({error}): {REMEDY}.") from error
    if found != index:
        raise DamagedStoreError(f"{where} holds row {found} instead: rows were swapped; {REMEDY}.")
    return planes


def decode_planes(
    stored: Mapping[str, Any],
    manifest: Manifest,
    split: str,
    where: str,
    *,
    wanted: Collection[str] | None = None,
    reuse: Arrays | None = None,
) -> Arrays:
    """Decodes and checks planes of a row.

    Args:
        stored: bytes of all its planes.
        manifest: of the store.
        split: of the row.
        where: the row's place, for messages.
        wanted: names of planes, see `Codec.decode_planes`; None for all.
        reuse: see `Codec.decode_planes`.

    Raises:
        DamagedStoreError: a plane cannot be decoded.
        InvalidRowError: what is decoded breaks a rule.
    """
    try:
        planes = codec_of(manifest).decode_planes(stored, manifest, wanted, reuse)
    except PlaneError as error:
        raise DamagedStoreError(f"{where}, plane {error.plane}: {error}; {REMEDY}.") from error
    except (ValueError, IndexError, OverflowError) as error:
        # What numpy says of contents that no codec writes and that none looked for.
        raise DamagedStoreError(f"{where}: its planes cannot be decoded ({error}); {REMEDY}.") from error
    check_planes(
        planes,
        manifest,
        split=split,
        where=where,
        short_heads=mass_of(manifest) is not None,
        only=None if wanted is None else planes.keys(),
    )
    return planes


def decode_row(
    message: bytes | memoryview,
    manifest: Manifest,
    split: str,
    index: int,
    where: str,
    reuse: Arrays | None = None,
) -> Row:
    """Decodes and checks a row's batch whose crc32 was right.

    Args:
        message: the batch's bytes.
        manifest: of the store.
        split: of the row.
        index: number of the row that should be there.
        where: the row's place, for messages.
        reuse: see `Codec.decode_planes`.

    Raises:
        DamagedStoreError: it is another row, or a plane cannot be decoded.
        InvalidRowError: the decoded row breaks a rule.
    """
    stored = stored_planes(message, manifest, index, where)
    return row_of_planes(decode_planes(stored, manifest, split, where, reuse=reuse))


def stored_row(
    message: bytes | memoryview, manifest: Manifest, split: str, index: int, where: str
) -> StoredRow:
    """Returns a row of which the text alone is decoded and checked; see `decode_row`."""
    stored = stored_planes(message, manifest, index, where)
    _, crc32, _ = read_batch(message, tuple(stored))
    planes = decode_planes(stored, manifest, split, where, wanted={*text_planes(manifest), "recorded"})
    recorded = planes.pop("recorded", None)
    text = {item.name: getattr(row_of_planes(planes), item.name) for item in fields(Row)}
    return StoredRow(**text | {"recorded": recorded}, stored=stored, crc32=crc32)
