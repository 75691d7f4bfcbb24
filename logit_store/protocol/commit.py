"""The commit record of a shard: what makes it exist, and where its rows lie."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.json_text import read_signed_json
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.places.files import read_file
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.protocol.layout import REMEDY, commit_file
from sparsekd.logit_store.protocol.message import largest_message
from sparsekd.logit_store.row import PADDING_DOCUMENT, Row, is_real
from sparsekd.logit_store.typed_json import Count, Sha256, read_bounded, require, short, typed

RECORD_BYTES = 16 << 20
"""Bytes of a commit record at most; a row takes about 40."""


@dataclass(frozen=True)
class RowCounts:
    """What is counted over rows, for the index and for people.

    Attributes:
        tokens: positions, padding included.
        tokens_counted: positions where the loss mask is True.
        tokens_recorded: positions with a teacher's record.
        tokens_padding: positions of padding segments.
        segments: documents, or pieces of one, without padding.
    """

    tokens: Count
    tokens_counted: Count
    tokens_recorded: Count
    tokens_padding: Count
    segments: Count


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
        counted: int64 [rows], positions of each row that the loss counts.
        counts: over the rows.
        plane_bytes: stored bytes of each plane, over the rows.
    """

    split: str
    shard: Count
    manifest_sha256: Sha256
    file_sha256: Sha256
    file_bytes: Count
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    counted: NDArray[np.int64]
    counts: RowCounts
    plane_bytes: dict[str, Count]

    @property
    def rows(self) -> int:
        return len(self.offsets)


def count_rows(rows: Sequence[Row]) -> RowCounts:
    """Counts positions and segments over rows."""
    return RowCounts(
        tokens=sum(len(row.token_ids) for row in rows),
        tokens_counted=sum(int(np.count_nonzero(row.loss_mask)) for row in rows),
        tokens_recorded=sum(
            0 if row.recorded is None else int(np.count_nonzero(row.recorded)) for row in rows
        ),
        tokens_padding=sum(int(np.count_nonzero(~is_real(row))) for row in rows),
        segments=sum(int((row.segment_documents != PADDING_DOCUMENT).sum()) for row in rows),
    )


def sum_of_counts(counts: Sequence[RowCounts]) -> RowCounts:
    """Returns the counts over all rows, from those of each."""
    return RowCounts(*(sum(column) for column in zip(*map(astuple, counts), strict=True)))


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
        "counted": record.counted.tolist(),
        "counts": asdict(record.counts),
        "plane_bytes": record.plane_bytes,
    }


def read_commit(
    path: StorePath,
    manifest_sha256: str,
    split: str,
    shard: int,
    *,
    read: Callable[[Any, int], bytes] = read_file,
) -> tuple[CommitRecord, bytes]:
    """Reads a commit record and the bytes it was read from.

    Args:
        path: of the store.
        manifest_sha256: of its manifest.
        split: name of the row space.
        shard: number of the shard in it.
        read: gives the bytes of a file of a limited size; by default from the store itself.

    Raises:
        DamagedStoreError: there is none, it is damaged, or it belongs to another shard or store.
    """
    place = commit_file(path, split, shard)
    try:
        data = read_bounded(place, RECORD_BYTES, read)
    except FileNotFoundError:
        raise DamagedStoreError(
            f"{place} is missing, and without its commit record shard {shard:06d} of split {split} does not "
            f"exist: {REMEDY}."
        ) from None
    content, _ = read_signed_json(place, data, FORMAT_VERSION)
    record = typed(CommitRecord, content, str(place))
    found = (record.split, record.shard, record.manifest_sha256)
    if found != (split, shard, manifest_sha256):
        raise DamagedStoreError(
            f"{place} is the record of shard {record.shard:06d} of split {short(record.split)[1:-1]} under "
            f"manifest {record.manifest_sha256[:12]}, expected shard {shard:06d} of split {split} under "
            f"manifest {manifest_sha256[:12]}: {REMEDY}."
        )
    _check_places(record, place)
    return record, data


def _check_places(record: CommitRecord, place: StorePath) -> None:
    """Raises DamagedStoreError where the batches do not lie one behind the other in the file."""
    columns = (record.offsets, record.lengths, record.crc32, record.counted)
    lengths = {len(column) for column in columns}
    names = "offsets, lengths, crc32 and counted"
    require(len(lengths) == 1, place, names, "lists of one length", sorted(lengths))
    require(record.rows > 0, place, "offsets", "at least one row", 0)
    require(bool((record.lengths > 0).all()), place, "lengths", "above 0", int(record.lengths.min()))
    require(int(record.offsets[0]) > 0, place, "offsets[0]", "behind the header", int(record.offsets[0]))
    # Before anything is added up, which could overflow.
    for name, column in (("offsets", record.offsets), ("lengths", record.lengths)):
        most = int(column.max())
        require(most < record.file_bytes, place, name, f"inside of the {record.file_bytes:,} bytes", most)
    ends = record.offsets + record.lengths
    wrong = np.flatnonzero(record.offsets[1:] != ends[:-1])
    if wrong.size:
        row = int(wrong[0]) + 1
        require(False, place, f"offsets[{row}]", f"{ends[row - 1]}", int(record.offsets[row]))
    end = int(ends[-1])
    require(end < record.file_bytes, place, "file_bytes", f"above {end}", record.file_bytes)


def check_record(record: CommitRecord, manifest: Manifest, rows: int, place: StorePath) -> None:
    """Compares a commit record with the manifest, before anything is allocated by it.

    Args:
        record: from `read_commit`.
        manifest: of the store.
        rows: that the shard must have.
        place: of the record, for messages.

    Raises:
        DamagedStoreError: its number of rows, a row's length, a count or a plane is not what it can be.
    """
    require(record.rows == rows, place, "offsets", f"of {rows} rows", record.rows)
    most, longest = largest_message(manifest), int(record.lengths.max())
    require(longest <= most, place, "lengths", f"at most {most:,} bytes for a row of this store", longest)
    check_sums(record.counts, record.plane_bytes, rows, manifest, str(place))
    within = bool(((record.counted >= 0) & (record.counted <= manifest.sequence_length)).all())
    require(within, place, "counted", f"from 0 to {manifest.sequence_length}", record.counted.tolist()[:5])
    total, counted = int(record.counted.sum()), record.counts.tokens_counted
    require(total == counted, place, "counts.tokens_counted", f"{total}, as its rows have", counted)
    stored, total = sum(record.plane_bytes.values()), int(record.lengths.sum())
    require(stored < total, place, "plane_bytes", f"below the rows' {total} bytes in all", stored)


def check_sums(
    counts: RowCounts, plane_bytes: dict[str, int], rows: int, manifest: Manifest, where: str
) -> None:
    """Compares what is counted over rows with what so many rows of a store can have.

    Raises:
        DamagedStoreError: a number cannot be, or the planes are others than the store's.
    """
    positions = rows * manifest.sequence_length
    require(counts.tokens == positions, where, "counts.tokens", str(positions), counts.tokens)
    padding = counts.tokens_padding
    require(padding <= positions, where, "counts.tokens_padding", f"at most {positions}", padding)
    left = positions - padding
    for name in ("tokens_counted", "tokens_recorded", "segments"):
        found = getattr(counts, name)
        require(found <= left, where, f"counts.{name}", f"at most {left}", found)
    planes = sorted(names_of(planes_of(manifest)))
    require(sorted(plane_bytes) == planes, where, "plane_bytes", ", ".join(planes), sorted(plane_bytes))
