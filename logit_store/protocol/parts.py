"""Parts of shards: rows that are written before the others of their shard are there, and joined to it later.

A part is the batches of its rows, as the shard will have them, and behind them a signed record of where each
lies. It is whole or not there, as every file of a store; whoever finds that all parts of a shard are there
copies the rows as they are stored. Parts exist on a local file system only, in a store that is not sealed,
below the folder `work`; no reader looks there.
"""

import contextlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import NameTakenError, StoreError
from sparsekd.logit_store.json_text import read_signed_json, signed_json
from sparsekd.logit_store.manifest import Manifest, manifest_digest
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.places.files import (
    TEMPORARY_PREFIX,
    HashingFile,
    exists,
    explained,
    make_folder,
    publish,
    read_range,
    remove_stale,
    require_no_links,
    size_of,
)
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.commit import RECORD_BYTES
from sparsekd.logit_store.protocol.layout import (
    commit_file,
    part_file,
    row_place,
    shard_file,
    work_folder,
)
from sparsekd.logit_store.protocol.message import StoredRow, largest_message, stored_row
from sparsekd.logit_store.protocol.rows import OneByOne
from sparsekd.logit_store.protocol.shard import write_batches
from sparsekd.logit_store.protocol.writer import write_shard
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.typed_json import Count, Sha256, typed

_LENGTH_BYTES = 8
"""At a part's end: how many bytes precede them that are its record."""

_TRIES = 4
"""Of a part, whose folder another writer removes when it has joined the shard."""


@dataclass(frozen=True)
class _PartRecord:
    """What a part says of itself.

    Attributes:
        manifest_sha256: `manifest_digest` of the store.
        split: name of the row space.
        shard: number of the shard in it.
        first: number of the first row in the shard.
        lengths: int64 [rows], bytes of each row's batch; the first begins where the file does.
        crc32: uint32 [rows], of these bytes.
    """

    manifest_sha256: Sha256
    split: str
    shard: Count
    first: Count
    lengths: NDArray[np.int64]
    crc32: NDArray[np.uint32]


class _PartError(Exception):
    """A part is not what it must be; says why."""


def is_committed(path: StorePath, split: str, shard: int) -> bool:
    """Returns whether a shard is there with its commit record."""
    # The record first: a writer makes it last, so that the shard is there at the second look.
    return exists(commit_file(path, split, shard)) and exists(shard_file(path, split, shard))


def write_part(
    path: Path, manifest: Manifest, split: str, shard: int, places: range, rows: Sequence[Row]
) -> None:
    """Writes rows of a shard, unless the shard is committed meanwhile or another writer was faster.

    Args:
        path: of a store made by `create_store`.
        manifest: of that store.
        split: one of the manifest's.
        shard: number of the shard.
        places: numbers of the rows in the shard, from 0.
        rows: as many.

    Raises:
        InvalidRowError: a row breaks a rule.
        StoreError: no room, or a failing disk.
    """
    final = part_file(path, split, shard, places)

    def produce(file: HashingFile) -> None:
        first = shard * manifest.rows_per_shard + places.start
        written = write_batches(file, path, manifest, split, first, rows)
        record = {
            "manifest_sha256": manifest_digest(manifest),
            "split": split,
            "shard": shard,
            "first": places.start,
            "lengths": [length for _, length in written.places],
            "crc32": written.crc32,
        }
        text = signed_json({"format_version": FORMAT_VERSION, **record})
        file.write(text)
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))

    for attempt in range(_TRIES):
        if is_committed(path, split, shard):
            return
        try:
            make_folder(final.parent)
            publish(final, produce)
        except NameTakenError:
            pass  # of a teacher that does not give the same bits: its rows are as good
        except StoreError:
            # Where its folder went away, the shard is committed; but an earlier look may not have seen that.
            if final.parent.is_dir() or attempt == _TRIES - 1:
                raise
            continue
        break
    if is_committed(path, split, shard):  # joined of others' rows while this was written
        clear_work(work_folder(path, split, shard))


def missing_parts(path: Path, split: str, shard: int, parts: Sequence[range]) -> list[range]:
    """Returns those of a shard's parts that are not there."""
    return [places for places in parts if not exists(part_file(path, split, shard, places))]


def join_parts(path: Path, manifest: Manifest, split: str, shard: int, parts: Sequence[range]) -> str | None:
    """Makes a shard of its parts, and removes them when its commit record is durable.

    A part that is not as it was written is removed instead, to be made again.

    Args:
        path: of the store.
        manifest: of the store.
        split: name of the row space.
        shard: number of the shard.
        parts: numbers of the rows of each, from 0 and without a gap.

    Returns:
        None where the shard is committed now; else why it is not, in one sentence.

    Raises:
        StoreError: no room, or a failing disk.
    """
    rows = _Parts(path, manifest, split, shard, parts)
    try:
        if not is_committed(path, split, shard):
            write_shard(path, manifest, split, shard, OneByOne(rows, range(rows.count)))
    except _PartError as error:
        if not is_committed(path, split, shard):  # else another has joined and removed them
            with explained(rows.current):
                rows.current.unlink(missing_ok=True)
            return f"{rows.current} is not as it was written ({error}): its rows are made again"
    clear_work(work_folder(path, split, shard))
    return None


