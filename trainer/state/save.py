"""Saving: what the engine holds is copied to the host, and written behind the steps that follow.

Each rank writes, hashes and makes durable its own files, then a list of them. When every list is whole, the
first rank publishes the checkpoint by one rename. Threads wait for lists, never in a collective.
"""

import copy
import functools
import io
import json
import os
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from sparsekd.logit_store.typed_json import parse_json, read_bounded, typed
from sparsekd.trainer.run.errors import UserError, writing
from sparsekd.trainer.run.files import write_whole
from sparsekd.trainer.run.ranks import Ranks, on_first, together
from sparsekd.trainer.run.waiting import patiently
from sparsekd.trainer.state.checkpoint import make_way
from sparsekd.trainer.state.record import (
    COMMIT_NAME,
    ENGINE_FOLDER,
    RECORD_BYTES,
    Commit,
    FileRecord,
    commit_bytes,
    step_name,
)

_LISTS = "lists"
_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class _List:
    """What one rank has written."""

    files: dict[str, FileRecord]


class HostCopies:
    """Host memory for copies of tensors, kept from save to save: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._used = 0

    def of(self, value: Any) -> Any:
        """A copy of a tree of plain containers whose tensors lie on the host, and change with it no more.

        Tensors that are one and the same stay so. Copies are good until the next call.
        """
        self._used = 0
        copied = self._copied(value, {})
        if any(tensor.is_pinned() for tensor in self._kept):
            torch.cuda.synchronize()
        return copied

    def _copied(self, value: Any, known: dict[Any, Tensor]) -> Any:
        if isinstance(value, Tensor):
            where = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if value.numel() == 0:
                return value.detach().clone().cpu()
            if where not in known:
                known[where] = self._next(value).copy_(value.detach(), non_blocking=True)
            return known[where]
        if isinstance(value, dict):
            made = copy.copy(value)  # whatever kind of mapping it is
            made.clear()
            made.update({key: self._copied(item, known) for key, item in value.items()})
            return made
        if isinstance(value, list):
            return [self._copied(item, known) for item in value]
        if type(value) is tuple:
            return tuple(self._copied(item, known) for item in value)
        return copy.deepcopy(value)

    def _next(self, like: Tensor) -> Tensor:
        """Memory for one tensor: that of the last save, where the tree has not changed."""
        number, self._used = self._used, self._used + 1
        if number < len(self._kept):
            kept = self._kept[number]
            if kept.shape == like.shape and kept.dtype == like.dtype:
                return kept
        made = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
        self._kept[number:] = [made]
        return made


class Saver:
    """Writes a run's checkpoints, one at a time, behind the steps.

    Args:
        folder: The run's `checkpoints` folder.
        here: This rank.
        behind: Whether `begin` returns before the files are written.
        require_owner: Checks, before a checkpoint is published, that the folder is still this run's.
    """

    def __init__(
        self,
        folder: Path,
        here: Ranks,
        *,
        behind: bool,
        require_owner: Callable[[], None],
    ) -> None:
        self._folder, self._here, self._behind = folder, here, behind
        self._require_owner = require_owner
        self.seconds = 0.0
        """That the last checkpoint took to be written."""
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._has_written = threading.Event()  # this rank's own files, or failed to
        self._gives_up = threading.Event()

    def begin(
        self, engine: deepspeed.DeepSpeedEngine, commit: Commit, published: Callable[[Path, float], None]
    ) -> None:
        """Copies what the engine holds, and has it written; every rank calls it, between two optimizer steps.

        Where a rank cannot write, all leave at the latest in the next `begin` or `finish`; nothing is
        published, and what was written is removed.

        Args:
            engine: The engine.
            commit: The record; its `files` are filled in here.
            published: Called by a thread of the first rank, with the checkpoint's folder and the seconds it
                took.

        Raises:
            UserError: The disk is full or fails (on the first rank; the others exit).
            CheckpointError: DeepSpeed has not written what loading needs (as above).
        """
        self.finish()
        began = time.monotonic()
        name = f".{step_name(commit.step)}.tmp-{uuid.uuid4().hex[:12]}"
        working = self._folder / on_first(self._here, lambda: name)
        on_first(self._here, functools.partial(_make_folders, working))
        # Also where nothing runs beside the writing: torch.save writes all of the memory of which a tensor is
        # a part, and a GPU's tensor as one that belongs there. So files are alike, and take what `plan` says.
        files = self._copies.of(collected_files(engine, working))
        work = functools.partial(self._write, working, files, commit, published, began)
        self._has_written.clear()
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()
        if not self._behind:
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint in flight, if there is one; every rank calls it.

        Raises:
            UserError: It could not be written, for the reason that the message gives (as `begin`).
        """
        if self._thread is None:
            return
        try:
            together(self._here, patiently(self._here, self._own_files))
        except BaseException:
            self.abandon()  # a rank's list will never come
            raise
        together(self._here, patiently(self._here, self._whole))
        self._thread = None

    def abandon(self) -> None:
        """Lets go of the checkpoint in flight where the run fails, after a while: other ranks may be dead."""
        if self._thread is not None:
            self._thread.join(_SECONDS_TO_END)
        self._gives_up.set()
        if self._thread is not None:
            self._thread.join()

    def _own_files(self) -> None:
        """Waits for this rank's own files."""
        self._has_written.wait()
        self._raise_failure()

    def _whole(self) -> None:
        """Waits for the thread; on the first rank that is for the checkpoint's name, too."""
        if self._thread is not None:
            self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _write(
        self,
        working: Path,
        files: dict[str, Any],
        commit: Commit,
        published: Callable[[Path, float], None],
        began: float,
    ) -> None:
        """This rank's part, in a thread; on the first rank also the rest."""
        try:
            with writing(self._folder):
                written = _List({name: torch_save(value, working / name) for name, value in files.items()})
                _leave_list(working, self._here.rank, written)
        except BaseException as error:  # whatever it is, the main thread raises it
            self._failure = error
        self.seconds = time.monotonic() - began
        self._has_written.set()
        if not self._here.is_first:
            return
        try:
            final = self._publish(working, commit)
            self.seconds = time.monotonic() - began
            published(final, self.seconds)
        except BaseException as error:  # as above
            self._failure = self._failure or error
            # However it was broken off: half a checkpoint takes the room that the next try needs.
            shutil.rmtree(working, ignore_errors=True)

    def _publish(self, working: Path, commit: Commit) -> Path:
        lists = [self._list_of(working, rank) for rank in range(self._here.world_size)]
        listed = {name: entry for found in lists for name, entry in found.files.items()}
        record = replace(commit, files=dict(sorted(listed.items())))
        final = self._folder / step_name(commit.step)
        data = commit_bytes(record, final)
        self._require_owner()
        with writing(self._folder):
            shutil.rmtree(working / _LISTS)
            _write_durably(working / COMMIT_NAME, data)
            for inner in (working, *(path for path in working.rglob("*") if path.is_dir())):
                _sync_folder(inner)
            if os.path.lexists(final):
                make_way(final)
            os.rename(working, final)
            _sync_folder(self._folder)
        return final

    def _list_of(self, working: Path, rank: int) -> _List:
        """One rank's list, as soon as it is there."""
        place = _list_place(working, rank)
        while not place.exists():
            if self._gives_up.wait(_SECONDS_BETWEEN_LOOKS):
                raise UserError(f"{working} was given up: rank {rank} has not written its part.")
            if not working.exists():
                raise UserError(
                    f"{working} is not there: it was removed while this command ran; run the same command "
                    "again: it goes on from the newest checkpoint that is left."
                )
        return typed(_List, parse_json(read_bounded(place, RECORD_BYTES), str(place)), str(place))


