"""Verifying a store: every byte of every file, every row's rules, and whether records fit their tokens."""

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.manifest import MANIFEST_NAME
from sparsekd.logit_store.places.files import (
    TEMPORARY_PREFIX,
    exists,
    explained,
    files_below,
    read_range,
    sha256_of,
    size_of,
)
from sparsekd.logit_store.places.paths import StorePath, store_path
from sparsekd.logit_store.places.tokenizer_folder import require_tokenizer
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.positions import recorded_positions, rule_of_split
from sparsekd.logit_store.projections import projected, projection_name, projection_of
from sparsekd.logit_store.protocol.commit import CommitRecord, RowCounts, count_rows, sum_of_counts
from sparsekd.logit_store.protocol.layout import (
    INDEX_FOLDER,
    INDEX_NAME,
    QUARANTINE_NAME,
    REMEDY,
    TOKENIZER_NAME,
    WORK_NAME,
    row_place,
    shard_file,
    shard_number,
    table_file,
)
from sparsekd.logit_store.protocol.message import (
    decode_row,
    read_batch,
    shard_footer,
    shard_header,
)
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.recover import in_quarantine
from sparsekd.logit_store.tools.alignment import Alignment, AlignmentCheck
from sparsekd.logit_store.tools.derive import Progress, no_progress, shards_of
from sparsekd.logit_store.tools.processes import results_of

PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class VerifyResult:
    """What `verify_store` found.

    Attributes:
        path: of the store.
        digest: of the store, None when its index cannot be read.
        rows: that were read and decoded.
        shards: that were read.
        bytes_read: of the Arrow files.
        problems: one sentence each; empty in a sound store.
        damaged: (split, shard) of each shard with a problem.
        strangers: files that do not belong to the store; harmless.
        quarantined: files of shards that were replaced; harmless, and never removed.
        alignment: None without a teacher, or when no row could be read.
    """

    path: StorePath
    digest: str | None
    rows: int
    shards: int
    bytes_read: int
    problems: tuple[str, ...]
    damaged: tuple[tuple[str, int], ...]
    strangers: tuple[str, ...]
    quarantined: tuple[str, ...]
    alignment: AlignmentCheck | None

    @property
    def ok(self) -> bool:
        """Returns whether the store can be trained on."""
        return not self.problems and (self.alignment is None or self.alignment.verdict != "misaligned")

    def text(self) -> str:
        """Returns a page for people."""
        lines = [
            f"store      {self.path}",
            f"digest     {self.digest or 'unknown'}",
            f"read       {self.rows:,} rows in {self.shards:,} shards, {self.bytes_read:,} bytes",
        ]
        if self.problems:
            lines.append(f"integrity  DAMAGED: {len(self.problems):,} problems")
            lines += [f"  - {problem}" for problem in self.problems[:PROBLEMS_SHOWN]]
            if len(self.problems) > PROBLEMS_SHOWN:
                lines.append(f"  - and {len(self.problems) - PROBLEMS_SHOWN:,} more")
        else:
            lines.append("integrity  sound: every byte is as it was written, every row keeps the rules")
        if self.strangers:
            lines.append(
                f"strangers  {len(self.strangers)} files are not part of it: {', '.join(self.strangers[:5])}"
            )
        if self.quarantined:
            lines.append(
                f"quarantine {len(self.quarantined)} files of replaced shards: "
                f"{', '.join(self.quarantined[:5])}"
            )
        if self.alignment is not None:
            lines.append("alignment  " + self.alignment.text().replace("\n", "\n           "))
        lines.append(f"verdict    {'sound' if self.ok else 'NOT SOUND'}")
        return "\n".join(lines) + "\n"


@dataclass
class _Finding:
    """What is found in one shard.

    Attributes:
        problems: one sentence each.
        rows: that are sound.
        file_bytes: of the Arrow file.
        counts: over the rows; None where one is unsound.
        plane_bytes: stored bytes of each plane.
        alignment: of the sound rows.
    """

    problems: list[str] = field(default_factory=list)
    rows: int = 0
    file_bytes: int = 0
    counts: RowCounts | None = None
    plane_bytes: Counter[str] = field(default_factory=Counter)
    alignment: Alignment = field(default_factory=Alignment)


