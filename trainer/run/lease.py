"""A lease: a file that says who works at a place, told without trusting any machine's clock.

It comes into its place whole, never over another, and is touched again and again by whoever holds it. One
that has not been touched for long, as the file system's own times say, or whose process is known to be dead,
is taken over. A holder that was only asleep finds out when it reads the file again; so a lease saves work,
and alone keeps nothing safe.
"""

import contextlib
import errno
import json
import os
import stat
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.typed_json import Count, parse_json, typed
from sparsekd.trainer.run.process import Process, life_of, this_process

SECONDS_BETWEEN_BEATS = 15.0
STALE_SECONDS = 150.0
"""Ten missed beats. NFS shows a file's time up to a minute late."""

MOST_BYTES = 4096
TRIES = 16


@dataclass(frozen=True)
class Job:
    """A start of a job, as Slurm counts them; an empty name where there is none."""

    name: str
    restart: Count

    @staticmethod
    def of_environment(environment: Mapping[str, str]) -> "Job":
        restart = environment.get("SLURM_RESTART_COUNT", "0")
        return Job(
            environment.get("SLURM_JOB_ID", "")[:40],
            int(restart) if restart.isascii() and restart.isdigit() else 0,
        )


@dataclass(frozen=True)
class Holder:
    """Who holds a lease; the token is this holding's alone."""

    process: Process
    job: Job
    token: str

    @staticmethod
    def of_this_process(environment: Mapping[str, str], token: str | None = None) -> "Holder":
        return Holder(this_process(), Job.of_environment(environment), token or uuid.uuid4().hex)

    def written(self) -> bytes:
        """What a lease of this holder contains."""
        return (json.dumps(asdict(self)) + "\n").encode()


@dataclass(frozen=True)
class Found:
    """A lease's file as it was read."""

    data: bytes
    modified: int  # nanoseconds, by the file system's clock
    holder: Holder | None  # None where the file says nothing that can be read

    @staticmethod
    def of(data: bytes, modified: int, name: str) -> "Found":
        """What the bytes of a lease of this name say."""
        try:
            return Found(data, modified, typed(Holder, parse_json(data, name), name))
        except StoreError:
            return Found(data, modified, None)

    def who(self) -> str:
        if self.holder is None:
            return "a job that cannot be read from it"
        job = self.holder.job
        return str(self.holder.process) + (
            f" (Slurm job {job.name}, start {job.restart})" if job.name else ""
        )


class HeldError(Exception):
    """A lease is another's, who may live.

    Args:
        found: Its file; None where it changed hands whenever it was looked at.
        age: Seconds since its last sign of life.
    """

    def __init__(self, found: Found | None, age: float) -> None:
        super().__init__(found.who() if found is not None else "several")
        self.found, self.age = found, age


class UnreadableError(OSError):
    """A lease's file cannot be read."""


class NoFileError(UnreadableError):
    """What has a lease's name is no file."""


class Lease:
    """A lease that is held, and kept alive by a thread until it is given back."""

    def __init__(self, place: Path, token: str) -> None:
        self.place, self.token = place, token
        self._ends = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._beats.start()

    def release(self) -> None:
        """Gives it back, unless it is another's by now."""
        self._ends.set()
        self._beats.join()
        if not is_anothers(self.place, self.token):
            # One that stays is of a dead process, which whoever comes next sees.
            with contextlib.suppress(OSError):
                self.place.unlink()

    def _beat(self) -> None:
        while not self._ends.wait(SECONDS_BETWEEN_BEATS):
            if is_anothers(self.place, self.token):
                return  # who took it over keeps it young
            with contextlib.suppress(OSError):  # the next beat may come through
                os.utime(self.place)