def collected_files(engine: deepspeed.DeepSpeedEngine, working: Path) -> dict[str, Any]:
    """What this rank would write, by file: DeepSpeed's own saving, with its writer's hand held."""
    files: dict[str, Any] = {}
    writer = engine.checkpoint_engine
    writer.save = lambda state_dict, path: files.update(
        {Path(path).relative_to(working).as_posix(): state_dict}
    )
    try:
        engine.save_checkpoint(str(working), tag=ENGINE_FOLDER, save_latest=False)
    finally:
        del writer.save  # the class's own again
    return files


def _make_folders(working: Path) -> None:
    with writing(working.parent):
        # Not its parents: a run folder that was removed is not made anew, without its metrics.
        for folder in (working, working / ENGINE_FOLDER, working / _LISTS):
            folder.mkdir(exist_ok=True)


def torch_save(value: Any, path: Path) -> FileRecord:
    """torch.save, durably, whose failed writes are OSErrors, as those of any file.

    By a path torch writes through a stream of C++, which says of a full disk what the moment gives
    ("unexpected pos", "iostream error", "Parent directory does not exist") and never why.

    Raises:
        OSError: The disk is full or fails, or the place may not be written.
    """
    file = _Hashed(path)
    try:
        with file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError:
        if file.failure is not None:
            raise file.failure from None
        raise
    return FileRecord(file.bytes, file.crc32)


class _Hashed(io.BufferedWriter):
    """A new file that knows its length and crc32, and keeps its first failed write: torch's zip writer raises
    an error of its own instead. Writes come one behind the other."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.bytes = self.crc32 = 0
        self.failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError as failure:
            self.failure = self.failure or failure
            raise
        self.bytes += written
        self.crc32 = zlib.crc32(data, self.crc32)
        return written


def _list_place(working: Path, rank: int) -> Path:
    return working / _LISTS / f"rank_{rank}.json"


def _leave_list(working: Path, rank: int, written: _List) -> None:
    place = _list_place(working, rank)
    write_whole(place, json.dumps(asdict(written)))


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
