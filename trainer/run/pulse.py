"""Each rank's sign of life: where it stands, in a small file of its own that is rewritten as it goes on.

After a failure the files of all ranks tell who died or hangs, and where. Nothing is flushed to the disk: what
a killed process wrote is there for others on its machine at once, and elsewhere with the next beat.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.typed_json import Count, parse_json, typed
from sparsekd.trainer.run.errors import writing
from sparsekd.trainer.run.process import Process, life_of

SECONDS_BETWEEN_BEATS = 5.0
_BEATS_MISSED = 3
_BYTES = 256

Phase = Literal["start", "read", "step", "log", "evaluate", "save", "convert", "left", "failed"]


@dataclass(frozen=True)
class Stand:
    """Where a rank stands: the step that it works on, and what it does."""

    step: Count
    phase: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


@dataclass(frozen=True)
class Lost:
    """A rank that is dead or hangs."""

    rank: int
    process: Process
    stand: Stand | None
    how: str

    def __str__(self) -> str:
        where = f", last seen in {self.stand}" if self.stand is not None else ""
        return f"rank {self.rank} ({self.process}{where}) {self.how}"


class Pulse:
    """This rank's file, rewritten at each phase and touched by a thread; use it in a `with` block.

    Args:
        folder: Of all ranks' files.
        rank: This one.
        processes: Of all ranks, in their order.

    Raises:
        UserError: The file cannot be made.
    """

    def __init__(self, folder: Path, rank: int, processes: Sequence[Process]) -> None:
        self._folder, self._rank, self._processes = folder, rank, processes
        path = _place(folder, rank)
        with writing(path):
            self._file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        self.stand = Stand(0, "start")
        self.changed = time.monotonic()
        """Clock of the last change of phase, in seconds."""
        self._write()
        self._ends = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._beats.start()

    def __enter__(self) -> "Pulse":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A rank whose connections broke leaves, too, without being the one that failed.
        if self.stand.phase != "failed":
            self.at(self.stand.step, "left")
        self._ends.set()
        self._beats.join()
        os.close(self._file)

    def at(self, step: int, phase: Phase) -> None:
        """Tells where this rank stands: one write to the operating system's memory."""
        self.stand, self.changed = Stand(step, phase), time.monotonic()
        self._write()

    def _write(self) -> None:
        text = json.dumps({"step": self.stand.step, "phase": self.stand.phase})
        with contextlib.suppress(OSError):  # a full disk: the run's own files say so
            os.pwrite(self._file, text.ljust(_BYTES - 1).encode() + b"\n", 0)

    def _beat(self) -> None:
        while not self._ends.wait(SECONDS_BETWEEN_BEATS):
            with contextlib.suppress(OSError):  # the next beat may come through
                os.utime(self._file)

    def lost(self) -> list[Lost]:
        """The ranks known to be dead or stopped, or without a sign of life; nobody is asked or waited for."""
        return [lost for rank in range(len(self._processes)) if (lost := self._lost(rank)) is not None]

    def dead_here(self) -> list[Lost]:
        """Those of this machine that are dead without having left, which is certain.

        It is asked all the time: of ranks on other machines no file is read.
        """
        machine = self._processes[self._rank].machine
        here = [rank for rank, process in enumerate(self._processes) if process.machine == machine]
        return [lost for rank in here if (lost := self._lost(rank)) is not None and lost.how == DIED]

    def last(self) -> list[Lost]:
        """The ranks that stand furthest behind the others, where not all stand at one place."""
        stands = {rank: _stand(self._folder, rank)[0] for rank in range(len(self._processes))}
        steps = {rank: stand.step for rank, stand in stands.items() if stand is not None}
        least = min(steps.values(), default=0)
        behind = [rank for rank, step in steps.items() if step == least]
        if len(behind) in (0, len(steps)):
            return []
        return [Lost(rank, self._processes[rank], stands[rank], "is furthest behind") for rank in behind]

    def _lost(self, rank: int) -> Lost | None:
        if rank == self._rank:
            return None
        process = self._processes[rank]
        stand, modified = _stand(self._folder, rank)
        if stand is not None and stand.phase in ("left", "failed"):
            return None
        life = life_of(process)
        if life == "dead":
            return Lost(rank, process, stand, DIED)
        if life == "stopped":
            return Lost(rank, process, stand, "is stopped (SIGSTOP, a debugger, or a suspended machine)")
        if life == "unknown" and stand is not None:
            mine = _stand(self._folder, self._rank)[1]
            silent = (mine - modified) / 1e9
            if silent > (_BEATS_MISSED + 1) * SECONDS_BETWEEN_BEATS:
                return Lost(rank, process, stand, f"gives no sign of life since {silent:.0f} s")
        return None


DIED = "died without a word, as by SIGKILL, a crash, or the kernel for want of memory"


def _place(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.pulse"


def _stand(folder: Path, rank: int) -> tuple[Stand | None, int]:
    """What a rank's file says, and when it was touched, in nanoseconds by the file system's clock."""
    try:
        with _place(folder, rank).open("rb") as file:
            data, modified = file.read(_BYTES), os.fstat(file.fileno()).st_mtime_ns
        return typed(Stand, parse_json(data, "a pulse"), "a pulse"), modified
    except (OSError, StoreError):  # not there yet, or written at this moment
        return None, 0


def clear(folder: Path) -> Iterator[Path]:
    """The files of an earlier start, which had other ranks."""
    yield from folder.glob("rank_*.pulse")