def take(place: Path, holder: Holder, now: Callable[[], int] | None = None) -> Lease:
    """Takes a lease that is free, or in place of a dead holder.

    Args:
        place: Of its file, in a folder that is there.
        holder: Who takes it.
        now: Gives the time as `now_at` does; None asks for it beside the file.

    Raises:
        HeldError: It is another's, who may live.
        UnreadableError: What has its name cannot be read.
        OSError: It cannot be written.
    """
    data = holder.written()
    for _ in range(TRIES):
        if _created(place, data):
            return Lease(place, holder.token)
        found = read(place)
        if found is not None:
            require_dead(found, holder.job, now or (lambda: now_at(place.parent, place.name)))
            _put_away(place, found)
    raise HeldError(None, 0.0)


def is_anothers(place: Path, token: str) -> bool:
    """Whether another holder has taken a lease over, as far as its file can be read."""
    try:
        found = read(place)
    except UnreadableError:
        return False
    return found is not None and not is_of(found, token)


def is_of(found: Found, token: str) -> bool:
    """Whether a lease is the holding with this token."""
    return found.holder is not None and found.holder.token == token


def read(place: Path) -> Found | None:
    """A lease's file, with its time as the file system has it now; None where there is none.

    Raises:
        NoFileError: It is no file.
        UnreadableError: It cannot be read.
    """
    try:
        # Opened, so that a network file system asks its server; at a FIFO one would wait for ever.
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise NoFileError(errno.EINVAL, "it is no file")
            data, modified = os.read(descriptor, MOST_BYTES), status.st_mtime_ns
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except UnreadableError:
        raise
    except OSError as error:
        if error.errno == errno.ESTALE:  # NFS: another machine has removed it while it was open here
            return None
        raise UnreadableError(error.errno, error.strerror or str(error)) from error
    return Found.of(data, modified, place.name)


def now_at(folder: Path, name: str) -> int:
    """The time, in nanoseconds, by the clock that gives files in this folder theirs.

    Args:
        folder: Where a file is made for it.
        name: That the file's own begins with, behind a dot.

    Raises:
        OSError: None can be made there.
    """
    probe = folder / f".{name}.now-{uuid.uuid4().hex[:12]}"
    try:
        with probe.open("xb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    finally:
        probe.unlink(missing_ok=True)


def _created(place: Path, data: bytes) -> bool:
    """Creates a lease's file, whole from its first moment on, unless there is one.

    One that is created and filled afterwards names nobody where its maker is killed in between, and only its
    age could tell that it is free.
    """
    if os.path.lexists(place):
        return False
    whole = place.with_name(f".{place.name}.new-{uuid.uuid4().hex[:12]}")
    try:
        whole.write_bytes(data)
        try:
            os.link(whole, place)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return _created_in_place(place, data)
        return True
    finally:
        whole.unlink(missing_ok=True)


def _created_in_place(place: Path, data: bytes) -> bool:
    """Creates a lease's file and fills it, unless there is one."""
    try:
        with place.open("xb") as file:
            try:
                file.write(data)
                file.flush()
            except OSError:
                place.unlink(missing_ok=True)  # half of it would be a holder that cannot be read
                raise
    except FileExistsError:
        return False
    return True


def require_dead(found: Found, job: Job, now: Callable[[], int]) -> None:
    """Checks that a holder is known to be dead, or has given no sign of life for long.

    Raises:
        HeldError: It may live.
    """
    holder = found.holder
    if holder is not None:
        if life_of(holder.process) == "dead":
            return
        # Slurm starts a job again only after it has ended all of it.
        if job.name and holder.job.name == job.name and holder.job.restart < job.restart:
            return
    age = (now() - found.modified) / 1e9
    if age <= STALE_SECONDS:
        raise HeldError(found, age)


def _put_away(place: Path, judged: Found) -> None:
    """Takes a dead holder's file out of the way; one that has come alive, or another's, is put back."""
    aside = place.with_name(f".{place.name}.gone-{uuid.uuid4().hex[:12]}")
    try:
        os.rename(place, aside)
    except FileNotFoundError:
        return  # another was quicker
    try:
        taken = read(aside)
        if taken is not None and (taken.data, taken.modified) != (judged.data, judged.modified):
            with contextlib.suppress(OSError):
                os.link(aside, place)  # never over a newer one
    finally:
        aside.unlink(missing_ok=True)