class _Parts:
    """The rows of a shard, in its parts."""

    def __init__(
        self, path: Path, manifest: Manifest, split: str, shard: int, parts: Sequence[range]
    ) -> None:
        self._path, self._manifest, self._split, self._shard, self._parts = (
            path,
            manifest,
            split,
            shard,
            parts,
        )
        self._records: dict[int, tuple[_PartRecord, list[int]]] = {}
        self.current = part_file(path, split, shard, parts[0])
        """The part that was read last."""

    @property
    def count(self) -> int:
        return self._parts[-1].stop

    @cached_property
    def _of_row(self) -> list[int]:
        """The part of each row."""
        return [number for number, places in enumerate(self._parts) for _ in places]

    def get(self, index: int) -> StoredRow:
        """Returns a row as it is stored.

        Raises:
            _PartError: its part is not as it was written.
        """
        number = self._of_row[index]
        places = self._parts[number]
        self.current = part_file(self._path, self._split, self._shard, places)
        record, offsets = self._record(number)
        place = index - places.start
        length = int(record.lengths[place])
        try:
            message = read_range(self.current, offsets[place], length)
        except FileNotFoundError as error:
            raise _PartError("it is gone") from error
        except OSError as error:
            raise _unreadable(self.current, error) from error
        row = self._shard * self._manifest.rows_per_shard + index
        where = row_place(self._path, self._split, row, self._manifest.rows_per_shard)
        if len(message) != length or zlib.crc32(message) != record.crc32[place]:
            raise _PartError(f"the bytes of row {row} differ from their checksum")
        try:
            return stored_row(message, self._manifest, self._split, row, where)
        except StoreError as error:
            raise _PartError(str(error).rstrip(".")) from error

    def _record(self, number: int) -> tuple[_PartRecord, list[int]]:
        """Returns the record of a part, and where each of its rows begins."""
        if number not in self._records:
            try:
                record = self._read_record(self._parts[number])
            except FileNotFoundError as error:
                raise _PartError("it is gone") from error
            except OSError as error:
                raise _unreadable(self.current, error) from error
            except StoreError as error:
                raise _PartError(str(error).rstrip(".")) from error
            self._records[number] = record, [0, *np.cumsum(record.lengths).tolist()]
        return self._records[number]

    def _read_record(self, places: range) -> _PartRecord:
        size = size_of(self.current)
        length = int.from_bytes(
            read_range(self.current, max(size - _LENGTH_BYTES, 0), _LENGTH_BYTES), "little"
        )
        begin = size - _LENGTH_BYTES - length
        if not 0 < length <= RECORD_BYTES or begin < 0:
            raise _PartError("it has no record at its end")
        content, _ = read_signed_json(self.current, read_range(self.current, begin, length), FORMAT_VERSION)
        record = typed(_PartRecord, content, str(self.current))
        wanted = (manifest_digest(self._manifest), self._split, self._shard, places.start)
        if (record.manifest_sha256, record.split, record.shard, record.first) != wanted:
            raise _PartError("it is of another store or of other rows")
        bounds = (record.lengths > 0) & (record.lengths <= largest_message(self._manifest))
        if not len(record.lengths) == len(record.crc32) == len(places) or not bounds.all():
            raise _PartError(f"its record is not one of {len(places)} rows")
        if int(record.lengths.sum()) != begin:
            raise _PartError(f"it has {begin} bytes of rows, its record says {int(record.lengths.sum())}")
        return record


def _unreadable(part: Path, error: OSError) -> StoreError:
    """Of a part that may be as it was written: it is not made again."""
    return StoreError(f"{part} cannot be read ({error.strerror or error}); mend the disk, and run again.")


def clear_work(folder: Path) -> None:
    """Removes a folder of work that is done, with what dead writers left in it; living ones remove their own.

    Args:
        folder: `work` of a sealed store, or that of a shard that is committed; there need not be one.

    Raises:
        StoreError: it is a link.
    """
    require_no_links([folder])
    for inner, folders, names in os.walk(folder, topdown=False):
        here = Path(inner)
        remove_stale(here)
        with contextlib.suppress(OSError):  # another writer was faster, or has put something there
            # A link to a folder is listed among the folders, and not followed.
            for name in [*names, *(name for name in folders if (here / name).is_symlink())]:
                if not name.startswith(TEMPORARY_PREFIX):
                    (here / name).unlink(missing_ok=True)
            here.rmdir()
