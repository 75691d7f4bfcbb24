"""A lease (see `lease`) that is an object of a bucket.

It is made by an upload that the service refuses where there is one already, kept young by uploads of the same
content, and taken over by one that is refused where another holder's content stands there by then. Its age is
by the service's clock.
"""

import contextlib
import threading
import uuid
from collections.abc import Callable

from sparsekd.logit_store.places.object_files import ObjectFiles
from sparsekd.logit_store.places.paths import RemotePath, StorePath
from sparsekd.trainer.run.lease import (
    MOST_BYTES,
    SECONDS_BETWEEN_BEATS,
    TRIES,
    Found,
    HeldError,
    Holder,
    is_of,
    require_dead,
)


def can_be_leased(path: StorePath) -> bool:
    """Whether objects below a place can be leases: where the service honours conditional uploads.

    Raises:
        OSError: The service cannot be asked.
    """
    return (
        isinstance(path, RemotePath) and isinstance(path.files, ObjectFiles) and path.files.is_exclusive(path)
    )


class ObjectLease:
    """A lease that is held, and kept alive by a thread until it is given back."""

    def __init__(self, place: RemotePath, holder: Holder, tag: str) -> None:
        self.place = place
        self._files: ObjectFiles = place.files
        self._holder, self._tag = holder, tag
        self._ends = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._beats.start()

    def release(self) -> None:
        """Gives it back, unless it is another's by now."""
        self._ends.set()
        self._beats.join()
        # One that stays is of a dead process, which whoever comes next sees.
        with contextlib.suppress(OSError):
            found = self._files.read_tagged(self.place, MOST_BYTES)
            if found is not None and is_of(Found.of(found[0], found[2], "a lease"), self._holder.token):
                self._files.remove(self.place)

    def _beat(self) -> None:
        while not self._ends.wait(SECONDS_BETWEEN_BEATS):
            with contextlib.suppress(OSError):  # the next beat may come through
                tag = self._files.replace_same(self.place, self._holder.written(), self._tag)
                if tag is None:
                    return  # who took it over keeps it young
                self._tag = tag


def take_object(place: RemotePath, holder: Holder, now: Callable[[], int]) -> ObjectLease:
    """Takes a lease that is free, or in place of a dead holder.

    Args:
        place: Of its object, below one that `can_be_leased`.
        holder: Who takes it.
        now: Gives the time as `now_at_service` does.

    Raises:
        HeldError: It is another's, who may live.
        OSError: It cannot be written or read.
    """
    files: ObjectFiles = place.files
    for _ in range(TRIES):
        if (tag := files.create(place, holder.written())) is not None:
            return ObjectLease(place, holder, tag)
        read = files.read_tagged(place, MOST_BYTES)
        if read is not None:
            data, old, modified = read
            found = Found.of(data, modified, "a lease")
            if not is_of(found, holder.token):  # its own: the answer to its upload was lost, and asked again
                require_dead(found, holder.job, now)
            if (tag := files.replace_same(place, holder.written(), old)) is not None:
                return ObjectLease(place, holder, tag)
    raise HeldError(None, 0.0)


def now_at_service(folder: RemotePath) -> int:
    """The time, in nanoseconds since 1970, by the clock that gives objects theirs.

    Raises:
        OSError: None can be made there.
    """
    files: ObjectFiles = folder.files
    probe = folder / f".now-{uuid.uuid4().hex[:12]}"
    files.create(probe, b"")
    try:
        read = files.read_tagged(probe, 1)
        if read is None:
            raise OSError(f"{probe} is not there, which was just made")
        return read[2]
    finally:
        files.remove(probe)
