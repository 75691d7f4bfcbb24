"""Checkpoints as they lie in a run's folder: whole or not there. Found, verified, loaded and removed here.

`save` writes them into a folder that no reader takes for a checkpoint; a commit record with every file's size
and checksum is added; then the folder gets its name.
"""

import functools
import math
import os
import shutil
import stat
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed

from sparsekd.trainer.run.errors import CheckpointError, UserError
from sparsekd.trainer.run.ranks import Ranks, gather, on_first
from sparsekd.trainer.run.stop import StopWatch
from sparsekd.trainer.run.waiting import patiently
from sparsekd.trainer.state.record import (
    COMMIT_NAME,
    ENGINE_FOLDER,
    Commit,
    FileRecord,
    is_loaded,
    read_commit,
    step_name,
)

CONVERTED_SUFFIX = ".tmp-universal"
"""Ends the name of a checkpoint that was converted for another number of ranks."""

_BLOCK_BYTES = 1 << 24


def published(folder: Path) -> list[Path]:
    """The published checkpoints in a run's `checkpoints` folder, oldest first. Not yet verified."""
    names = folder.glob("step-" + "[0-9]" * 8)
    # Whatever has the record's name: what is no file is for `verify` to tell.
    return sorted(path for path in names if os.path.lexists(path / COMMIT_NAME))


def make_way(final: Path) -> None:
    """Takes the name from a checkpoint of the same step, which was damaged or older; `prune` removes it."""
    try:
        _set_aside(final)
    except OSError as error:
        raise UserError(
            f"{final} is in the way of a new checkpoint and cannot be moved ({error.strerror or error}); "
            "remove it by hand, then run the same command again: it goes on from the newest sound checkpoint."
        ) from error


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> None:
    """Brings weights and optimizer state of a checkpoint of the same world size into the engine.

    Raises:
        CheckpointError: DeepSpeed found nothing to load.
    """
    path, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE_FOLDER, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(f"DeepSpeed finds nothing to load in {checkpoint}; use an older checkpoint.")


def verify(checkpoint: Path, here: Ranks, watch: StopWatch | None = None) -> str | None:
    """What is wrong with a checkpoint, on every rank; None if its record is sound and its files fit it.

    The files are shared out over the ranks, each of which reads its part once, however long that takes.

    Raises:
        StopAsked: `watch` was asked meanwhile.
    """
    read = functools.partial(_problem_of_share, checkpoint, here)
    problems = gather(here, patiently(here, read, watch))
    return next((problem for problem in problems if problem is not None), None)


def _problem_of_share(checkpoint: Path, here: Ranks) -> str | None:
    try:
        commit = read_commit(checkpoint)
    except CheckpointError as error:
        return str(error).removesuffix(".")
    problem = problem_of_share(checkpoint, commit.files, here)
    return problem or (_foreign(checkpoint, commit) if here.is_first else None)


def problem_of_share(folder: Path, files: Mapping[str, FileRecord], here: Ranks) -> str | None:
    """What is wrong with this rank's share of files that must be as a record says; None where nothing is."""
    names = sorted(files)[here.rank :: here.world_size]
    problems = (_problem_of(folder, name, files[name]) for name in names)
    return next((problem for problem in problems if problem is not None), None)


def _problem_of(checkpoint: Path, name: str, wanted: FileRecord) -> str | None:
    path = checkpoint / name
    try:
        status = path.lstat()
        # A link leads out of the checkpoint, and at a FIFO one would wait for ever.
        folder = os.path.join(os.path.realpath(checkpoint), os.path.dirname(name))
        if not stat.S_ISREG(status.st_mode) or os.path.realpath(path.parent) != folder:
            return f"{path} is a link, a folder or the like where a file of the checkpoint belongs"
        if status.st_size != wanted.bytes:
            return f"{path} has {status.st_size} bytes, expected {wanted.bytes}"
        if crc32_of(path) != wanted.crc32:
            return f"{path} does not match its recorded checksum"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    return None


