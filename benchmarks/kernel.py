"""The loss kernel against its floor and its peers: one command, a page of tables and a picture.

The floor is the time of the plain matrix products that nobody can do without, measured in the same rounds.
Contestants of one table do equal work; one that cannot run here has a row that says so.

    .venv/bin/python benchmarks/kernel.py
    python benchmarks/kernel.py --shapes 128256x4096 --only AB --budget-seconds 540 --resume runs/kernel.json

On CUDA without flags: four shapes at 8192, 2048 and 32768 positions with K 64 and T 1, then K and T varied at
the first shape (--cross: every combination). On the CPU: one small case per table in float32 and bfloat16.
With --smoke: that on the CPU at its smallest.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before torch: its profiler is not to talk, and fragments left by contestants whose blocks differ in size
    # must not pass for a lack of memory.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

import torch
from kernel_cases import ACCURACY_SHAPE, TABLES, Setting
from kernel_measure import INPUT_SETS, SEED, Result, measure
from kernel_peers import contestants
from kernel_plot import draw
from kernel_report import markdown, table_title
from page import Code, command_line, made_by, page_and_picture, processor, running_code, versions

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")
DEFAULTS: dict[str, dict[str, list]] = {
    "cuda": {
        "shapes": [(128256, 4096), (151936, 2048), (256000, 2304), (32000, 4096)],
        "positions": [8192, 2048, 32768],
        "k": [64, 16, 256],
        "temperature": [1.0, 2.0],
        "dtypes": ["bfloat16"],
    },
    "cpu": {
        "shapes": [(32768, 256)],
        "positions": [256],
        "k": [64],
        "temperature": [1.0],
        "dtypes": ["float32", "bfloat16"],
    },
    "smoke": {
        "shapes": [(300, 16)],
        "positions": [24],
        "k": [8],
        "temperature": [1.0],
        "dtypes": ["float32", "bfloat16"],
    },
}
REPEATS = {"cuda": 30, "cpu": 5, "smoke": 2}


def plan(arguments: argparse.Namespace) -> list[Setting]:
    """The cases, the most telling first.

    The first of --k and --temperature is the base. Others vary one at a time at the first shape and number of
    positions, in the tables where they matter; with --cross every combination runs.
    """
    shapes, positions = arguments.shapes, arguments.positions
    base_k, base_t = arguments.k[0], arguments.temperature[0]
    points = [(count, shape, base_k, base_t) for count, shape in product(positions, shapes)]
    others = [(k, base_t) for k in arguments.k[1:]] + [(base_k, t) for t in arguments.temperature[1:]]
    if arguments.cross:
        others = [pair for pair in product(arguments.k, arguments.temperature) if pair != (base_k, base_t)]
        points += [(count, shape, *pair) for count, shape, pair in product(positions, shapes, others)]
    else:
        points += [(positions[0], shapes[0], *pair) for pair in others]
    settings = []
    for (count, (vocabulary, hidden), k, t), table, dtype in product(
        points, arguments.only, arguments.dtypes
    ):
        # Where a number plays no part, the case at its base value says it all.
        matters = {"A": (True, True), "B": (False, False), "C": (False, True), "D": (True, False)}[table]
        if (k != base_k and not matters[0]) or (t != base_t and not matters[1]):
            continue
        settings.append(Setting(table, count, vocabulary, hidden, k, t, dtype, arguments.data))
    return settings


def header(arguments: argparse.Namespace) -> str:
    """How to read the numbers."""
    sort = "logits of a zipf-like law" if arguments.data == "zipf" else "gaussian logits"
    return (
        "Forward and backward together: from hidden states and head to the gradients of both, "
        f"{arguments.repeats} repeats after warm-up, all contestants in turn in every round in an order "
        f"drawn anew, {INPUT_SETS} sets of inputs in rotation (seed {SEED}, {sort}). Medians with 20th and "
        "80th percentile. Peak memory: what a step allocates beyond its inputs, its results counted. Errors: "
        "norm of the difference to float64 over the norm, at no more than "
        f"{' x '.join(map(str, ACCURACY_SHAPE))}. Floor: the plain matrix products of the same shape, in the "
        "same rounds."
    )


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU {processor()}, {threads} thread{'s' * (threads > 1)}"


def run(
    settings: Sequence[Setting], arguments: argparse.Namespace, device: torch.device, code: Code
) -> tuple[list[Result], list[str], int]:
    """(results, titles of the cases left out, results of earlier calls): cases in order until the time budget
    is used up."""
    begin = time.monotonic()
    conditions = made_with(arguments, device, code)
    done = load(arguments.resume, conditions)
    earlier = len(done)
    left_out = []
    for number, setting in enumerate(settings, 1):
        if setting in done:
            continue
        if arguments.budget_seconds and time.monotonic() - begin > arguments.budget_seconds:
            left_out.append(f"{setting.table}: {setting.title}")
            continue
        peers = [
            peer
            for peer in contestants(setting.table, device)
            if not any(word.lower() in peer.name.lower() for word in arguments.without)
        ]
        result = done[setting] = measure(setting, peers, device, arguments.repeats)
        save(arguments.resume, done, conditions)
        print(f"[{number}/{len(settings)}] {table_title(result)}: {result.seconds:.0f} s", flush=True)
        for row in result.rows:
            print(f"    {row.name:28} {f'{row.median:.3f} ms' if row.times else row.reason}", flush=True)
    return list(done.values()), left_out, earlier


def made_with(arguments: argparse.Namespace, device: torch.device, code: Code) -> dict[str, Any]:
    """What must be equal for times to stand in one table, besides the setting."""
    return {
        "device": device_name(device),
        "code": code.digest,
        "versions": versions(PACKAGES),
        "repeats": arguments.repeats,
        "without": sorted(arguments.without),
    }


def load(path: Path | None, conditions: dict[str, Any]) -> dict[Setting, Result]:
    """Cases of earlier calls, by setting; refused where they were made with anything else."""
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text())
    for name, here in conditions.items():
        if (there := found.get("made_with", {}).get(name)) != here:
            raise SystemExit(
                f"{path} holds times of {name} {there}, but this is {name} {here}: they do not compare; name "
                "another file with --resume"
            )
    results = [Result.from_json(data) for data in found["results"]]
    return {result.setting: result for result in results}


def save(path: Path | None, done: dict[Setting, Result], conditions: dict[str, Any]) -> None:
    """Keep what is done for a later call."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        results = [result.to_json() for result in done.values()]
        path.write_text(json.dumps({"made_with": conditions, "results": results}))


