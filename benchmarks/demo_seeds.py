"""Repeats the demo's two students with several seeds, and writes the margin's mean and standard deviation.

One seed's margin could be luck. This repeats `make demo`'s student runs on its store, with other seeds for
the students' weights and the order of data; teacher and store stay as they are. Other words are overrides for
the students' training.

    make demo && .venv/bin/python benchmarks/demo_seeds.py --seeds 1 2 3
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

# The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

from page import command_line, made_by, processor, running_code, table
from verbs import sparsekd

from sparsekd.logit_store.protocol.reader import open_store

VARIANTS = {"kd": [], "ce": ["objective=ce_only"]}
PACKAGES = ("torch", "deepspeed", "transformers")
SMOKE = ("train.steps=2", "train.evaluate_every=0", "train.checkpoint_every=2", "schedule.warmup_steps=1")


def run_seed(seed: int, demo: Path, overrides: Sequence[str], *, ranks: int) -> dict[str, float]:
    """Trains, exports and evaluates both students with one seed; losses in nats per held-out token.

    The runs go to a folder of their own: in the demo's, an earlier one would be resumed, not repeated.
    """
    with TemporaryDirectory() as root:
        road = [
            "experiment=demo", f"run.root={root}", f"store.path={demo.resolve() / 'store'}",
            f"teacher.path={demo.resolve() / 'teacher' / 'export'}",
        ]  # fmt: skip
        for variant, objective in VARIANTS.items():
            run = [*road, f"run.name={variant}"]
            sparsekd(
                "train", *run, f"train.seed={seed}", *objective, "tracking=disabled", *overrides, ranks=ranks
            )
            sparsekd("export", *run)
        sparsekd("evaluate", *road, f"evaluate.path={root}/evaluation")
        result = json.loads(Path(root, "evaluation", "evaluation.json").read_text())
    losses = {model["name"]: model["figures"]["loss"]["value"] for model in result["models"]}
    margin = result["margin"]
    return {**losses, "margin": margin["value"], "low": margin["low"], "high": margin["high"]}


def markdown(results: dict[int, dict[str, float]], made: Sequence[str]) -> str:
    """The whole page: how it was made, a row for each seed, and their mean."""
    margins = [row["margin"] for row in results.values()]
    spread = f"{statistics.stdev(margins):.3f}" if len(margins) > 1 else "unknown"
    rows = [
        [
            f"{seed}",
            *(f"{row[name]:.3f}" for name in ("teacher", "kd", "ce", "margin")),
            f"{row['low']:.3f} to {row['high']:.3f}",
        ]
        for seed, row in sorted(results.items())
    ]
    lines = [
        "# The demo's margin over several seeds",
        "",
        *made,
        "",
        "Held-out loss in nats per token; margin = CE-only minus KD, with the 95 % interval of a paired "
        "bootstrap over held-out documents.",
        "",
        *table(("seed", "teacher", "KD", "CE-only", "margin", "95 % interval"), rows, words=()),
        f"Mean margin {statistics.mean(margins):.3f}, standard deviation over seeds {spread}.",
        "",
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Run every seed, write the page, say where it is."""
    words = list(sys.argv[1:] if words is None else words)
    parser = command_line(__doc__, smoke="one seed, two steps, one rank: does it run?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, default=2, help="processes of a student's training")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder that `make demo` wrote")
    arguments, overrides = parser.parse_known_args(words)
    if arguments.smoke:
        arguments.seeds, arguments.ranks = arguments.seeds[:1], 1
        overrides = [*SMOKE, *overrides]
    if not (arguments.demo / "store").exists():
        parser.error(f"--demo {arguments.demo} has no folder `store`: run `make demo` first")
    code, begin = running_code(), time.monotonic()
    store = open_store(arguments.demo / "store")
    results = {}
    for seed in arguments.seeds:
        results[seed] = run_seed(seed, arguments.demo, overrides, ranks=arguments.ranks)
        print(f"seed {seed}: {results[seed]}", flush=True)
    minutes = (time.monotonic() - begin) / 60
    made = made_by(
        "demo_seeds.py",
        words,
        code,
        cache=f"Teacher and store are those of an earlier `make demo`, store `{store.digest}`.",
        machine=f"{processor()}, {arguments.ranks} ranks of one thread, {minutes:.0f} minutes",
        packages=PACKAGES,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    page = arguments.out / "demo_seeds.md"
    page.write_text(markdown(results, made))
    print(f"{page.read_text()}\nWritten: {page}")


if __name__ == "__main__":
    main()
