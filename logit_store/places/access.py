"""How the bytes of a store reach its reader: by positional reads, from mapped files, or through a cache.

Positional reads are the default: a mapped file that is cut short kills its reader with SIGBUS, and so does,
on NFS, one that another machine replaces; a read merely fails.
"""

import mmap
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

from sparsekd.logit_store.places.cache import Cache
from sparsekd.logit_store.places.files import forget, read_file, read_range
from sparsekd.logit_store.places.local_files import opened
from sparsekd.logit_store.places.paths import RemotePath, StorePath

KINDS = ("positional", "mapped")

MAPS_KEPT = 256
"""Files mapped at one time; address space costs nothing, but each holds a file open."""


class Access(Protocol):
    """What a reader asks for. Missing files raise FileNotFoundError, other failures OSError."""

    def read(self, place: Any, offset: int, length: int, *, keep: bool = True) -> bytes | memoryview:
        """Returns up to `length` bytes from `offset`, fewer only where the file ends.

        What is not to be kept takes no room in a cache.
        """

    def whole(self, place: Any, largest: int) -> bytes:
        """Returns a whole file. Raises OSError where it has more than `largest` bytes."""

    def forget(self, place: Any, offset: int) -> None:
        """Has the next read of a piece that was wrong go to the store itself."""


class PositionalAccess:
    """One positional read for each piece."""

    def read(self, place: StorePath, offset: int, length: int, *, keep: bool = True) -> bytes:
        return read_range(place, offset, length)

    def whole(self, place: StorePath, largest: int) -> bytes:
        return read_file(place, largest)

    def forget(self, place: StorePath, offset: int) -> None:
        forget(place)


class MappedAccess:
    """Pieces of mapped local files, without a copy; for local disks whose files nobody cuts short."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, place: Path, offset: int, length: int, *, keep: bool = True) -> memoryview:
        with self._lock:
            mapped = self._maps.pop(place, None)
        # A file that is shorter than its map would kill this process at the first touch. This look keeps that
        # to the moment between it and the touch.
        size = os.stat(place).st_size
        if mapped is None or len(mapped) != size:
            with opened(place) as (descriptor, size):
                mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if size else mmap.mmap(-1, 1)
        with self._lock:
            self._maps[place] = mapped
            while len(self._maps) > MAPS_KEPT:
                self._maps.popitem(last=False)  # unmapped when the last piece of it is gone
        return memoryview(mapped)[offset : min(offset + length, size)]

    def whole(self, place: Path, largest: int) -> bytes:
        return read_file(place, largest)

    def forget(self, place: Path, offset: int) -> None:
        with self._lock:
            self._maps.pop(place, None)


class CachedAccess:
    """Pieces of a remote store, kept in a bounded cache on a local disk."""

    def __init__(self, cache: Cache, store_digest: str) -> None:
        self._cache = cache
        self._store = store_digest[:16]

    def read(self, place: RemotePath, offset: int, length: int, *, keep: bool = True) -> bytes:
        if not keep:
            return read_range(place, offset, length)
        name = self._name(place, offset)
        data = self._cache.get(name)
        if data is None or len(data) != length:
            data = read_range(place, offset, length)
            self._cache.put(name, data)
        return data

    def whole(self, place: RemotePath, largest: int) -> bytes:
        name = self._name(place, 0)
        data = self._cache.get(name)
        if data is None:
            data = read_file(place, largest)
            self._cache.put(name, data)
        return data

    def forget(self, place: RemotePath, offset: int) -> None:
        self._cache.remove(self._name(place, offset))
        forget(place)

    def _name(self, place: RemotePath, offset: int) -> str:
        return f"{self._store}-{place.parent.name}-{place.name}-{offset}"