class _Sums:
    """What a split's sound shards have together."""

    def __init__(self) -> None:
        self.counts: list[RowCounts] = []  # none, or the sums so far
        self.plane_bytes: Counter[str] = Counter()
        self.file_bytes = 0

    def add(self, shard: _Finding) -> None:
        assert shard.counts is not None
        self.counts = [sum_of_counts([*self.counts, shard.counts])]
        self.plane_bytes.update(shard.plane_bytes)
        self.file_bytes += shard.file_bytes

    def contradictions(self, store: LogitStore, split: str) -> list[str]:
        """Says where the index has other sums."""
        index = store.index(split)
        found = {
            "counts": [index.counts] == self.counts,
            "plane_bytes": index.plane_bytes == self.plane_bytes,
            "file_bytes": index.file_bytes == self.file_bytes,
        }
        where = f"{store.path / INDEX_NAME}, {split} has other"
        return [
            f"{where} {name} than its commit records together: restore it from a copy."
            for name, is_right in found.items()
            if not is_right
        ]


def verify_store(path: str | StorePath, *, jobs: int = 1, progress: Progress = no_progress) -> VerifyResult:
    """Reads a whole store and reports everything that is wrong with it.

    Every file is compared with its digest; every row is decoded and checked; the true tokens are looked for
    in the records, aligned and shifted by one.

    Args:
        path: of a sealed store.
        jobs: processes that read shards.
        progress: told after each shard.

    Raises:
        StoreError: there is no store, it is not sealed, or it is of a newer format. Damage does not raise.
    """
    path = store_path(path)
    try:
        store = open_store(path, whole_tables=False)
    except StoreError as error:
        if not (exists(path / MANIFEST_NAME) and exists(path / INDEX_NAME)):
            raise
        return VerifyResult(path, None, 0, 0, 0, (str(error),), (), (), (), None)
    problems: list[str] = []
    damaged: list[tuple[str, int]] = []
    alignment = Alignment()
    sums = {split: _Sums() for split in store.manifest.splits}
    rows = bytes_read = 0
    with _noted(problems):
        require_tokenizer(path / TOKENIZER_NAME, store.manifest.tokenizer.digest)
    for spec in projected(store.manifest):
        with _noted(problems):
            projection_of(path, spec)
    # The table first: it says whether there are as many shards as the index claims.
    readable = [split for split in store.manifest.splits if _table_is_sound(store, split, problems)]
    shards = sum(map(store.shards, readable))
    findings = results_of(
        partial(_verify_shard, store), shards_of(store, readable), jobs, what=f"verifying {path}"
    )
    for done, ((split, shard), finding) in enumerate(
        zip(shards_of(store, readable), findings, strict=True), start=1
    ):
        if finding.problems:
            problems += finding.problems
            damaged.append((split, shard))
        else:
            sums[split].add(finding)
        alignment.include(finding.alignment)
        rows, bytes_read = rows + finding.rows, bytes_read + finding.file_bytes
        progress("shards", done, shards)
    broken = {name for name, _ in damaged}
    for name in readable:
        if store.rows(name) and name not in broken:
            problems += sums[name].contradictions(store, name)
    strangers: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()
    with _noted(problems):
        strangers, quarantined = _strangers(store), tuple(in_quarantine(path))
    return VerifyResult(
        path=path,
        digest=store.digest,
        rows=rows,
        shards=shards,
        bytes_read=bytes_read,
        problems=tuple(problems),
        damaged=tuple(damaged),
        strangers=strangers,
        quarantined=quarantined,
        alignment=alignment.result() if store.manifest.teacher is not None else None,
    )


@contextlib.contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Turns what is wrong with a store into a problem of it: damage does not raise."""
    try:
        yield
    except StoreError as error:
        problems.append(str(error))


def _table_is_sound(store: LogitStore, split: str, problems: list[str]) -> bool:
    """Returns whether a split's table of rows is the one that was sealed; notes where it is not."""
    index = store.index(split)
    if not index.rows:
        return True
    place = table_file(store.path, split, index.table_sha256)
    try:
        with explained(place):
            # The length first: it must not have others believe in rows that are not there.
            if size_of(place) == index.table_bytes and sha256_of(place) == index.table_sha256:
                return True
        problems.append(
            f"{place} is not the table of rows that was sealed: restore it from a copy, or remove it and "
            f"{INDEX_NAME} and run the command that writes the store again, which seals it."
        )
    except StoreError as error:
        problems.append(str(error))
    return False


