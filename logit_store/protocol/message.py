"""A row as one Arrow record batch: its schema, its bytes, what they decode to, and what is wrong in them."""

import json
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sparsekd.logit_store.checks import check_planes
from sparsekd.logit_store.codecs.codec import Arrays, codec_of
from sparsekd.logit_store.codecs.frames import PlaneError
from sparsekd.logit_store.codecs.frequency import mass_of
from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.manifest import Manifest, manifest_digest
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.protocol.layout import REMEDY
from sparsekd.logit_store.row import Row, row_of_planes

_MAGIC = b"ARROW1\0\0"
"""First bytes of every Arrow IPC file, padded to 8."""


def row_schema(manifest: Manifest) -> pa.Schema:
    """Returns the Arrow schema of a row's batch, without metadata."""
    planes = names_of(planes_of(manifest))
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


def _one_value(stored: bytes) -> pa.Array:
    """Returns a binary column of one value, without copying it."""
    offsets = pa.py_buffer(np.array([0, len(stored)], np.int32))
    return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(stored)])


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


def stored_planes(
    message: bytes | memoryview, schema: pa.Schema, index: int, where: str
) -> dict[str, pa.Buffer]:
    """Returns the stored bytes of each plane of a row's batch whose crc32 was right.

    Raises:
        DamagedStoreError: it is another row.
    """
    found, _, planes = read_batch(message, schema)
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
    schema: pa.Schema,
    split: str,
    index: int,
    where: str,
    reuse: Arrays | None = None,
) -> Row:
    """Decodes and checks a row's batch whose crc32 was right.

    Args:
        message: the batch's bytes.
        manifest: of the store.
        schema: `row_schema`.
        split: of the row.
        index: number of the row that should be there.
        where: the row's place, for messages.
        reuse: see `Codec.decode_planes`.

    Raises:
        DamagedStoreError: it is another row, or a plane cannot be decoded.
        InvalidRowError: the decoded row breaks a rule.
    """
    stored = stored_planes(message, schema, index, where)
    return row_of_planes(decode_planes(stored, manifest, split, where, reuse=reuse))