def _shape(text: str) -> tuple[int, int]:
    vocabulary, hidden = text.split("x")
    return int(vocabulary), int(hidden)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line, its defaults those of the device."""
    parser = command_line(__doc__, smoke="tiny cases on the CPU, nothing compiled: does it run?")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="VxH", help="vocabulary x hidden size")
    parser.add_argument("--positions", nargs="+", type=int, metavar="N")
    parser.add_argument(
        "--k", nargs="+", type=int, help="entries of the teacher's head; the first is the base"
    )
    parser.add_argument("--temperature", nargs="+", type=float, help="the first is the base")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--data", choices=("zipf", "gaussian"), default="zipf")
    parser.add_argument("--cross", action="store_true", help="every combination of K and T at every shape")
    parser.add_argument(
        "--threads", type=int, default=1, help="on a CPU; one is steadiest where other programs run as well"
    )
    parser.add_argument(
        "--repeats", type=int, help=f"timed rounds: {REPEATS['cuda']} on CUDA, {REPEATS['cpu']} on a CPU"
    )
    parser.add_argument("--only", default="".join(TABLES), help="letters of the tables: " + ", ".join(TABLES))
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="WORD", help="leave out contestants so named"
    )
    parser.add_argument(
        "--budget-seconds", type=float, help="start no case after so long, and say what is left out"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep finished cases here; a later call of the same code goes on from them, which the page says",
    )
    arguments = parser.parse_args(words)
    if arguments.smoke:
        arguments.device = "cpu"
        arguments.without.append("compile")
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = "smoke" if arguments.smoke else arguments.device
    for name, value in DEFAULTS[size].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.repeats = arguments.repeats or REPEATS[size]
    unknown = set(arguments.only) - set(TABLES)
    if unknown:
        parser.error(f"--only names {', '.join(sorted(unknown))}, expected letters of {', '.join(TABLES)}")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the page and the picture, say where they are."""
    words = list(sys.argv[1:] if words is None else words)
    arguments = parse(words)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    code = running_code()
    results, left_out, earlier = run(plan(arguments), arguments, device, code)
    cache = f"{earlier} of {len(results)} cases are of earlier calls of the same code (--resume)."
    made = made_by(
        "kernel.py",
        words,
        code,
        cache=cache if earlier else "",
        machine=device_name(device),
        packages=PACKAGES,
    )
    page, picture = page_and_picture(arguments.out, f"kernel_{device.type}")
    draw(results, picture, device_name(device))
    head = [*made, "", header(arguments)]
    page.write_text(markdown(results, head, left_out, picture.name))
    print(f"Written: {page}, {picture}")


if __name__ == "__main__":
    main()
