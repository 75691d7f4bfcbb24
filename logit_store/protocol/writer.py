"""Writing a store: the manifest first, then shards in any order by any number of processes, then the seal.

A shard exists when its commit record does. Equal rows give equal files, whoever writes them and whenever, so
two writers of one shard cannot harm each other and a killed run is continued by running it again.
"""

import contextlib
import random
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO

import numpy as np

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.errors import DamagedStoreError, NameTakenError, StoreError
from sparsekd.logit_store.json_text import signed_digest, signed_json
from sparsekd.logit_store.manifest import (
    MANIFEST_NAME,
    Manifest,
    compare_manifests,
    manifest_digest,
    read_manifest,
    readable_text,
)
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.places.file_system import Produce
from sparsekd.logit_store.places.files import (
    READ_BYTES,
    TEMPORARY_PREFIX,
    HashingFile,
    exists,
    explained,
    files_below,
    is_exclusive,
    make_folder,
    names_in,
    publish,
    publish_bytes,
    read_file,
    read_range,
    remove_stale,
    require_no_links,
    sha256_of,
    sizes_below,
)
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.places.tokenizer_folder import (
    files_of_tokenizer,
    require_tokenizer,
    tokenizer_digest,
)
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.projections import projections_of, write_projections
from sparsekd.logit_store.protocol.commit import (
    CommitRecord,
    RowCounts,
    check_record,
    commit_to_content,
    read_commit,
)
from sparsekd.logit_store.protocol.index import TableWriter
from sparsekd.logit_store.protocol.layout import (
    INDEX_NAME,
    REMEDY,
    TOKENIZER_NAME,
    commit_file,
    folders_of,
    shard_file,
    shard_names,
    shard_number,
    split_folder,
    table_file,
)
from sparsekd.logit_store.protocol.message import decode_planes, shard_header, stored_planes
from sparsekd.logit_store.protocol.recover import adopt_shard, quarantine
from sparsekd.logit_store.protocol.shard import write_rows
from sparsekd.logit_store.row import Row

SETTLE_TRIES = 20
"""Times that a writer looks whether record and shard fit, where another may have replaced one of them."""

RECORDS_AT_A_TIME = 16
"""Commit records that sealing reads at once: on an object store each is a question of some 20 ms."""

RECORDS_IN_MEMORY = 1024
"""Commit records that sealing holds at a time, some 40 bytes for each row."""


def create_store(
    path: StorePath,
    manifest: Manifest,
    tokenizer_files: Path,
    projections: Mapping[str, bytes] | None = None,
) -> None:
    """Makes an empty store, or does nothing when this very store is there.

    Temporary files of writers that are no longer alive are removed.

    Args:
        path: folder of the store; made when absent.
        manifest: its identity.
        tokenizer_files: the tokenizer's files; their `tokenizer_digest` is in the manifest.
        projections: contents of the files of projected features by plane, see `projections`.

    Raises:
        StoreError: another store is there (naming the fields that differ), the folder holds something else,
            a folder of the store is a link, the tokenizer's files are not those of the manifest, or a reader
            would refuse the manifest.
    """
    codec_of(manifest)
    text = readable_text(manifest)
    found = tokenizer_digest(tokenizer_files)
    if found != manifest.tokenizer.digest:
        raise StoreError(
            f"The tokenizer files in {tokenizer_files} have the digest {found[:12]}, but the manifest names "
            f"{manifest.tokenizer.digest[:12]}: give the folder of the tokenizer that made the ids."
        )
    make_folder(path)
    require_no_links(folders_of(path, manifest.splits))
    if exists(path / MANIFEST_NAME):
        _require_same_manifest(path, manifest)
    else:
        strangers = [name for name in names_in(path) if not name.startswith(TEMPORARY_PREFIX)]
        if strangers and not exists(path / MANIFEST_NAME):
            raise StoreError(
                f"{path} is no store but holds {', '.join(sorted(strangers)[:3])}: name a new or an empty "
                "folder."
            )
        publish_bytes(path / MANIFEST_NAME, text)
    for name, source in files_of_tokenizer(tokenizer_files):
        target = path / TOKENIZER_NAME / name
        make_folder(target.parent)
        publish_bytes(target, source.read_bytes())
    write_projections(path, manifest, projections or {})
    for split in manifest.splits:
        make_folder(split_folder(path, split))
    remove_leftovers(path, manifest)


