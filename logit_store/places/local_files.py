"""Local files that are either whole or absent: temporary name, fsync, read back, link, fsync the folder.

A temporary file is locked (flock) by the process that writes it. The kernel lets go of the lock when the
process dies, however it dies, so a temporary file that can be locked has no writer any more and is removed.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places import file_system
from sparsekd.logit_store.places.file_system import (
    READ_BYTES,
    TEMPORARY_PREFIX,
    HashingFile,
    Produce,
    name_taken,
    require_few,
)
from sparsekd.logit_store.places.names import admitted_name

# Where a file system has no locks, only age tells a dead writer's file from a living one's.
STALE_SECONDS_WITHOUT_LOCKS = 24 * 3600

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

_WITHOUT_WAITING = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
"""How every file that may be another's is opened."""

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class LocalFiles:
    """A POSIX file system; see `file_system.Files`."""

    def is_exclusive(self, folder: Path) -> bool:
        return True

    def exists(self, path: Path) -> bool:
        return path.exists()

    def size(self, path: Path) -> int:
        status = os.lstat(path)
        _require_file(path, status.st_mode)
        return status.st_size

    def read_range(self, path: Path, offset: int, length: int) -> bytes:
        with opened(path) as (descriptor, size):
            return _read(descriptor, offset, min(length, size))

    def read_file(self, path: Path, largest: int) -> bytes:
        with opened(path) as (descriptor, size):
            if size > largest:
                raise OSError(errno.EFBIG, f"has {size:,} bytes, expected at most {largest:,}")
            return _read(descriptor, 0, size)

    def sha256(self, path: Path) -> str:
        with opened(path) as (descriptor, _):
            return sha256_of_descriptor(descriptor)

    def names(self, folder: Path) -> list[str]:
        return sorted(name for name, _ in _listed(folder, ""))

    def sizes(self, folder: Path, *, below: bool, most: int | None) -> dict[str, int]:
        found: dict[str, int] = {}
        waiting = [""]
        while waiting:
            for name, entry in _listed(folder, waiting.pop()):
                if entry.is_dir(follow_symlinks=False):
                    waiting += [name] * below
                    continue
                with contextlib.suppress(FileNotFoundError):  # a temporary file, since it was listed
                    found[name] = entry.stat(follow_symlinks=False).st_size
                require_few(found, most, folder)
        return dict(sorted(found.items()))

    def make_folder(self, folder: Path) -> None:
        if folder.is_dir():  # nothing is written where nothing has to be: the disk may be read-only
            return
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)

    def publish(self, final: Path, produce: Produce, *, replace: bool) -> str:
        if (digest := self._finished(final, produce, replace=replace)) is not None:
            return digest
        folder = final.parent
        # Beside its folder where that is not there yet: content that is refused leaves no empty one behind.
        temporary, descriptor = _open_temporary(folder if folder.is_dir() else folder.parent)
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
            if temporary.parent != folder:
                folder.mkdir(exist_ok=True)
                sync_folder(folder.parent)
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
        sync_folder(folder)
        file_system.reached("folder synced", final)
        return file.hexdigest()

    def move(self, source: Path, target: Path) -> None:
        _give_name(source, target)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(source)
        # The new name first: a crash between the two must leave the file at least one.
        sync_folder(target.parent)
        sync_folder(source.parent)

    def forget(self, path: Path) -> None:
        pass  # nothing is kept

    def remove_stale(self, folder: Path) -> None:
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):  # another process may just have removed it
            return
        for path in [folder / name for name in names if name.startswith(TEMPORARY_PREFIX)]:
            # What another user left, or lies on a disk that is read-only now, cannot be removed and harms
            # nobody: no reader looks at it.
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | _WITHOUT_WAITING)
                try:
                    if _locked(descriptor, age=time.time() - os.fstat(descriptor).st_mtime):
                        os.unlink(path)
                finally:
                    os.close(descriptor)

    def _finished(self, final: Path, produce: Produce, *, replace: bool) -> str | None:
        """Returns the digest of a file that has what is to be written, None where there is something to do.

        Looked at first, so that a command which is run again over what it finished writes nothing, as it
        could not on a disk that is read-only now.
        """
        try:
            present = self.sha256(final)
        except FileNotFoundError:
            return None
        except OSError:
            if replace:
                return None
            raise
        with open(os.devnull, "wb") as nowhere:
            file = HashingFile(nowhere.fileno())
            produce(file)
        if present == file.hexdigest():
            with contextlib.suppress(OSError):  # where its writer has not come so far
                sync_folder(final.parent)
            return present
        if not replace:
            raise name_taken(final)
        return None

    def _name_it(self, temporary: Path, final: Path, digest: str) -> None:
        """Gives the temporary file its final name; one of that name with the same bytes is left alone."""
        try:
            _give_name(temporary, final)
        except FileExistsError:
            if self.sha256(final) != digest:
                raise name_taken(final) from None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """Opens a file of a store for reading; gives (descriptor, bytes).

    Whatever else has the name is refused at once, where a plain `open` would follow a link out of the store,
    or wait for ever at a FIFO.

    Raises:
        FileNotFoundError: there is nothing of that name.
        OSError: it is no regular file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _WITHOUT_WAITING)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, or a socket
            _require_file(path, os.lstat(path).st_mode)
        raise
    try:
        status = os.fstat(descriptor)
        _require_file(path, status.st_mode)
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _require_file(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(
            errno.EINVAL, f"it is {_KINDS.get(stat.S_IFMT(mode), 'something')} where a file belongs"
        )


def _read(descriptor: int, offset: int, length: int) -> bytes:
    """Returns up to `length` bytes, fewer only where the file ends."""
    data = os.pread(descriptor, length, offset)
    # The operating system may return less than asked for, as it does beyond 2 GiB.
    while len(data) < length:
        piece = os.pread(descriptor, length - len(data), offset + len(data))
        if not piece:
            break
        data += piece
    return data


def _listed(folder: Path, inner: str) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """Gives (name relative to `folder`, entry) of what lies directly in a folder below it.

    Raises:
        StoreError: for a name that is not admitted, and for what is neither file nor folder.
    """
    try:
        entries = os.scandir(folder / inner)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            name = admitted_name(f"{inner}/{entry.name}" if inner else entry.name, folder)
            if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
                kind = "a link" if entry.is_symlink() else "a FIFO, a socket or a device"
                raise StoreError(
                    f"{folder} holds {name}, {kind}: a store has files and folders only; where its files are "
                    "links, as in a download cache, copy it with `cp -rL` and use the copy."
                )
            yield name, entry


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
