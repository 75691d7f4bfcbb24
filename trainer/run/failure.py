"""How a job that fails says so: once, naming the rank that is to blame, and without waiting for the dead.

An error of a broken connection names the survivor. So a rank that fails so looks who is gone first; and a
thread looks all the time, since with NCCL the survivors of a dead rank just wait.
"""

import contextlib
import faulthandler
import json
import logging
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsekd.trainer.run.errors import OwnerError, RankLostError, UserError
from sparsekd.trainer.run.lost import is_of_connections
from sparsekd.trainer.run.owner import Claim
from sparsekd.trainer.run.pulse import Lost, Pulse
from sparsekd.trainer.run.ranks import Ranks, is_sentence

FAILED_NAME = "FAILED.json"
_ROOM_NAME = f".{FAILED_NAME}.room"
_ROOM_BYTES = 32_768
_MOST_BYTES = 1 << 20

# Beats of a rank on another machine go missing for so long before it is named; one on this machine is known.
_SECONDS_HERE, _SECONDS_ELSEWHERE = 5.0, 30.0
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_FOR_ITS_OWN_RECORD = 2.0
_SECONDS_AFTER_ANOTHERS = 20.0

_STALL_STEPS = 10
_STALL_SECONDS = 120.0
_SECONDS_OF_A_START = 600.0
"""A rank that takes so many median steps for one phase, and so long, is worth a look at its stack."""


def make_room(folder: Path) -> None:
    """Keeps room for the record of a failure, which a full disk may be.

    Raises:
        OSError: The disk is full already.
    """
    (folder / _ROOM_NAME).write_bytes(b" " * _ROOM_BYTES)


def remove_room(folder: Path) -> None:
    """Gives the room back, at an end that is no failure."""
    (folder / _ROOM_NAME).unlink(missing_ok=True)


