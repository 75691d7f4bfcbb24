"""One shard: an Arrow IPC file with one record batch per row, and its commit record.

The commit record knows where each row's batch lies, so a row is one positional read. Arrow has no checksums;
all of them are ours: crc32 of each row's batch (in the commit record) and of each plane (in the batch), and
sha256 of the file.
"""

import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sparsekd.logit_store.checks import check_row
from sparsekd.logit_store.codecs.codec import PlaneError, codec_of, new_record
from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.manifest import FORMAT_VERSION, Manifest, manifest_digest
from sparsekd.logit_store.places.files import HashingFile, read_signed_json
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.row import PADDING_DOCUMENT, Row, TeacherRecord, segment_lengths

AnyPath = TypeVar("AnyPath", bound=StorePath)

_MAGIC = b"ARROW1\0\0"
"""First bytes of every Arrow IPC file, padded to 8."""


REMEDY = "restore it from a copy, or have it made again with `sparsekd store verify STORE --repair`"
"""What to do about a damaged shard."""


@dataclass(frozen=True)
class RowCounts:
    """What is counted over rows, for the index and for people.

    Attributes:
        tokens: positions, padding included.
        tokens_counted: positions where the loss mask is True.
        tokens_padding: positions of padding segments.
        segments: documents, or pieces of one, without padding.
    """

    tokens: int
    tokens_counted: int
    tokens_padding: int
    segments: int


@dataclass(frozen=True)
class CommitRecord:
    """What makes a shard exist: written after the shard's file is durable.

    Attributes:
        split: name of the row space.
        shard: number of the shard in it.
        manifest_sha256: `manifest_digest` of the store.
        file_sha256: of the shard's file, hex.
        file_bytes: its length.
        offsets: int64 [rows], where each row's batch begins in the file.
        lengths: int64 [rows], bytes of each row's batch.
        crc32: uint32 [rows], of these bytes.
        counts: over the rows.
        plane_bytes: stored bytes of each plane, over the rows.
    """

    split: str
    shard: int
    manifest_sha256: str
    file_sha256: str
    file_bytes: int
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    counts: RowCounts
    plane_bytes: dict[str, int]

    @property
    def rows(self) -> int:
        return len(self.offsets)


def shard_file(path: AnyPath, split: str, shard: int) -> AnyPath:
    """Returns the path of a shard's Arrow file."""
    return cast(AnyPath, path / "shards" / split / f"{shard:06d}.arrow")


def commit_file(path: AnyPath, split: str, shard: int) -> AnyPath:
    """Returns the path of a shard's commit record."""
    return cast(AnyPath, path / "shards" / split / f"{shard:06d}.json")


def row_schema(manifest: Manifest) -> pa.Schema:
    """Returns the Arrow schema of a row's batch, without metadata."""
    planes = codec_of(manifest).planes(manifest)
    checksum = pa.field("item", pa.uint32(), nullable=False)
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("crc32", pa.list_(checksum, len(planes)), nullable=False),
            *(pa.field(plane, pa.binary(), nullable=False) for plane in planes),
        ]
    )


def shard_schema(manifest: Manifest, split: str, shard: int) -> pa.Schema:
    """Returns the schema of a shard's file: that of a row, with the shard's identity as metadata."""
    return row_schema(manifest).with_metadata(
        {
            "sparsekd.format_version": str(FORMAT_VERSION),
            "sparsekd.manifest_sha256": manifest_digest(manifest),
            "sparsekd.codec": manifest.codec.name,
            "sparsekd.codec_parameters": json.dumps(
                manifest.codec.parameters, sort_keys=True, separators=(",", ":")
            ),
            "sparsekd.split": split,
            "sparsekd.shard": str(shard),
        }
    )


def shard_header(manifest: Manifest, split: str, shard: int) -> bytes:
    """Returns the bytes with which the shard's file must begin."""
    return _MAGIC + shard_schema(manifest, split, shard).serialize().to_pybytes()


def row_place(store: StorePath, split: str, index: int, rows_per_shard: int) -> str:
    """Returns a row's place in words, for messages."""
    return f"{store}, split {split}, shard {index // rows_per_shard:06d}, row {index}"


class _ChecksummingFile(io.RawIOBase):
    """Passes on what is written to a file, and knows the crc32 of what was written from some offset on."""

    def __init__(self, file: HashingFile) -> None:
        super().__init__()
        self._file = file
        self.begin(0)

    def begin(self, offset: int) -> None:
        """Starts a new checksum at an offset that is reached already or will be."""
        self._offset = offset
        self.crc32 = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.crc32 = zlib.crc32(view[max(0, self._offset - self._file.size) :], self.crc32)
        return self._file.write(view)


def _one_value(stored: bytes) -> pa.Array:
    """Returns a binary column of one value, without copying it."""
    offsets = pa.py_buffer(np.array([0, len(stored)], np.int32))
    return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(stored)])


