"""The logit store against other layouts, and what records of (k, n) are worth: a page and a picture.

Three data sets: a synthetic heavy-tailed teacher at V = 128,256 with text-like and with nearly uniform ids,
and a small teacher with V = 32,768 that is trained here once, on the CPU, in minutes, and kept in --cache.

    .venv/bin/python benchmarks/store.py
    .venv/bin/python benchmarks/store.py --quick --out runs/quick

Speeds are per second of this process's CPU time, on one thread.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

if __name__ == "__main__":
    # Before numpy: its products are to run on one core, like everything else here.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
# The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

import pyarrow as pa
from store_data import Case, DataSet, synthetic_set
from store_fidelity import CASES, DenseTeacher, measure_fidelity, students, synthetic_teacher
from store_layouts import Ours, ours
from store_measure import Measured, measure, size_alone
from store_peers import peers
from store_plot import draw
from store_report import Budget, markdown

PACKAGES = ("numpy", "pyarrow", "zstandard", "torch")
DIVERGENCES = (0.3, 1.0)
"""Nats between teacher and student for the fidelity of records."""


def data_sets(arguments: argparse.Namespace) -> dict[str, DataSet]:
    """The data sets, by name."""
    shape = {"vocabulary": arguments.vocabulary, "length": arguments.length, "rows": arguments.rows}
    found = {ids: synthetic_set(ids, **shape) for ids in ("text", "uniform") if ids in arguments.sets}
    if "real" in arguments.sets:
        from store_teacher import real_set, train_teacher  # it imports the trainer

        print("real: the teacher", flush=True)
        train_teacher(arguments.cache, _say)
        found["real"] = real_set(arguments.cache, arguments.rows)
    return found


def sizes_of_cases(sets: dict[str, DataSet], arguments: argparse.Namespace) -> dict[str, dict[Case, float]]:
    """Data set -> case -> bytes per token with the default codec, for the fidelity of records."""
    few = {}
    if "text" in sets or "real" not in sets:
        few["text"] = synthetic_set(
            "text", vocabulary=arguments.vocabulary, length=arguments.length, rows=min(2, arguments.rows)
        )
    if "real" in sets:
        from store_teacher import real_set

        few["real"] = real_set(arguments.cache, min(2, arguments.rows))
    return {
        name: {case: size_alone(Ours(str(case), "tkq8", case), data) for case in CASES}
        for name, data in few.items()
    }


def dense_teachers(sets: dict[str, DataSet], arguments: argparse.Namespace) -> list[DenseTeacher]:
    """The teachers on which the fidelity of records is measured."""
    found = [
        synthetic_teacher(
            positions=arguments.positions,
            vocabulary=arguments.vocabulary,
            hidden=arguments.hidden,
            entropy=2.0,
        )
    ]
    if "real" in sets:
        import numpy as np
        from store_teacher import dense_inputs

        hidden, weight = dense_inputs(arguments.cache, arguments.positions)
        story = f"the trained teacher, V = {len(weight):,}, H = {hidden.shape[1]}"
        found.append(DenseTeacher("trained", story, hidden, weight, np.zeros(len(weight), np.float32)))
    return found


def header(words: Sequence[str], arguments: argparse.Namespace, seconds: float) -> list[str]:
    """What the numbers were made with, and how to read them."""
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    return [
        f"Written by `{' '.join(['benchmarks/store.py', *words])}` on {date.today().isoformat()}: "
        f"{processor()}, one thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}, "
        f"Python {platform.python_version()}; {seconds / 60:.0f} minutes.",
        "",
        "Bytes: everything on disk that grows with the number of rows (token ids, every side plane, "
        "checksums, container, commit record). KL in nats of decoded head and rest from the exact ones, at "
        "T = 1 and, where the layout has a rest there, at T = 2 and 4; a layout that keeps no rest has 1 - "
        "its head's sum, at least 2^-24. `head alone`: both sides renormalised. `sum > 1`: positions whose "
        "decoded head sums to more. Of a head cut short, and of one smaller than 64, what is not listed "
        "belongs to the rest on both sides. write, read, encode, decode: million tokens per second of CPU "
        f"time, medians of {arguments.rounds} rounds in which all take turns in an order drawn anew. write: "
        "from arrays to a file; sparsekd's checks each row, decodes it again, checks that, hashes and syncs "
        "the file. read: rows in random order, from the page cache to int32 and float32; sparsekd's with "
        "crc32, zstd's checksums and every rule of a row. encode, decode: its codec alone. row: wall time of "
        f"one random row of {arguments.length:,} positions, median (95th percentile).",
    ]


def processor() -> str:
    """The processor in words."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _say(text: str) -> None:
    print(text, flush=True)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="synthetic data alone, small: seconds")
    parser.add_argument(
        "--sets", nargs="+", choices=("text", "uniform", "real"), help="data sets; all by default"
    )
    parser.add_argument("--rows", type=int, help="rows of each data set")
    parser.add_argument("--rounds", type=int, help="timed rounds")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/benchmark_store"), help="folder of the trained teacher"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of the page"
    )
    arguments = parser.parse_args(words)
    quick = arguments.quick
    arguments.sets = arguments.sets or (["text", "uniform"] if quick else ["text", "uniform", "real"])
    arguments.rows = arguments.rows or (2 if quick else 4)
    arguments.rounds = arguments.rounds or (2 if quick else 5)
    arguments.vocabulary = 8192 if quick else 128_256
    arguments.length = 256 if quick else 4096
    arguments.positions = 256 if quick else 2048
    arguments.hidden = 16 if quick else 64
    if arguments.rows < 2:
        parser.error("--rows is at least 2: the static entropy of ids needs rows to learn from")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the page and the picture, say where they are."""
    words = list(sys.argv[1:] if words is None else words)
    arguments = parse(words)
    begin = time.monotonic()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    sets = data_sets(arguments)
    found: list[Measured] = []
    for name, data in sets.items():
        print(f"{name}: V = {data.vocabulary:,}", flush=True)
        found.append(measure(data, [*ours(), *peers()], rounds=arguments.rounds, say=_say))
    print("fidelity of records", flush=True)
    sizes = sizes_of_cases(sets, arguments)
    budgets = []
    for teacher in dense_teachers(sets, arguments):
        pupils = students(teacher, DIVERGENCES)
        budgets.append(Budget(teacher, pupils, measure_fidelity(teacher, pupils)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    page = arguments.out / "store_cpu.md"
    shown = [Path(word).name if "/" in word else word for word in words]
    draw(found, budgets, sizes, page.with_suffix(".png"), f"{processor()}, one core")
    text = markdown(
        found, budgets, sizes, header(shown, arguments, time.monotonic() - begin), "store_cpu.png"
    )
    page.write_text(text)
    print(text.partition("## Text")[0].partition("## Targets")[2])
    print(f"Written: {page}, {page.with_suffix('.png')}")


if __name__ == "__main__":
    main()
