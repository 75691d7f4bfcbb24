"""Reading a sealed store: any row by one positional read, checked to the last byte.

Opening reads the manifest and the index alone; the tables of rows are read by blocks, the least recently used
of which are forgotten, so a store of a million shards costs little memory.
"""

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.codec import Arrays, codec_of
from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.json_text import signed_digest
from sparsekd.logit_store.manifest import (
    MANIFEST_NAME,
    Manifest,
    manifest_digest,
    manifest_from_json,
    read_manifest_text,
)
from sparsekd.logit_store.places.access import (
    KINDS,
    Access,
    CachedAccess,
    MappedAccess,
    PositionalAccess,
)
from sparsekd.logit_store.places.cache import Cache, default_cache
from sparsekd.logit_store.places.files import size_of
from sparsekd.logit_store.places.paths import RemotePath, StorePath, store_path
from sparsekd.logit_store.places.tokenizer_folder import local_tokenizer, require_tokenizer
from sparsekd.logit_store.planes import names_of, planes_of, text_planes
from sparsekd.logit_store.protocol.commit import CommitRecord, check_record, read_commit
from sparsekd.logit_store.protocol.index import RowTable, SplitIndex, entries_of, read_index
from sparsekd.logit_store.protocol.layout import (
    REMEDY,
    TOKENIZER_NAME,
    commit_file,
    row_place,
    shard_file,
)
from sparsekd.logit_store.protocol.message import (
    StoredRow,
    decode_planes,
    decode_row,
    find_damage,
    stored_planes,
    stored_row,
)
from sparsekd.logit_store.row import Row, row_of_planes
from sparsekd.logit_store.typed_json import one_line

COMMIT_RECORDS_KEPT = 1024
"""About 20 bytes per row each: 20 MB where a shard has 1,000 rows."""


