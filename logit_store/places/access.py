"""How the bytes of a store reach its reader: by positional reads, from mapped files, or through a cache.

Positional reads are the default: a mapped file that is cut short kills its reader with SIGBUS, and so does,
on NFS, one that another machine replaces; a read merely fails.
"""

import mmap
import os
import shutil
import threading
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.places.cache import Cache
from sparsekd.logit_store.places.files import REMOTE, TEMPORARY_PREFIX, explained, files_below, read_range
from sparsekd.logit_store.places.paths import RemotePath, StorePath
from sparsekd.logit_store.tokenizer_files import tokenizer_digest

KINDS = ("positional", "mapped")

MAPS_KEPT = 256
"""Files mapped at one time; address space costs nothing, but each holds a file open."""


class Access(Protocol):
    """What a reader asks for. Missing files raise FileNotFoundError, other failures OSError."""

    def read(self, place: Any, offset: int, length: int) -> bytes | memoryview:
        """Returns up to `length` bytes from `offset`, fewer only where the file ends."""

    def whole(self, place: Any) -> bytes:
        """Returns a whole file."""

    def forget(self, place: Any, offset: int) -> None:
        """Has the next read of a piece that was wrong go to the store itself."""


class PositionalAccess:
    """One positional read for each piece."""

    def read(self, place: StorePath, offset: int, length: int) -> bytes:
        return read_range(place, offset, length)

    def whole(self, place: StorePath) -> bytes:
        return place.read_bytes()

    def forget(self, place: StorePath, offset: int) -> None:
        if isinstance(place, RemotePath):
            REMOTE.forget(place)


class MappedAccess:
    """Pieces of mapped local files, without a copy; for local disks whose files nobody cuts short."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, place: Path, offset: int, length: int) -> memoryview:
        with self._lock:
            mapped = self._maps.pop(place, None)
        # A file that is shorter than its map would kill this process at the first touch. This look keeps that
        # to the moment between it and the touch.
        size = os.stat(place).st_size
        if mapped is None or len(mapped) != size:
            with open(place, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else mmap.mmap(-1, 1)
        with self._lock:
            self._maps[place] = mapped
            while len(self._maps) > MAPS_KEPT:
                self._maps.popitem(last=False)  # unmapped when the last piece of it is gone
        return memoryview(mapped)[offset : min(offset + length, size)]

    def whole(self, place: Path) -> bytes:
        return place.read_bytes()

    def forget(self, place: Path, offset: int) -> None:
        with self._lock:
            self._maps.pop(place, None)


class CachedAccess:
    """Pieces of a remote store, kept in a bounded cache on a local disk."""

    def __init__(self, cache: Cache, store_digest: str) -> None:
        self._cache = cache
        self._store = store_digest[:16]

    def read(self, place: RemotePath, offset: int, length: int) -> bytes:
        name = self._name(place, offset)
        data = self._cache.get(name)
        if data is None or len(data) != length:
            data = read_range(place, offset, length)
            self._cache.put(name, data)
        return data

    def whole(self, place: RemotePath) -> bytes:
        name = self._name(place, 0)
        data = self._cache.get(name)
        if data is None:
            data = place.read_bytes()
            self._cache.put(name, data)
        return data

    def forget(self, place: RemotePath, offset: int) -> None:
        self._cache.remove(self._name(place, offset))
        REMOTE.forget(place)

    def _name(self, place: RemotePath, offset: int) -> str:
        return f"{self._store}-{place.parent.name}-{place.name}-{offset}"


def local_tokenizer(folder: RemotePath, digest: str, cache: Cache) -> Path:
    """Returns a local folder with a remote store's tokenizer, copied there once.

    It stays outside of the cache's bound: libraries hold on to its path, and it has a few megabytes.

    Raises:
        DamagedStoreError: the files are not the tokenizer of that digest.
        StoreError: they cannot be read or written.
    """
    final = cache.folder / "tokenizers" / digest
    if final.is_dir() and tokenizer_digest(final) == digest:
        return final
    working = final.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    with explained(working):
        working.mkdir(parents=True)
        try:
            for name in files_below(folder):
                (working / name).parent.mkdir(parents=True, exist_ok=True)
                with explained(folder / name):
                    (working / name).write_bytes((folder / name).read_bytes())
            if tokenizer_digest(working) != digest:
                raise DamagedStoreError(
                    f"{folder} does not hold the manifest's tokenizer: a file is damaged, missing or too "
                    "many; restore it from a copy."
                )
            shutil.rmtree(final, ignore_errors=True)  # damaged
            try:
                os.rename(working, final)
            except OSError:
                if not final.is_dir():  # of another process, which was faster
                    raise
        finally:
            shutil.rmtree(working, ignore_errors=True)
    return final
