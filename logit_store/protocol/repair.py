"""Repairing a sealed store: damaged shards are made again, and the old files kept in quarantine.

The store calls nothing above it: it is given a function that makes the rows of a shard. The new shard must
be, to the byte, the one that was sealed, so that the store's digest stays and every run begun on it goes on.
Where it is not, that is an error which names what differs, or, as an explicit decision, the store is sealed
anew.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.json_text import signed_json
from sparsekd.logit_store.places.files import (
    HashingFile,
    exists,
    publish,
    publish_bytes,
    require_no_links,
)
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.commit import CommitRecord, commit_to_content
from sparsekd.logit_store.protocol.layout import INDEX_NAME, commit_file, folders_of, shard_file, table_file
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.recover import keep_copy, quarantine, record_of_file
from sparsekd.logit_store.protocol.shard import write_rows
from sparsekd.logit_store.protocol.writer import seal
from sparsekd.logit_store.row import Row, planes_of_row

Recapture = Callable[[str, int], Sequence[Row]]
"""Makes the rows of (split, shard) anew."""


@dataclass(frozen=True)
class RepairResult:
    """What `repair_store` did.

    Attributes:
        digest: of the store now.
        repaired: (split, shard) of each shard that is sound again.
        quarantined: places where the files that were replaced are kept.
        resealed: whether the digest is another than before.
    """

    digest: str
    repaired: tuple[tuple[str, int], ...]
    quarantined: tuple[str, ...]
    resealed: bool


def repair_store(
    path: StorePath, damaged: Sequence[tuple[str, int]], recapture: Recapture, *, reseal: bool = False
) -> RepairResult:
    """Makes damaged shards of a sealed store anew. Killed, the same call goes on.

    A shard whose file is sound gets its commit record back without a recapture. Until all shards are there
    the index stays as it was, so that those which came out different are damaged for every reader, and are
    made again by a call that goes on; then the new index takes its place in one step.

    Args:
        path: of the store.
        damaged: (split, shard) of the shards, as `verify_store` names them.
        recapture: makes the rows of one of them.
        reseal: whether shards that come out different are taken, and the store sealed with another digest.

    Raises:
        StoreError: a shard comes out different, and `reseal` is False; the message names what differs. Shards
            repaired before it stay repaired.
    """
    store = open_store(path)
    require_no_links(folders_of(path, store.manifest.splits))
    moved: list[StorePath] = []
    resealed = False  # some shard is not the one in the index any more
    for split, shard in damaged:
        record = _sound_record(store, split, shard)
        if record is not None:
            _take_away(store, [commit_file(path, split, shard)], split, moved)
            publish_bytes(commit_file(path, split, shard), signed_json(commit_to_content(record)))
            continue
        rows = recapture(split, shard)
        record = _record_of_rows(store, split, shard, rows)
        is_sealed = _is_sealed(store, record)
        if not (is_sealed or reseal):
            raise StoreError(_difference(store, record, rows))
        _replace(store, record, rows, moved)
        resealed = resealed or not is_sealed
    if resealed:
        moved.append(keep_copy(path, path / INDEX_NAME))
        before = _tables(store)
        seal(path, {name: store.shards(name) for name in store.manifest.splits}, replace=True)
        store = open_store(path)
        moved += [quarantine(path, table, "") for table in before if table not in _tables(store)]
    return RepairResult(
        digest=store.digest,
        repaired=tuple(damaged),
        quarantined=tuple(str(place) for place in moved),
        resealed=resealed,
    )


def _tables(store: LogitStore) -> list[StorePath]:
    """Returns the files of the index's tables."""
    indices = {split: store.index(split) for split in store.manifest.splits if store.rows(split)}
    return [table_file(store.path, split, index.table_sha256) for split, index in indices.items()]


def _sound_record(store: LogitStore, split: str, shard: int) -> CommitRecord | None:
    """Returns the record of a shard whose file is the one that was sealed; None where it is not."""
    try:
        record = record_of_file(store.path, store.manifest, split, shard)
    except StoreError:
        return None
    return record if _is_sealed(store, record) else None


def _record_of_rows(store: LogitStore, split: str, shard: int, rows: Sequence[Row]) -> CommitRecord:
    with open(os.devnull, "wb") as nowhere:
        file = HashingFile(nowhere.fileno())
        return write_rows(file, store.path, store.manifest, split, shard, rows)


def _is_sealed(store: LogitStore, record: CommitRecord) -> bool:
    text = signed_json(commit_to_content(record))
    return store.is_record(record.split, record.shard, text)


def _replace(store: LogitStore, record: CommitRecord, rows: Sequence[Row], moved: list[StorePath]) -> None:
    """Puts a shard in its place. Between the two steps it is missing, which is as damaged as before."""
    path, split, shard = store.path, record.split, record.shard
    final, commit = shard_file(path, split, shard), commit_file(path, split, shard)
    _take_away(store, [commit, final], split, moved)

    def produce(file: HashingFile) -> None:
        write_rows(file, path, store.manifest, split, shard, rows)

    publish(final, produce)
    publish_bytes(commit, signed_json(commit_to_content(record)))


def _take_away(store: LogitStore, files: Sequence[StorePath], split: str, moved: list[StorePath]) -> None:
    moved += [quarantine(store.path, file, split) for file in files if exists(file)]


def _difference(store: LogitStore, record: CommitRecord, rows: Sequence[Row]) -> str:
    """Says in which plane the rows differ from those that can still be read."""
    found = "none of its rows can be read to say where"
    for index, row in zip(store.shard_rows(record.split, record.shard), rows, strict=False):
        try:
            stored = store.read_row(record.split, index)
        except StoreError:
            continue
        found = "the rows that can still be read are the same"
        if place := _first_difference(stored, row):
            found = f"row {index} differs in {place}"
            break
    return (
        f"{store.path}, split {record.split}, shard {record.shard:06d}, made again, is not the shard that "
        f"was sealed ({found}), and nothing of it was replaced: make it again on the machine and with the "
        "versions of the first time, or take it with --reseal, after which the store has another digest and "
        "runs begun on it must begin anew."
    )


def _first_difference(stored: Row, row: Row) -> str | None:
    one, other = planes_of_row(stored), planes_of_row(row)
    for name in (name for name in one if name in other):
        left, right = one[name], other[name]
        if np.array_equal(left, right):
            continue
        if left.shape != right.shape:
            return f"the shape of {name}"
        different = left != right
        return f"{name} ({int(different.sum()):,} of {different.size:,} values)"
    return None
