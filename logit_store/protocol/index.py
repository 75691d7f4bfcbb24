"""The index of a sealed store: what is counted over its shards, and where each row lies.

`INDEX.json` is small and signed; it names, for each split, a table with an entry for each row and, behind
them, the digest of each shard's commit record. The table is read by blocks when a row is asked for, so that
opening a store costs the same however many rows it has, and a row needs no commit record. A table is believed
as far as the crc32 that it gives fits the bytes that it leads to; `store verify` compares its sha256.
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.json_text import read_signed_json
from sparsekd.logit_store.manifest import (
    MANIFEST_NAME,
    Manifest,
    manifest_digest,
    manifest_to_json,
)
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.places.access import Access
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.commit import CommitRecord, RowCounts, check_sums
from sparsekd.logit_store.protocol.layout import INDEX_NAME, table_file
from sparsekd.logit_store.protocol.message import largest_message
from sparsekd.logit_store.typed_json import Count, Sha256, read_bounded, require, typed

INDEX_BYTES = 16 << 20
"""Bytes of an index at most: it has a few hundred for each split."""

MOST_SHARDS = 1 << 32

ROW_ENTRY = np.dtype(
    [("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4"), ("counted", "<u4")],
)
"""An entry of the table, 20 bytes: where the row's batch begins in its shard's file, its length, its crc32,
and how many of its positions the loss counts."""

DIGEST_BYTES = 32
"""Of a commit record, behind the entries of all rows."""

BLOCK_BYTES = 20 * 4096
"""Read at once: entries of 4,096 rows."""

BLOCKS_KEPT = 256
"""20 MiB at most."""


@dataclass(frozen=True)
class SplitIndex:
    """What the index says of one split.

    Attributes:
        rows: in all shards.
        shards: how many; all but the last have the manifest's rows.
        counts: over these rows.
        plane_bytes: stored bytes of each plane, over these rows.
        file_bytes: of all Arrow files.
        table_sha256: of the file with the entries of rows and the digests of commit records.
    """

    rows: Count
    shards: Count
    counts: RowCounts
    plane_bytes: dict[str, Count]
    file_bytes: Count
    table_sha256: Sha256

    @property
    def table_bytes(self) -> int:
        """Returns the length of that file."""
        return self.rows * ROW_ENTRY.itemsize + self.shards * DIGEST_BYTES


@dataclass(frozen=True)
class _Index:
    """The file, without its envelope.

    Attributes:
        manifest_sha256: of the store's `MANIFEST.json`.
        splits: by name.
    """

    manifest_sha256: Sha256
    splits: dict[str, SplitIndex]


def read_index(
    path: StorePath, manifest: Manifest, manifest_text: bytes
) -> tuple[dict[str, SplitIndex], str]:
    """Reads the index of a store.

    Args:
        path: of the store.
        manifest: of that store.
        manifest_text: the bytes of its file.

    Returns:
        (what it says of each split, its digest).

    Raises:
        DamagedStoreError: it is damaged, of another manifest, or contradicts the manifest or itself.
        StoreError: there is none, or it cannot be read.
    """
    place = path / INDEX_NAME
    try:
        data = read_bounded(place, INDEX_BYTES)
    except FileNotFoundError:
        raise StoreError(
            f"{path} is not finished: it has no {INDEX_NAME}; run the command that writes it again, which "
            "continues and seals it."
        ) from None
    content, digest = read_signed_json(place, data, FORMAT_VERSION)
    index = typed(_Index, content, str(place))
    is_canonical = manifest_text == manifest_to_json(manifest).encode("ascii")
    if index.manifest_sha256 != manifest_digest(manifest) or not is_canonical:
        raise DamagedStoreError(
            f"{path / MANIFEST_NAME} is not the manifest that was sealed: it was edited or damaged; restore "
            "it from a copy."
        )
    names = sorted(index.splits)
    require(names == sorted(manifest.splits), place, "splits", ", ".join(manifest.splits), names)
    splits = {name: _checked(index.splits[name], manifest, f"{place}, {name}") for name in names}
    return {name: splits[name] for name in manifest.splits}, digest


def _checked(split: SplitIndex, manifest: Manifest, where: str) -> SplitIndex:
    """Returns what the file says of a split, after a comparison with the manifest and with its own sums."""
    shards = -(-split.rows // manifest.rows_per_shard)
    require(split.shards == shards, where, "shards", f"{shards}, of {split.rows} rows", split.shards)
    require(split.shards <= MOST_SHARDS, where, "shards", f"at most {MOST_SHARDS}", split.shards)
    check_sums(split.counts, split.plane_bytes, split.rows, manifest, where)
    stored = sum(split.plane_bytes.values())
    require(split.file_bytes >= stored, where, "file_bytes", f"at least {stored} of planes", split.file_bytes)
    none = split.rows > 0 or split.file_bytes == 0
    require(none, where, "file_bytes", "0, because it has no shards", split.file_bytes)
    return split


class RowTable:
    """The table of a split, read by blocks. All methods may be called from several threads at once."""

    def __init__(
        self, path: StorePath, manifest: Manifest, split: str, index: SplitIndex, access: Access
    ) -> None:
        self._place = table_file(path, split, index.table_sha256)
        self._index = index
        self._largest = largest_message(manifest)
        self._access = access
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def entry(self, row: int) -> tuple[int, int, int]:
        """Returns (offset, length, crc32) of a row.

        Raises:
            DamagedStoreError: the table is missing or cut off, or the entry is no place in a shard.
        """
        entries = self.entries(row, row + 1)
        offset, length, crc32, _ = entries[0].tolist()
        if not self.are_places(entries):
            raise self.damaged(f"row {row} is {length:,} bytes at {offset:,}")
        return offset, length, crc32

    def entries(self, first: int, stop: int) -> NDArray[np.void]:
        """Returns the entries of rows `first` to `stop`, `ROW_ENTRY` [stop - first]."""
        begin, size = first * ROW_ENTRY.itemsize, (stop - first) * ROW_ENTRY.itemsize
        return np.frombuffer(self._bytes(begin, size), ROW_ENTRY)

    def are_places(self, entries: NDArray[np.void]) -> bool:
        """Returns whether entries may be of rows: of a length that a row can have, at a possible offset."""
        lengths, offsets = entries["length"], entries["offset"]
        return bool(((lengths > 0) & (lengths <= self._largest) & (offsets < 1 << 62)).all())

    def record_digest(self, shard: int) -> str:
        """Returns the digest (hex) of a shard's commit record."""
        begin = self._index.rows * ROW_ENTRY.itemsize + shard * DIGEST_BYTES
        return self._bytes(begin, DIGEST_BYTES).hex()

    def forget(self) -> None:
        """Has the next question go to the file again."""
        with self._lock:
            blocks, self._blocks = list(self._blocks), OrderedDict()
        for block in blocks:
            self._access.forget(self._place, block * BLOCK_BYTES)

    def require_end(self) -> None:
        """Reads its last byte: there are as many rows as the index claims, before anything counts on it.

        Raises:
            DamagedStoreError: it is shorter.
        """
        if self._index.table_bytes:
            self._bytes(self._index.table_bytes - 1, 1)

    def damaged(self, what: str) -> DamagedStoreError:
        """Returns the error of a table that says something impossible."""
        return DamagedStoreError(
            f"{self._place} is damaged: {what}; restore it from a copy, or remove it and {INDEX_NAME} and "
            "run the command that writes the store again, which seals it."
        )

    def _bytes(self, begin: int, size: int) -> bytes:
        first, last = begin // BLOCK_BYTES, (begin + size - 1) // BLOCK_BYTES
        data = b"".join(self._block(block) for block in range(first, last + 1))
        start = begin - first * BLOCK_BYTES
        return data[start : start + size]

    def _block(self, block: int) -> bytes:
        with self._lock:
            if block in self._blocks:
                self._blocks.move_to_end(block)
                return self._blocks[block]
        begin = block * BLOCK_BYTES
        length = min(BLOCK_BYTES, self._index.table_bytes - begin)
        data, failure = b"", None
        # Once more: a network or a cable may have failed, not the disk.
        for _ in range(2):
            try:
                data, failure = bytes(self._access.read(self._place, begin, length)), None
            except FileNotFoundError:
                raise self.damaged("it is missing") from None
            except OSError as error:
                failure = error
            if len(data) == length:
                break
            self._access.forget(self._place, begin)
        if failure is not None:
            raise DamagedStoreError(
                f"{self._place} cannot be read ({failure.strerror or failure}): see to the disk or the "
                "connection, then run the same command again."
            ) from failure
        if len(data) != length:
            raise self.damaged(f"it ends before byte {begin + length:,}")
        with self._lock:
            self._blocks[block] = data
            while len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return data


def entries_of(record: CommitRecord) -> NDArray[np.void]:
    """Returns the entries of a shard's rows in the table, `ROW_ENTRY` [rows]."""
    entries = np.empty(record.rows, ROW_ENTRY)
    columns = (record.offsets, record.lengths, record.crc32, record.counted)
    for name, column in zip(ROW_ENTRY.names or (), columns, strict=True):
        entries[name] = column
    return entries


class TableWriter:
    """Gathers a split's table from its commit records, in order, in a temporary file.

    Args:
        spool: an open temporary file.
    """

    def __init__(self, spool: IO[bytes]) -> None:
        self._spool = spool
        self._digests = bytearray()

    def add(self, record: CommitRecord, digest: str) -> None:
        """Adds a shard."""
        self._spool.write(entries_of(record).tobytes())
        self._digests += bytes.fromhex(digest)

    def finish(self) -> str:
        """Completes the file; returns its sha256 (hex)."""
        self._spool.write(self._digests)
        total = hashlib.sha256()
        self._spool.seek(0)
        while piece := self._spool.read(1 << 20):
            total.update(piece)
        return total.hexdigest()
