"""Measures the store benchmark's contestants: size, errors, speed and latency, all by the same code.

Speeds are per second of this process's CPU time, so that other programs on the machine count little; the
latency of a row is wall time.

L positions of a row, k head entries, G grid temperatures.
"""

import random
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from store_data import Case, DataSet, Facts, facts_of, record_of
from store_layouts import Layout, Ours, Read

from sparsekd.logit_store.row import Row

LEAST_REST = 2.0**-24
"""Rest where a layout keeps none and its head sums to 1 or more: one step of float32 below 1."""

ROUNDING = 1e-6
"""By how much a sum of float32 values may exceed 1 without meaning it."""

FILE_ROWS = 16
"""Rows of a file at least, the data set's in turn: what a file costs once is to weigh little, as it does in
real ones of some hundred rows."""

SEED = 0


@dataclass
class Errors:
    """How far decoded records are from those that were written, over all positions.

    Attributes:
        kl: nats, KL of decoded head and rest from the exact ones, at T = 1.
        kl_hot: the same at the other temperatures of the grid; empty where the layout has no rest at them.
        kl_head: the same of the head alone, both sides renormalised.
        overfull: share of positions whose decoded head sums to more than 1.
        exact_ids: whether head ids, drawn ids and counts are all the written ones.
    """

    kl: NDArray[np.float64]
    kl_hot: NDArray[np.float64]
    kl_head: NDArray[np.float64]
    overfull: float
    exact_ids: bool


@dataclass
class Result:
    """One contestant on one data set. Times are CPU seconds of each round, latencies wall seconds of each
    row."""

    name: str
    lacks: str
    is_ours: bool
    case: Case
    tokens: int
    bytes: int
    errors: Errors
    writes: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    encodes: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    def rate(self, kind: str) -> float:
        """Tokens per CPU second in the median round; NaN where it was not measured."""
        times = getattr(self, kind)
        return self.tokens / statistics.median(times) if times else float("nan")

    def best_rate(self, kind: str) -> float:
        """The same of the fastest round."""
        return self.tokens / min(getattr(self, kind))


@dataclass
class Measured:
    """A data set with all contestants.

    Attributes:
        yardstick: bytes per CPU second of zlib's crc32 in the median round, to compare machines and moments.
    """

    data: DataSet
    facts: Facts
    results: list[Result]
    yardstick: float

    def result(self, name: str) -> Result:
        """The contestant of that name."""
        return next(result for result in self.results if result.name == name)


def measure(data: DataSet, layouts: Sequence[Layout], *, rounds: int, say: Callable[[str], None]) -> Measured:
    """Measures every contestant on a data set: errors and size once, times in rounds in which all take turns,
    in an order drawn anew."""
    order = random.Random(SEED)
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        readers: dict[str, Read] = {}
        for number, layout in enumerate(layouts):
            manifest, rows = data.rows_of(layout.case)
            folder = root / f"{number}"
            folder.mkdir()
            content = _repeated(rows)
            layout.prepare(folder, manifest, rows)
            layout.write(folder, content)
            layout.finish(folder)
            read = readers[layout.name] = layout.open(folder)
            results[layout.name] = Result(
                name=layout.name,
                lacks=layout.lacks,
                is_ours=layout.is_ours,
                case=layout.case,
                tokens=sum(len(row.token_ids) for row in content),
                bytes=layout.size(folder),
                errors=errors_of(rows, read, manifest.record.temperatures),
            )
        yardsticks = []
        for _ in range(rounds):
            yardsticks.append(_yardstick())
            for layout in order.sample(list(layouts), len(layouts)):
                rows = _repeated(data.rows_of(layout.case)[1])
                result = results[layout.name]
                _time_write(layout, data, rows, root / "again", result)
                _time_read(readers[layout.name], order.sample(range(len(rows)), len(rows)), result)
                if isinstance(layout, Ours):
                    _time_codec(layout, rows, result)
    for result in results.values():
        say(
            f"    {result.name:44} {result.bytes_per_token:7.1f} B/token, "
            f"write {result.rate('writes') / 1e6:.2f} M/s, read {result.rate('reads') / 1e6:.2f} M/s"
        )
    return Measured(data, facts_of(data), list(results.values()), statistics.median(yardsticks))


