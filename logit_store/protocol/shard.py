"""Writing one shard: an Arrow IPC file with one record batch per row, and the commit record that it gets.

The commit record knows where each row's batch lies, so a row is one positional read. Arrow has no checksums;
all of them are ours: crc32 of each row's batch (in the commit record) and of each plane (in the batch), and
sha256 of the file.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsekd.logit_store.checks import check_row
from sparsekd.logit_store.codecs.codec import Arrays, Codec, codec_of
from sparsekd.logit_store.codecs.faithful import first_difference
from sparsekd.logit_store.codecs.frames import PlaneError
from sparsekd.logit_store.codecs.frequency import mass_of
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest, manifest_digest
from sparsekd.logit_store.places.files import HashingFile
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.protocol.commit import CommitRecord, RowCounts, count_rows, sum_of_counts
from sparsekd.logit_store.protocol.layout import row_place
from sparsekd.logit_store.protocol.message import StoredRow, row_message, shard_footer, shard_header
from sparsekd.logit_store.row import Row


@dataclass(frozen=True)
class Batches:
    """What is known of rows that were written one behind the other.

    Attributes:
        places: (offset, length) of each row's batch in the file.
        crc32: of each batch.
        counts: of each row.
        plane_bytes: stored bytes of each plane, over the rows.
    """

    places: list[tuple[int, int]]
    crc32: list[int]
    counts: list[RowCounts]
    plane_bytes: dict[str, int]


def write_batches(
    file: HashingFile, store: StorePath, manifest: Manifest, split: str, first: int, rows: Iterable[Row]
) -> Batches:
    """Writes the batches of rows, which are the same bytes in whatever file.

    Every row is checked, encoded, decoded again and compared: what would not be read as it was given is not
    written. A `StoredRow` is copied; its store has this one's codec and record.
    Each is taken from `rows` once, in order, so that a sequence which reads them one by one needs little
    memory.

    Args:
        file: where they are written.
        store: for messages.
        manifest: of the store.
        split: of the rows.
        first: number of the first row in the split.
        rows: those from there on.

    Raises:
        InvalidRowError: a row breaks a rule.
        StoreError: the codec does not give a row back.
    """
    codec = codec_of(manifest)
    planes = names_of(planes_of(manifest))
    written = Batches([], [], [], dict.fromkeys(planes, 0))
    reuse: Arrays = {}
    for index, row in enumerate(rows, start=first):
        where = row_place(store, split, index, manifest.rows_per_shard)
        stored: Mapping[str, bytes | memoryview]
        if isinstance(row, StoredRow):
            stored, message = row.stored, row_message(index, list(row.stored.values()), row.crc32)
        else:
            check_row(row, manifest, split=split, where=where, short_heads=mass_of(manifest) is not None)
            stored = codec.encode(row, manifest)
            if difference := _difference(codec, row, stored, manifest, reuse):
                raise StoreError(
                    f"{where}: the codec {manifest.codec.name} does not give back {difference}; nothing of "
                    "the shard was written: this is a fault of sparsekd, please report it with the store's "
                    "manifest."
                )
            message = row_message(index, [stored[plane] for plane in planes])
        written.counts.append(count_rows([row]))
        written.crc32.append(zlib.crc32(message))
        written.places.append((file.size, len(message)))
        file.write(message)
        for plane in planes:
            written.plane_bytes[plane] += len(stored[plane])
    return written


def write_rows(
    file: HashingFile, store: StorePath, manifest: Manifest, split: str, shard: int, rows: Sequence[Row]
) -> CommitRecord:
    """Writes a shard's Arrow file, by `write_batches`, and returns its commit record."""
    file.write(shard_header(manifest, split, shard))
    written = write_batches(file, store, manifest, split, shard * manifest.rows_per_shard, rows)
    file.write(shard_footer(manifest, split, shard, written.places))
    offsets, lengths = np.array(written.places, np.int64).T
    return CommitRecord(
        split=split,
        shard=shard,
        manifest_sha256=manifest_digest(manifest),
        file_sha256=file.hexdigest(),
        file_bytes=file.size,
        offsets=offsets,
        lengths=lengths,
        crc32=np.array(written.crc32, np.uint32),
        counted=np.array([part.tokens_counted for part in written.counts], np.int64),
        counts=sum_of_counts(written.counts),
        plane_bytes=written.plane_bytes,
    )


def _difference(
    codec: Codec, row: Row, stored: Mapping[str, bytes | memoryview], manifest: Manifest, reuse: Arrays
) -> str | None:
    """Returns what of a row its stored planes do not give back, None where they give all."""
    try:
        return first_difference(row, codec.decode_planes(stored, manifest, None, reuse), manifest)
    except PlaneError as error:
        return f"{error.plane} ({error})"
