"""Whether a job that has ended goes back into Slurm's queue: the frame of launch/slurm/train.sbatch.

    mark=$(python -m sparsekd.launch.requeue before FOLDER)
    python -m sparsekd.launch.requeue after FOLDER CODE "$mark"

Slurm itself requeues a job whose node died; that the ranks stopped because the time was up only their run
folder says (STOPPED.json).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REQUEUES_NAME = "requeues.jsonl"

_STOPPED_NAME = "STOPPED.json"
_STOPPED_CODE = 75
_LARGEST_RECORD = 1 << 20
_LAST_BYTES = 4096


def why_not(stopped: Any, code: int, *, is_new: bool, last_step: int | None = None) -> str | None:
    """Returns why a job stays out of the queue; None where it goes back.

    Args:
        stopped: What STOPPED.json holds; None where there is none.
        code: Exit code of srun.
        is_new: Whether it was written by this start of the job.
        last_step: The step at which the job was last requeued.
    """
    if code == 0:
        return "it is done"
    if code == _STOPPED_CODE and (stopped is None or not is_new):
        return "it was asked to stop before it had begun, so that it would not come further the next time"
    if not isinstance(stopped, dict) or not isinstance(stopped.get("step"), int):
        return f"it ended with code {code} and was not asked to stop"
    if not is_new:  # that start failed before it could take the mark away, and would again, for ever
        return f"it ended with code {code}, and {_STOPPED_NAME} is that of an earlier start"
    if stopped.get("requeue") is not True:
        return f"it was asked to stop ({stopped.get('reason')})"
    step = stopped["step"]
    if last_step is not None and step <= last_step:
        return (
            f"it made no step since the last time, at step {last_step}; its time limit is too short for its "
            "start, or the signal comes too early before it"
        )
    return None


def mark_of(folder: Path) -> str:
    """What tells one STOPPED.json from the next, without a clock: each is a new file."""
    try:
        found = (folder / _STOPPED_NAME).stat()
    except OSError:
        return "none"
    return f"{found.st_ino}-{found.st_mtime_ns}"


def requeue_or_say(folder: Path, code: int, mark: str) -> None:
    """Requeues this job, or says why not.

    Args:
        folder: The run folder.
        code: Exit code of srun.
        mark: What `mark_of` gave before the start.
    """
    stopped, requeues = _record(folder / _STOPPED_NAME), folder / REQUEUES_NAME
    reason = why_not(stopped, code, is_new=mark_of(folder) != mark, last_step=_last_step(requeues))
    job = os.environ.get("SLURM_JOB_ID", "")
    if reason is None:
        try:
            with requeues.open("a") as file:
                file.write(json.dumps({"job": job, "step": stopped["step"]}) + "\n")
        except OSError as error:  # without it nothing would end a job that makes no step
            reason = f"{REQUEUES_NAME} cannot be written ({error.strerror or error})"
    if reason is not None:
        print(f"sparsekd: the job is not requeued: {reason}.", flush=True)
        return
    print(f"sparsekd: the time was up at step {stopped['step']}; the job is requeued.", flush=True)
    done = subprocess.run(["scontrol", "requeue", job], check=False)
    if done.returncode:
        print(
            f"sparsekd: `scontrol requeue {job}` ended with {done.returncode}; submit the same job again: it "
            "goes on from its checkpoint.",
            file=sys.stderr,
        )


def main(arguments: Sequence[str]) -> int:
    """`before FOLDER` prints a mark; `after FOLDER CODE MARK` decides, and returns the code."""
    if arguments[0] == "before":
        print(mark_of(Path(arguments[1])))
        return 0
    _, folder, code, mark = arguments
    requeue_or_say(Path(folder), int(code), mark)
    return int(code)


def _last_step(requeues: Path) -> int | None:
    """The step of the last line; None where there is none that can be read."""
    try:
        with requeues.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            step = json.loads(file.read(_LAST_BYTES).splitlines()[-1])["step"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def _record(path: Path) -> Any:
    """What a JSON file holds; None where there is none that can be read."""
    try:
        with path.open() as file:
            return json.loads(file.read(_LARGEST_RECORD))
    except (OSError, ValueError, RecursionError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
