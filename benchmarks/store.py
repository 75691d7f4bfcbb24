"""The logit store against other layouts, and what records of (k, n) are worth: a page and a picture.

Three data sets: a synthetic heavy-tailed teacher at V = 128,256 with text-like and with nearly uniform ids,
and a small teacher with V = 32,768 that is trained here, on the CPU, in minutes.

    .venv/bin/python benchmarks/store.py
    .venv/bin/python benchmarks/store.py --cache runs/benchmark_store    (keeps the trained teacher)

Speeds are per second of this process's CPU time, on one thread.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":
    # Before numpy: its products are to run on one core, like everything else here.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
# The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

import pyarrow as pa
from page import command_line, made_by, page_and_picture, processor, running_code
from store_data import Case, DataSet, synthetic_set
from store_fidelity import CASES, measure_fidelity, students, synthetic_teacher
from store_measure import Measured, measure, size_alone
from store_ours import Ours, ours
from store_peers import peers
from store_plot import draw
from store_report import Budget, markdown
from store_targets import RATIOS, RATIOS_SET, targets
from store_teacher import TeacherSizes, trained_teacher

PACKAGES = ("numpy", "pyarrow", "zstandard", "torch", "transformers", "tokenizers", "deepspeed")
DIVERGENCES = (0.3, 1.0)
"""Nats between teacher and student for the fidelity of records."""

ENTROPY = 2.0
"""Nats, of the synthetic teacher for the fidelity of records."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        vocabulary: V of the synthetic rows.
        length: L of the synthetic rows.
        rows: of each data set, 2 or more: an id's static entropy is measured with the other rows' counts.
        rounds: timed ones.
        positions: for the fidelity of records.
        hidden: H of the synthetic teacher for it.
        teacher: the real one.
    """

    vocabulary: int
    length: int
    rows: int
    rounds: int
    positions: int
    hidden: int
    teacher: TeacherSizes


FULL = Sizes(
    vocabulary=128_256,
    length=4096,
    rows=4,
    rounds=5,
    positions=2048,
    hidden=64,
    # About 500,000 tokens, 15 epochs or more: four minutes on two idle cores, under ten on busy ones.
    teacher=TeacherSizes(
        vocabulary=32768,
        tokenizer_text=("",),
        text=("json", "collections", "wsgiref"),
        length=512,
        rows=4,
        joined=8,
        steps=500,
    ),
)
SMOKE = Sizes(
    vocabulary=2048,
    length=64,
    rows=2,
    rounds=1,
    positions=32,
    hidden=8,
    teacher=TeacherSizes(
        vocabulary=1024, tokenizer_text=("json",), text=("json",), length=32, rows=2, joined=2, steps=2
    ),
)


def sizes_of_cases(sets: Sequence[DataSet]) -> dict[str, dict[Case, float]]:
    """Data set -> case -> bytes per token with the default codec, for the fidelity of records."""
    return {
        data.name: {case: size_alone(Ours(str(case), "tkq8", case), data) for case in CASES} for data in sets
    }


def header(rounds: int, length: int) -> str:
    """How to read the numbers."""
    return (
        "Bytes: everything on disk that grows with the number of rows (token ids, every side plane, "
        "checksums, container, commit record). KL in nats of decoded head and rest from the exact ones, at "
        "T = 1 and, where the layout has a rest there, at T = 2 and 4; a layout that keeps no rest has 1 - "
        "its head's sum, at least 2^-24. `head alone`: both sides renormalised. `sum > 1`: positions whose "
        "decoded head sums to more. Of a head cut short, and of one smaller than 64, what is not listed "
        "belongs to the rest on both sides. write, read, encode, decode: million tokens per second of CPU "
        f"time, medians of {rounds} rounds in which all take turns in an order drawn anew. write: "
        "from arrays to a file; sparsekd's checks each row, decodes it again, checks that, hashes and syncs "
        "the file. read: rows in random order, from the page cache to int32 and float32; sparsekd's with "
        "crc32, zstd's checksums and every rule of a row. encode, decode: its codec alone. row: wall time of "
        f"one random row of {length:,} positions, median (95th percentile)."
    )


def _say(text: str) -> None:
    print(text, flush=True)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keep the trained teacher here, or take it from here where the same code made it; the page says "
        "which (default: train it anew, keep nothing)",
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the page and the picture, say where they are."""
    words = list(sys.argv[1:] if words is None else words)
    arguments = parse(words)
    sizes = SMOKE if arguments.smoke else FULL
    code, begin = running_code(), time.monotonic()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with ExitStack() as stack:
        cache = arguments.cache or Path(stack.enter_context(TemporaryDirectory()))
        _say("the real teacher")
        real = trained_teacher(cache, sizes.teacher, code, PACKAGES, _say)
        shape = {"vocabulary": sizes.vocabulary, "length": sizes.length, "rows": sizes.rows}
        text, uniform = (synthetic_set(ids, **shape) for ids in ("text", "uniform"))
        found: list[Measured] = []
        for data in (text, uniform, real.data_set()):
            _say(f"{data.name}: V = {data.vocabulary:,}")
            pairs = [target.pair for target in RATIOS] if data.name == RATIOS_SET else []
            found.append(measure(data, [*ours(), *peers()], pairs, rounds=sizes.rounds, say=_say))
        _say("fidelity of records")
        of_cases = sizes_of_cases([text, real.data_set()])
        synthetic = synthetic_teacher(
            positions=sizes.positions, vocabulary=sizes.vocabulary, hidden=sizes.hidden, entropy=ENTROPY
        )
        budgets = []
        for teacher in (synthetic, real.dense(sizes.positions)):
            pupils = students(teacher, DIVERGENCES)
            budgets.append(Budget(teacher, pupils, measure_fidelity(teacher, pupils)))
    minutes, load = (time.monotonic() - begin) / 60, os.getloadavg()[0]
    machine = f"{processor()}, one thread, load {load:.1f} at the end, {minutes:.0f} minutes"
    made = made_by("store.py", words, code, cache=real.cache_story, machine=machine, packages=PACKAGES)
    page, picture = page_and_picture(arguments.out, "store_cpu")
    draw(found, budgets, of_cases, picture, f"{processor()}, one thread")
    lines = targets(found)
    head = [*made, "", header(sizes.rounds, sizes.length)]
    page.write_text(markdown(found, budgets, of_cases, lines, head, picture.name))
    print("\n".join(lines))
    print(f"Written: {page}, {picture}")


if __name__ == "__main__":
    main()
