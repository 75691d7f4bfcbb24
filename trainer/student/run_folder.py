"""The run folder answers "what ran here": configuration, environment, logs, and how it ended."""

import json
import logging
import os
import subprocess
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsekd.trainer.compose import as_yaml
from sparsekd.trainer.config import Config
from sparsekd.trainer.distributed import Ranks

DONE_NAME = "DONE.json"
FAILED_NAME = "FAILED.json"
CHECKPOINTS_NAME = "checkpoints"

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
    """Makes the folder this run's own: settings and environment are written, marks of an earlier end go."""
    if here.is_first:
        (folder / CHECKPOINTS_NAME).mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        for name in (DONE_NAME, FAILED_NAME):
            (folder / name).unlink(missing_ok=True)
        (folder / "config.yaml").write_text(as_yaml(config))
        (folder / "overrides.yaml").write_text("".join(f"- {json.dumps(text)}\n" for text in overrides))
        (folder / "env.json").write_text(json.dumps(_environment(here), indent=1, sort_keys=True) + "\n")
    dist.barrier()
    _log_to_file(folder / "logs" / f"rank_{here.rank}.log")


def write_done(folder: Path, result: dict[str, Any]) -> None:
    """Leaves the mark of a finished run. First rank only."""
    (folder / DONE_NAME).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


@contextmanager
def failures_recorded(folder: Path, here: Ranks) -> Iterator[None]:
    """Writes the traceback of the first rank that fails to FAILED.json; the others fail because of it."""
    try:
        yield
    except Exception as error:
        record = {
            "rank": here.rank,
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        logging.getLogger(__name__).error("rank %d failed", here.rank, exc_info=True)
        try:
            with (folder / FAILED_NAME).open("x") as file:
                file.write(json.dumps(record, indent=1) + "\n")
        except FileExistsError:
            pass
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


def _log_to_file(path: Path) -> None:
    """Sends what libraries log to a file of this rank, and only warnings to the console."""
    root = logging.getLogger()
    handler = logging.FileHandler(path)
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
