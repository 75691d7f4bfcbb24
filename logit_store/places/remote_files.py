"""Files on a remote file system that is no object store (HDFS, what fsspec opens), by pyarrow's interface.

A file is uploaded under a temporary name, which is then moved. Nothing here can refuse to replace what
another writer makes at the same moment, so a shard exists by its commit record alone, and `writer` looks once
more after writing one.

Tested against fsspec's `memory://` and a local disk behind pyarrow's interface; HDFS is untested.
"""

import contextlib
import errno
import hashlib
import threading
import uuid
from collections import OrderedDict
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType

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

UPLOAD_BYTES = 8 << 20
"""Bytes handed on at a time."""

HANDLES_KEPT = 256
"""Open files; each spares the question for its length that would otherwise precede every read."""


class RemoteFiles:
    """A file system behind pyarrow's interface; see `file_system.Files`."""

    def __init__(self, arrow: FileSystem) -> None:
        self._arrow = arrow
        self._handles: OrderedDict[str, pa.NativeFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._arrow,)

    def is_exclusive(self, folder: RemotePath) -> bool:
        return False

    def exists(self, path: RemotePath) -> bool:
        return bool(self._arrow.get_file_info(path.key).type == FileType.File)

    def size(self, path: RemotePath) -> int:
        info = self._arrow.get_file_info(path.key)
        if info.type != FileType.File:
            raise FileNotFoundError(errno.ENOENT, "it is not there")
        return int(info.size)

    def read_range(self, path: RemotePath, offset: int, length: int) -> bytes:
        with self._lock:
            handle = self._handles.pop(path.key, None)
        if handle is None:
            handle = self._arrow.open_input_file(path.key)
        # pyarrow refuses to read behind the end, where a local file gives what there is.
        within = max(0, min(length, handle.size() - offset))
        data = handle.read_at(within, offset) if within else b""
        # Only after a read that worked, so that the next try after one that failed opens the file anew.
        with self._lock:
            self._handles[path.key] = handle
            while len(self._handles) > HANDLES_KEPT:
                self._handles.popitem(last=False)
        return data

    def read_file(self, path: RemotePath, largest: int) -> bytes:
        with self._arrow.open_input_file(path.key) as file:
            if file.size() > largest:
                raise OSError(errno.EFBIG, f"has {file.size():,} bytes, expected at most {largest:,}")
            return file.read()

    def forget(self, path: RemotePath) -> None:
        with self._lock:
            self._handles.pop(path.key, None)  # the file's length may be another

    def sha256(self, path: RemotePath) -> str:
        total = hashlib.sha256()
        with self._arrow.open_input_file(path.key) as file:
            while piece := file.read(READ_BYTES):
                total.update(piece)
        return total.hexdigest()

    def names(self, folder: RemotePath) -> list[str]:
        return sorted(self._listed(folder, recursive=False))

    def sizes(self, folder: RemotePath, *, below: bool, most: int | None) -> dict[str, int]:
        listed = self._listed(folder, recursive=below)
        files = {name: int(info.size) for name, info in listed.items() if info.type == FileType.File}
        require_few(files, most, folder)
        return dict(sorted(files.items()))

    def make_folder(self, folder: RemotePath) -> None:
        self._arrow.create_dir(folder.key, recursive=True)

    def publish(self, final: RemotePath, produce: Produce, *, replace: bool) -> str:
        with spooled(final, produce) as (spool, file):
            digest = file.hexdigest()
            if not replace and self.exists(final):
                self._require_same(final, digest)
                return digest
            self.make_folder(final.parent)
            temporary = final.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
            try:
                spool.seek(0)
                with self._arrow.open_output_stream(temporary.key) as upload:
                    while piece := spool.read(UPLOAD_BYTES):
                        upload.write(piece)
                        file_system.reached("uploading", final)
                file_system.reached("uploaded", final)
                self.forget(final)
                self._require_same(temporary, digest)
                self._arrow.move(temporary.key, final.key)
            except BaseException:  # however it was broken off, an interrupt too: no half upload stays
                with contextlib.suppress(OSError):
                    self._arrow.delete_file(temporary.key)
                raise
        file_system.reached("read back", final)
        return digest

    def move(self, source: RemotePath, target: RemotePath) -> None:
        if self.exists(target):
            raise FileExistsError(f"{target} is there")
        self.forget(source)
        self._arrow.move(source.key, target.key)

    def remove_stale(self, folder: RemotePath) -> None:
        # A temporary name on a file system without locks may be a living writer's: left to its owner, and
        # harmless.
        pass

    def _require_same(self, final: RemotePath, digest: str) -> None:
        if self.sha256(final) != digest:
            raise name_taken(final)

    def _listed(self, folder: RemotePath, *, recursive: bool) -> dict[str, pa.fs.FileInfo]:
        """Returns what lies in a folder, by its name relative to it."""
        selector = FileSelector(folder.key, recursive=recursive, allow_not_found=True)
        return {
            name_below(info.path, folder.key, folder): info for info in self._arrow.get_file_info(selector)
        }