def write_shard(
    path: StorePath, manifest: Manifest, split: str, shard_index: int, rows: Sequence[Row]
) -> None:
    """Writes one shard and commits it, or does nothing when it is committed with rows of this text.

    Whatever goes wrong, a half-written file never has a shard's name, and no temporary file stays behind. A
    file that has the name but no commit record is adopted where it is sound and of the same text, also where
    the teacher's bits are others than these rows', and put in quarantine where it is not (see `recover`). So
    is a commit record without its shard.

    Args:
        path: of a store made by `create_store`.
        manifest: of that store.
        split: one of the manifest's.
        shard_index: number of the shard; its first row is `shard_index * rows_per_shard`.
        rows: as many as the manifest says; fewer in the last shard of a split.

    Raises:
        InvalidRowError: a row breaks a rule; the message names position and value.
        StoreError: no room, another store, a sealed store, or a shard that is committed with other rows: as
            many, and of the same tokens in the first one, is taken for the same.
    """
    _require_same_manifest(path, manifest)
    where = f"{path}, split {split}, shard {shard_index:06d}"
    if split not in manifest.splits:
        raise StoreError(f"{path} has no split {split!r}: name one of {', '.join(manifest.splits)}.")
    if not 1 <= len(rows) <= manifest.rows_per_shard:
        raise StoreError(f"{where}: {len(rows)} rows were given, expected 1 to {manifest.rows_per_shard}.")
    final, commit = shard_file(path, split, shard_index), commit_file(path, split, shard_index)
    # The record first: another writer makes it last, so that its shard must be there at the second look.
    is_committed, is_there = exists(commit), exists(final)
    if is_there and is_committed:
        _require_same_text(path, manifest, split, shard_index, rows)
        return
    is_sealed = exists(path / INDEX_NAME)
    if is_sealed and not is_committed:
        raise StoreError(
            f"{where} is not part of the store, which is sealed: write to a new folder, or, if it has lost "
            f"the shard's commit record, run `sparsekd store verify {path} --repair`."
        )
    if is_there and adopt_shard(path, manifest, split, shard_index, rows):
        return
    if is_committed and not is_sealed:
        # Before the shard: were it there with a record of other bytes, nobody would look at the two again.
        _take_away_record(path, commit, split)
    make_folder(split_folder(path, split))
    records: list[CommitRecord] = []

    def produce(file: HashingFile) -> None:
        records.append(write_rows(file, path, manifest, split, shard_index, rows))
        if is_sealed and signed_json(commit_to_content(records[-1])) != read_file(commit):
            raise StoreError(
                f"{where} is sealed with other rows than these: write to a new folder, or make the shard "
                f"again with `sparsekd store verify {path} --repair`."
            )

    try:
        publish(final, produce)
    except NameTakenError:
        if is_sealed:
            raise
        # Another writer was faster, with a teacher that does not give the same bits: its shard is as good.
        if adopt_shard(path, manifest, split, shard_index, rows):
            return
        publish(final, produce)
    _commit(path, split, records[-1], produce, is_sealed=is_sealed)


def _require_same_text(
    path: StorePath, manifest: Manifest, split: str, shard: int, rows: Sequence[Row]
) -> None:
    """Compares the first row of a committed shard, which is one read, with the one that was to be written."""
    where = f"{path}, split {split}, shard {shard:06d}"
    remedy = "write to a new folder, or give the rows that this store was begun with"
    record, _ = read_commit(path, manifest_digest(manifest), split, shard)
    if record.rows != len(rows):
        raise StoreError(
            f"{where} is committed with {record.rows} rows, but {len(rows)} were given for it: {remedy}."
        )
    check_record(record, manifest, len(rows), commit_file(path, split, shard))
    index = shard * manifest.rows_per_shard
    offset, length = int(record.offsets[0]), int(record.lengths[0])
    place = shard_file(path, split, shard)
    with explained(place):
        message = read_range(place, offset, length)
    if len(message) != length or zlib.crc32(message) != record.crc32[0]:
        raise DamagedStoreError(
            f"{where}: the bytes of row {index} are not those that were written: {REMEDY}."
        )
    stored = stored_planes(message, manifest, index, where)
    found = decode_planes(stored, manifest, split, where, wanted=["token_ids"])["token_ids"]
    given = rows[0].token_ids
    if not np.array_equal(found, given):
        both = min(len(found), len(given))
        differing = np.flatnonzero(found[:both] != given[:both])
        position = differing[0] if len(differing) else both
        raise StoreError(
            f"{where} is committed with other text than was given for it: row {index} differs from position "
            f"{position} on; {remedy}."
        )


def _commit(path: StorePath, split: str, record: CommitRecord, produce: Produce, *, is_sealed: bool) -> None:
    commit = commit_file(path, split, record.shard)
    text = signed_json(commit_to_content(record))
    try:
        publish_bytes(commit, text)
    except NameTakenError:
        if is_sealed:
            raise
        if is_exclusive(commit):
            # A record whose file had gone, of another capture of the same rows.
            quarantine(path, commit, split)
            publish_bytes(commit, text)
    if not is_exclusive(commit):
        _settle(path, record, text, produce)


