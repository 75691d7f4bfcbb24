"""Shards that are there without being committed: adopted where they are sound, put in quarantine where not.

A writer that is killed between a shard and its commit record leaves a whole file that does not exist for
readers. To write it again would need the same bytes, which a teacher that is not bit-deterministic does not
give; so the file itself is read, checked as a reader would, and given its record.
"""

import contextlib
import hashlib
import itertools
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from sparsekd.logit_store.errors import DamagedStoreError, NameTakenError, StoreError
from sparsekd.logit_store.json_text import signed_json
from sparsekd.logit_store.manifest import Manifest, manifest_digest
from sparsekd.logit_store.places.files import (
    exists,
    explained,
    files_below,
    is_exclusive,
    make_folder,
    move,
    publish_bytes,
    read_file,
    read_range,
    size_of,
)
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.planes import names_of, planes_of, text_planes
from sparsekd.logit_store.protocol.arrow_layout import is_end, message_length
from sparsekd.logit_store.protocol.commit import (
    CommitRecord,
    RowCounts,
    commit_to_content,
    count_rows,
    sum_of_counts,
)
from sparsekd.logit_store.protocol.layout import (
    QUARANTINE_NAME,
    REMEDY,
    commit_file,
    row_place,
    shard_file,
    shard_names,
    shard_number,
    split_folder,
)
from sparsekd.logit_store.protocol.message import (
    decode_row,
    largest_message,
    read_batch,
    row_message,
    shard_footer,
    shard_header,
)
from sparsekd.logit_store.row import Row, planes_of_row

LOOKS = 3
SECONDS_BETWEEN_LOOKS = 0.5
"""At a remote file that seems unsound, before it is put in quarantine."""

RowsOf = Callable[[str, int], Sequence[Row]]
"""Gives the rows of (split, shard), of which only the text counts; none where the plan has no such shard."""


def quarantine(path: StorePath, file: StorePath, split: str) -> StorePath:
    """Moves a file to `quarantine/SPLIT`, over nothing; returns its place."""
    folder = path / QUARANTINE_NAME / split if split else path / QUARANTINE_NAME
    return _under_a_free_name(folder, file.name, partial(move, file))


def in_quarantine(path: StorePath) -> list[str]:
    """Returns the names, relative to the store, of what lies in quarantine."""
    return [f"{QUARANTINE_NAME}/{name}" for name in files_below(path / QUARANTINE_NAME)]


def keep_copy(path: StorePath, file: StorePath) -> StorePath:
    """Copies a file that is about to be replaced to `quarantine`, over nothing; returns the copy's place.

    A copy that is there already is not made again.
    """
    with explained(file):
        data = read_file(file)
    return _under_a_free_name(path / QUARANTINE_NAME, file.name, lambda target: publish_bytes(target, data))


def _under_a_free_name(folder: StorePath, name: str, put: Callable[[StorePath], object]) -> StorePath:
    """Puts a file into a folder, which is made, under its name with the first number that is free."""
    make_folder(folder)
    for number in itertools.count():
        target = folder / (f"{name}.{number}" if number else name)
        try:
            put(target)
        except (FileExistsError, NameTakenError):
            continue
        return target
    raise AssertionError("unreachable")


def is_same_text(left: Row, right: Row, manifest: Manifest) -> bool:
    """Returns whether two rows are of the same tokens, losses and documents, whatever a teacher said."""
    one, other = planes_of_row(left), planes_of_row(right)
    return all(np.array_equal(one[name], other[name]) for name in text_planes(manifest))


