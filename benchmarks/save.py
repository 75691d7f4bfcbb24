"""How long a checkpoint holds the training, beside other ways to save: a page and a picture.

Two ranks on gloo train a random Llama under DeepSpeed's ZeRO-3 and save the same state by turns: sparsekd's
asynchronous and synchronous save, `torch.distributed.checkpoint`'s asynchronous one, plain `torch.save`, and
DeepSpeed's own.

    .venv/bin/python benchmarks/save.py
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

from page import command_line, made_by, page_and_picture, processor, running_code, table
from save_worker import BEHIND, NOTHING, SYNCHRONOUS, Task

PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
RANKS = 2
WANTED = 0.15
"""The pause of an asynchronous save as a share of the same save synchronous, at most."""

FULL = Task("", "", hidden=768, layers=6, vocabulary=8192, length=32, rounds=4, steps=2)
SMOKE = Task("", "", hidden=32, layers=1, vocabulary=64, length=8, rounds=1, steps=1)

Result = Mapping[str, Any]
"""What `save_worker.measure` returns."""


def run_ranks(task: Task, say: Path) -> Result:
    """Runs the ranks; what their libraries say goes to a file, of which the end is shown if they fail."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
    worker = Path(__file__).with_name("save_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
    with say.open("w") as output:
        done = subprocess.run(
            [sys.executable, *launcher, str(worker), json.dumps(vars(task))],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if done.returncode != 0:
        raise RuntimeError(f"the ranks failed:\n{say.read_text()[-4000:]}")
    result: Result = json.loads(Path(task.answer).read_text())
    return result


def share(result: Result, name: str, other: str, what: str) -> list[float]:
    """One way's seconds over another's, round by round, without the first save."""
    ours, theirs = (result["ways"][way][what][1:] for way in (name, other))
    return [mine / its for mine, its in zip(ours, theirs, strict=True)]


def targets(result: Result, task: Task) -> list[str]:
    """What is wanted and what was found, in Markdown."""
    found = share(result, BEHIND, SYNCHRONOUS, "pause")
    median = statistics.median(found)
    verdict = "other sizes" if replace(task, folder="", answer="") != FULL else _verdict(median <= WANTED)
    row = (
        "pause of an asynchronous save / the same save synchronous",
        f"<= {WANTED:.0%}",
        f"{median:.1%} ({_spread(found, '.1%')})",
        verdict,
    )
    return table(("target", "wanted", "found, median (rounds)", "met"), [row], words=(0, 3))


def _verdict(met: bool) -> str:
    return "yes" if met else "**no**"


def _spread(values: Sequence[float], form: str = ".2f") -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def markdown(result: Result, task: Task, made: Sequence[str], picture: str) -> str:
    """The page."""
    ways = result["ways"]
    rows = []
    for name, found in sorted(ways.items(), key=lambda entry: statistics.median(entry[1]["pause"][1:])):
        slower = share(result, name, NOTHING, "steps")
        ratio = (
            ""
            if name in (BEHIND, NOTHING)
            else f"{statistics.median(share(result, BEHIND, name, 'pause')):.2f}"
        )
        rows.append(
            [
                name,
                f"{statistics.median(found['pause'][1:]):.3f}",
                _spread(found["pause"][1:], ".3f"),
                ratio,
                f"{found['pause'][0]:.3f}",
                f"{statistics.median(slower):.2f}",
                f"{statistics.median(found['whole'][1:]):.2f}",
                f"{result['bytes'][name]:,}",
            ]
        )
    head = (
        "way",
        "pause, s",
        "rounds",
        "ours over it",
        "first save",
        "steps after it",
        "until whole, s",
        "bytes",
    )
    parts = [[name, f"{seconds:.3f}"] for name, seconds in result["parts"].items()]
    return "\n".join(
        [
            "# How long a checkpoint holds the training",
            "",
            *made,
            "",
            f"A Llama of {result['parameters']:,} parameters in bfloat16 under ZeRO-3 on {RANKS} ranks "
            f"(gloo): medians of {task.rounds} rounds, in each of which all ways take turns in an order "
            "drawn anew, after a first save of each. pause: until the next step could begin, of the slower "
            "rank. ours over it: the pause of `sparsekd, behind the steps` over this one, round by round. "
            f"steps after it: time of the {task.steps} steps that follow, over that of as many without "
            "a save. until whole: from the save's begin until its files are whole, those steps included. The "
            "disk is idle at each begin, the page cache takes what is written without fsync.",
            "",
            f"![Pause of each way]({picture})",
            "",
            "## Target",
            "",
            *targets(result, task),
            "## All ways",
            "",
            *table(head, rows, words=(0,)),
            "sparsekd makes every file durable (fsync), computes its crc32 and publishes by a rename; "
            "dcp.async_save makes its files durable; torch.save and DeepSpeed's own save leave them in the "
            "page cache where nothing else is said. dcp.async_save and torch.save are given the state as "
            "DeepSpeed collected it before their clock began; the others collect it themselves. `memory "
            "kept`: one stager from save to save, as sparsekd keeps its copies.",
            "",
            "## Parts of an asynchronous save before it returns",
            "",
            *table(("part", "least, s"), parts, words=(0,)),
        ]
    )


def draw(result: Result, path: Path, note: str) -> None:
    """Writes the picture: the pause of each way, with its rounds, and of its first save."""
    # Imported on use: the tables do without it.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {name: way["pause"] for name, way in result["ways"].items() if name != NOTHING}
    names = sorted(found, key=lambda name: -statistics.median(found[name][1:]))
    medians = [statistics.median(found[name][1:]) for name in names]
    colours = ["#D62728" if name.startswith("sparsekd") else "#56B4E9" for name in names]
    figure, axis = pyplot.subplots(figsize=(8, 4))
    axis.barh(names, medians, color=colours, zorder=2)
    for place, name in enumerate(names):
        axis.plot(found[name][1:], [place] * len(found[name][1:]), "k|", zorder=3)
        axis.plot(found[name][0], place, "x", color="#666666", zorder=3)
    axis.grid(True, axis="x", color="#ececec", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("seconds until the next step can begin: median; | rounds, x the first save", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.set_title(f"A save of {result['bytes'][BEHIND] / 1e6:,.0f} MB on {RANKS} ranks", fontsize=10)
    figure.text(0.01, 0.01, note, fontsize=7, color="#666666")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the page and the picture, say where they are."""
    words = list(sys.argv[1:] if words is None else words)
    parser = command_line(__doc__)
    arguments = parser.parse_args(words)
    code, begin, load = running_code(), time.monotonic(), os.getloadavg()[0]
    with TemporaryDirectory() as root:
        folder = Path(root, "checkpoints")
        folder.mkdir()
        task = replace(
            SMOKE if arguments.smoke else FULL, folder=str(folder), answer=str(Path(root, "answer.json"))
        )
        result = run_ranks(task, Path(root, "output.txt"))
    minutes = (time.monotonic() - begin) / 60
    machine = (
        f"{processor()}, {RANKS} ranks of one thread, load {load:.1f} at the begin and "
        f"{os.getloadavg()[0]:.1f} at the end, {minutes:.0f} minutes"
    )
    made = made_by("save.py", words, code, cache="", machine=machine, packages=PACKAGES)
    page, picture = page_and_picture(arguments.out, "save_cpu")
    draw(result, picture, processor())
    page.write_text(markdown(result, task, made, picture.name))
    print(f"{page.read_text()}\nWritten: {page}, {picture}")


if __name__ == "__main__":
    main()
