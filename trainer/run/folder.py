"""The run folder answers "what ran here": configuration, environment, logs, and how it ended."""

import contextlib
import functools
import json
import logging
import os
import subprocess
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparsekd.trainer.config.compose import as_yaml
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.run.errors import writing
from sparsekd.trainer.run.ranks import Ranks, is_sentence, together

DONE_NAME = "DONE.json"
FAILED_NAME = "FAILED.json"
CHECKPOINTS_NAME = "checkpoints"

# Another rank's record is on disk before its connections break; a shared file system may show it later.
_SECONDS_FOR_ANOTHERS_RECORD = 5.0

_PACKAGES = ("sparsekd", "torch", "deepspeed", "transformers", "triton", "numpy", "pyarrow")


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape the numbers; those not installed are left out."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def adopt(folder: Path, config: Config, overrides: Sequence[str], here: Ranks) -> None:
    """Makes the folder this run's own: settings and environment are written, marks of an earlier end go.

    Raises:
        UserError: It cannot be written (on the first rank; the others exit).
    """
    together(here, functools.partial(_adopt_first, folder, config, overrides, here))
    together(here, lambda: _log_to_file(folder / "logs" / f"rank_{here.rank}.log"))


def _adopt_first(folder: Path, config: Config, overrides: Sequence[str], here: Ranks) -> None:
    if not here.is_first:
        return
    with writing(folder):
        (folder / CHECKPOINTS_NAME).mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        for name in (DONE_NAME, FAILED_NAME):
            (folder / name).unlink(missing_ok=True)
        (folder / "config.yaml").write_text(as_yaml(config))
        (folder / "overrides.yaml").write_text("".join(f"- {json.dumps(text)}\n" for text in overrides))
        (folder / "env.json").write_text(json.dumps(_environment(here), indent=1, sort_keys=True) + "\n")


def write_done(folder: Path, result: dict[str, Any]) -> None:
    """Leaves the mark of a finished run, and removes that of a failed one. First rank only."""
    with writing(folder / DONE_NAME):
        (folder / DONE_NAME).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        (folder / FAILED_NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def failures_recorded(folder: Path, here: Ranks) -> Iterator[None]:
    """Writes the traceback of the first rank that fails to FAILED.json; the others leave without a word.

    Raises:
        SystemExit: With code 2, where another rank has failed before: it says why, and this one's own error
            is most likely a connection that broke because of it. That error is in this rank's log.
    """
    try:
        yield
    except Exception as error:  # whatever it is, the record of it is all that outlives the job
        record = {
            "rank": here.rank,
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        logging.getLogger(__name__).error("rank %d failed", here.rank, exc_info=True)
        place = folder / FAILED_NAME
        deadline = time.monotonic() + _SECONDS_FOR_ANOTHERS_RECORD
        while here.world_size > 1 and not is_sentence(error) and time.monotonic() < deadline:
            if place.exists():
                break
            time.sleep(0.1)
        try:
            with place.open("x") as file:
                file.write(json.dumps(record, indent=1) + "\n")
        except FileExistsError:
            raise SystemExit(2) from None
        except OSError as problem:  # a full disk: the error itself still goes up
            logging.getLogger(__name__).error("%s cannot be written: %s", place, problem)
        raise


def _environment(here: Ranks) -> dict[str, Any]:
    is_cuda = here.device.type == "cuda"
    return {
        "versions": package_versions(),
        "world_size": here.world_size,
        "device": torch.cuda.get_device_name(here.device) if is_cuda else "cpu",
        "cuda": torch.version.cuda,
        "threads_per_rank": torch.get_num_threads(),
        "git": _git_state(),
    }


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
    root = logging.getLogger()
    with writing(path):
        handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    # DeepSpeed calls collectives by names that newer torch versions deprecate: a line for every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # DeepSpeed's logger has a handler of its own and does not pass its lines on.
    noisy = logging.getLogger("DeepSpeed")
    for existing in noisy.handlers:
        existing.setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    noisy.addHandler(handler)
