"""Repeats the demo's two students with several seeds, and writes the margin's mean and standard deviation.

One seed's margin could be luck. This repeats `make demo`'s student runs on its store, with other seeds for
the students' weights and the order of data; teacher and store stay as they are.

    make demo && .venv/bin/python benchmarks/demo_seeds.py --seeds 1 2 3
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

RANKS = 2
VARIANTS = {"kd": [], "ce": ["objective=ce_only"]}
PACKAGES = ("torch", "deepspeed", "transformers")


def sparsekd(*words: str, ranks: int = 1) -> None:
    """Runs one verb as a user would, and stops where it fails."""
    command = ["sparsekd", *words]
    if ranks > 1:
        command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "--no-python", *command]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def run_seed(seed: int, root: str, overrides: Sequence[str]) -> dict[str, float]:
    """Trains, exports and evaluates both students with one seed; losses in nats per held-out token."""
    models = {}
    for variant, objective in VARIANTS.items():
        name = f"{variant}-seed{seed}"
        common = ["experiment=demo", f"run.root={root}", f"run.name={name}", f"train.seed={seed}"]
        sparsekd("train", *common, *objective, *overrides, "tracking=disabled", ranks=RANKS)
        sparsekd("export", *common)
        models[variant] = f"{root}/{name}/export"
    folder = f"{root}/evaluation-seed{seed}"
    named = ",".join(f"{name}:{path}" for name, path in models.items())
    sparsekd(
        "evaluate", "experiment=demo", f"run.root={root}", f"evaluate.models={{{named}}}",
        f"evaluate.path={folder}",
    )  # fmt: skip
    result = json.loads(Path(folder, "evaluation.json").read_text())
    losses = {model["name"]: model["figures"]["loss"]["value"] for model in result["models"]}
    margin = result["margin"]
    return {**losses, "margin": margin["value"], "low": margin["low"], "high": margin["high"]}


def table(results: dict[int, dict[str, float]], seconds: float, overrides: Sequence[str]) -> str:
    """The results as Markdown, with what they were made with."""
    margins = [row["margin"] for row in results.values()]
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    lines = [
        "# The demo's margin over several seeds",
        "",
        f"Written by `benchmarks/demo_seeds.py` on {date.today().isoformat()}: {versions}, Python "
        f"{platform.python_version()}, {RANKS} ranks of one thread on {os.cpu_count()} CPU cores, "
        f"{seconds / 60:.0f} minutes.",
        f"Overrides besides `experiment=demo`: {' '.join(overrides) or 'none'}.",
        "",
        "Held-out loss in nats per token; margin = CE-only minus KD, with the 95 % interval of a paired",
        "bootstrap over held-out documents.",
        "",
        "| seed | teacher | KD | CE-only | margin | 95 % interval |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for seed, row in sorted(results.items()):
        lines.append(
            f"| {seed} | {row['teacher']:.3f} | {row['kd']:.3f} | {row['ce']:.3f} | {row['margin']:.3f} "
            f"| {row['low']:.3f} to {row['high']:.3f} |"
        )
    spread = statistics.stdev(margins) if len(margins) > 1 else float("nan")
    lines += [
        "",
        f"Mean margin {statistics.mean(margins):.3f}, standard deviation over seeds {spread:.3f}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--root", default="runs/demo", help="run.root of the demo whose store is used")
    parser.add_argument("--output", default="benchmarks/results/demo_seeds.md")
    arguments, overrides = parser.parse_known_args()
    begin = time.monotonic()
    results = {}
    for seed in arguments.seeds:
        results[seed] = run_seed(seed, arguments.root, overrides)
        print(f"seed {seed}: {results[seed]}", flush=True)
    text = table(results, time.monotonic() - begin, overrides)
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.output).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
