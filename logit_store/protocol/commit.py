"""The commit record of a shard: what makes it exist, and where its rows lie."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.json_text import read_signed_json
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.layout import REMEDY, commit_file
from sparsekd.logit_store.row import PADDING_DOCUMENT, Row, is_real


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

    tokens: int
    tokens_counted: int
    tokens_recorded: int
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
