"""A bounded cache on a local disk for what is read from a remote store; ranks of one machine share it.

Pieces are files, the least recently used of which make room for new ones. What lies in the folder is never
more than the limit, also while several processes write to it: each first enters its bytes in the folder's
account, under a lock. Nothing here is trusted: who reads a piece checks it as if it came from the store.
"""

import contextlib
import fcntl
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places.file_system import TEMPORARY_PREFIX

FOLDER_VARIABLE = "SPARSEKD_CACHE"
LIMIT_VARIABLE = "SPARSEKD_CACHE_GIB"
"""The cache is a matter of the machine, not of a run: no configuration or checkpoint knows of it."""

DEFAULT_LIMIT_GIB = 20.0

FREED_SHARE = 0.1
"""Share of the limit that one eviction frees, so that not every new piece has to look through the folder."""

_ACCOUNT_NAME = "account"


class Cache:
    """A folder of at most `limit` bytes. All methods may be called from several threads and processes.

    Attributes:
        folder: where it is; made when absent.
        limit: bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._pieces = folder / "pieces"
        self._warned = False
        try:
            self._pieces.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"The cache folder {folder} cannot be made ({error.strerror}): set {FOLDER_VARIABLE} to a "
                "folder on a local disk."
            ) from error

    def get(self, name: str) -> bytes | None:
        """Returns a piece, or None where it is not (or no longer) there."""
        path = self._pieces / name
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keeps a piece, evicting others as needed; one that is larger than the limit is not kept."""
        if len(data) > self.limit:
            return
        temporary = self._pieces / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            self._make_room(temporary, len(data))
            with open(temporary, "r+b") as file:
                file.write(data)
            # Under the lock, too: who counts meanwhile might meet it under neither name.
            with self._account():
                os.replace(temporary, self._pieces / name)
        except FileNotFoundError:
            return  # another process needed the room at once
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"The cache {self.folder} cannot be written ({error.strerror}); rows are read from the "
                    "store each time.",
                    stacklevel=2,
                )

    def remove(self, name: str) -> None:
        """Forgets a piece."""
        with contextlib.suppress(OSError):
            (self._pieces / name).unlink()

    def size(self) -> int:
        """Returns the bytes of all pieces that are there."""
        with self._account():
            return sum(size for _, size, _ in self._listed())

    def _make_room(self, temporary: Path, size: int) -> None:
        """Enters `size` bytes in the account, after an eviction where they would not fit.

        The file that they are for has their length from now on, so that whoever looks through the folder to
        count it sees them.
        """
        with self._account() as account:
            text = os.pread(account, 32, 0)
            total = int(text) if text.isdigit() else self.limit
            if total + size > self.limit:
                total = self._evict(min(int(self.limit * (1 - FREED_SHARE)), self.limit - size))
            with open(temporary, "xb") as file:
                file.truncate(size)
            os.pwrite(account, b"%032d" % (total + size), 0)

    def _evict(self, wanted: int) -> int:
        """Removes the least recently used pieces until `wanted` bytes are left; returns what is left."""
        pieces = sorted(self._listed())
        total = sum(size for _, size, _ in pieces)
        for _, size, path in pieces:
            if total <= wanted:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    def _listed(self) -> list[tuple[int, int, str]]:
        """Returns (time of use, bytes, path) of each piece; asked under the lock."""
        found = []
        for entry in os.scandir(self._pieces):
            with contextlib.suppress(FileNotFoundError):  # `remove` asks nobody
                status = entry.stat()
                found.append((status.st_mtime_ns, status.st_size, entry.path))
        return found

    @contextlib.contextmanager
    def _account(self) -> Iterator[int]:
        descriptor = os.open(self.folder / _ACCOUNT_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def default_cache(environment: Mapping[str, str]) -> Cache:
    """Returns the machine's cache: the folder in `SPARSEKD_CACHE`, of `SPARSEKD_CACHE_GIB` GiB at most.

    Raises:
        StoreError: the number is none, or the folder cannot be made.
    """
    home = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(environment.get(FOLDER_VARIABLE) or Path(home, "sparsekd"))
    text = environment.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_GIB))
    try:
        limit = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise StoreError(f"{LIMIT_VARIABLE}={text} is not a number of GiB: set it to one, such as 20.")
    return Cache(folder, limit)
