"""Files on an object store (S3, GCS, Azure), by the library obstore: one request for one thing.

An object is visible when its upload is completed, or not at all; a killed writer leaves nothing that a
reader sees. Where the service honours conditional uploads ("only if there is no such object"), which is tried
out once, two writers of one name cannot replace one another, as on a local disk. Where it does not, a shard
exists by its commit record alone, and `writer` looks once more after writing one.

Tested against moto's S3 server and, by hand, against Azurite; GCS against a server that speaks its dialect.
"""

import contextlib
import errno
import hashlib
import mmap
import os
import re
import threading
import uuid
from collections.abc import Iterable, Iterator
from typing import IO, Any

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places import file_system
from sparsekd.logit_store.places.file_system import (
    READ_BYTES,
    TEMPORARY_PREFIX,
    Produce,
    name_taken,
    require_few,
    spooled,
)
from sparsekd.logit_store.places.names import name_below
from sparsekd.logit_store.places.paths import RemotePath

LARGEST_UPLOAD = 5000 << 20
"""Bytes of the largest single upload, which alone can be conditional: 5,000 MiB on Azure, 5 GiB on S3."""

_LISTED_AT_ONCE = 1000

_process: int | None = None
"""Number of the process that used obstore first: its threads do not live in a child that was forked."""


