"""Writing one shard: an Arrow IPC file with one record batch per row, and the commit record that it gets.

The commit record knows where each row's batch lies, so a row is one positional read. Arrow has no checksums;
all of them are ours: crc32 of each row's batch (in the commit record) and of each plane (in the batch), and
sha256 of the file.
"""

import io
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sparsekd.logit_store.checks import check_row
from sparsekd.logit_store.codecs.codec import Arrays, codec_of
from sparsekd.logit_store.codecs.faithful import first_difference
from sparsekd.logit_store.codecs.frequency import mass_of
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest, manifest_digest
from sparsekd.logit_store.places.files import HashingFile
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.protocol.commit import CommitRecord, RowCounts, count_rows, sum_of_counts
from sparsekd.logit_store.protocol.layout import row_place
from sparsekd.logit_store.protocol.message import row_batch, shard_header, shard_schema
from sparsekd.logit_store.row import Row


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


def write_rows(
    file: HashingFile, store: StorePath, manifest: Manifest, split: str, shard: int, rows: Sequence[Row]
) -> CommitRecord:
    """Writes a shard's Arrow file and returns its commit record.

    Every row is checked, encoded, decoded again and compared: what would not be read as it was given is not
    written.
    Each is taken from `rows` once, in order, so that a sequence which reads them one by one needs little
    memory.

    Raises:
        InvalidRowError: a row breaks a rule.
        StoreError: the codec does not give a row back.
    """
    codec = codec_of(manifest)
    planes = names_of(planes_of(manifest))
    schema = shard_schema(manifest, split, shard)
    plane_bytes = dict.fromkeys(planes, 0)
    batches: list[tuple[int, int]] = []
    crc32: list[int] = []
    counts: list[RowCounts] = []
    reuse: Arrays = {}
    first = shard * manifest.rows_per_shard
    header = shard_header(manifest, split, shard)
    checked = _ChecksummingFile(file)
    writer = pa.ipc.new_file(checked, schema)
    for index, row in enumerate(rows, start=first):
        where = row_place(store, split, index, manifest.rows_per_shard)
        check_row(row, manifest, split=split, where=where, short_heads=mass_of(manifest) is not None)
        stored = codec.encode(row, manifest)
        if difference := first_difference(row, codec.decode_planes(stored, manifest, None, reuse), manifest):
            raise StoreError(
                f"{where}: the codec {manifest.codec.name} does not give back {difference}; nothing of the "
                "shard was written: this is a fault of sparsekd, please report it with the store's manifest."
            )
        batch = row_batch(schema, index, stored)
        counts.append(count_rows([row]))
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
        counts=sum_of_counts(counts),
        plane_bytes=plane_bytes,
    )