def record_of_file(
    path: StorePath, manifest: Manifest, split: str, shard: int, text: Sequence[Row] | None = None
) -> CommitRecord:
    """Returns the commit record of a shard's file, made from the file alone.

    Every row is checked as a reader checks it, and the file must be, to the byte, what its planes make:
    header, batches, footer.

    Args:
        path: of the store.
        manifest: of that store.
        split: name of the row space.
        shard: number of the shard in it.
        text: the rows that it must be about, whatever their teacher; None takes any.

    Raises:
        DamagedStoreError: it is not, or the file is another shard's or another store's, or of another text.
        StoreError: it cannot be read, or a row breaks a rule.
    """
    place = shard_file(path, split, shard)
    header = shard_header(manifest, split, shard)
    with explained(place):
        size = size_of(place)
        if size > len(header) + (manifest.rows_per_shard + 1) * largest_message(manifest):
            raise DamagedStoreError(f"{place} has {size:,} bytes, more than a shard can have: {REMEDY}.")
        data = read_range(place, 0, size)
    if not data.startswith(header):
        raise DamagedStoreError(f"{place} does not begin as this shard of this store must: {REMEDY}.")
    planes = names_of(planes_of(manifest))
    first = shard * manifest.rows_per_shard
    view = memoryview(data)
    # Numbers alone are kept: all decoded rows of a shard are many times its file.
    counts: list[RowCounts] = []
    batches: list[tuple[int, int]] = []
    crc32s: list[int] = []
    plane_bytes = dict.fromkeys(planes, 0)
    offset = len(header)
    while len(counts) < manifest.rows_per_shard and not is_end(view[offset:]):
        index = first + len(counts)
        where = row_place(path, split, index, manifest.rows_per_shard)
        try:
            message = view[offset : offset + message_length(view[offset:], len(planes))]
            _, _, stored = read_batch(message, planes)
        except ValueError as error:
            raise DamagedStoreError(f"{where}: its batch cannot be read ({error}): {REMEDY}.") from error
        row = decode_row(message, manifest, split, index, where)
        here = None if text is None else text[len(counts) : len(counts) + 1]
        if here is not None and not (here and is_same_text(row, here[0], manifest)):
            raise DamagedStoreError(f"{where} holds another text than is written here: {REMEDY}.")
        # From the planes alone, so that not a byte around them is taken over; with their checksums, so that a
        # plane which differs from its own makes another batch.
        if row_message(index, list(stored.values())) != message:
            raise DamagedStoreError(f"{where}: its batch is not the one that its planes make; {REMEDY}.")
        counts.append(count_rows([row]))
        batches.append((offset, len(message)))
        crc32s.append(zlib.crc32(message))
        for name, plane in stored.items():
            plane_bytes[name] += len(plane)
        offset += len(message)
    if not counts or view[offset:] != shard_footer(manifest, split, shard, batches):
        raise DamagedStoreError(f"{place} does not end as its {len(counts)} rows make it end: {REMEDY}.")
    if text is not None and len(counts) != len(text):
        raise DamagedStoreError(f"{place} has {len(counts)} rows, expected {len(text)}: {REMEDY}.")
    offsets, lengths = zip(*batches, strict=True)
    return CommitRecord(
        split=split,
        shard=shard,
        manifest_sha256=manifest_digest(manifest),
        file_sha256=hashlib.sha256(data).hexdigest(),
        file_bytes=len(data),
        offsets=np.array(offsets, np.int64),
        lengths=np.array(lengths, np.int64),
        crc32=np.array(crc32s, np.uint32),
        counted=np.array([part.tokens_counted for part in counts], np.int64),
        counts=sum_of_counts(counts),
        plane_bytes=plane_bytes,
    )


def adopt_shard(
    path: StorePath, manifest: Manifest, split: str, shard: int, text: Sequence[Row] | None = None
) -> bool:
    """Commits a shard's file that has no commit record, or puts it in quarantine where it is not sound.

    May be called while the file's own writer is still alive: both write the same record.

    Takes what `record_of_file` takes, and returns whether the shard is committed now.
    """
    place, commit = shard_file(path, split, shard), commit_file(path, split, shard)
    # Where uploads replace one another, a file that is read meanwhile is half of each.
    for _ in range(1 if is_exclusive(place) else LOOKS):
        try:
            record = record_of_file(path, manifest, split, shard, text)
        except StoreError:
            if exists(commit):
                return True
            if not exists(place):
                return False
            time.sleep(0 if is_exclusive(place) else SECONDS_BETWEEN_LOOKS)
            continue
        with contextlib.suppress(NameTakenError):  # by another writer, which looks that the two fit
            publish_bytes(commit, signed_json(commit_to_content(record)))
        return True
    quarantine(path, place, split)
    return False


def adopt_orphans(path: StorePath, manifest: Manifest, text_of: RowsOf | None = None) -> tuple[int, int]:
    """Adopts every shard file of an unsealed store that has no commit record.

    Args:
        path: of the store.
        manifest: of that store.
        text_of: gives the rows that a shard must be about; None takes any.

    Returns:
        (files adopted, files put in quarantine).
    """
    adopted = refused = 0
    for split in manifest.splits:
        names = set(files_below(split_folder(path, split)))
        for shard in sorted({number for name in names if (number := shard_number(name)) is not None}):
            file, record = shard_names(shard)
            if file not in names or record in names:
                continue
            # Asked for outside of the check: what is wrong with the text says nothing about the shard.
            text = None if text_of is None else text_of(split, shard)
            if adopt_shard(path, manifest, split, shard, text):
                adopted += 1
            else:
                refused += 1
    return adopted, refused
