"""Who trains in a run folder: one job at a time, by a lease of the folder (see `lease`).

An owner that was only asleep while another job took the folder over finds out before it writes: it reads the
lease again each time.
"""

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparsekd.trainer.run.errors import OwnerError, UserError, writing
from sparsekd.trainer.run.lease import (
    STALE_SECONDS,
    Found,
    HeldError,
    Holder,
    Lease,
    NoFileError,
    UnreadableError,
    is_anothers,
    is_of,
    read,
    take,
)
from sparsekd.trainer.run.ranks import Ranks

OWNER_NAME = "OWNER.json"

_SECONDS_TO_SETTLE = 1.0


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
        with _readable(self.place):
            found = read(self.place)
        if found is None:
            raise OwnerError(
                f"{self.place if self.place.parent.exists() else self.place.parent} is not there: it was "
                "removed while this command ran, or this machine does not see it; run the same command "
                "again: it goes on from the newest checkpoint that is left."
            )
        if not is_of(found, self.token):
            raise OwnerError(
                f"{self.place.parent} was taken over by {found.who()} while this process gave no sign of "
                "life; it leaves without writing, and the other one goes on."
            )

    def is_anothers(self) -> bool:
        """Whether another job has taken the folder over, as far as its file can be read."""
        return is_anothers(self.place, self.token)


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
        lease = _taken(claim, Holder.of_this_process(environment, claim.token), settle=folder not in made)
        try:
            yield claim
        finally:
            lease.release()
    finally:
        with contextlib.suppress(OSError):  # not empty, or gone
            for place in made:
                place.rmdir()


def _taken(claim: Claim, holder: Holder, *, settle: bool) -> Lease:
    """The folder's lease, in place of a dead owner's; `settle` where there may have been one before.

    Raises:
        OwnerError: A living job has it.
        UserError: It cannot be read or written.
    """
    place = claim.place
    try:
        with writing(place), _readable(place):
            lease = take(place, holder)
    except HeldError as held:
        raise OwnerError(_whose(place, held.found, held.age)) from None
    if settle:
        _settle(claim, lease)
    return lease


def _whose(place: Path, found: Found | None, age: float) -> str:
    if found is None:
        return f"{place} changes hands all the time: several jobs start in this folder; start one."
    return (
        f"{place.parent} belongs to {found.who()}, whose last sign of life is {max(age, 0):.0f} s old. Wait "
        "for its end or stop it, or take another run.name. If you know it to be dead: it is taken over "
        f"{STALE_SECONDS:.0f} s after its last sign of life, or when you remove {OWNER_NAME}."
    )


def _settle(claim: Claim, lease: Lease) -> None:
    """Waits until no other start, which judged the same dead owner, can still take this one's file for it.

    Raises:
        OwnerError: One has, and a third was quicker to create its own.
    """
    time.sleep(_SECONDS_TO_SETTLE)
    try:
        claim.require()
    except OwnerError:
        lease.release()
        raise


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    """Turns an owner's file that cannot be read into one sentence.

    Raises:
        UserError: It is no file, or cannot be read.
    """
    try:
        yield
    except NoFileError as error:
        raise UserError(f"{place} is no file, expected that of the folder's owner; remove it.") from error
    except UnreadableError as error:
        raise UserError(
            f"{place} cannot be read ({error.strerror}), which names the owner of this run folder; "
            "make it readable, or take another run.name."
        ) from error