class FailureWatch:
    """Records the first failure of a job, and watches for those that nobody reports.

    Args:
        folder: The run folder.
        here: This rank.
        pulse: Its sign of life, and what it knows of the others'.
        claim: Of this job to the folder.
    """

    def __init__(self, folder: Path, here: Ranks, pulse: Pulse, claim: Claim) -> None:
        self._folder, self._here, self._pulse, self._claim = folder, here, pulse, claim
        self._reports = threading.Lock()
        self._seconds: deque[float] = deque(maxlen=101)  # of the last steps
        self._stall_said = 0.0
        self._has_reported = False
        self._told: Exception | None = None
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failures", daemon=True)

    def __enter__(self) -> "FailureWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def step_took(self, seconds: float) -> None:
        """How long a step took, of which the watch knows what is long."""
        self._seconds.append(seconds)

    def report(self, error: Exception) -> Exception:
        """Records a failure of this rank, or the rank that is to blame for it.

        Returns:
            What to raise: the error; a sentence of it; or one that names another rank.

        Raises:
            SystemExit: With 2, where another rank's record says it.
        """
        with self._reports:
            if error is self._told:  # it comes by again, further out
                return error
            # From here on the main thread leaves by itself, with the sentence.
            self._has_reported = True
            if self._here.world_size > 1 and _may_be_anothers(error):
                try:
                    self._blame_another(error)
                except RankLostError as lost:
                    self._told = lost
                    return lost
            if isinstance(error, OwnerError):
                return error  # the folder is another job's, and so would be the record
            told = _out_of_memory(error) or error
            self._pulse.at(self._pulse.stand.step, "failed")
            blamed = error.rank if isinstance(error, RankLostError) else None
            record = self._record(self._here.rank if blamed is None else blamed, error, str(told))
            if not self._write(record | {"traceback": "".join(traceback.format_exception(error))}):
                raise SystemExit(2)
            self._told = told
            return told

    def _blame_another(self, error: Exception) -> None:
        """Finds out whether another rank is why this one failed.

        Raises:
            RankLostError: One is; this rank has written the record.
            SystemExit: With 2: it is said already.
        """
        here_only = len({process.machine for process in self._here.processes}) == 1
        deadline = time.monotonic() + (_SECONDS_HERE if here_only else _SECONDS_ELSEWHERE)
        while time.monotonic() < deadline:
            if self._is_said():
                raise SystemExit(2)
            if lost := self._pulse.lost():
                raise self._lost(lost, error)
            time.sleep(0.1)
        if ("imed out" in str(error) or "imeout" in str(error)) and (lost := self._pulse.last()):
            raise self._lost(lost, error)
        if is_of_connections(error):
            raise self._cut_off(error)

    def _cut_off(self, error: Exception) -> BaseException:
        """The record of a connection that broke though nobody died; returns what to raise."""
        processes, rank = self._here.processes, self._here.rank
        who = f"Rank {rank}" + (f" ({processes[rank]})" if processes else "")
        hosts = ", ".join(sorted({process.host for process in processes}))
        first = (str(error).strip().splitlines() or [""])[0][:200]
        told = RankLostError(
            f"{who} cannot speak with the others any more, in {self._pulse.stand} ({first}), though no rank "
            f"is known to be dead: look at the network between {hosts}. The same command goes on from the "
            "newest checkpoint."
        )
        self._pulse.at(self._pulse.stand.step, "failed")
        record = self._record(rank, told, str(told))
        traces = "".join(traceback.format_exception(error))
        return told if self._write(record | {"traceback": traces}) else SystemExit(2)

    def _lost(self, lost: list[Lost], error: Exception | None) -> BaseException:
        """The record of lost ranks is written; returns what to raise."""
        first = lost[0]
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        told = RankLostError(
            f"{str(first)[0].upper()}{str(first)[1:]}{more}; the other ranks cannot go on without it. The "
            "same command goes on from the newest checkpoint."
        )
        self._pulse.at(self._pulse.stand.step, "failed")
        record = self._record(first.rank, told, str(told)) | {
            "noticed_by": self._here.rank,
            "noticed_as": None if error is None else "".join(traceback.format_exception(error)),
        }
        return told if self._write(record) else SystemExit(2)

    def _record(self, rank: int, error: Exception, message: str) -> dict[str, Any]:
        process = self._here.processes[rank] if self._here.processes else None
        stand = self._pulse.stand
        return {
            "rank": rank,
            "host": process.host if process else "",
            "pid": process.pid if process else os.getpid(),
            "step": stand.step,
            "error": type(error).__name__,
            "message": message,
            "start": self._claim.token,
        }

    def _is_said(self) -> bool:
        """Whether a failure of this start is recorded. A record of another start, which took the folder over
        or lost it and found out late, ends nobody here."""
        try:
            # Opened, so that a network file system asks its server.
            with (self._folder / FAILED_NAME).open("rb") as file:
                record = json.loads(file.read(_MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(record, dict) and record.get("start") == self._claim.token

    def _write(self, record: dict[str, Any]) -> bool:
        """Writes the record of a failure; False where there is one already."""
        logging.getLogger(__name__).error("%s", record["message"])
        if self._claim.is_anothers():  # and so would be the record
            return True
        try:
            # One of another start, which found out late.
            if (self._folder / FAILED_NAME).exists() and not self._is_said():
                (self._folder / FAILED_NAME).unlink(missing_ok=True)
            return _written(self._folder, record, self._here.rank)
        except OSError as problem:  # a folder that was removed: the error itself still goes up
            logging.getLogger(__name__).error("%s cannot be written: %s", FAILED_NAME, problem)
            return True

    def _watch(self) -> None:
        others_since: float | None = None
        while not self._ends.wait(_SECONDS_BETWEEN_LOOKS):
            self._look_for_stall()
            if self._is_said():
                others_since = others_since or time.monotonic()
                if time.monotonic() - others_since > _SECONDS_AFTER_ANOTHERS:
                    self._leave(None)
            elif self._here.world_size > 1 and self._pulse.dead_here():
                # It may have failed in a way of its own, and its record shows in a moment.
                if self._ends.wait(_SECONDS_FOR_ITS_OWN_RECORD):
                    return
                lost = self._pulse.dead_here()
                if lost and not self._is_said():
                    self._leave(lost)

    def _leave(self, lost: list[Lost] | None) -> None:
        """Ends this process from beside its main thread, which may wait for the dead for ever."""
        if not self._reports.acquire(timeout=_SECONDS_AFTER_ANOTHERS):
            return
        if self._has_reported:
            self._reports.release()
            return
        told = self._lost(lost, None) if lost else None
        # Nobody may read any more, or it is closed: the record in the folder tells.
        with contextlib.suppress(OSError, ValueError):
            if isinstance(told, UserError):
                print(f"sparsekd train: rank {self._here.rank}: {told}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(2)

    def _look_for_stall(self) -> None:
        since = time.monotonic() - self._pulse.changed
        usual = statistics.median(self._seconds) if self._seconds else None
        limit = _SECONDS_OF_A_START if usual is None else max(_STALL_SECONDS, _STALL_STEPS * usual)
        if since < limit or self._stall_said == self._pulse.changed:
            return
        self._stall_said = self._pulse.changed
        stacks = self._folder / "logs" / f"rank_{self._here.rank}.stacks"
        # On a full disk the line below is all there is.
        with contextlib.suppress(OSError), stacks.open("a") as file:
            file.write(f"{time.strftime('%F %T')}: {since:.0f} s in {self._pulse.stand}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if self._here.is_first:
            found = self._pulse.lost() or self._pulse.last()
            who = f"; {found[0]}" if found else ""
            long = "" if usual is None else f", where a step takes {usual:.1f} s"
            print(
                f"warning: {since:.0f} s in {self._pulse.stand}{long}{who}; the stacks of all ranks are in "
                f"{stacks.parent}",
                flush=True,
            )


@contextmanager
def failures_recorded(folder: Path, here: Ranks, pulse: Pulse, claim: Claim) -> Iterator[FailureWatch]:
    """Writes the first failure of a job to FAILED.json, naming the rank that is to blame.

    Raises:
        RankLostError: Another rank died or hangs, and no other survivor has said it before.
        SystemExit: With code 2, where another rank has failed before and says why.
        UserError: Memory ran out: the keys that help.
        Exception: Whatever else was raised inside.
    """
    with FailureWatch(folder, here, pulse, claim) as watch:
        try:
            yield watch
        except Exception as error:  # whatever it is, the record of it is all that outlives the job
            told = watch.report(error)
            if told is error:
                raise
            raise told from error


@contextmanager
def told_first(watch: FailureWatch, let_go: Callable[[], None]) -> Iterator[None]:
    """Records a failure before anything waits on its way out, as for a checkpoint that is being written.

    Args:
        watch: Of `failures_recorded`, further out, which passes on what was told here.
        let_go: Called however the block is left by an exception.
    """
    try:
        yield
    except Exception as error:  # as there
        try:
            told = watch.report(error)
        finally:
            let_go()
        if told is error:
            raise
        raise told from error
    except BaseException:  # an exit: no thread of the run goes on writing
        let_go()
        raise


def _may_be_anothers(error: Exception) -> bool:
    """Whether an error may be that of a connection which broke because of another rank."""
    if isinstance(error, RankLostError):  # it knows so, and perhaps another rank has said it
        return True
    return not is_sentence(error) and isinstance(error, RuntimeError) and _out_of_memory(error) is None


def _out_of_memory(error: Exception) -> UserError | None:
    """The sentence for an error of memory that ran out; None for another error."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "t allocate memory" not in text:
        return None
    first = (text.strip().splitlines() or [""])[0][:200]
    return UserError(
        f"Memory ran out ({first}). Lower train.micro_batch_rows or objective.memory_gib, or set "
        "student.activation_checkpointing=true, engine.zero_stage=3 or engine.offload=cpu; `sparsekd plan` "
        "shows what they come to, and the same command goes on from the newest checkpoint."
    )


def _end_of(text: str) -> str:
    """As much of a text as surely fits: a letter takes up to twelve bytes of JSON."""
    most = _ROOM_BYTES // 4
    text = text[-most:]
    while len(json.dumps(text)) > most:
        text = text[len(text) // 8 + 1 :]
    return text


def _written(folder: Path, record: dict[str, Any], rank: int) -> bool:
    """Writes the record where there is none, into the room that was kept for it if it is still there.

    Raises:
        OSError: It cannot be written.
    """
    place, own = folder / FAILED_NAME, folder / f".{FAILED_NAME}.rank_{rank}"
    record = {key: _end_of(value) if isinstance(value, str) else value for key, value in record.items()}
    data = (json.dumps(record, indent=1) + "\n").encode()
    try:
        os.rename(folder / _ROOM_NAME, own)
    except OSError:  # another rank has it
        own.touch()
    try:
        with own.open("r+b") as file:
            file.write(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        os.link(own, place)
    except FileExistsError:
        return False
    finally:
        own.unlink(missing_ok=True)
    return True
