"""A row as one Arrow record batch: its bytes, what they decode to, and what is wrong in them."""

import json
import zlib
from collections.abc import Iterable, Sequence

from sparsekd.logit_store.checks import check_row
from sparsekd.logit_store.codecs.codec import PlaneError, codec_of
from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.manifest import FORMAT_VERSION, Manifest, manifest_digest
from sparsekd.logit_store.protocol.arrow_layout import (
    batch_message,
    file_footer,
    file_header,
    plane_offsets,
    split_message,
)
from sparsekd.logit_store.protocol.layout import REMEDY
from sparsekd.logit_store.row import Row, TeacherRecord

ROW_BYTES = 256 << 20
"""Bytes of a decoded row at most. 16,384 positions of k = 512 and n = 64 take 80 MB."""


def stored_planes(manifest: Manifest) -> tuple[str, ...]:
    """Returns the names of the planes of every row, in stored order."""
    return codec_of(manifest).planes(manifest)


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
    return file_header(stored_planes(manifest), _shard_metadata(manifest, split, shard))


def shard_footer(manifest: Manifest, split: str, shard: int, batches: Iterable[tuple[int, int]]) -> bytes:
    """Returns the bytes with which the shard's file must end.

    Args:
        manifest: of the store.
        split: name of the row space.
        shard: number of the shard in it.
        batches: (offset, length) of each row's batch in the file.
    """
    return file_footer(stored_planes(manifest), _shard_metadata(manifest, split, shard), batches)


def row_message(index: int, planes: Sequence[bytes | memoryview]) -> bytes:
    """Returns the bytes of a row's batch with these stored planes, in the codec's order."""
    return batch_message(index, [zlib.crc32(plane) for plane in planes], planes)


def decoded_bytes(manifest: Manifest) -> int:
    """Returns how many bytes the arrays of a decoded row take at most."""
    record = manifest.record
    of_position = 4 + 1 + 12  # token, mask, and at most one segment
    if manifest.teacher is not None:
        of_position += 8 * record.k + 12 * record.n + 4 * len(record.temperatures) + 12
    return manifest.sequence_length * of_position


def largest_message(manifest: Manifest) -> int:
    """Returns how many bytes a row's batch has at most, under whatever codec.

    No codec stores a plane in more than its decoded arrays take, but for the frames around incompressible
    pieces; twice that and a fixed allowance hold any batch, and are what a reader may be made to allocate.
    """
    return 2 * decoded_bytes(manifest) + (1 << 16)


def read_batch(
    message: bytes | memoryview, planes: Sequence[str]
) -> tuple[int, tuple[int, ...], dict[str, memoryview]]:
    """Returns (row number, crc32 of each plane, stored bytes of each plane) of a row's batch.

    Args:
        message: the batch's bytes.
        planes: `stored_planes`.

    Raises:
        ValueError: they are no such batch; says why not.
    """
    row, crc32, stored = split_message(message, len(planes))
    return row, crc32, dict(zip(planes, stored, strict=True))


def find_damage(message: bytes | memoryview, planes: Sequence[str], offset: int, index: int) -> str:
    """Says what is wrong with a batch that differs from its crc32, and where it lies in the file.

    Args:
        message: the batch's bytes.
        planes: `stored_planes`.
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


def decode_row(
    message: bytes | memoryview,
    manifest: Manifest,
    index: int,
    where: str,
    out: TeacherRecord | None = None,
) -> Row:
    """Decodes and checks a row's batch whose crc32 was right, which says nothing of who made it.

    Args:
        message: the batch's bytes.
        manifest: of the store.
        index: number of the row that should be there.
        where: the row's place, for messages.
        out: arrays that the record is written to, see `Codec.decode`; None makes new ones.

    Raises:
        DamagedStoreError: it is no batch of this store, another row, or a plane cannot be decoded.
        InvalidRowError: the decoded row breaks a rule.
    """
    codec = codec_of(manifest)
    try:
        found, _, planes = read_batch(message, codec.planes(manifest))
    except ValueError as error:
        raise DamagedStoreError(f"{where}: its batch cannot be read ({error}): {REMEDY}.") from error
    if found != index:
        raise DamagedStoreError(f"{where} holds row {found} instead: rows were swapped; {REMEDY}.")
    try:
        row = codec.decode(planes, manifest, out)
    except PlaneError as error:
        raise DamagedStoreError(f"{where}, plane {error.plane}: {error}; {REMEDY}.") from error
    except (ValueError, IndexError, OverflowError) as error:
        # What numpy says of contents that no codec writes and that none looked for.
        raise DamagedStoreError(f"{where}: its planes cannot be decoded ({error}); {REMEDY}.") from error
    check_row(row, manifest, mass_tolerance=codec.mass_tolerance, where=where)
    return row