def _verify_shard(store: LogitStore, shard_place: tuple[str, int]) -> _Finding:
    """Checks one shard."""
    split, shard = shard_place
    found = _Finding()
    place = shard_file(store.path, split, shard)
    manifest, planes = store.manifest, names_of(planes_of(store.manifest))
    try:
        if not exists(place):
            found.problems.append(f"{place} is missing: {REMEDY}.")
            return found
        record = store.commit(split, shard)
        with explained(place):
            size = size_of(place)
            digest = sha256_of(place)
        frame = _wrong_frame(store, record)
    except StoreError as error:
        found.problems.append(str(error))
        return found
    found.file_bytes = size
    sound: list[RowCounts] = []  # of each row that is; all decoded rows of a shard would fill the memory
    for index in store.shard_rows(split, shard):
        where = row_place(store.path, split, index, manifest.rows_per_shard)
        try:
            message = store.read_message(split, index)
            row = decode_row(message, manifest, split, index, where)
            _, crc32, stored = read_batch(message, planes)
            for expected, (plane, data) in zip(crc32, stored.items(), strict=True):
                if zlib.crc32(data) != expected:
                    raise DamagedStoreError(f"{where}, plane {plane}: its own checksum differs; {REMEDY}.")
                found.plane_bytes[plane] += len(data)
        except StoreError as error:
            found.problems.append(str(error))
            continue
        if (
            row.recorded is not None
            and rule_of_split(manifest, split) == "sampled"
            and not np.array_equal(row.recorded, recorded_positions(row, manifest, split))
        ):
            found.problems.append(
                f"{where}: records stand at other positions than the text and the seed choose, so that the "
                f"loss would weigh them wrongly; {REMEDY}."
            )
            continue
        sound.append(count_rows([row]))
        if manifest.teacher is not None:
            found.alignment.add(row, manifest)
    found.rows = len(sound)
    if not found.problems:
        found.counts = sum_of_counts(sound)
        counted = [row.tokens_counted for row in sound]
        is_file = digest == record.file_sha256 and size == record.file_bytes
        found.problems = [
            *_contradictions(store, record, found, counted),
            *_file_problems(place, record, frame, size, is_file),
        ]
    return found


def _contradictions(
    store: LogitStore, record: CommitRecord, found: _Finding, counted: list[int]
) -> Iterator[str]:
    """Says where a shard's sound rows are not what its commit record and the index say of them."""
    place = shard_file(store.path, record.split, record.shard)
    if found.counts != record.counts or counted != record.counted.tolist():
        yield f"{place} holds other numbers of tokens than its commit record says."
    if not store.entries_fit(record.split, record):
        yield (f"{place}: the index's table has other entries for its rows than its commit record; {REMEDY}.")
    if found.plane_bytes != record.plane_bytes:
        yield f"{place} holds planes of other lengths than its commit record says."


def _file_problems(
    place: StorePath, record: CommitRecord, frame: str, size: int, is_file: bool
) -> Iterator[str]:
    """Says what is wrong with a shard's file, whose rows are sound."""
    if not is_file:
        part = f", in its {frame}" if frame else ""
        yield (
            f"{place} ({size:,} bytes) is not the file that was written ({record.file_bytes:,} "
            f"bytes){part}; its rows are sound; {REMEDY}."
        )
    elif frame:
        yield (
            f"{place} is the file of its commit record, but its {frame} is not what the manifest and the "
            f"rows make it, and misleads other programs: {REMEDY}."
        )


def _wrong_frame(store: LogitStore, record: CommitRecord) -> str:
    """Returns which part of a shard's file around its batches is not what it must be, if any."""
    place = shard_file(store.path, record.split, record.shard)
    header = shard_header(store.manifest, record.split, record.shard)
    batches = list(zip(record.offsets.tolist(), record.lengths.tolist(), strict=True))
    footer = shard_footer(store.manifest, record.split, record.shard, batches)
    end = sum(batches[-1])
    with explained(place):
        # One byte more than there must be, for a file that goes on.
        if read_range(place, 0, len(header)) != header or batches[0][0] != len(header):
            return "header"
        return "" if read_range(place, end, len(footer) + 1) == footer else "footer"


def _strangers(store: LogitStore) -> tuple[str, ...]:
    """Returns the files below the store's folder that it does not know."""
    known = {MANIFEST_NAME, INDEX_NAME, *map(projection_name, projected(store.manifest))}
    for split in store.manifest.splits:
        known.add(f"{INDEX_FOLDER}/{table_file(store.path, split, store.index(split).table_sha256).name}")
    # Files below tokenizer/ are covered by its digest: there, whatever is too much is a problem.
    covered = (f"{TOKENIZER_NAME}/", f"{QUARANTINE_NAME}/")
    found = []
    for name in files_below(store.path):
        is_left = name.rpartition("/")[2].startswith(TEMPORARY_PREFIX) or name.startswith(f"{WORK_NAME}/")
        is_known = name in known or name.startswith(covered) or _is_shard(store, name)
        if is_left or not is_known:
            found.append(name + " (left by a killed writer)" * is_left)
    return tuple(found)


def _is_shard(store: LogitStore, name: str) -> bool:
    """Returns whether a name is one that a shard of the store has."""
    folder, _, rest = name.partition("/")
    split, _, rest = rest.partition("/")
    number = shard_number(rest)
    if folder != "shards" or split not in store.manifest.splits or number is None:
        return False
    return number < store.shards(split)
