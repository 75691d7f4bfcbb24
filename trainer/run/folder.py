"""The run folder answers "what ran here": configuration, environment, logs, and how it ended."""

import errno
import json
import logging
import os
import socket
import stat
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sparsekd.trainer.config.compose import as_yaml
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.run.errors import writing
from sparsekd.trainer.run.failure import FAILED_NAME, make_room, remove_room
from sparsekd.trainer.run.files import write_whole
from sparsekd.trainer.run.owner import Claim
from sparsekd.trainer.run.pulse import clear
from sparsekd.trainer.run.ranks import Ranks, on_first, together
from sparsekd.trainer.run.stop import STOPPED_NAME, StopRequest
from sparsekd.trainer.run.versions import TRAINING_PACKAGES, versions_of

DONE_NAME = "DONE.json"
STARTS_NAME = "starts.jsonl"
CHECKPOINTS_NAME = "checkpoints"
LOGS_NAME = "logs"

_ENDS = (DONE_NAME, FAILED_NAME, STOPPED_NAME)
"""Marks of how a run ended; a run has one of them or none."""


def adopt(
    folder: Path,
    config: Config,
    overrides: Sequence[str],
    here: Ranks,
    begun: Mapping[str, Any],
    claim: Claim,
) -> None:
    """Makes the folder this run's own: settings and environment are written, marks of an earlier end go.

    Args:
        folder: The run folder.
        config: The composed configuration.
        overrides: What the user typed.
        here: This rank.
        begun: Where this start begins, for its line in starts.jsonl.
        claim: Of this job to the folder.

    Raises:
        UserError: It cannot be written (on the first rank; the others exit).
    """

    def make_it_ours() -> None:
        claim.require()
        with writing(folder):
            (folder / CHECKPOINTS_NAME).mkdir(parents=True, exist_ok=True)
            (folder / LOGS_NAME).mkdir(exist_ok=True)
            for old in (*(folder / name for name in _ENDS), *clear(folder / LOGS_NAME)):
                old.unlink(missing_ok=True)
            make_room(folder)
            write_whole(folder / "config.yaml", as_yaml(config))
            write_whole(folder / "overrides.yaml", "".join(f"- {json.dumps(text)}\n" for text in overrides))
            environment = _environment(here)
            write_whole(folder / "env.json", json.dumps(environment, indent=1, sort_keys=True) + "\n")
            who = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "host": socket.gethostname()}
            start = {**who, "pid": os.getpid(), **begun, "overrides": list(overrides), **environment}
        with writing(folder / STARTS_NAME):
            append_line(folder / STARTS_NAME, json.dumps(start | {"slurm": _slurm_state()}))

    on_first(here, make_it_ours)
    together(here, lambda: _log_to_file(folder / LOGS_NAME / f"rank_{here.rank}.log"))


def write_done(folder: Path, result: dict[str, Any], claim: Claim) -> None:
    """Leaves the mark of a finished run. First rank only.

    Raises:
        UserError: It cannot be written, or the folder is another job's by now.
    """
    _write_end(folder, DONE_NAME, result, claim)


def write_stopped(folder: Path, step: int, request: StopRequest, claim: Claim) -> None:
    """Leaves the mark of a run that was asked to stop and has saved. First rank only.

    Raises:
        UserError: It cannot be written, or the folder is another job's by now.
    """
    said = {"reason": request.reason, "signal": request.signal, "requeue": request.requeue, "step": step}
    _write_end(folder, STOPPED_NAME, said, claim)


def _write_end(folder: Path, name: str, content: dict[str, Any], claim: Claim) -> None:
    """Writes how a run ended, in one step: a batch script may read it at any time."""
    claim.require()
    with writing(folder / name):
        for old in _ENDS:
            (folder / old).unlink(missing_ok=True)
        write_whole(folder / name, json.dumps(content, indent=1, sort_keys=True) + "\n")
        remove_room(folder)


def _environment(here: Ranks) -> dict[str, Any]:
    is_cuda = here.device.type == "cuda"
    return {
        "versions": versions_of(TRAINING_PACKAGES),
        "world_size": here.world_size,
        "device": torch.cuda.get_device_name(here.device) if is_cuda else "cpu",
        "cuda": torch.version.cuda,
        "threads_per_rank": torch.get_num_threads(),
        "git": _git_state(),
    }


def append_line(path: Path, line: str) -> None:
    """Adds a line durably, on a line of its own also where an earlier write was cut short.

    Raises:
        OSError: It cannot be written, or is no file: a link may lead anywhere, and a FIFO is never read.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(path, flags, 0o666), "ab+") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "It is no file", str(path))
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _slurm_state() -> dict[str, str] | None:
    """Job, restarts of it, and its nodes, as Slurm names them; None outside of a job."""
    names = {"job": "SLURM_JOB_ID", "restarts": "SLURM_RESTART_COUNT", "nodes": "SLURM_JOB_NODELIST"}
    if names["job"] not in os.environ:
        return None
    return {key: os.environ[name] for key, name in names.items() if name in os.environ}


def _git_state() -> dict[str, Any] | None:
    """Commit of sparsekd's source, and whether it was changed; None where it is not a git checkout."""
    source = Path(__file__).resolve().parent
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(source), *words], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short: the run's own files say so, without a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _log_to_file(path: Path) -> None:
    """Sends what libraries log to a file of this rank, and only warnings to the console."""
    # DeepSpeed's logger has a handler of its own and does not pass its lines on.
    root, noisy = logging.getLogger(), logging.getLogger("DeepSpeed")
    for logger in (root, noisy):  # an earlier run of this process has its own file
        for earlier in [handler for handler in logger.handlers if isinstance(handler, _LogFile)]:
            logger.removeHandler(earlier)
            earlier.close()
    with writing(path):
        handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    # DeepSpeed calls collectives by names that newer torch versions deprecate: a line for every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for existing in noisy.handlers:
        existing.setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    noisy.addHandler(handler)
