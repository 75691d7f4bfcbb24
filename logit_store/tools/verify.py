"""Verifying a store: every byte of every file, every row's rules, and whether records fit their tokens.

Shapes: L positions of a row, k head entries, n draws, K = k + n stored ids.
"""

import contextlib
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.manifest import MANIFEST_NAME, Manifest
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
from sparsekd.logit_store.projections import projected, projection_name, read_projection
from sparsekd.logit_store.protocol.commit import CommitRecord, RowCounts, count_rows, sum_of_counts
from sparsekd.logit_store.protocol.layout import (
    INDEX_FOLDER,
    INDEX_NAME,
    QUARANTINE_NAME,
    REMEDY,
    TOKENIZER_NAME,
    row_place,
    shard_file,
    shard_names,
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
from sparsekd.logit_store.row import (
    IGNORED_LABEL,
    NO_ID,
    PADDING_DOCUMENT,
    RECORD_NAMES,
    Row,
    TeacherRecord,
    document_of_position,
    labels_at_records,
)

PROBLEMS_SHOWN = 20

MIN_POSITIONS = 100
"""Fewer say nothing about alignment."""

LOGPROB_TOLERANCE = 0.05
"""Nats by which a true token's log-probability may differ between its two planes, beyond the errors that the
codec states; a shift makes it nats."""

INCONSISTENT_SHARE = 0.01
"""Share of positions beyond that tolerance that raises the alarm."""

BLOCK_RECORDS = 4096
"""Records that are compared at once, which bounds the arrays that it takes."""

STANDARD_ERRORS = 3.0
"""Distance of two shares that counts as a difference."""


@dataclass(frozen=True)
class AlignmentCheck:
    """Do the records speak of the tokens that follow them? Compared with the same records moved by one.

    Attributes:
        positions: compared; those with a record whose two neighbours are in the same document (for targets
            other than the next token: whose neighbouring records have labels).
        found: share of positions whose true token is among the stored ids.
        found_late: that share if the records stood one position too late (they would fit the token itself).
        found_early: that share if they stood one position too early (they would fit the token after next).
        mean_logprob: mean log-probability, in nats, of the true tokens that are in the head; NaN if none is.
        mean_logprob_shifted: the larger of the means that the two shifted copies give for head entries.
        inconsistent: share of positions where the true token's own plane contradicts the head.
    """

    positions: int
    found: float
    found_late: float
    found_early: float
    mean_logprob: float
    mean_logprob_shifted: float
    inconsistent: float

    @property
    def verdict(self) -> str:
        """Returns `aligned`, `misaligned`, or `undecided` where the numbers do not tell."""
        if self.positions < MIN_POSITIONS:
            return "undecided"
        shifted = max(self.found_late, self.found_early)
        variance = self.found * (1 - self.found) + shifted * (1 - shifted)
        margin = STANDARD_ERRORS * math.sqrt(variance / self.positions)
        if self.inconsistent > INCONSISTENT_SHARE or shifted > self.found + margin:
            return "misaligned"
        return "aligned" if self.found > shifted + margin else "undecided"

    def text(self) -> str:
        """Returns the finding in words."""
        meaning = {
            "aligned": "the records describe the tokens that follow them",
            "misaligned": "the records do NOT describe the tokens that follow them; do not train on them",
            "undecided": "too few positions, or too weak a teacher, to tell from the ids",
        }[self.verdict]
        return "\n".join(
            [
                f"{self.verdict}: {meaning} ({self.positions:,} positions)",
                f"  true token among the stored ids   {self.found:7.2%}",
                f"  the same, records one late        {self.found_late:7.2%}",
                f"  the same, records one early       {self.found_early:7.2%}",
                f"  its mean log-probability          {self.mean_logprob:7.3f} nats in the head "
                f"({self.mean_logprob_shifted:.3f} shifted)",
                f"  its own plane contradicts         {self.inconsistent:7.2%}",
            ]
        )


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


class _Alignment:
    """Sums over rows for `AlignmentCheck`."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.positions = 0
        self.inconsistent = 0
        self.found = np.zeros(3, np.int64)  # aligned, late, early
        self.in_head = np.zeros(3, np.int64)
        self.logprob = np.zeros(3)

    def add(self, row: Row) -> None:
        """Adds a row that has a teacher record."""
        assert row.teacher is not None
        here, labels = _neighbouring_labels(row, self._manifest.target)
        self.positions += len(here)
        for start in range(0, len(here), BLOCK_RECORDS):
            block = slice(start, start + BLOCK_RECORDS)
            some = here[block]
            record = TeacherRecord(**{name: getattr(row.teacher, name)[some] for name in RECORD_NAMES})
            self._add_records(record, [which[block] for which in labels])

    def _add_records(self, record: TeacherRecord, tokens: Sequence[NDArray[np.int64]]) -> None:
        """Adds records [M]; `tokens` are the labels that fit them as they stand, one late, one early, [M]."""
        head, tail, values = record.head_ids, record.tail_ids, record.head_logprobs
        for which, labels in enumerate(tokens):
            token = labels[:, None]
            is_head = head == token
            in_head = is_head.any(axis=1)
            self.found[which] += int((in_head | (tail == token).any(axis=1)).sum())
            self.in_head[which] += int(in_head.sum())
            stored = np.where(is_head, values, 0).sum(axis=1, dtype=np.float64)
            self.logprob[which] += float(stored[in_head].sum())
            if which == 0:
                true = record.true_logprob
                # A true token outside the head is at most as likely as the head's last entry.
                last = np.where(head == NO_ID, 0, values).min(axis=1, initial=0)
                errors = codec_of(self._manifest).errors(record, self._manifest)
                # A store without a head has no such errors.
                of_head = errors.get("head_logprobs", values)
                # No bound for an entry that was stored as -inf; it must not reach the others of its position.
                of_true = np.where(is_head, of_head, 0).sum(axis=1)
                slack = np.where(in_head, of_true, of_head.max(axis=1, initial=0))
                slack += errors["true_logprob"] + LOGPROB_TOLERANCE
                wrong = np.where(in_head, np.abs(true - stored), true - last) > slack
                self.inconsistent += int(wrong.sum())

    def result(self) -> AlignmentCheck | None:
        if not self.positions:
            return None
        means = [
            float(total / count) if count else math.nan
            for total, count in zip(self.logprob, self.in_head, strict=True)
        ]
        found = self.found / self.positions
        return AlignmentCheck(
            positions=self.positions,
            found=float(found[0]),
            found_late=float(found[1]),
            found_early=float(found[2]),
            mean_logprob=means[0],
            mean_logprob_shifted=max(means[1], means[2]),
            inconsistent=self.inconsistent / self.positions,
        )


class _Sums:
    """What the commit records of a split's shards say together."""

    def __init__(self) -> None:
        self.counts: list[RowCounts] = []  # none, or the sums so far
        self.plane_bytes: Counter[str] = Counter()
        self.file_bytes = 0

    def add(self, record: CommitRecord) -> None:
        self.counts = [sum_of_counts([*self.counts, record.counts])]
        self.plane_bytes.update(record.plane_bytes)
        self.file_bytes += record.file_bytes

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


def _neighbouring_labels(
    row: Row, target: str
) -> tuple[NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Returns which records are compared, and the labels that fit them as they stand, one late, one early.

    For `next_token` a record that stands a position late would fit the token itself, one that stands early
    the token after next; all three are in one document. Other targets have labels at records alone: there it
    is the labels of the neighbouring records.
    """
    assert row.recorded is not None
    if target == "next_token":
        documents, length = document_of_position(row), len(row.token_ids)
        places = np.flatnonzero(row.recorded)
        ahead = np.minimum(places + 2, length - 1)
        same = (documents[places] == documents[ahead]) & (documents[places] != PADDING_DOCUMENT)
        here = np.flatnonzero(same & (places + 2 < length))
        at = places[here]
        tokens = row.token_ids.astype(np.int64)
        return here, (tokens[at + 1], tokens[at], tokens[at + 2])
    labels = labels_at_records(row, target)
    inner = np.arange(1, max(len(labels) - 1, 1))
    known = labels != IGNORED_LABEL
    here = inner[known[inner - 1] & known[inner] & known[inner + 1]] if len(labels) > 2 else inner[:0]
    return here, (labels[here], labels[here - 1], labels[here + 1])


def verify_store(
    path: str | StorePath, *, progress: Callable[[int, int], None] | None = None
) -> VerifyResult:
    """Reads a whole store and reports everything that is wrong with it.

    Every file is compared with its digest; every row is decoded and checked; the true tokens are looked for
    in the records, aligned and shifted by one.

    Args:
        path: of a sealed store.
        progress: called with (shards done, shards in all) after each.

    Raises:
        StoreError: there is no store, it is not sealed, or it is of a newer format. Damage does not raise.
    """
    path = store_path(path)
    try:
        store = open_store(path)
    except StoreError as error:
        if not (exists(path / MANIFEST_NAME) and exists(path / INDEX_NAME)):
            raise
        return VerifyResult(path, None, 0, 0, 0, (str(error),), (), (), (), None)
    problems: list[str] = []
    damaged: list[tuple[str, int]] = []
    alignment = _Alignment(store.manifest)
    sums = {split: _Sums() for split in store.manifest.splits}
    rows = bytes_read = done = 0
    places = [(split, shard) for split in store.manifest.splits for shard in range(store.shards(split))]
    with _noted(problems):
        require_tokenizer(path / TOKENIZER_NAME, store.manifest.tokenizer.digest)
    for spec in projected(store.manifest):
        with _noted(problems):
            read_projection(path, spec)
    unreadable = {split for split in store.manifest.splits if not _table_is_sound(store, split, problems)}
    for split, shard in places:
        if split in unreadable:
            continue
        before = len(problems)
        good, size = _verify_shard(store, split, shard, alignment, problems)
        if len(problems) > before:
            damaged.append((split, shard))
        else:
            sums[split].add(store.commit(split, shard))
        rows, bytes_read, done = rows + good, bytes_read + size, done + 1
        if progress is not None:
            progress(done, len(places))
    for split in {split for split, _ in places} - {split for split, _ in damaged} - unreadable:
        problems += sums[split].contradictions(store, split)
    strangers: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()
    with _noted(problems):
        strangers, quarantined = _strangers(store), tuple(in_quarantine(path))
    return VerifyResult(
        path=path,
        digest=store.digest,
        rows=rows,
        shards=len(places),
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
            if sha256_of(place) == index.table_sha256:
                return True
        problems.append(
            f"{place} is not the table of rows that was sealed: restore it from a copy, or remove it and "
            f"{INDEX_NAME} and run the command that writes the store again, which seals it."
        )
    except StoreError as error:
        problems.append(str(error))
    return False


def _verify_shard(
    store: LogitStore, split: str, shard: int, alignment: _Alignment, problems: list[str]
) -> tuple[int, int]:
    """Checks one shard; returns (rows that are sound, bytes of its file)."""
    place = shard_file(store.path, split, shard)
    manifest, planes = store.manifest, names_of(planes_of(store.manifest))
    try:
        if not exists(place):
            problems.append(f"{place} is missing: {REMEDY}.")
            return 0, 0
        record = store.commit(split, shard)
        with explained(place):
            size = size_of(place)
            digest = sha256_of(place)
        frame = _wrong_frame(store, record)
    except StoreError as error:
        problems.append(str(error))
        return 0, 0
    before = len(problems)
    sound: list[RowCounts] = []  # of each row that is; all decoded rows of a shard would fill the memory
    plane_bytes = dict.fromkeys(planes, 0)
    for index in store.shard_rows(split, shard):
        where = row_place(store.path, split, index, manifest.rows_per_shard)
        try:
            message = store.read_message(split, index)
            row = decode_row(message, manifest, split, index, where)
            _, crc32, found = read_batch(message, planes)
            for expected, (plane, stored) in zip(crc32, found.items(), strict=True):
                if zlib.crc32(stored) != expected:
                    raise DamagedStoreError(f"{where}, plane {plane}: its own checksum differs; {REMEDY}.")
                plane_bytes[plane] += len(stored)
        except StoreError as error:
            problems.append(str(error))
            continue
        if (
            row.recorded is not None
            and rule_of_split(manifest, split) == "sampled"
            and not np.array_equal(row.recorded, recorded_positions(row, manifest, split))
        ):
            problems.append(
                f"{where}: records stand at other positions than the text and the seed choose, so that the "
                f"loss would weigh them wrongly; {REMEDY}."
            )
            continue
        sound.append(count_rows([row]))
        if manifest.teacher is not None:
            alignment.add(row)
    if len(problems) > before:
        return len(sound), size
    if (
        sum_of_counts(sound) != record.counts
        or [row.tokens_counted for row in sound] != record.counted.tolist()
    ):
        problems.append(f"{place} holds other numbers of tokens than its commit record says.")
    if not store.entries_fit(split, record):
        problems.append(
            f"{place}: the index's table has other entries for its rows than its commit record; {REMEDY}."
        )
    if plane_bytes != record.plane_bytes:
        problems.append(f"{place} holds planes of other lengths than its commit record says.")
    if digest != record.file_sha256:
        part = f", in its {frame}" if frame else ""
        problems.append(
            f"{place} ({size:,} bytes) is not the file that was written ({record.file_bytes:,} "
            f"bytes){part}; its "
            f"rows are sound; {REMEDY}."
        )
    elif frame:
        problems.append(
            f"{place} is the file of its commit record, but its {frame} is not what the manifest and the "
            f"rows make it, and misleads other programs: {REMEDY}."
        )
    return len(sound), size


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
        for shard in range(store.shards(split)):
            known |= {f"shards/{split}/{name}" for name in shard_names(shard)}
    # Files below tokenizer/ are covered by its digest: there, whatever is too much is a problem.
    covered = (f"{TOKENIZER_NAME}/", f"{QUARANTINE_NAME}/")
    found = []
    for name in files_below(store.path):
        is_temporary = name.rpartition("/")[2].startswith(TEMPORARY_PREFIX)
        if is_temporary or (name not in known and not name.startswith(covered)):
            found.append(name + " (left by a killed writer)" * is_temporary)
    return tuple(found)
