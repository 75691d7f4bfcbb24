"""`sparsekd train --multirun`: one run for each combination of swept values, here or by Slurm; one table."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sparsekd.trainer.config.schema import run_folder
from sparsekd.trainer.config.sweep import SweptRun, swept_runs
from sparsekd.trainer.door.submit import job_of, require_alone, submit_job
from sparsekd.trainer.quality.table import UNKNOWN, aligned
from sparsekd.trainer.run.errors import ConfigError, DataError, TypedError
from sparsekd.trainer.run.stop import STOPPED_CODE

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# The last held-out figures: the cross-entropy is the one that runs with other objectives share.
_FIGURES = ("ce", "kd", "agreement")


def run_sweep(verb: str, overrides: Sequence[str], *, config_directory: str | None, dry_run: bool) -> int:
    """Runs a sweep, or submits it; returns 0, or the code of the first run that did not end well.

    Raises:
        ConfigError: Another verb than train, or overrides that are no sweep.
        UserError: A job cannot be submitted.
    """
    if verb != "train":
        raise TypedError(f"--multirun is for train, whose runs have folders of their own, not {verb}.")
    require_alone("--multirun starts its runs by itself (see launch.sweep_ranks)")
    flags = [] if config_directory is None else ["--config-dir", config_directory]
    runs = swept_runs(overrides, verb, config_directory=config_directory)
    first = runs[0].config.launch
    if any(run.config.launch.scheduler != first.scheduler for run in runs):
        raise ConfigError("launch.scheduler cannot be swept; choose one for all runs.")
    if first.scheduler == "slurm":
        _submit_all(verb, runs, flags, dry_run=dry_run)
        return 0
    return _run_all(verb, runs, flags, dry_run=dry_run)


def _submit_all(verb: str, runs: Sequence[SweptRun], flags: list[str], *, dry_run: bool) -> None:
    jobs = [job_of(run.config, verb, [*flags, *run.overrides]) for run in runs]  # all are sound, or none goes
    lines = [["run", "job", "script"]]
    for job in jobs:
        number = UNKNOWN if dry_run else submit_job(job)
        lines.append([str(job.folder), number, str(job.path)])
    if dry_run:
        print(f"The script of the first of {len(jobs)} runs:\n\n{jobs[0].script}")
    print("\n".join(aligned(lines)))
    print("a dry run: nothing is written or submitted" if dry_run else "follow them: squeue --me", flush=True)


def _run_all(verb: str, runs: Sequence[SweptRun], flags: list[str], *, dry_run: bool) -> int:
    ends: list[str] = []
    code = 0
    for number, run in enumerate(runs, 1):
        words = [verb, *flags, *run.overrides]
        print(f"run {number} of {len(runs)}: sparsekd {shlex.join(words)}", flush=True)
        if dry_run:
            continue
        ended = _run_one(words, run.config.launch.sweep_ranks)
        code = code or ended
        ends.append(_end(Path(run_folder(run.config)), ended))
        if ended in (STOPPED_CODE, 130) or ended < 0:
            print("The sweep is stopped; the same command goes on.", flush=True)
            break
    ends += ["not begun"] * (len(runs) - len(ends))
    print("\n".join(_table(runs, ends)), flush=True)
    return code if code >= 0 else 128 - code


def _run_one(words: list[str], ranks: int) -> int:
    """One run in processes of its own; signals to this one go to them."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [sys.executable, "-m", *(launcher if ranks > 1 else []), "sparsekd.trainer.door.cli", *words]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONSAFEPATH": "1"}
    with _passed_on() as to:
        child = subprocess.Popen(command, env=environment)
        to(child)
        return child.wait()


@contextmanager
def _passed_on() -> Iterator[Callable[["subprocess.Popen[bytes]"], None]]:
    """Hands signals on, so that the run is stopped as if it were alone. From a terminal it has them twice.

    Entered before the run is begun; gives what takes the run, which then gets the signals of before.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    def to(begun: "subprocess.Popen[bytes]") -> None:
        nonlocal child
        child = begun
        for number in early:
            child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        yield to
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(folder: Path, code: int) -> str:
    if code == 0:
        return "done"
    return "stopped" if code == STOPPED_CODE else f"failed ({code}), see {folder}"


def _table(runs: Sequence[SweptRun], ends: Sequence[str]) -> list[str]:
    from sparsekd.trainer.run.tracking import read_metrics  # torch comes with it

    lines = [["run", *runs[0].chosen, "step", *(f"held-out {name}" for name in _FIGURES), "end"]]
    for run, end in zip(runs, ends, strict=True):
        folder = Path(run_folder(run.config))
        try:
            heldout = [record for record in read_metrics(folder) if record["kind"] == "heldout"]
            last = heldout[-1] if heldout else {}
        except (OSError, DataError):  # its own folder tells; the others' figures stand all the same
            last = {}
        figures = [UNKNOWN if last.get(name) is None else f"{last[name]:.4f}" for name in _FIGURES]
        lines.append([str(folder), *run.chosen.values(), str(last.get("step", UNKNOWN)), *figures, end])
    return aligned(lines)
