"""Jobs by the command line: every rank a process of its own, whose exit code and words can be seen.

No launcher: one would kill the other ranks before they can show that they end by themselves. Ranks are forked
(see `forked`), unless a test is about the time in which an interpreter loads its libraries.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distributed_harness import VOCABULARY
from forked import ALONE, ForkedRank, forked, new_output, places

ROWS, STEPS, RANKS = 8, 4, 2
_PROGRAM = 3
"""Words of a command line that name the program."""
STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def started(store: Path, root: Path, *more: str) -> tuple[list[int], str]:
    """Trains on two ranks by the command line; returns the exit codes and everything that was printed."""
    return ended(start(store, root, *more))


def start(store: Path, root: Path, *more: str) -> list[ForkedRank]:
    """Starts a training on two ranks."""
    # Not below `root`: its disk may be full, on purpose.
    return forked(command(store, root, *more)[_PROGRAM:], [new_output() for _ in range(RANKS)])


def start_anew(store: Path, root: Path, *more: str) -> "list[subprocess.Popen[str]]":
    """Starts a training on two ranks, each of an interpreter of its own."""
    return [
        subprocess.Popen(
            command(store, root, *more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | ALONE | place,
        )
        for place in places(RANKS)
    ]


def command(store: Path, root: Path, *more: str) -> list[str]:
    """The command line of each rank; `student.path` takes the place of the tiny student."""
    config = {} if any(word.startswith("student.path=") for word in more) else STUDENT
    return [
        *(sys.executable, "-m", "sparsekd.trainer.door.cli", "train"),
        *(f"store.path={store}", f"run.root={root}", "run.name=run", "launch=cpu", "tracking=disabled"),
        *("engine.dtype=float32", "engine.zero_stage=3", "objective=kd", "schedule.warmup_steps=1"),
        *(f"train.steps={STEPS}", f"train.global_batch_rows={ROWS}", "train.micro_batch_rows=2"),
        *("train.log_every=1", "train.evaluate_rows=0", "train.prefetch_steps=1"),
        *(f"+student.config.{key}={value}" for key, value in config.items()),
        *more,
    ]


def ended(jobs: "Sequence[ForkedRank | subprocess.Popen[str]]") -> tuple[list[int], str]:
    """Waits for all ranks of a job; returns the exit codes and everything that was printed."""
    try:
        output = "".join(job.communicate(timeout=120)[0] for job in jobs)
    finally:
        for job in jobs:
            job.kill()
    return [job.wait(0) for job in jobs], output


def the_sentence(output: str) -> str:
    """What was said of the failure, once and without a traceback."""
    assert "Traceback" not in output, output[-6000:]
    said = [line for line in output.splitlines() if line.startswith("sparsekd train: ")]
    assert len(said) == 1, output[-6000:]
    return said[0]


def wait_for_lines(run: Path, jobs: "Sequence[ForkedRank | subprocess.Popen[str]]", count: int = 1) -> None:
    """Waits until a job has written so many lines of metrics, or has ended."""
    deadline = time.monotonic() + 100
    metrics = run / "metrics.jsonl"
    while time.monotonic() < deadline and all(job.poll() is None for job in jobs):
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
