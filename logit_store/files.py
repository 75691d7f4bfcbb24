"""Files that are either whole or absent: temporary name, fsync, read back, publish, fsync the folder.

A temporary file is locked (flock) by the process that writes it. The kernel lets go of the lock when the
process dies, however it dies, so a temporary file that can be locked has no writer any more and is removed.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.manifest import canonical_json

TEMPORARY_PREFIX = ".tmp-"

READ_BYTES = 1 << 20

# Where a file system has no locks, only age tells a dead writer's file from a living one's.
STALE_SECONDS_WITHOUT_LOCKS = 24 * 3600

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
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


def publish(final: Path, produce: Callable[[HashingFile], None]) -> str:
    """Makes the file `final` with what `produce` writes, whole or not at all.

    The bytes go to a temporary file in the same folder, reach the disk, are read back and compared, and only
    then get their name. A file of that name with the same bytes is left as it is. Whatever fails, the
    temporary file is gone afterwards.

    Args:
        final: the file to make; its folder exists.
        produce: writes the content.

    Returns:
        The sha256 (hex) of the file.

    Raises:
        StoreError: no room, a failing disk, or a file of that name with other bytes.
    """
    with explained(final):
        temporary, descriptor = _open_temporary(final.parent)
        try:
            file = HashingFile(descriptor)
            produce(file)
            os.fsync(descriptor)
            # Dropped from the cache, so that what is read back comes from the disk.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if sha256_of_descriptor(descriptor) != file.hexdigest():
                raise StoreError(
                    f"{final} was read back with other bytes than were written: the disk or its driver is "
                    "faulty; nothing was published, run the same command on another disk."
                )
            _name_it(temporary, final, file.hexdigest())
        finally:
            # While the lock is held: nobody else may take the file for a dead writer's.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            os.close(descriptor)
        sync_folder(final.parent)
        return file.hexdigest()


def publish_bytes(final: Path, content: bytes) -> str:
    """Makes the file `final` with the given content, see `publish`."""

    def produce(file: HashingFile) -> None:
        file.write(content)

    return publish(final, produce)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, and has their names reach the disk."""
    with explained(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)


def remove_stale(folder: Path) -> None:
    """Removes from a folder the temporary files whose writers are dead."""
    for path in folder.glob(TEMPORARY_PREFIX + "*"):
        with explained(path), contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                if _locked(descriptor, age=time.time() - os.fstat(descriptor).st_mtime):
                    os.unlink(path)
            finally:
                os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Has the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Returns the sha256 (hex) of a file, read in pieces."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return sha256_of_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_descriptor(descriptor: int) -> str:
    """Returns the sha256 (hex) of an open file, from its beginning."""
    total, offset = hashlib.sha256(), 0
    while piece := os.pread(descriptor, READ_BYTES, offset):
        total.update(piece)
        offset += len(piece)
    return total.hexdigest()


def read_range(path: Path, offset: int, length: int) -> bytes:
    """Returns up to `length` bytes from `offset`, fewer only where the file ends; one positional read."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(descriptor, length, offset)
        # The operating system may return less than asked for, as it does beyond 2 GiB.
        while len(data) < length and (piece := os.pread(descriptor, length - len(data), offset + len(data))):
            data += piece
        return data
    finally:
        os.close(descriptor)


def signed_json(content: dict[str, Any]) -> bytes:
    """Returns canonical JSON that carries its own digest.

    The field `digest` is the sha256 (hex) of the same text with an empty string there.
    """
    unsigned = canonical_json({**content, "digest": ""}).encode("ascii")
    digest = hashlib.sha256(unsigned).hexdigest()
    return canonical_json({**content, "digest": digest}).encode("ascii")


def read_signed_json(path: Path, data: bytes) -> dict[str, Any]:
    """Reads what `signed_json` returned.

    Raises:
        DamagedStoreError: any byte differs.
    """
    damaged = DamagedStoreError(
        f"{path} is damaged (its digest does not fit its text): restore it from a copy."
    )
    try:
        content = json.loads(data.decode("ascii"))
        digest = content["digest"]
        field = b'"digest": "' + digest.encode("ascii") + b'"'
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None
    unsigned = data.replace(field, b'"digest": ""', 1)
    if len(digest) != 64 or hashlib.sha256(unsigned).hexdigest() != digest:
        raise damaged
    return content


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an operating system error about `path` into a StoreError of one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StoreError(
                f"No room to write {path}: {_free_bytes(path):,} bytes are free on its disk; make room and "
                "run the same command again, it keeps every finished shard and continues."
            ) from error
        raise StoreError(f"Could not use {path}: {error.strerror or error}.") from error


def _open_temporary(folder: Path) -> tuple[Path, int]:
    """Returns a new locked temporary file in `folder`."""
    while True:
        temporary = folder / f"{TEMPORARY_PREFIX}{os.getpid()}-{uuid.uuid4().hex}"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        # Between the two calls another process may have taken the file for a dead writer's.
        if _locked(descriptor, age=STALE_SECONDS_WITHOUT_LOCKS) and os.fstat(descriptor).st_nlink == 1:
            return temporary, descriptor
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _locked(descriptor: int, *, age: float) -> bool:
    """Locks a file unless somebody else has; without locks on the file system, goes by age in seconds."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return age >= STALE_SECONDS_WITHOUT_LOCKS
    return True


def _name_it(temporary: Path, final: Path, digest: str) -> None:
    """Gives the temporary file its final name, never over another file.

    A hard link does that in one step where rename would replace. Where the file system has no hard links,
    a look before the rename stands for it.
    """
    try:
        try:
            os.link(temporary, final)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if final.exists():
                raise FileExistsError from None
            os.rename(temporary, final)
    except FileExistsError:
        if sha256_of(final) != digest:
            raise StoreError(
                f"{final} exists already with other bytes than this run made: another configuration, model "
                "or package version wrote it; use a new folder, or remove this file if nothing refers to it."
            ) from None


def _free_bytes(path: Path) -> int:
    existing = next(folder for folder in path.parents if folder.exists())
    return shutil.disk_usage(existing).free