def _repeated(rows: Sequence[Row]) -> list[Row]:
    """The rows of a file; no layout looks beyond a row, so that repeating one saves it nothing."""
    return [rows[index % len(rows)] for index in range(max(FILE_ROWS, len(rows)))]


def _yardstick() -> float:
    block, repeats = bytes(1 << 20), 32
    begin = time.process_time()
    for _ in range(repeats):
        zlib.crc32(block)
    return repeats * len(block) / (time.process_time() - begin)


def size_alone(layout: Ours, data: DataSet) -> float:
    """Bytes per token of a data set's rows in a layout."""
    manifest, rows = data.rows_of(layout.case)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layout.prepare(folder, manifest, rows)
        layout.write(folder, rows)
        return layout.size(folder) / sum(len(row.token_ids) for row in rows)


def _time_write(layout: Layout, data: DataSet, rows: Sequence[Row], folder: Path, result: Result) -> None:
    folder.mkdir()
    layout.prepare(folder, data.rows_of(layout.case)[0], rows)
    begin = time.process_time()
    layout.write(folder, rows)
    result.writes.append(time.process_time() - begin)
    shutil.rmtree(folder)


def _time_read(read: Read, order: Sequence[int], result: Result) -> None:
    total = 0.0
    for index in order:
        begin, wall = time.process_time(), time.perf_counter()
        read(index)
        result.latencies.append(time.perf_counter() - wall)
        total += time.process_time() - begin
    result.reads.append(total)


def _time_codec(layout: Ours, rows: Sequence[Row], result: Result) -> None:
    begin = time.process_time()
    stored = [layout.encode(row) for row in rows]
    middle = time.process_time()
    for planes in stored:
        layout.decode(planes)
    result.encodes.append(middle - begin)
    result.decodes.append(time.process_time() - middle)


def errors_of(rows: Sequence[Row], read: Read, temperatures: Sequence[float]) -> Errors:
    """Reads every row and compares it with what was written."""
    kl, hot, alone, overfull, exact = [], [], [], [], True
    for index, row in enumerate(rows):
        decoded, record = read(index), record_of(row)
        size = decoded.head_ids.shape[1]
        used = decoded.head_ids >= 0
        # The decoded head lists the most likely ids; what it does not list belongs to the rest on both sides.
        ids = np.where(used, record.head_ids[:, :size], -1)
        exact &= bool((np.sort(ids, axis=1) == np.sort(decoded.head_ids, axis=1)).all())
        if decoded.tail_ids.shape[1]:
            exact &= bool((record.tail_ids == decoded.tail_ids).all())
            exact &= bool((record.tail_counts == decoded.tail_counts).all())
        if not size:
            continue
        left = _by_id(ids, np.where(used, record.head_logprobs[:, :size], -np.inf))
        right = _by_id(decoded.head_ids, decoded.head_logprobs)
        cut = record.head_logprobs.astype(np.float64)
        cut[:, :size][used] = -np.inf
        for column, temperature in enumerate(temperatures):
            rest = np.logaddexp(record.log_rest[:, column], _log_sum(cut / temperature))
            if decoded.log_rest is not None:
                found = decoded.log_rest[:, column].astype(np.float64)
            elif temperature == 1:
                found = np.log(np.maximum(1 - np.exp(right).sum(axis=1), LEAST_REST))
            else:
                continue
            divergence = _divergence(
                np.column_stack([left / temperature, rest]), np.column_stack([right / temperature, found])
            )
            (kl if temperature == 1 else hot).append(divergence)
        alone.append(_divergence(left, right))
        overfull.append(np.exp(right).sum(axis=1) > 1 + ROUNDING)

    def together(parts: list[NDArray]) -> NDArray:
        return np.concatenate(parts) if parts else np.zeros(0)

    share = float(together(overfull).mean()) if overfull else 0.0
    return Errors(together(kl), together(hot), together(alone), share, exact)


def _by_id(ids: NDArray[np.int32], values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Values [L, k] in the order of their ids: two that tie may have changed places."""
    return np.take_along_axis(values, np.argsort(ids, axis=1, kind="stable"), axis=1).astype(np.float64)


def _log_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values).sum(axis=1))


def _divergence(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL in nats, float64 [L], of the distribution `right` from `left`, both given as logarithms and
    normalised here."""
    left = left - _log_sum(left)[:, None]
    right = right - _log_sum(right)[:, None]
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(left), 0, np.exp(left) * (left - right))
    return terms.sum(axis=1)
