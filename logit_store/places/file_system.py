"""What a store needs of a file system, and the words for what goes wrong there.

Three kinds keep the promise that a file is whole or absent: `local_files` by temporary name, fsync and link,
`object_files` by an upload that shows when it is completed, `remote_files` by temporary name and move.
"""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import IO, Any, Protocol

from sparsekd.logit_store.errors import NameTakenError, StoreError
from sparsekd.logit_store.places.paths import StorePath

TEMPORARY_PREFIX = ".tmp-"

READ_BYTES = 1 << 20

STEPS = ("opened", "written", "synced", "read back", "named", "folder synced")
"""The steps of `publish` on a local disk, in order."""

UPLOAD_STEPS = ("opened", "written", "uploading", "uploaded", "read back")
"""Those of an upload."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class HashingFile(io.RawIOBase):
    """A file open for writing that knows the sha256 and the number of the bytes written."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Writes all of `data`, however many calls the operating system needs for it."""
        left = memoryview(data).cast("B")
        total = len(left)
        while left:
            done = os.write(self._descriptor, left)
            self._hash.update(left[:done])
            left = left[done:]
        self.size += total
        return total

    def tell(self) -> int:
        return self.size

    def hexdigest(self) -> str:
        """Returns the sha256 (hex) of everything written so far."""
        return self._hash.hexdigest()


Produce = Callable[[HashingFile], None]
"""Writes the content of a file."""


class Files(Protocol):
    """What a store asks of a file system. Missing files raise FileNotFoundError, other failures OSError."""

    def is_exclusive(self, folder: Any) -> bool:
        """Returns whether `publish` never replaces a file that another writer makes at the same moment.

        Args:
            folder: where this may be tried out.
        """

    def exists(self, path: Any) -> bool:
        """Returns whether there is such a file."""

    def size(self, path: Any) -> int:
        """Returns the bytes of a file."""

    def read_range(self, path: Any, offset: int, length: int) -> bytes:
        """Returns up to `length` bytes from `offset`, fewer only where the file ends."""

    def sha256(self, path: Any) -> str:
        """Returns the sha256 (hex) of a file, read in pieces."""

    def read_file(self, path: Any, largest: int) -> bytes:
        """Returns a whole file. Raises OSError where it has more than `largest` bytes."""

    def names(self, folder: Any) -> list[str]:
        """Returns the names of what lies directly in a folder, sorted; empty where there is none.

        Raises StoreError where `names.admitted_name` does, and over what is neither file nor folder.
        """

    def sizes(self, folder: Any, *, below: bool, most: int | None) -> dict[str, int]:
        """Returns the bytes of each file by its name, relative to the folder and with `/`, sorted.

        Args:
            folder: there need not be one.
            below: whether those of all folders below it are meant, else those directly in it.
            most: more files than this raise StoreError.

        Raises StoreError where `names` does.
        """

    def make_folder(self, folder: Any) -> None:
        """Makes a folder and its parents where the file system has any, durably."""

    def publish(self, final: Any, produce: Produce, *, replace: bool) -> str:
        """Makes a file, whole or not at all; see `files.publish`."""

    def move(self, source: Any, target: Any) -> None:
        """Gives a file another name, durably. Raises FileExistsError where there is such a file."""

    def forget(self, path: Any) -> None:
        """Has the next read of a file that was wrong go to the file system itself."""

    def remove_stale(self, folder: Any) -> None:
        """Removes what writers that are no longer alive left directly in a folder."""


def name_taken(final: StorePath) -> NameTakenError:
    """Returns the error about a file that is there with other bytes than were to be written."""
    return NameTakenError(
        f"{final} holds other bytes than this run made: another configuration, model or package version "
        "wrote it, or the upload failed; use a new folder, or remove this file if nothing refers to it."
    )


def require_few(names: Sized, most: int | None, folder: StorePath) -> None:
    """Raises StoreError where a listing gave more files than `most`."""
    if most is not None and len(names) > most:
        raise StoreError(
            f"{folder} holds more than {most:,} files: it is not what it should be; restore it from a copy."
        )


def reached(step: str, final: StorePath) -> None:
    """Does nothing. Called after each step of publishing `final`, so that tests can stop a writer there."""


@contextlib.contextmanager
def spooled(final: StorePath, produce: Produce) -> Iterator[tuple[IO[bytes], HashingFile]]:
    """Gives a local temporary file with what is to be uploaded as `final`, and what is known of it.

    Whole before anything is sent, so that little can fail while an upload is open.
    """
    reached("opened", final)
    with tempfile.TemporaryFile() as spool:
        file = HashingFile(spool.fileno())
        produce(file)
        reached("written", final)
        yield spool, file


@contextlib.contextmanager
def explained(path: StorePath) -> Iterator[None]:
    """Turns an operating system error about `path` into a StoreError of one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            room = f": {_free_bytes(path):,} bytes are free on its disk" if isinstance(path, Path) else ""
            raise StoreError(
                f"No room to write {path}{room}; make room and run the same command again, it keeps every "
                "finished shard and continues."
            ) from error
        reason = error.strerror or str(error).strip().partition("\n")[0].rstrip(".")
        raise StoreError(f"Could not use {path}: {reason or 'it is not there'}.") from error


def _free_bytes(path: Path) -> int:
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    return shutil.disk_usage(existing).free