class LogitStore:
    """A sealed store. All methods may be called from several threads at once.

    Attributes:
        path: its folder.
        manifest: what it holds and where that came from.
        digest: sha256 (hex) of the index: equal for equal stores.
    """

    def __init__(
        self,
        path: StorePath,
        manifest: Manifest,
        digest: str,
        index: dict[str, SplitIndex],
        access: Access,
        cache: Cache | None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest
        self._index = index
        self._access = access
        self._cache = cache
        self._manifest_sha256 = manifest_digest(manifest)
        self._planes = names_of(planes_of(manifest))
        self._tables = {
            split: RowTable(path, manifest, split, entry, access) for split, entry in index.items()
        }
        self._commits: OrderedDict[tuple[str, int], CommitRecord] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Has another process open the store for itself."""
        kind = "mapped" if isinstance(self._access, MappedAccess) else "positional"
        return _open_again, (self.path, kind, self._cache, self.digest)

    @cached_property
    def tokenizer_path(self) -> Path:
        """Returns the folder of the tokenizer's files; a remote store's is copied to the local cache.

        Raises:
            DamagedStoreError: the files are not the manifest's tokenizer.
            StoreError: they are not such as a store may have: links, a name that leads out of the folder,
                too many, too large.
        """
        digest = self.manifest.tokenizer.digest
        if isinstance(self.path, Path):
            require_tokenizer(self.path / TOKENIZER_NAME, digest)
            return self.path / TOKENIZER_NAME
        assert self._cache is not None
        return local_tokenizer(self.path / TOKENIZER_NAME, digest, self._cache)

    def require_whole_tables(self) -> None:
        """Raises DamagedStoreError where a table of rows is shorter than the index says."""
        for table in self._tables.values():
            table.require_end()

    def index(self, split: str) -> SplitIndex:
        """Returns what the index says of a split.

        Raises:
            StoreError: there is no such split.
        """
        if split not in self._index:
            raise StoreError(f"{self.path} has no split {split!r}: name one of {', '.join(self._index)}.")
        return self._index[split]

    def rows(self, split: str) -> int:
        """Returns the number of rows of a split."""
        return self.index(split).rows

    def shards(self, split: str) -> int:
        """Returns the number of shards of a split."""
        return self.index(split).shards

    def tokens(self, split: str) -> tuple[int, int]:
        """Returns (positions, positions where the loss mask is True) of a split."""
        counts = self.index(split).counts
        return counts.tokens, counts.tokens_counted

    def shard_rows(self, split: str, shard_index: int) -> range:
        """Returns the numbers of a shard's rows in its split."""
        if not 0 <= shard_index < self.shards(split):
            raise StoreError(
                f"{self.path}, split {split} has no shard {shard_index}: it has {self.shards(split)} shards."
            )
        first = shard_index * self.manifest.rows_per_shard
        return range(first, min(first + self.manifest.rows_per_shard, self.rows(split)))

    def commit(self, split: str, shard_index: int) -> CommitRecord:
        """Returns a shard's commit record.

        Raises:
            DamagedStoreError: it is missing, damaged, or not the one that was sealed.
        """
        key = (split, shard_index)
        with self._lock:
            if key in self._commits:
                self._commits.move_to_end(key)
                return self._commits[key]
        try:
            record = self._read_commit(split, shard_index)
        except DamagedStoreError:
            self._access.forget(commit_file(self.path, split, shard_index), 0)
            record = self._read_commit(split, shard_index)
        with self._lock:
            self._commits[key] = record
            while len(self._commits) > COMMIT_RECORDS_KEPT:
                self._commits.popitem(last=False)
        return record

    def is_record(self, split: str, shard_index: int, text: bytes) -> bool:
        """Returns whether a sound commit record, as its file, is the one that was sealed."""
        return signed_digest(text) == self._tables[split].record_digest(shard_index)

    def _read_commit(self, split: str, shard_index: int) -> CommitRecord:
        place = commit_file(self.path, split, shard_index)
        record, data = read_commit(
            self.path, self._manifest_sha256, split, shard_index, read=self._access.whole
        )
        if not self.is_record(split, shard_index, data):
            raise DamagedStoreError(
                f"{self.path}, split {split}, shard {shard_index:06d}: the commit record is not the one that "
                f"was sealed; {REMEDY}."
            )
        check_record(record, self.manifest, len(self.shard_rows(split, shard_index)), place)
        return record

    def read_message(self, split: str, index: int) -> bytes | memoryview:
        """Returns the bytes of a row's record batch, whose crc32 is right.

        Raises:
            DamagedStoreError: they are not, even when read again; the message names store, split, shard, row,
                plane and the bytes in the file.
        """
        if not 0 <= index < self.rows(split):
            raise StoreError(
                f"{self.path}, split {split} has no row {index}: it has {self.rows(split)} rows."
            )
        shard = index // self.manifest.rows_per_shard
        table, place = self._tables[split], shard_file(self.path, split, shard)
        where = row_place(self.path, split, index, self.manifest.rows_per_shard)
        message: bytes | memoryview = b""
        failure: OSError | None = None
        # Once more: a network or a cable may have failed, not the disk.
        for _ in range(2):
            offset, length, crc32 = table.entry(index)
            try:
                message, failure = self._access.read(place, offset, length), None
            except FileNotFoundError:
                raise DamagedStoreError(f"{place} is missing: {REMEDY}.") from None
            except OSError as error:
                message, failure = b"", error
            if zlib.crc32(message) == crc32 and len(message) == length:
                return message
            self._access.forget(place, offset)
            table.forget()
        self._compare_entry(split, index, (offset, length, crc32))
        if failure is not None:
            reason = failure.strerror or str(failure).strip().partition("\n")[0].rstrip(".")
            raise DamagedStoreError(
                f"{where}: bytes {offset} to {offset + length - 1} of {place.name} cannot be read "
                f"({reason or 'no reason was given'}): see to the disk or the connection, then {REMEDY}."
            ) from failure
        if len(message) < length:
            raise DamagedStoreError(
                f"{where}: {place.name} has {size_of(place)} bytes, expected {offset + length} or more: "
                f"the file is cut off; {REMEDY}."
            )
        damage = find_damage(message, self._planes, offset, index)
        raise DamagedStoreError(f"{where}: stored bytes differ from their checksum in {damage}; {REMEDY}.")

    def read_messages(
        self, split: str, first: int, stop: int, *, keep: bool = True
    ) -> list[bytes | memoryview | None]:
        """Returns what `read_message` does of rows `first` to `stop`, by one read of what lies together.

        The rows of one shard lie together. None stands for a row that cannot be read or whose crc32 is wrong:
        `read_message` tries it again, and says what is wrong.

        Args:
            split: name of the row space.
            first: number of the first row.
            stop: number behind the last one.
            keep: whether a remote store's bytes go through the cache; not where they are read once.

        Raises:
            StoreError: there are no such rows.
            DamagedStoreError: the table of rows is damaged.
        """
        self._require_rows(split, first, stop)
        entries = self._tables[split].entries(first, stop)
        if first == stop or not self._tables[split].are_places(entries):
            return [None] * (stop - first)
        found: list[bytes | memoryview | None] = []
        together: list[tuple[int, int, int]] = []  # offset, length, crc32
        end, shard_end = -1, first
        for row, (offset, length, crc32, _) in enumerate(entries.tolist(), start=first):
            if offset != end or row >= shard_end:
                found += self._read_run(split, row - 1, together, keep=keep)
                together = []
                shard_end = (row // self.manifest.rows_per_shard + 1) * self.manifest.rows_per_shard
            together.append((offset, length, crc32))
            end = offset + length
        return found + self._read_run(split, stop - 1, together, keep=keep)

    def _read_run(
        self, split: str, row: int, together: Sequence[tuple[int, int, int]], *, keep: bool
    ) -> list[bytes | memoryview | None]:
        """Reads (offset, length, crc32) of rows that lie together, one of which is given."""
        if not together:
            return []
        begin, end = together[0][0], together[-1][0] + together[-1][1]
        place = shard_file(self.path, split, row // self.manifest.rows_per_shard)
        try:
            data = memoryview(self._access.read(place, begin, end - begin, keep=keep))
        except OSError:  # each row is then read by itself, which tells what is wrong with it
            return [None] * len(together)
        messages = [data[offset - begin : offset - begin + length] for offset, length, _ in together]
        return [
            message if zlib.crc32(message) == crc32 and len(message) == length else None
            for message, (_, length, crc32) in zip(messages, together, strict=True)
        ]

    def counted(self, split: str, first: int, stop: int) -> NDArray[np.uint32]:
        """Returns how many positions the loss counts of rows `first` to `stop`, uint32 [stop - first].

        No row is read.
        """
        self._require_rows(split, first, stop)
        return self._tables[split].entries(first, stop)["counted"].astype(np.uint32)

    def _require_rows(self, split: str, first: int, stop: int) -> None:
        if not 0 <= first <= stop <= self.rows(split):
            raise StoreError(
                f"{self.path}, split {split} has no rows {first} to {stop}: it has {self.rows(split)} rows."
            )

    def entries_fit(self, split: str, record: CommitRecord) -> bool:
        """Returns whether the table's entries of a shard's rows are those of its commit record."""
        rows = self.shard_rows(split, record.shard)
        entries = self._tables[split].entries(rows.start, rows.stop)
        return entries.tobytes() == entries_of(record).tobytes()

    def _compare_entry(self, split: str, index: int, entry: tuple[int, int, int]) -> None:
        """Raises DamagedStoreError where a row's entry in the table is not the one in its commit record."""
        shard, local = divmod(index, self.manifest.rows_per_shard)
        record = self.commit(split, shard)
        columns = (record.offsets, record.lengths, record.crc32)
        if entry != tuple(int(column[local]) for column in columns):
            raise self._tables[split].damaged(f"the entry of row {index} is not that of its commit record")

    def read_row(self, split: str, index: int, reuse: Arrays | None = None) -> Row:
        """Returns a row, after one positional read.

        Checked are the crc32 of the stored bytes, the checksum of each decompressed plane, the row's own
        number, and the rules of `check_row`.

        Args:
            split: name of the row space.
            index: number of the row in it.
            reuse: arrays of a row that was read before and is needed no more, so that many reads take the
                memory of one: an empty dictionary at first. None makes new arrays.

        Raises:
            DamagedStoreError: the bytes are not those that were written.
            InvalidRowError: they are, but break a rule.
            StoreError: there is no such row.
        """
        message = self.read_message(split, index)
        return decode_row(message, self.manifest, split, index, self._place(split, index), reuse)

    def read_planes(
        self,
        split: str,
        index: int,
        names: Collection[str],
        reuse: Arrays | None = None,
        message: bytes | memoryview | None = None,
    ) -> Arrays:
        """Returns some planes of a row by name, after one positional read; the others are not decoded.

        With them come those that say where they stand (`loss_mask`, `recorded`, ...). Names of planes that
        the store does not have are left out.

        Args:
            split: name of the row space.
            index: number of the row in it.
            names: of planes, see `planes.TABLE`.
            reuse: as of `read_row`.
            message: the row's, where `read_messages` gave it.

        Raises:
            DamagedStoreError, InvalidRowError, StoreError: as `read_row`.
        """
        if message is None:
            message = self.read_message(split, index)
        where = self._place(split, index)
        stored = stored_planes(message, self.manifest, index, where)
        return decode_planes(stored, self.manifest, split, where, wanted=names, reuse=reuse)

    def read_part(
        self,
        split: str,
        index: int,
        names: Collection[str],
        reuse: Arrays | None = None,
        message: bytes | memoryview | None = None,
    ) -> Row:
        """Returns a row of which, besides its text, some planes of the record are decoded.

        What is not decoded is empty (`row.row_of_planes`). Raises as `read_row`.

        Args:
            split: name of the row space.
            index: number of the row in it.
            names: of planes of the record.
            reuse: as of `read_row`.
            message: as of `read_planes`.
        """
        wanted = {*text_planes(self.manifest), *names}
        return row_of_planes(self.read_planes(split, index, wanted, reuse, message))

    def read_stored(self, split: str, index: int) -> StoredRow:
        """Returns a row to be copied as it is stored: its text alone is decoded; raises as `read_row`."""
        message = self.read_message(split, index)
        return stored_row(message, self.manifest, split, index, self._place(split, index))

    def _place(self, split: str, index: int) -> str:
        return row_place(self.path, split, index, self.manifest.rows_per_shard)

    def read_text(self, split: str, index: int) -> Row:
        """Returns a row without its teacher's record, whose planes are not decoded; raises as `read_row`."""
        return row_of_planes(self.read_planes(split, index, text_planes(self.manifest)))


def open_store(
    path: str | StorePath,
    *,
    access: str = "positional",
    cache: Cache | None = None,
    whole_tables: bool = True,
) -> LogitStore:
    """Opens a sealed store.

    Args:
        path: a folder, or an address such as `s3://bucket/store` (see `paths.store_path`).
        access: one of `access.KINDS`; a remote store has `positional` alone.
        cache: of a remote store; by default the machine's (see `cache.default_cache`).
        whole_tables: whether the tables of rows must be as long as the index says, so that what is allocated
            for so many rows is bounded by files that are there; without it, whoever asks takes care.

    Raises:
        DamagedStoreError: the manifest or the index is damaged, or a table is shorter.
        StoreError: there is no store, it is not sealed, or it is of a newer format.
    """
    path = store_path(path)
    if access not in KINDS or (access == "mapped" and isinstance(path, RemotePath)):
        raise StoreError(
            f"{path} cannot be read {access!r}: local stores are read {' or '.join(KINDS)}, remote ones "
            "positional."
        )
    text = read_manifest_text(path)
    manifest = manifest_from_json(text, str(path / MANIFEST_NAME))
    try:
        codec_of(manifest)
    except StoreError as error:
        # It may quote what a stranger wrote.
        raise StoreError(f"{path / MANIFEST_NAME}: {one_line(str(error))}") from error
    index, digest = read_index(path, manifest, text)
    if isinstance(path, RemotePath):
        cache = cache or default_cache(os.environ)
        store = LogitStore(path, manifest, digest, index, CachedAccess(cache, digest), cache)
    else:
        chosen = MappedAccess() if access == "mapped" else PositionalAccess()
        store = LogitStore(path, manifest, digest, index, chosen, None)
    if whole_tables:
        store.require_whole_tables()
    return store


def _open_again(path: StorePath, access: str, cache: Cache | None, digest: str) -> LogitStore:
    """Opens a store that another process has open."""
    store = open_store(path, access=access, cache=cache, whole_tables=False)
    if store.digest != digest:
        raise StoreError(f"{path} was sealed anew while it was read: run the command again.")
    return store
