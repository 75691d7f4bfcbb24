"""Who trains in a run folder: one job at a time, told without trusting any machine's clock.

The owner's file is created exclusively and touched again and again. Whoever finds one that has not been
touched for long, as the file system's own times say, or whose process is known to be dead, takes the folder
over. An owner that was only asleep finds out before it writes: it reads the file again each time.
"""

import contextlib
import json
import os
import stat
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.typed_json import Count, parse_json, typed
from sparsekd.trainer.run.errors import OwnerError, UserError, writing
from sparsekd.trainer.run.process import Process, life_of, this_process
from sparsekd.trainer.run.ranks import Ranks

OWNER_NAME = "OWNER.json"
SECONDS_BETWEEN_BEATS = 15.0
STALE_SECONDS = 150.0
"""Ten missed beats. NFS shows a file's time up to a minute late."""

_MOST_BYTES = 4096
_TRIES = 16
_SECONDS_TO_SETTLE = 1.0


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
class _Holder:
    process: Process
    job: Job
    token: str


@dataclass(frozen=True)
class _Found:
    """An owner's file as it was read."""

    data: bytes
    modified: int  # nanoseconds, by the file system's clock
    holder: _Holder | None  # None where the file says nothing that can be read

    def who(self) -> str:
        if self.holder is None:
            return "a job that cannot be read from it"
        job = self.holder.job
        return str(self.holder.process) + (
            f" (Slurm job {job.name}, start {job.restart})" if job.name else ""
        )


@dataclass(frozen=True)
class Claim:
    """The claim of one start to a run folder: by it each rank knows whether the folder is still its job's.

    Args:
        place: Of the owner's file.
        token: Of this start alone.
    """

    place: Path
    token: str

    def require(self) -> None:
        """Checks that the folder is still this job's own; called before anything in it is changed.

        Raises:
            OwnerError: Another job has taken it over, or the folder was removed.
        UserError: The owner's file cannot be read.
        """
        found = _read(self.place)
        if found is None:
            raise OwnerError(
                f"{self.place if self.place.parent.exists() else self.place.parent} is not there: it was "
                "removed while this command ran, or this machine does not see it; run the same command "
                "again: it goes on from the newest checkpoint that is left."
            )
        if not self._is_in(found):
            raise OwnerError(
                f"{self.place.parent} was taken over by {found.who()} while this process gave no sign of "
                "life; it leaves without writing, and the other one goes on."
            )

    def is_anothers(self) -> bool:
        """Whether another job has taken the folder over, as far as its file can be read."""
        try:
            found = _read(self.place)
        except UserError:
            return False
        return found is not None and not self._is_in(found)

    def _is_in(self, found: _Found) -> bool:
        return found.holder is not None and found.holder.token == self.token