def _take_away_record(path: StorePath, commit: StorePath, split: str) -> None:
    try:
        quarantine(path, commit, split)
    except StoreError:
        if exists(commit):  # else another writer, which saw the same, was faster
            raise


def _settle(path: StorePath, record: CommitRecord, text: bytes, produce: Produce) -> None:
    """Looks, where uploads replace one another, that the commit record and the shard are of one writer.

    Of two writers of one shard, the later upload stays, of the shard and of the record each. Where they are
    of two writers, the one whose record stayed uploads its shard once more; the other one waits for it, and
    takes its place where nothing happens.

    Args:
        path: of the store.
        record: of this writer's shard.
        text: that record as its file.
        produce: writes this writer's shard.

    Raises:
        StoreError: they still do not fit after `SETTLE_TRIES` looks.
    """
    final = shard_file(path, record.split, record.shard)
    for look in range(SETTLE_TRIES):
        try:
            found, _ = read_commit(path, record.manifest_sha256, record.split, record.shard)
            with explained(final):
                stored = sha256_of(final)
        except StoreError:  # replaced while it was read
            time.sleep(random.uniform(0.05, 0.5))
            continue
        if stored == found.file_sha256:
            return
        # A third writer may replace what this one uploads before it is read back: then look again.
        with contextlib.suppress(NameTakenError):
            if found.file_sha256 == record.file_sha256:
                publish(final, produce, replace=True)
            elif look < SETTLE_TRIES // 2:
                time.sleep(random.uniform(0.05, 0.5))
            else:  # it died between the two
                publish_bytes(commit_file(path, record.split, record.shard), text, replace=True)
    raise StoreError(
        f"{final} and its commit record are of different writers and stay so: stop all but one of the "
        "commands that write this store, and run it again."
    )


def committed_shards(path: StorePath, split: str) -> set[int]:
    """Returns the numbers of the shards of a split that are there with their commit records."""
    names = set(files_below(split_folder(path, split)))
    return {number for number in _shard_numbers(names) if names.issuperset(shard_names(number))}


def _shard_numbers(names: Iterable[str]) -> set[int]:
    """Returns the numbers of the shards that have any file among those of a split's folder."""
    return {number for name in names if (number := shard_number(name)) is not None}


def seal(path: StorePath, shards_per_split: Mapping[str, int], *, replace: bool = False) -> str:
    """Writes the index, after which the store can be read; does nothing when it is sealed so already.

    Each shard's commit record and length are checked, on a local disk its header, too; its content is not
    read, see `verify_store`. On an object store this takes one listing of each split's folder, a page for
    each 1,000 files, and one request for each commit record.

    Args:
        path: of the store.
        shards_per_split: for each split of the manifest, how many shards it must have.
        replace: whether an index of other shards gives way, in one step.

    Returns:
        The store's digest, sha256 (hex): equal for equal stores.

    Raises:
        StoreError: a shard is missing, short, superfluous or of another store, or the store is sealed with
            another number of shards.
    """
    manifest = read_manifest(path)
    if sorted(shards_per_split) != sorted(manifest.splits):
        raise StoreError(
            f"{path} has the splits {', '.join(manifest.splits)}, but shards were given for "
            f"{', '.join(shards_per_split)}: give a number for each."
        )
    if sum(shards_per_split.values()) == 0:
        raise StoreError(
            f"{path} has no shard in any split: there is nothing to seal, write some rows first."
        )
    require_tokenizer(path / TOKENIZER_NAME, manifest.tokenizer.digest)
    projections_of(path, manifest)
    remove_leftovers(path, manifest)
    content = {
        "format_version": FORMAT_VERSION,
        "manifest_sha256": manifest_digest(manifest),
        "splits": {
            split: _seal_split(path, manifest, split, shards_per_split[split]) for split in manifest.splits
        },
    }
    data = signed_json(content)
    index = path / INDEX_NAME
    with explained(index):
        is_another = not replace and exists(index) and read_file(index) != data
    if is_another:
        raise StoreError(
            f"{path} was sealed before with other shards, or its {INDEX_NAME} is damaged: remove "
            f"{INDEX_NAME} if "
            "the shards of now are meant."
        )
    publish_bytes(index, data, replace=replace)
    return signed_digest(data)


