"""Checkpoints that are whole or not there: written to a temporary folder, then published by one rename.

DeepSpeed writes files under their final names, and its pointer to the latest checkpoint before the other
ranks are done. So it writes into a folder that no reader takes for a checkpoint; a commit record with every
file's size and checksum is added; then the folder gets its name.
"""

import functools
import io
import os
import shutil
import stat
import uuid
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from sparsekd.trainer.run.errors import CheckpointError, UserError, writing
from sparsekd.trainer.run.ranks import Ranks, agree, broadcast_object, together
from sparsekd.trainer.state.record import (
    COMMIT_NAME,
    ENGINE_FOLDER,
    Commit,
    FileRecord,
    commit_bytes,
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


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, commit: Commit, here: Ranks) -> Path:
    """Writes and publishes a checkpoint; every rank calls it. Returns the published folder.

    Where a rank cannot write, all leave, nothing is published, and what was written is removed.

    Args:
        engine: The engine, between two optimizer steps.
        folder: The run's `checkpoints` folder.
        commit: The record; its `files` are filled in here.
        here: This rank.

    Raises:
        UserError: The disk is full or fails (on the first rank; the others exit).
        CheckpointError: DeepSpeed has not written what loading needs (as above).
    """
    token = uuid.uuid4().hex[:12]
    working = folder / broadcast_object(f".{step_name(commit.step)}.tmp-{token}")
    final = folder / step_name(commit.step)
    try:
        _write_engine(engine, working, here)
        names = _share(_file_names(working), here)
        listed = _gathered(together(here, lambda: _checked_in(working, names)))
        record = replace(commit, files=dict(sorted(listed.items())))
        together(here, functools.partial(_publish, working, final, record, here))
    except BaseException:
        # However it was broken off: half a checkpoint takes the room that the next try needs.
        if here.is_first:
            shutil.rmtree(working, ignore_errors=True)
        raise
    return final


def _write_engine(engine: deepspeed.DeepSpeedEngine, working: Path, here: Ranks) -> None:
    """DeepSpeed's part. A rank that cannot write still takes part in DeepSpeed's collectives, and all ranks
    leave after them: none is left waiting."""

    def make_folder() -> None:
        with writing(working.parent):
            # Not its parents: a run folder that was removed is not made anew, without its metrics.
            for folder in (working, working / ENGINE_FOLDER):
                folder.mkdir(exist_ok=True)

    together(here, make_folder)
    writer, problems = engine.checkpoint_engine, []

    def write_or_note(state_dict: Any, path: str) -> None:
        try:
            with writing(working.parent):
                torch_save(state_dict, Path(path))
        except UserError as error:
            problems.append(error)

    def raise_problem() -> None:
        if problems:
            raise problems[0]

    writer.save = write_or_note
    try:
        engine.save_checkpoint(str(working), tag=ENGINE_FOLDER, save_latest=False)
    finally:
        del writer.save  # the class's own again
    together(here, raise_problem)


def torch_save(value: Any, path: Path) -> None:
    """torch.save whose failed writes are OSErrors, as those of any file.

    By a path torch writes through a stream of C++, which says of a full disk what the moment gives
    ("unexpected pos", "iostream error", "Parent directory does not exist") and never why.

    Raises:
        OSError: The disk is full or fails, or the place may not be written.
    """
    file = _Written(path)
    try:
        with file:
            torch.save(value, file)
    except RuntimeError:
        if file.failure is not None:
            raise file.failure from None
        raise


class _Written(io.BufferedWriter):
    """A new file that keeps its first failed write: torch's zip writer raises an error of its own instead."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as failure:
            self.failure = self.failure or failure
            raise


def _publish(working: Path, final: Path, record: Commit, here: Ranks) -> None:
    if not here.is_first:
        return
    data = commit_bytes(record, final)
    with writing(final.parent):
        _write_durably(working / COMMIT_NAME, data)
        for inner in (working, *(path for path in working.rglob("*") if path.is_dir())):
            _sync_folder(inner)
        if os.path.lexists(final):
            _make_way(final)
        os.rename(working, final)
        _sync_folder(final.parent)


def _make_way(final: Path) -> None:
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


def verify(checkpoint: Path, here: Ranks) -> str | None:
    """What is wrong with a checkpoint, on every rank; None if its record is sound and its files fit it.

    The files are shared out over the ranks, each of which reads its part once.
    """
    try:
        commit = read_commit(checkpoint)
    except CheckpointError as error:
        return agree(str(error).removesuffix("."))
    names = _share(sorted(commit.files), here)
    problems = (_problem_of(checkpoint, name, commit.files[name]) for name in names)
    problem = next((problem for problem in problems if problem is not None), None)
    return agree(problem or (_foreign(checkpoint, commit) if here.is_first else None))


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
        if _crc32(path) != wanted.crc32:
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


def newest_verified(folder: Path, here: Ranks) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as recorded, and what is wrong with newer ones.

    Every rank gets the first rank's view of the folder, so that none waits for another.
    """
    names = broadcast_object([path.name for path in published(folder)])
    problems: list[str] = []
    for name in reversed(names):
        problem = verify(folder / name, here)
        if problem is None:
            return folder / name, problems
        problems.append(problem)
    return None, problems


def prune(folder: Path, *, step: int, after: int, keep: int) -> dict[Path, str]:
    """Removes all but the newest checkpoints, and what broken-off runs left behind. First rank only.

    Args:
        folder: The run's `checkpoints` folder.
        step: The checkpoint that was just written.
        after: The one that this process wrote before, or went on from (0 for none). Others beyond it were
            found damaged then: they must not crowd out sound ones.
        keep: Sound checkpoints to keep.

    Returns:
        What could not be removed, with the reason. It is tried again at every call.
    """
    found = published(folder)
    sound = [path for path in found if path.name <= step_name(after) or path.name == step_name(step)]
    doomed = [path for path in found if path not in sound[-keep:]]
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


def _share(names: list[str], here: Ranks) -> list[str]:
    return names[here.rank :: here.world_size]


def _file_names(folder: Path) -> list[str]:
    """Files below the folder, as the first rank sees them."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return broadcast_object(found)


def _checked_in(folder: Path, names: list[str]) -> dict[str, FileRecord]:
    """Makes files durable and measures them."""
    measured = {}
    for name in names:
        path = folder / name
        with writing(folder.parent):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            measured[name] = FileRecord(path.stat().st_size, _crc32(path))
    return measured


def _gathered(part: dict[str, FileRecord]) -> dict[str, FileRecord]:
    parts: list[dict[str, FileRecord]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, part)
    return {name: entry for found in parts for name, entry in found.items()}


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
