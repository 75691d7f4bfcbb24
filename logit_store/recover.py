"""Shards that are there without being committed: adopted where they are sound, put in quarantine where not.

A writer that is killed between a shard and its commit record leaves a whole file that does not exist for
readers. To write it again would need the same bytes, which a teacher that is not bit-deterministic does not
give; so the file itself is read, checked as a reader would, and given its record.
"""

import contextlib
import itertools
import os
import time
import zlib

import numpy as np
import pyarrow as pa

from sparsekd.logit_store.errors import DamagedStoreError, NameTakenError, StoreError
from sparsekd.logit_store.files import (
    HashingFile,
    exists,
    explained,
    files_below,
    files_of,
    make_folder,
    move,
    names_in,
    publish_bytes,
    read_range,
    sha256_of,
    signed_json,
    size_of,
)
from sparsekd.logit_store.manifest import Manifest, manifest_digest
from sparsekd.logit_store.paths import StorePath
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.shard import (
    REMEDY,
    CommitRecord,
    commit_file,
    commit_to_content,
    count_rows,
    decode_row,
    read_batch,
    row_batch,
    row_place,
    row_schema,
    shard_file,
    shard_header,
    shard_schema,
)

QUARANTINE_NAME = "quarantine"

LOOKS = 3
SECONDS_BETWEEN_LOOKS = 0.5
"""At a remote file that seems unsound, before it is put in quarantine."""


def quarantine(path: StorePath, file: StorePath, split: str) -> StorePath:
    """Moves a file to `quarantine/SPLIT`, over nothing; returns its place."""
    folder = path / QUARANTINE_NAME / split if split else path / QUARANTINE_NAME
    make_folder(folder)
    for number in itertools.count():
        target = folder / (f"{file.name}.{number}" if number else file.name)
        try:
            move(file, target)
        except FileExistsError:
            continue
        return target
    raise AssertionError("unreachable")


def in_quarantine(path: StorePath) -> list[str]:
    """Returns the names, relative to the store, of what lies in quarantine."""
    return [f"{QUARANTINE_NAME}/{name}" for name in files_below(path / QUARANTINE_NAME)]


def record_of_file(path: StorePath, manifest: Manifest, split: str, shard: int) -> CommitRecord:
    """Returns the commit record of a shard's file, made from the file alone.

    Every row is checked as a reader checks it, and the file must be, to the byte, what Arrow writes of these
    rows: header, batches, footer.

    Raises:
        DamagedStoreError: it is not, or the file is another shard's or another store's.
        StoreError: it cannot be read, or a row breaks a rule.
    """
    place = shard_file(path, split, shard)
    with explained(place):
        data = read_range(place, 0, size_of(place))
        digest = sha256_of(place)
    header = shard_header(manifest, split, shard)
    if not data.startswith(header):
        raise DamagedStoreError(f"{place} does not begin as this shard of this store must: {REMEDY}.")
    schema, full_schema = row_schema(manifest), shard_schema(manifest, split, shard)
    first = shard * manifest.rows_per_shard
    rows: list[Row] = []
    batches: list[tuple[int, int, int]] = []
    plane_bytes = dict.fromkeys(schema.names[2:], 0)
    # Written again to nowhere, to know where each batch lies and that nothing else is in the file.
    with open(os.devnull, "wb") as nowhere:
        again = HashingFile(nowhere.fileno())
        writer = pa.ipc.new_file(again, full_schema)
        try:
            file = pa.ipc.open_file(pa.BufferReader(data))
            for index in range(file.num_record_batches):
                batch = file.get_batch(index)
                # Before anything else touches it: Arrow ends the process over lengths that make no sense.
                if batch.num_rows != 1:
                    raise DamagedStoreError(
                        f"{place} holds {batch.num_rows} rows in batch {index}: {REMEDY}."
                    )
                batch.validate(full=True)
                message = batch.serialize().to_pybytes()
                where = row_place(path, split, first + index, manifest.rows_per_shard)
                rows.append(decode_row(message, manifest, schema, first + index, where))
                _, _, found = read_batch(message, schema)
                planes = {name: stored.to_pybytes() for name, stored in found.items()}
                # From the planes alone, so that not a byte around them is taken over; with their checksums,
                # so that a plane which differs from its own makes another file.
                batch = row_batch(full_schema, first + index, planes)
                offset = max(again.size, len(header))
                writer.write_batch(batch)
                batches.append((offset, again.size - offset, zlib.crc32(batch.serialize())))
                for name, stored in planes.items():
                    plane_bytes[name] += len(stored)
        except (pa.ArrowException, OSError, EOFError, ValueError, IndexError, AttributeError) as error:
            raise DamagedStoreError(f"{place} cannot be read as an Arrow file: {REMEDY}.") from error
        writer.close()
    if again.hexdigest() != digest or not 1 <= len(rows) <= manifest.rows_per_shard:
        raise DamagedStoreError(f"{place} is not the file that its {len(rows)} rows make: {REMEDY}.")
    offsets, lengths, crc32s = zip(*batches, strict=True)
    return CommitRecord(
        split=split,
        shard=shard,
        manifest_sha256=manifest_digest(manifest),
        file_sha256=digest,
        file_bytes=len(data),
        offsets=np.array(offsets, np.int64),
        lengths=np.array(lengths, np.int64),
        crc32=np.array(crc32s, np.uint32),
        counts=count_rows(rows),
        plane_bytes=plane_bytes,
    )


def adopt_shard(path: StorePath, manifest: Manifest, split: str, shard: int) -> bool:
    """Commits a shard's file that has no commit record, or puts it in quarantine where it is not sound.

    May be called while the file's own writer is still alive: both write the same record.

    Returns:
        Whether the shard is committed now.
    """
    place, commit = shard_file(path, split, shard), commit_file(path, split, shard)
    # Where uploads replace one another, a file that is read meanwhile is half of each.
    for _ in range(1 if files_of(place).is_exclusive else LOOKS):
        try:
            record = record_of_file(path, manifest, split, shard)
        except StoreError:
            if exists(commit):
                return True
            if not exists(place):
                return False
            time.sleep(0 if files_of(place).is_exclusive else SECONDS_BETWEEN_LOOKS)
            continue
        with contextlib.suppress(NameTakenError):  # by another writer, which looks that the two fit
            publish_bytes(commit, signed_json(commit_to_content(record)))
        return True
    quarantine(path, place, split)
    return False


def adopt_orphans(path: StorePath, manifest: Manifest) -> tuple[int, int]:
    """Adopts every shard file of an unsealed store that has no commit record.

    Returns:
        (files adopted, files put in quarantine).
    """
    adopted = refused = 0
    for split in manifest.splits:
        names = set(names_in(shard_file(path, split, 0).parent))
        for name in sorted(names):
            stem, _, ending = name.partition(".")
            if ending != "arrow" or not stem.isdecimal() or f"{stem}.json" in names:
                continue
            if adopt_shard(path, manifest, split, int(stem)):
                adopted += 1
            else:
                refused += 1
    return adopted, refused
