"""What a store's records are like: how much mass is in the rest, how sure the teacher was, what a token
costs.

Only positions that the loss counts and that have a record are looked at.

Shapes: M recorded positions of a row, k head entries, n draws, G grid temperatures, K = k + n stored ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.planes import planes_of
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import NO_ID, Row, labels_at_records
from sparsekd.logit_store.spacing import evenly
from sparsekd.logit_store.tools.derive import Progress, no_progress
from sparsekd.logit_store.tools.inspect import REST_NOTES, plane_table, section, table, tail_masses
from sparsekd.logit_store.tools.processes import results_of
from sparsekd.logit_store.tools.spread import Spread

PERCENTILES = (1.0, 10.0, 50.0, 90.0, 99.0)

ROWS_AT_A_TIME = 16
"""Rows that one process reads before it tells what it has found."""


@dataclass(frozen=True)
class SplitStats:
    """The records of one split.

    Attributes:
        rows: that were read.
        positions: that were counted.
        tail_mass: of the rest, at each temperature of the grid.
        entropy: of the teacher at the draw temperature, nats.
        rest_entropy: of the rest at temperature 1, nats.
        teacher_nll: of the true tokens, nats.
        overlap: share of a position's stored ids (head and draws) that the position before it stores too,
            where both are in one document: what text is predictable from its neighbour, and what a codec
            could save.
        true_in_head: share of positions whose true token is in the head.
        true_stored: share of positions whose true token is in head or draws.
        features: by plane of hidden states, (root mean square of its numbers, that of the rounding of their
            codec, at most): what was left of a projection, `kept`, stands in the manifest.
    """

    rows: int
    positions: int
    tail_mass: tuple[Spread, ...]
    entropy: Spread
    rest_entropy: Spread
    teacher_nll: Spread
    overlap: Spread
    true_in_head: float
    true_stored: float
    features: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class StoreStats:
    """What `store_stats` found.

    Attributes:
        store: that was read.
        splits: of each split that has rows; empty for a token store, which says nothing of a teacher.
    """

    store: LogitStore
    splits: dict[str, SplitStats]

    def text(self) -> str:
        """Returns a page for people."""
        record = self.store.manifest.record
        parts = [f"store  {self.store.path}\ndigest {self.store.digest}"]
        for split, stats in self.splits.items():
            quantities = [
                (f"tail mass at T = {temperature:g}", spread)
                for temperature, spread in zip(record.temperatures, stats.tail_mass, strict=True)
            ]
            quantities += [
                (f"entropy at T = {record.draw_temperature:g} (nats)", stats.entropy),
                ("entropy of the rest (nats)", stats.rest_entropy),
                ("teacher's loss (nats)", stats.teacher_nll),
                ("support overlap", stats.overlap),
            ]
            header = [split, "mean", *(f"p{percent:g}" for percent in PERCENTILES), "largest"]
            lines = [[name, *cells(spread)] for name, spread in quantities if spread.count]
            notes = [
                f"{name}: root mean square {size:.4g}, rounded by up to {error / max(size, 1e-30):.2%}"
                for name, (size, error) in stats.features.items()
            ]
            if record.k:
                notes.append(f"true token in the head: {stats.true_in_head:.2%}")
            if record.n:
                notes.append(f"true token in head or draws: {stats.true_stored:.2%}")
            if stats.teacher_nll.infinite:
                notes.append(
                    f"true tokens of probability 0, left out of the mean: {stats.teacher_nll.infinite:,}"
                )
            if REST_NOTES[record.rest]:
                notes.append(
                    REST_NOTES[record.rest] + ("; so is the loss" if record.rest == "derived" else "")
                )
            title = f"{stats.positions:,} counted positions with a record, of {stats.rows:,} rows"
            parts.append(section(title, [*table(header, lines), *notes]))
        if not self.splits:
            parts.append("A token store: there is no teacher's record to describe.")
        parts.append(plane_table(self.store))
        return "\n\n".join(parts) + "\n"


def store_stats(
    path: StorePath,
    *,
    split: str | None = None,
    rows: int | None = None,
    jobs: int = 1,
    progress: Progress = no_progress,
) -> StoreStats:
    """Reads a store's rows and describes their records.

    Args:
        path: of a sealed store.
        split: look at this one only.
        rows: rows of each split to read, spread evenly; None for all.
        jobs: processes that read rows.
        progress: told of rows.

    Raises:
        StoreError: there is no readable store, or no such split.
    """
    store = open_store(path)
    if split is not None:
        store.index(split)
    if rows is not None and rows < 1:
        raise StoreError(f"rows is {rows}, expected at least 1.")
    if store.manifest.teacher is None:
        return StoreStats(store, {})
    names = [split] if split is not None else [name for name in store.manifest.splits if store.rows(name)]
    # In groups of one size, so that however many processes there are the sums are rounded alike.
    groups = [
        (name, numbers[start : start + ROWS_AT_A_TIME])
        for name in names
        for numbers in [evenly(store.rows(name), rows)]
        for start in range(0, len(numbers), ROWS_AT_A_TIME)
    ]
    total, done = sum(len(numbers) for _, numbers in groups), 0
    counters = {name: _Counter(len(store.manifest.record.temperatures)) for name in names}
    counted = results_of(partial(_count_rows, store), groups, jobs, what=f"reading {path}")
    for (name, numbers), counter in zip(groups, counted, strict=True):
        counters[name].include(counter)
        done += len(numbers)
        progress("rows", done, total)
    return StoreStats(store, {name: counter.result() for name, counter in counters.items()})


def _count_rows(store: LogitStore, group: tuple[str, Sequence[int]]) -> "_Counter":
    """Returns what some rows of a split have."""
    split, numbers = group
    counter = _Counter(len(store.manifest.record.temperatures))
    for index in numbers:
        counter.add(store.read_row(split, index), store.manifest)
    return counter


def cells(spread: Spread) -> list[str]:
    """Returns mean, percentiles and maximum of a table's line."""
    values = [spread.mean, *(spread.percentile(percent) for percent in PERCENTILES), spread.maximum]
    return [f"{value:.1e}" if 0 < value < 0.001 else f"{value:.4f}" for value in values]