def _seal_split(path: StorePath, manifest: Manifest, split: str, shards: int) -> dict[str, object]:
    folder = split_folder(path, split)
    # One listing of all names and sizes: on an object store each question about a file costs some 20 ms.
    sizes = sizes_below(folder)
    present = _shard_numbers(sizes)
    if missing := [shard for shard in range(shards) if not sizes.keys() >= set(shard_names(shard))]:
        some = ", ".join(f"{number:06d}" for number in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise StoreError(
            f"{path}, split {split}: {len(missing)} of {shards} shards are not committed ({some}{more}); "
            + (_repair(path) or "run the command that writes the store again, it makes the missing ones.")
        )
    if foreign := sorted(present - set(range(shards))):
        raise StoreError(
            f"{folder} has shard {foreign[0]:06d}, but the split has {shards} shards: it belongs to another "
            "plan; remove it or write to a new folder."
        )
    digest = manifest_digest(manifest)
    rows = 0
    counts = dict.fromkeys((field.name for field in fields(RowCounts)), 0)
    plane_bytes = dict.fromkeys(names_of(planes_of(manifest)), 0)
    file_bytes = 0

    def checked(shard: int) -> tuple[CommitRecord, bytes]:
        record, data = read_commit(path, digest, split, shard)
        is_short = record.rows < manifest.rows_per_shard and shard == shards - 1
        if record.rows != manifest.rows_per_shard and not is_short:
            raise StoreError(
                f"{path}, split {split}, shard {shard:06d} has {record.rows} rows, expected "
                f"{manifest.rows_per_shard}: only the last shard may be short; remove both its files and run "
                "again."
            )
        check_record(record, manifest, record.rows, commit_file(path, split, shard))
        _check_length(path, record, sizes[shard_names(shard)[0]])
        if isinstance(path, Path):
            _check_header(path, manifest, record)
        return record, data

    with tempfile.TemporaryFile() as spool, ThreadPoolExecutor(RECORDS_AT_A_TIME) as pool:
        table = TableWriter(spool)
        # In turns, so that not all records of a large store wait in memory.
        for first in range(0, shards, RECORDS_IN_MEMORY):
            turn = range(first, min(first + RECORDS_IN_MEMORY, shards))
            for record, data in pool.map(checked, turn):
                table.add(record, signed_digest(data))
                rows += record.rows
                for name, value in asdict(record.counts).items():
                    counts[name] += value
                for name, value in record.plane_bytes.items():
                    plane_bytes[name] += value
                file_bytes += record.file_bytes
        sha256 = table.finish()
        if shards:
            _publish_table(table_file(path, split, sha256), spool)
    return {
        "rows": rows,
        "shards": shards,
        "counts": counts,
        "plane_bytes": plane_bytes,
        "file_bytes": file_bytes,
        "table_sha256": sha256,
    }


def _publish_table(final: StorePath, spool: IO[bytes]) -> None:
    def produce(file: HashingFile) -> None:
        spool.seek(0)
        while piece := spool.read(READ_BYTES):
            file.write(piece)

    make_folder(final.parent)
    publish(final, produce)


def _check_length(path: StorePath, record: CommitRecord, length: int) -> None:
    """Compares a shard's length with its record; wrong bytes are for `verify_store` and readers to find."""
    place = shard_file(path, record.split, record.shard)
    if length != record.file_bytes:
        raise DamagedStoreError(
            f"{place} has {length} bytes, but its commit record says {record.file_bytes}: "
            + (_repair(path) or "remove both files and run the command that writes the store again.")
        )


def _check_header(path: StorePath, manifest: Manifest, record: CommitRecord) -> None:
    """Compares the beginning of a shard, which is one read: of local stores only."""
    place = shard_file(path, record.split, record.shard)
    header = shard_header(manifest, record.split, record.shard)
    with explained(place):
        begins_right = read_range(place, 0, len(header)) == header
    if not begins_right:
        raise DamagedStoreError(
            f"{place} does not begin as shard {record.shard:06d} of split {record.split} of this store must: "
            "it is damaged or another shard; "
            + (_repair(path) or "remove it and its commit record and run again.")
        )


def _repair(path: StorePath) -> str:
    """Returns the remedy of a damaged store that is sealed, or nothing: then it can still be written."""
    return f"run `sparsekd store verify {path} --repair`." if exists(path / INDEX_NAME) else ""


def _require_same_manifest(path: StorePath, manifest: Manifest) -> None:
    if differing := compare_manifests(read_manifest(path), manifest):
        raise StoreError(
            f"{path} is another store than this run would write ({'; '.join(differing)}): use a new folder, "
            "or the settings that made this one."
        )


def remove_leftovers(path: StorePath, manifest: Manifest) -> None:
    """Removes the temporary files of writers that are no longer alive from all folders of a store.

    Raises:
        StoreError: a folder of the store is a link, and the files may be those of something else.
    """
    folders = folders_of(path, manifest.splits)
    require_no_links(folders)
    if isinstance(path, Path):  # elsewhere nothing is known to be stale
        tops = [path / TOKENIZER_NAME, *(split_folder(path, split) for split in manifest.splits)]
        inner = {(top / name).parent for top in tops for name in files_below(top)}
        for folder in {path, *folders, *inner}:
            remove_stale(folder)