class Owner:
    """A claim that is kept alive by a thread, and given back."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self._ends = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._beats.start()

    def release(self) -> None:
        """Gives the folder back."""
        self._ends.set()
        self._beats.join()
        if not self.claim.is_anothers():
            with contextlib.suppress(
                OSError
            ):  # one that stays is of a dead process, which the next start sees
                self.claim.place.unlink()

    def _beat(self) -> None:
        while not self._ends.wait(SECONDS_BETWEEN_BEATS):
            if self.claim.is_anothers():
                return  # who took it over keeps it young
            with contextlib.suppress(OSError):  # the next beat may come through; `require` tells
                os.utime(self.claim.place)


@contextmanager
def owned(
    folder: Path, environment: Mapping[str, str], here: Ranks, token: str | None = None
) -> Iterator[Claim]:
    """Owns a run folder for the length of a `with` block; gives the claim, to check before each change.

    The first rank owns it for all. A folder that did not exist before, and in which nothing was written, goes
    again.

    Args:
        folder: The run folder.
        environment: Of this process, for Slurm's job.
        here: This rank.
        token: A name of this start, equal on all its ranks and no other start's; None for one alone.

    Raises:
        OwnerError: A living job owns it.
        UserError: It cannot be written.
    """
    claim = Claim(folder / OWNER_NAME, token or uuid.uuid4().hex)
    if not here.is_first:
        yield claim
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        owner = _claim(claim, Job.of_environment(environment), settle=folder not in made)
        try:
            yield claim
        finally:
            owner.release()
    finally:
        with contextlib.suppress(OSError):  # not empty, or gone
            for place in made:
                place.rmdir()


def _claim(claim: Claim, job: Job, *, settle: bool) -> Owner:
    """Creates the owner's file, in place of a dead one's; `settle` where there may have been one before."""
    place, holder = claim.place, _Holder(this_process(), job, claim.token)
    data = (json.dumps(asdict(holder)) + "\n").encode()
    for _ in range(_TRIES):
        if _created(place, data):
            owner = Owner(claim)
            if settle:
                _settle(owner)
            return owner
        found = _read(place)
        if found is not None:
            _require_dead(place, found, job)
            _put_away(place, found)
    raise OwnerError(f"{place} changes hands all the time: several jobs start in this folder; start one.")


def _settle(owner: Owner) -> None:
    """Waits until no other start, which judged the same dead owner, can still take this one's file for it.

    Raises:
        OwnerError: One has, and a third was quicker to create its own.
    """
    time.sleep(_SECONDS_TO_SETTLE)
    try:
        owner.claim.require()
    except OwnerError:
        owner.release()
        raise


def _created(place: Path, data: bytes) -> bool:
    """Creates the owner's file, unless there is one."""
    with writing(place):
        try:
            with place.open("xb") as file:
                try:
                    file.write(data)
                    file.flush()
                except OSError:
                    place.unlink(missing_ok=True)  # half of it would be an owner that cannot be read
                    raise
        except FileExistsError:
            return False
    return True


def _require_dead(place: Path, found: _Found, job: Job) -> None:
    """Checks that an owner is known to be dead, or has given no sign of life for long.

    Raises:
        OwnerError: It may live.
    """
    holder = found.holder
    age = (_now(place) - found.modified) / 1e9
    if age > STALE_SECONDS:
        return
    if holder is not None:
        if life_of(holder.process) == "dead":
            return
        # Slurm starts a job again only after it has ended all of it.
        if job.name and holder.job.name == job.name and holder.job.restart < job.restart:
            return
    raise OwnerError(
        f"{place.parent} belongs to {found.who()}, whose last sign of life is {max(age, 0):.0f} s old. Wait "
        "for its end or stop it, or take another run.name. If you know it to be dead: it is taken over "
        f"{STALE_SECONDS:.0f} s after its last sign of life, or when you remove {OWNER_NAME}."
    )


def _put_away(place: Path, judged: _Found) -> None:
    """Takes a dead owner's file out of the way; one that has come alive, or another's, is put back."""
    aside = place.with_name(f".{place.name}.gone-{uuid.uuid4().hex[:12]}")
    try:
        os.rename(place, aside)
    except FileNotFoundError:
        return  # another start was quicker
    try:
        taken = _read(aside)
        if taken is not None and (taken.data, taken.modified) != (judged.data, judged.modified):
            with contextlib.suppress(OSError):
                os.link(aside, place)  # never over a newer one
    finally:
        aside.unlink(missing_ok=True)


def _read(place: Path) -> _Found | None:
    """The owner's file, with its time as the file system has it now; None where there is none.

    Raises:
        UserError: It is no file, or cannot be read.
    """
    try:
        # Opened, so that a network file system asks its server; at a FIFO one would wait for ever.
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{place} is no file, expected that of the folder's owner; remove it.")
            data, modified = os.read(descriptor, _MOST_BYTES), status.st_mtime_ns
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{place} cannot be read ({error.strerror or error}), which names the owner of this run folder; "
            "make it readable, or take another run.name."
        ) from error
    try:
        return _Found(data, modified, typed(_Holder, parse_json(data, place.name), place.name))
    except StoreError:
        return _Found(data, modified, None)


def _now(place: Path) -> int:
    """The time, in nanoseconds, by the clock that gives files in this folder theirs."""
    probe = place.with_name(f".{place.name}.now-{uuid.uuid4().hex[:12]}")
    with writing(place):
        try:
            with probe.open("xb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)
