"""Local files that are either whole or absent: temporary name, fsync, read back, link, fsync the folder.

A temporary file is locked (flock) by the process that writes it. The kernel lets go of the lock when the
process dies, however it dies, so a temporary file that can be locked has no writer any more and is removed.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import time
import uuid
from pathlib import Path

from sparsekd.logit_store.errors import NameTakenError, StoreError
from sparsekd.logit_store.places import file_system
from sparsekd.logit_store.places.file_system import READ_BYTES, TEMPORARY_PREFIX, HashingFile, Produce

# Where a file system has no locks, only age tells a dead writer's file from a living one's.
STALE_SECONDS_WITHOUT_LOCKS = 24 * 3600

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalFiles:
    """A POSIX file system; see `file_system.Files`."""

    is_exclusive = True

    def exists(self, path: Path) -> bool:
        return path.exists()

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def read_range(self, path: Path, offset: int, length: int) -> bytes:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, length, offset)
            # The operating system may return less than asked for, as it does beyond 2 GiB.
            while len(data) < length:
                piece = os.pread(descriptor, length - len(data), offset + len(data))
                if not piece:
                    break
                data += piece
            return data
        finally:
            os.close(descriptor)

    def sha256(self, path: Path) -> str:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return sha256_of_descriptor(descriptor)
        finally:
            os.close(descriptor)

    def names(self, folder: Path) -> list[str]:
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def files_below(self, folder: Path) -> list[str]:
        return sorted(item.relative_to(folder).as_posix() for item in folder.rglob("*") if item.is_file())

    def make_folder(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)

    def publish(self, final: Path, produce: Produce, *, replace: bool) -> str:
        temporary, descriptor = _open_temporary(final.parent)
        try:
            file_system.reached("opened", final)
            file = HashingFile(descriptor)
            produce(file)
            file_system.reached("written", final)
            os.fsync(descriptor)
            file_system.reached("synced", final)
            # Dropped from the cache, so that what is read back comes from the disk.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if sha256_of_descriptor(descriptor) != file.hexdigest():
                raise StoreError(
                    f"{final} was read back with other bytes than were written: the disk or its driver is "
                    "faulty; nothing was published, run the same command on another disk."
                )
            file_system.reached("read back", final)
            if replace:
                os.rename(temporary, final)
            else:
                self._name_it(temporary, final, file.hexdigest())
            file_system.reached("named", final)
        finally:
            # While the lock is held: nobody else may take the file for a dead writer's.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            os.close(descriptor)
        sync_folder(final.parent)
        file_system.reached("folder synced", final)
        return file.hexdigest()

    def move(self, source: Path, target: Path) -> None:
        _give_name(source, target)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(source)
        # The new name first: a crash between the two must leave the file at least one.
        sync_folder(target.parent)
        sync_folder(source.parent)

    def remove_stale(self, folder: Path) -> None:
        for path in folder.glob(TEMPORARY_PREFIX + "*"):
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR)
                try:
                    if _locked(descriptor, age=time.time() - os.fstat(descriptor).st_mtime):
                        os.unlink(path)
                finally:
                    os.close(descriptor)

    def _name_it(self, temporary: Path, final: Path, digest: str) -> None:
        """Gives the temporary file its final name; one of that name with the same bytes is left alone."""
        try:
            _give_name(temporary, final)
        except FileExistsError:
            if self.sha256(final) != digest:
                raise NameTakenError(
                    f"{final} exists already with other bytes than this run made: another configuration, "
                    "model or package version wrote it; use a new folder, or remove this file if nothing "
                    "refers to it."
                ) from None


def sync_folder(folder: Path) -> None:
    """Has the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_descriptor(descriptor: int) -> str:
    """Returns the sha256 (hex) of an open file, from its beginning."""
    total, offset = hashlib.sha256(), 0
    while piece := os.pread(descriptor, READ_BYTES, offset):
        total.update(piece)
        offset += len(piece)
    return total.hexdigest()


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


def _give_name(present: Path, final: Path) -> None:
    """Gives a file a name, never over another file; the old name may stay.

    A hard link does that in one step where rename would replace. Where the file system has no hard links,
    a look before the rename stands for it.
    """
    try:
        os.link(present, final)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if final.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from None
        os.rename(present, final)