def _foreign(checkpoint: Path, commit: Commit) -> str | None:
    """A file that nobody checked and that loading would take for one of the checkpoint's."""
    for folder, _, names in os.walk(checkpoint / ENGINE_FOLDER):
        for name in names:
            path = Path(folder, name)
            if is_loaded(name) and path.relative_to(checkpoint).as_posix() not in commit.files:
                return f"{path} is not in the checkpoint's record"
    return None


def newest_verified(
    folder: Path, here: Ranks, watch: StopWatch | None = None
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as recorded, and what is wrong with newer ones.

    Every rank gets the first rank's view of the folder, so that none waits for another.

    Raises:
        StopAsked: `watch` was asked meanwhile.
    """
    names = on_first(here, lambda: [path.name for path in published(folder)])
    problems: list[str] = []
    for name in reversed(names):
        problem = verify(folder / name, here, watch)
        if problem is None:
            return folder / name, problems
        problems.append(problem)
    return None, problems


def step_of(checkpoint: Path) -> int:
    """The step of a published checkpoint, as its folder is named."""
    return int(checkpoint.name.removeprefix("step-"))


@dataclass(frozen=True)
class Kept:
    """Which sound checkpoints stay."""

    newest: int
    every: int = 0
    """Steps whose multiples stay for good; 0 for none."""
    best: int = 0
    """So many with the least held-out loss, of those that have one."""
    losses: Mapping[int, float] = field(default_factory=dict)
    """Held-out losses by step: of evaluations that were made up for after the checkpoint was written."""

    def of(self, sound: Sequence[Path]) -> set[Path]:
        """Those of the given ones, oldest first, that stay."""
        stay = set(sound[-self.newest :])
        if self.every:
            stay |= {path for path in sound if step_of(path) % self.every == 0}
        losses = {path: self._loss(path) for path in sound} if self.best else {}
        measured = [path for path, loss in losses.items() if loss is not None and math.isfinite(loss)]
        measured.sort(key=lambda path: (losses[path], path.name))
        return stay | set(measured[: self.best])

    def _loss(self, checkpoint: Path) -> float | None:
        """A checkpoint's held-out loss; None where it was not measured, or its record is damaged by now."""
        try:
            recorded = read_commit(checkpoint).heldout_loss
        except CheckpointError:
            return None
        return self.losses.get(step_of(checkpoint)) if recorded is None else recorded


def prune(folder: Path, *, step: int, after: int, keep: Kept) -> dict[Path, str]:
    """Removes checkpoints that need not stay, and what broken-off runs left behind. First rank only.

    Args:
        folder: The run's `checkpoints` folder.
        step: The checkpoint that was just written.
        after: The one that this process wrote before, or went on from (0 for none). Others beyond it were
            found damaged then: they must not crowd out sound ones.
        keep: Which of the sound ones stay.

    Returns:
        What could not be removed, with the reason. It is tried again at every call.
    """
    found = published(folder)
    sound = [path for path in found if path.name <= step_name(after) or path.name == step_name(step)]
    stay = keep.of(sound)
    doomed = [path for path in found if path not in stay]
    problems: dict[Path, str] = {}
    for path in (*folder.glob(".step-*.tmp-*"), *doomed):
        left = path
        try:
            if path in doomed:
                left = _set_aside(path)
            shutil.rmtree(left)
        except OSError as error:
            if os.path.lexists(left):
                problems[left] = error.strerror or str(error)
    return problems


def clear_leftovers(folder: Path) -> None:
    """Removes what a broken-off save left behind; a finished conversion for other ranks stays of use.

    What cannot be removed is for `prune` to tell.
    """
    for leftover in folder.glob(".step-*.tmp-*"):
        if not leftover.name.endswith(CONVERTED_SUFFIX):
            shutil.rmtree(leftover, ignore_errors=True)


def _set_aside(checkpoint: Path) -> Path:
    """Takes a published checkpoint's name from it, so that no reader sees half of it; returns the new one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.tmp-discarded-{uuid.uuid4().hex[:12]}")
    os.rename(checkpoint, doomed)
    return doomed


def crc32_of(path: Path) -> int:
    """The crc32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value