class ObjectFiles:
    """The objects of one bucket; see `file_system.Files`. Keys are below the bucket.

    Args:
        store: obstore's, whose requests fail when nothing comes for a minute.
        uploads: the same, which waits longer: nothing comes while an upload is under way.
    """

    def __init__(self, store: Any, uploads: Any) -> None:
        from obstore import exceptions

        self._store = store
        self._uploads = uploads
        self._errors = exceptions
        self._lock = threading.Lock()
        self._is_exclusive: bool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._store, self._uploads)

    def is_exclusive(self, folder: RemotePath) -> bool:
        with self._lock:
            if self._is_exclusive is None:
                self._is_exclusive = self._refuses_a_second_upload(folder)
            return self._is_exclusive

    def exists(self, path: RemotePath) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: RemotePath) -> int:
        with self._told():
            return int(self._store.head(_key(path))["size"])

    def read_range(self, path: RemotePath, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        try:
            with self._told():
                return bytes(self._store.get_range(_key(path), start=offset, length=length))
        except OSError as error:
            # Behind the end; a local file gives nothing there.
            if "416 Range Not Satisfiable" in str(error):
                return b""
            raise

    def read_file(self, path: RemotePath, largest: int) -> bytes:
        with self._told():
            found = self._store.get(_key(path))
            size = int(found.meta["size"])
            if size > largest:
                raise OSError(errno.EFBIG, f"has {size:,} bytes, expected at most {largest:,}")
            return bytes(found.bytes())

    def sha256(self, path: RemotePath) -> str:
        total = hashlib.sha256()
        with self._told():
            for piece in self._store.get(_key(path)).stream(min_chunk_size=READ_BYTES):
                total.update(piece)
        return total.hexdigest()

    def names(self, folder: RemotePath) -> list[str]:
        with self._listing(folder):
            listed = self._store.list_with_delimiter(_key(folder))
        places = [*listed["common_prefixes"], *(item["path"] for item in listed["objects"])]
        return sorted({name_below(place, _key(folder), folder) for place in places})

    def sizes(self, folder: RemotePath, *, below: bool, most: int | None) -> dict[str, int]:
        found: dict[str, int] = {}
        with self._listing(folder):
            for page in self._pages(folder, below=below):
                for item in page:
                    found[name_below(item["path"], _key(folder), folder)] = int(item["size"])
                require_few(found, most, folder)
        # Some tools make an empty object in a folder's name.
        folders = {name.rpartition("/")[0] for name in found}
        return {name: size for name, size in sorted(found.items()) if size or name not in folders}

    def make_folder(self, folder: RemotePath) -> None:
        pass  # there are no folders, only names with slashes in them

    def publish(self, final: RemotePath, produce: Produce, *, replace: bool) -> str:
        with spooled(final, produce) as (spool, file):
            digest = file.hexdigest()
            # Looked at first, so that nothing is uploaded again over what is finished.
            present = self._digest_of_present(final)
            if present == digest:
                return digest
            if present is not None and not replace:
                raise name_taken(final)
            only_new = not replace and self.is_exclusive(final.parent)
            file_system.reached("uploading", final)
            self._upload(final, spool, file.size, only_new=only_new)
        file_system.reached("uploaded", final)
        if self.sha256(final) != digest:
            raise name_taken(final)
        file_system.reached("read back", final)
        return digest

    def move(self, source: RemotePath, target: RemotePath) -> None:
        with self._told():
            if self.is_exclusive(target.parent):
                content = self._store.get(_key(source)).bytes()
                try:
                    self._uploads.put(_key(target), content, mode="create", use_multipart=False)
                except self._errors.AlreadyExistsError:
                    raise FileExistsError(f"{target} is there") from None
            else:
                if self.exists(target):
                    raise FileExistsError(f"{target} is there")
                self._store.copy(_key(source), _key(target))
            self._store.delete(_key(source))

    def forget(self, path: RemotePath) -> None:
        pass  # nothing is kept

    def remove_stale(self, folder: RemotePath) -> None:
        pass  # a writer that was killed left nothing

    def create(self, path: RemotePath, content: bytes) -> str | None:
        """Makes a small object that is to change; returns its tag, or None where there is one already."""
        with self._told():
            try:
                put = self._store.put(_key(path), content, mode="create", use_multipart=False)
            except self._errors.AlreadyExistsError:
                return None
        return str(put["e_tag"])

    def replace_same(self, path: RemotePath, content: bytes, tag: str) -> str | None:
        """Replaces an object that has this tag; returns the new tag, or None where it has another or is gone.

        A service that does not know this condition is not asked for it, and the last one wins.
        """
        with self._told():
            try:
                put = self._store.put(_key(path), content, mode={"e_tag": tag}, use_multipart=False)
            except (self._errors.PreconditionError, FileNotFoundError):
                return None
            except (
                self._errors.NotSupportedError,
                NotImplementedError,
            ):  # the latter where obstore knows none
                put = self._store.put(_key(path), content, mode="overwrite", use_multipart=False)
        return str(put["e_tag"])

    def read_tagged(self, path: RemotePath, largest: int) -> tuple[bytes, str, int] | None:
        """Returns a small object's content, its tag, and when it was put; None where there is none.

        The content of a larger one is empty. The time is the service's, in nanoseconds since 1970.
        """
        try:
            with self._told():
                found = self._store.get(_key(path))
                meta = found.meta
                content = bytes(found.bytes()) if int(meta["size"]) <= largest else b""
                return content, str(meta["e_tag"]), int(meta["last_modified"].timestamp() * 1e9)
        except FileNotFoundError:
            return None

    def remove(self, path: RemotePath) -> None:
        """Removes an object, where there is one."""
        with contextlib.suppress(FileNotFoundError), self._told():
            self._store.delete(_key(path))

    def _upload(self, final: RemotePath, spool: IO[bytes], size: int, *, only_new: bool) -> None:
        if only_new and size > LARGEST_UPLOAD:
            raise StoreError(
                f"{final} would have {size:,} bytes, but one upload has {LARGEST_UPLOAD:,} at most: make the "
                "store with fewer rows per shard."
            )
        # Mapped: a shard need not be in memory a second time.
        content = mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        with self._told():
            if not only_new:
                in_parts = size > LARGEST_UPLOAD
                self._uploads.put(_key(final), content, mode="overwrite", use_multipart=in_parts)
                return
            # By another writer, or by this one, whose first try was answered too late: the bytes will tell.
            with contextlib.suppress(self._errors.AlreadyExistsError):
                self._uploads.put(_key(final), content, mode="create", use_multipart=False)

    def _refuses_a_second_upload(self, folder: RemotePath) -> bool:
        """Tries out whether the service honours conditional uploads, with an object of a name of its own."""
        key = _key(folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        with self._told():
            try:
                self._uploads.put(key, b"first", mode="create", use_multipart=False)
            except NotImplementedError:  # obstore was told not to ask for it (AWS_CONDITIONAL_PUT=disabled)
                return False
            except self._errors.BaseError as error:
                if not isinstance(error, self._errors.NotSupportedError) and "501 Not Imp" not in str(error):
                    raise
                return False
            try:
                self._uploads.put(key, b"second", mode="create", use_multipart=False)
            except self._errors.AlreadyExistsError:
                return True
            else:
                return False
            finally:
                with contextlib.suppress(self._errors.BaseError, FileNotFoundError):  # perhaps not allowed
                    self._uploads.delete(key)

    def _digest_of_present(self, path: RemotePath) -> str | None:
        try:
            return self.sha256(path)
        except FileNotFoundError:
            return None

    def _pages(self, folder: RemotePath, *, below: bool) -> Iterable[Any]:
        if below:
            return iter(self._store.list(_key(folder), chunk_size=_LISTED_AT_ONCE))
        return [self._store.list_with_delimiter(_key(folder))["objects"]]

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns obstore's errors into the operating system's, without what an address may hold of secrets."""
        _require_first_process()
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "it is not there") from None
        except self._errors.BaseError as error:
            raise OSError(_reason(error)) from None

    @contextlib.contextmanager
    def _listing(self, folder: RemotePath) -> Iterator[None]:
        try:
            with self._told():
                yield
        except OSError as error:
            # obstore itself refuses to list some of the names that `names` does.
            if match := _REFUSED_NAME.search(str(error)):
                name_below(match[1], _key(folder), folder)
            raise


_REFUSED_NAME = re.compile(r'invalid path: (?:Error parsing )?Path "(.*)"(?:: | contained)')


def _key(path: RemotePath) -> str:
    return path.key.strip("/")


def _reason(error: Exception) -> str:
    """Returns an error in one line, up to the server's own text, without the query of an address."""
    text = str(error).partition("\n\nDebug source")[0].partition("<?xml")[0].strip(" :\n")
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return re.sub(r"\?\S*", "", line).rstrip(".")


def _require_first_process() -> None:
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise StoreError(
            "Remote stores were used before this process was forked, and cannot be used in both: start "
            "workers by spawn or forkserver."
        )