def write_rows(
    file: HashingFile, store: StorePath, manifest: Manifest, split: str, shard: int, rows: Sequence[Row]
) -> CommitRecord:
    """Writes a shard's Arrow file and returns its commit record.

    Every row is checked, encoded, decoded again and checked again: what could not be read is not written.
    Each is taken from `rows` once, in order, so that a sequence which reads them one by one needs little
    memory.

    Raises:
        InvalidRowError: a row breaks a rule.
    """
    codec = codec_of(manifest)
    planes = codec.planes(manifest)
    schema = shard_schema(manifest, split, shard)
    plane_bytes = dict.fromkeys(planes, 0)
    batches: list[tuple[int, int]] = []
    crc32: list[int] = []
    counts = RowCounts(0, 0, 0, 0)
    again = new_record(manifest)
    first = shard * manifest.rows_per_shard
    header = shard_header(manifest, split, shard)
    checked = _ChecksummingFile(file)
    writer = pa.ipc.new_file(checked, schema)
    for index, row in enumerate(rows, start=first):
        where = row_place(store, split, index, manifest.rows_per_shard)
        check_row(row, manifest, mass_tolerance=codec.mass_tolerance, where=where)
        stored = codec.encode(row, manifest)
        decoded = codec.decode(stored, manifest, again)
        check_row(decoded, manifest, mass_tolerance=codec.mass_tolerance, where=where)
        batch = row_batch(schema, index, stored)
        counts = _sum_of(counts, count_rows([row]))
        # The file begins with the schema, which Arrow writes together with the first batch.
        offset = max(file.size, len(header))
        checked.begin(offset)
        writer.write_batch(batch)
        crc32.append(checked.crc32)
        batches.append((offset, file.size - offset))
        for plane in planes:
            plane_bytes[plane] += len(stored[plane])
    writer.close()
    offsets, lengths = np.array(batches, np.int64).T
    return CommitRecord(
        split=split,
        shard=shard,
        manifest_sha256=manifest_digest(manifest),
        file_sha256=file.hexdigest(),
        file_bytes=file.size,
        offsets=offsets,
        lengths=lengths,
        crc32=np.array(crc32, np.uint32),
        counts=counts,
        plane_bytes=plane_bytes,
    )


def row_batch(schema: pa.Schema, index: int, stored: Mapping[str, bytes]) -> pa.RecordBatch:
    """Returns the one batch of a row with these stored planes."""
    planes = schema.names[2:]
    plane_crcs = pa.array([zlib.crc32(stored[plane]) for plane in planes], pa.uint32())
    return pa.record_batch(
        [
            pa.array([index], pa.int64()),
            pa.FixedSizeListArray.from_arrays(plane_crcs, type=schema.field("crc32").type),
            *(_one_value(stored[plane]) for plane in planes),
        ],
        schema=schema,
    )


def count_rows(rows: Sequence[Row]) -> RowCounts:
    """Counts positions and segments over rows."""
    padding = sum(int(segment_lengths(row)[row.segment_documents == PADDING_DOCUMENT].sum()) for row in rows)
    return RowCounts(
        tokens=sum(len(row.token_ids) for row in rows),
        tokens_counted=sum(int(row.loss_mask.sum()) for row in rows),
        tokens_padding=padding,
        segments=sum(int((row.segment_documents != PADDING_DOCUMENT).sum()) for row in rows),
    )


def _sum_of(left: RowCounts, right: RowCounts) -> RowCounts:
    return RowCounts(*(one + other for one, other in zip(astuple(left), astuple(right), strict=True)))


def commit_to_content(record: CommitRecord) -> dict[str, Any]:
    """Returns a commit record as the content of its file."""
    return {
        "format_version": FORMAT_VERSION,
        "split": record.split,
        "shard": record.shard,
        "manifest_sha256": record.manifest_sha256,
        "file_sha256": record.file_sha256,
        "file_bytes": record.file_bytes,
        "offsets": record.offsets.tolist(),
        "lengths": record.lengths.tolist(),
        "crc32": record.crc32.tolist(),
        "counts": asdict(record.counts),
        "plane_bytes": record.plane_bytes,
    }