def support_overlap(row: Row) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns ([M], [M]): the share of each record's ids that the record one position before it stores; where
    there is one.

    A position that begins a document has none before it.
    """
    record = row.teacher
    assert record is not None and row.recorded is not None
    ids = np.concatenate([record.head_ids, record.tail_ids], axis=1).astype(np.int64)  # [M, K]
    length = len(ids)
    begins = np.zeros(len(row.token_ids), np.bool_)
    begins[row.segment_starts] = True
    has_before = np.append(False, row.recorded[:-1])[row.recorded] & ~begins[row.recorded]
    if not length:
        return np.empty(0), has_before
    used = ids != NO_ID
    span = int(ids.max()) + 2
    places = np.arange(length, dtype=np.int64)[:, None]
    keys = ids + span * places
    before = np.sort((ids + span * (places + 1))[used])  # what each position finds at the one before it
    found = np.minimum(np.searchsorted(before, keys), before.size - 1)
    hits = (before[found] == keys) & used
    return hits.sum(axis=1) / np.maximum(used.sum(axis=1), 1), has_before


class _Counter:
    """Gathers the rows of one split."""

    def __init__(self, grid: int) -> None:
        self._rows = self._positions = 0
        self._tail_mass = tuple(Spread() for _ in range(grid))
        self._entropy, self._rest_entropy, self._nll, self._overlap = (Spread() for _ in range(4))
        self._spreads = (*self._tail_mass, self._entropy, self._rest_entropy, self._nll, self._overlap)
        self._in_head = self._stored = 0
        self._features: dict[str, NDArray[np.float64]] = {}  # plane -> numbers, squares, squares of errors

    def add(self, row: Row, manifest: Manifest) -> None:
        temperatures, target = manifest.record.temperatures, manifest.target
        record = row.teacher
        assert record is not None and row.recorded is not None
        mask = row.loss_mask[row.recorded]
        self._rows += 1
        self._positions += int(mask.sum())
        masses = tail_masses(record, temperatures)
        for column, spread in enumerate(self._tail_mass):
            spread.add(masses[mask, column])
        if manifest.record.rest != "counts":  # draws alone tell nothing of these
            self._entropy.add(record.entropy[mask])
            self._rest_entropy.add(record.rest_entropy[mask])
            self._nll.add(-record.true_logprob[mask].astype(np.float64))
        share, has_before = support_overlap(row)
        self._overlap.add(share[mask & has_before])
        true = labels_at_records(row, target)[:, None]
        in_head = (record.head_ids == true).any(axis=1)
        stored = in_head | (record.tail_ids == true).any(axis=1)
        self._in_head += int(in_head[mask].sum())
        self._stored += int(stored[mask].sum())
        for plane in planes_of(manifest):
            if plane.coding == "vectors":
                values = row.optional[plane.name]
                error = codec_of(manifest).error_of(plane, values, manifest)
                squares = [float(np.square(part, dtype=np.float64).sum()) for part in (values, error)]
                self._features.setdefault(plane.name, np.zeros(3))
                self._features[plane.name] += [values.size, *squares]

    def include(self, other: "_Counter") -> None:
        """Adds what another one has gathered."""
        self._rows += other._rows
        self._positions += other._positions
        self._in_head += other._in_head
        self._stored += other._stored
        for own, found in zip(self._spreads, other._spreads, strict=True):
            own.include(found)
        for name, sums in other._features.items():
            self._features[name] = self._features.get(name, np.zeros(3)) + sums

    def result(self) -> SplitStats:
        positions = max(self._positions, 1)
        return SplitStats(
            rows=self._rows,
            positions=self._positions,
            tail_mass=self._tail_mass,
            entropy=self._entropy,
            rest_entropy=self._rest_entropy,
            teacher_nll=self._nll,
            overlap=self._overlap,
            true_in_head=self._in_head / positions,
            true_stored=self._stored / positions,
            features={
                name: tuple(np.sqrt(sums[1:] / max(sums[0], 1)).tolist())
                for name, sums in self._features.items()
            },
        )
