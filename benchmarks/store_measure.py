"""Measures the store benchmark's contestants: size, speed and latency, all by the same code.

Speeds are per second of this process's CPU time, so that other programs on the machine count little; the
latency of a row is wall time.

L positions of a row.
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

from store_data import Case, DataSet, Facts, facts_of
from store_errors import Errors, errors_of
from store_layout import Layout, Read
from store_ours import Ours

from sparsekd.logit_store.row import Row

FILE_ROWS = 16
"""Rows of a file at least, the data set's in turn: what a file costs once is to weigh little, as it does in
real ones of some hundred rows."""

PAIR_ROUNDS = 4
"""Times the rounds of all: a pair takes turns row by row, which is quick."""

SEED = 0


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


@dataclass(frozen=True)
class Pair:
    """Two contestants whose speeds are compared in turns of one row, or one file, so that whatever else the
    machine does slows both.

    Attributes:
        kind: "read" or "write".
        ours: name of the contestant whose speed is above the line.
        peer: name of the one below it.
    """

    kind: str
    ours: str
    peer: str


@dataclass
class Measured:
    """A data set with all contestants.

    Attributes:
        ratios: of each pair, ours' tokens per CPU second over the peer's in each round.
        yardstick: bytes per CPU second of zlib's crc32 in the median round, to compare machines and moments.
    """

    data: DataSet
    facts: Facts
    results: list[Result]
    ratios: dict[Pair, list[float]]
    yardstick: float

    def result(self, name: str) -> Result:
        """The contestant of that name."""
        return next(result for result in self.results if result.name == name)


def measure(
    data: DataSet,
    layouts: Sequence[Layout],
    pairs: Sequence[Pair],
    *,
    rounds: int,
    say: Callable[[str], None],
) -> Measured:
    """Measures every contestant on a data set: errors and size once, times in rounds in which all take turns,
    in an order drawn anew; then the pairs."""
    order = random.Random(SEED)
    results: dict[str, Result] = {}
    readers: dict[str, Read] = {}
    yardsticks = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for number, layout in enumerate(layouts):
            folder = root / f"{number}"
            folder.mkdir()
            readers[layout.name], results[layout.name] = _first_time(layout, data, folder)
        for _ in range(rounds):
            yardsticks.append(_yardstick())
            for layout in order.sample(list(layouts), len(layouts)):
                rows, result = _file_rows(data, layout), results[layout.name]
                result.writes.append(_write_time(layout, data, root / "again"))
                times = [
                    _read_time(readers[layout.name], index)
                    for index in order.sample(range(len(rows)), len(rows))
                ]
                result.reads.append(sum(cpu for cpu, _ in times))
                result.latencies.extend(wall for _, wall in times)
                if isinstance(layout, Ours):
                    _time_codec(layout, rows, result)
        by_name = {layout.name: layout for layout in layouts}
        ratios = {
            pair: _ratios(pair, by_name, data, readers, root / "again", PAIR_ROUNDS * rounds)
            for pair in pairs
        }
    for result in results.values():
        say(
            f"    {result.name:44} {result.bytes_per_token:7.1f} B/token, "
            f"write {result.rate('writes') / 1e6:.2f} M/s, read {result.rate('reads') / 1e6:.2f} M/s"
        )
    return Measured(data, facts_of(data), list(results.values()), ratios, statistics.median(yardsticks))


def size_alone(layout: Ours, data: DataSet) -> float:
    """Bytes per token of a data set's rows in a layout."""
    manifest, rows = data.rows_of(layout.case)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layout.prepare(folder, manifest, rows)
        layout.write(folder, rows)
        return layout.size(folder) / sum(len(row.token_ids) for row in rows)


def _first_time(layout: Layout, data: DataSet, folder: Path) -> tuple[Read, Result]:
    """Writes a file that stays, and looks at its size and its errors."""
    manifest, rows = data.rows_of(layout.case)
    content = _file_rows(data, layout)
    layout.prepare(folder, manifest, rows)
    layout.write(folder, content)
    layout.finish(folder)
    read = layout.open(folder)
    return read, Result(
        name=layout.name,
        lacks=layout.lacks,
        is_ours=layout.is_ours,
        case=layout.case,
        tokens=sum(len(row.token_ids) for row in content),
        bytes=layout.size(folder),
        errors=errors_of(rows, read, manifest.record.temperatures),
    )


def _file_rows(data: DataSet, layout: Layout) -> list[Row]:
    """The rows of a file; no layout looks beyond a row, so that repeating one saves it nothing."""
    rows = data.rows_of(layout.case)[1]
    return [rows[index % len(rows)] for index in range(max(FILE_ROWS, len(rows)))]


def _yardstick() -> float:
    block, repeats = bytes(1 << 20), 32
    begin = time.process_time()
    for _ in range(repeats):
        zlib.crc32(block)
    return repeats * len(block) / (time.process_time() - begin)


def _write_time(layout: Layout, data: DataSet, folder: Path) -> float:
    """CPU seconds to write one file."""
    manifest, rows = data.rows_of(layout.case)
    content = _file_rows(data, layout)
    folder.mkdir()
    layout.prepare(folder, manifest, rows)
    begin = time.process_time()
    layout.write(folder, content)
    seconds = time.process_time() - begin
    shutil.rmtree(folder)
    return seconds


def _read_time(read: Read, index: int) -> tuple[float, float]:
    """(CPU seconds, wall seconds) to read one row."""
    begin, wall = time.process_time(), time.perf_counter()
    read(index)
    latency = time.perf_counter() - wall
    return time.process_time() - begin, latency


def _time_codec(layout: Ours, rows: Sequence[Row], result: Result) -> None:
    begin = time.process_time()
    stored = [layout.encode(row) for row in rows]
    middle = time.process_time()
    for planes in stored:
        layout.decode(planes)
    result.encodes.append(middle - begin)
    result.decodes.append(time.process_time() - middle)


def _ratios(
    pair: Pair,
    layouts: dict[str, Layout],
    data: DataSet,
    readers: dict[str, Read],
    folder: Path,
    rounds: int,
) -> list[float]:
    """Ours' speed over the peer's in each round; both have rows of equal length, so times are enough."""
    names = (pair.ours, pair.peer)
    rows = len(_file_rows(data, layouts[pair.ours]))
    found = []
    for number in range(rounds):
        seconds = dict.fromkeys(names, 0.0)
        if pair.kind == "write":
            for name in _turn(names, number):
                seconds[name] = _write_time(layouts[name], data, folder)
        else:
            for index in range(rows):
                for name in _turn(names, number + index):
                    seconds[name] += _read_time(readers[name], index)[0]
        found.append(seconds[pair.peer] / seconds[pair.ours])
    return found


def _turn(names: Sequence[str], number: int) -> Sequence[str]:
    """Who begins changes each time."""
    return names if number % 2 else names[::-1]