def read_commit(
    path: StorePath,
    manifest_sha256: str,
    split: str,
    shard: int,
    *,
    read: Callable[[Any], bytes] | None = None,
) -> tuple[CommitRecord, bytes]:
    """Reads a commit record and the bytes it was read from.

    Args:
        path: of the store.
        manifest_sha256: of its manifest.
        split: name of the row space.
        shard: number of the shard in it.
        read: gives the bytes of a file; by default from the store itself.

    Raises:
        DamagedStoreError: there is none, it is damaged, or it belongs to another shard or store.
    """
    place = commit_file(path, split, shard)
    try:
        data = place.read_bytes() if read is None else read(place)
    except FileNotFoundError:
        raise DamagedStoreError(
            f"{place} is missing, and without its commit record shard {shard:06d} of split {split} does not "
            f"exist: {REMEDY}."
        ) from None
    content = read_signed_json(place, data)
    record = CommitRecord(
        split=content["split"],
        shard=content["shard"],
        manifest_sha256=content["manifest_sha256"],
        file_sha256=content["file_sha256"],
        file_bytes=content["file_bytes"],
        offsets=np.array(content["offsets"], np.int64),
        lengths=np.array(content["lengths"], np.int64),
        crc32=np.array(content["crc32"], np.uint32),
        counts=RowCounts(**content["counts"]),
        plane_bytes=content["plane_bytes"],
    )
    found = (record.split, record.shard, record.manifest_sha256)
    if found != (split, shard, manifest_sha256):
        raise DamagedStoreError(
            f"{place} is the record of shard {record.shard:06d} of split {record.split} under manifest "
            f"{record.manifest_sha256[:12]}, expected shard {shard:06d} of split {split} under manifest "
            f"{manifest_sha256[:12]}: {REMEDY}."
        )
    return record, data


def read_batch(
    message: bytes | memoryview, schema: pa.Schema
) -> tuple[int, NDArray[np.uint32], dict[str, pa.Buffer]]:
    """Returns (row number, crc32 of each plane, stored bytes of each plane) of a row's batch.

    Args:
        message: the batch's bytes, whose checksum the caller has compared: Arrow trusts what it reads.
        schema: `row_schema`.
    """
    batch = pa.ipc.read_record_batch(pa.py_buffer(message), schema)
    planes = {name: _only_value(batch.column(name)) for name in schema.names[2:]}
    return batch.column("row")[0].as_py(), batch.column("crc32").values.to_numpy(), planes


def _only_value(column: pa.Array) -> pa.Buffer:
    """Returns the one value of a binary column, without copying it as Arrow's scalars do."""
    _, offsets, values = column.buffers()
    begin, end = np.frombuffer(offsets, np.int32, count=2)
    return values.slice(int(begin), int(end - begin)) if end > begin else pa.py_buffer(b"")


def find_damage(message: bytes, schema: pa.Schema, offset: int, index: int) -> str:
    """Says what is wrong with a batch that differs from its crc32, and where it lies in the file.

    Args:
        message: the batch's bytes.
        schema: `row_schema`.
        offset: of the batch in the file.
        index: number of the row that should be there.
    """
    everywhere = f"bytes {offset} to {offset + len(message) - 1} of the file"
    try:
        buffer = pa.py_buffer(message)
        batch = pa.ipc.read_record_batch(buffer, schema)
        batch.validate(full=True)
        crcs = batch.column("crc32").values.to_numpy()
        for position, plane in enumerate(schema.names[2:]):
            stored = _only_value(batch.column(plane))
            begin = stored.address - buffer.address
            # A damaged header may place a plane outside of the batch.
            inside = 0 <= begin < begin + stored.size <= len(message)
            if inside and zlib.crc32(stored) != crcs[position]:
                return (
                    f"plane {plane}, bytes {offset + begin} to {offset + begin + stored.size - 1} of the file"
                )
        found = batch.column("row")[0].as_py()
        if found != index:
            return f"every plane: it is the batch of row {found}, {everywhere}"
    except (pa.ArrowException, EOFError, OSError, ValueError, IndexError, AttributeError, OverflowError):
        # Expected of damaged bytes: the header that says where the planes lie is itself unreadable.
        pass
    return f"no single plane, but the frame around them, {everywhere}"


def decode_row(
    message: bytes | memoryview,
    manifest: Manifest,
    schema: pa.Schema,
    index: int,
    where: str,
    out: TeacherRecord | None = None,
) -> Row:
    """Decodes and checks a row's batch whose crc32 was right.

    Args:
        message: the batch's bytes.
        manifest: of the store.
        schema: `row_schema`.
        index: number of the row that should be there.
        where: the row's place, for messages.
        out: arrays that the record is written to, see `Codec.decode`; None makes new ones.

    Raises:
        DamagedStoreError: it is another row, or a plane cannot be decoded.
        InvalidRowError: the decoded row breaks a rule.
    """
    codec = codec_of(manifest)
    found, _, planes = read_batch(message, schema)
    if found != index:
        raise DamagedStoreError(f"{where} holds row {found} instead: rows were swapped; {REMEDY}.")
    try:
        row = codec.decode(planes, manifest, out)
    except PlaneError as error:
        raise DamagedStoreError(f"{where}, plane {error.plane}: {error}; {REMEDY}.") from error
    check_row(row, manifest, mass_tolerance=codec.mass_tolerance, where=where)
    return row
