"""Files on a remote file system: a completed upload stands for the rename.

On an object store (S3, GCS) an object is visible when its upload is completed, or not at all; a killed writer
leaves nothing that a reader sees. Elsewhere (HDFS, fsspec) the upload goes to a temporary name, which is
then moved. Neither can refuse to replace what another writer makes at the same moment, so a shard exists by
its commit record alone, and `writer` looks once more after writing one.

Tested against an S3 server and a local file system behind pyarrow's interface; GCS and HDFS are untested.
"""

import contextlib
import errno
import hashlib
import os
import tempfile
import threading
import uuid
from collections import OrderedDict
from typing import IO

import pyarrow as pa
from pyarrow.fs import FileSelector, FileType

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
from sparsekd.logit_store.places.paths import OBJECT_STORES, RemotePath

UPLOAD_BYTES = 8 << 20
"""Bytes handed on at a time; S3 takes parts of 5 MiB and more."""

HANDLES_KEPT = 256
"""Open files; each spares the question for its length that would otherwise precede every read."""


class RemoteFiles:
    """A file system behind pyarrow's interface; see `file_system.Files`."""

    is_exclusive = False

    def __init__(self) -> None:
        self._handles: OrderedDict[RemotePath, pa.NativeFile] = OrderedDict()
        self._lock = threading.Lock()

    def exists(self, path: RemotePath) -> bool:
        return path.exists()

    def size(self, path: RemotePath) -> int:
        info = path.file_system.get_file_info(path.key)
        if info.type != FileType.File:
            raise FileNotFoundError(f"{path} is not there")
        return int(info.size)

    def read_range(self, path: RemotePath, offset: int, length: int) -> bytes:
        with self._lock:
            handle = self._handles.pop(path, None)
        if handle is None:
            handle = path.file_system.open_input_file(path.key)
        # pyarrow refuses to read behind the end, where a local file gives what there is.
        within = max(0, min(length, handle.size() - offset))
        data = handle.read_at(within, offset) if within else b""
        # Only after a read that worked, so that the next try after one that failed opens the file anew.
        with self._lock:
            self._handles[path] = handle
            while len(self._handles) > HANDLES_KEPT:
                self._handles.popitem(last=False)
        return data

    def forget(self, path: RemotePath) -> None:
        """Has the next read open a file anew: its length may be another."""
        with self._lock:
            self._handles.pop(path, None)

    def sha256(self, path: RemotePath) -> str:
        total = hashlib.sha256()
        with path.file_system.open_input_file(path.key) as file:
            while piece := file.read(READ_BYTES):
                total.update(piece)
        return total.hexdigest()

    def read_file(self, path: RemotePath, largest: int) -> bytes:
        with path.file_system.open_input_file(path.key) as file:
            if file.size() > largest:
                raise OSError(errno.EFBIG, f"it has {file.size():,} bytes, {largest:,} at most were expected")
            return file.read()

    def names(self, folder: RemotePath) -> list[str]:
        return sorted(self._listed(folder, recursive=False))

    def sizes(self, folder: RemotePath, *, below: bool, most: int | None) -> dict[str, int]:
        listed = self._listed(folder, recursive=below)
        files = {name: int(info.size) for name, info in listed.items() if info.type == FileType.File}
        require_few(files, most, folder)
        return dict(sorted(files.items()))

    def make_folder(self, folder: RemotePath) -> None:
        # An object store has no folders, only names with slashes in them.
        if not _is_object_store(folder):
            folder.file_system.create_dir(folder.key, recursive=True)

    def publish(self, final: RemotePath, produce: Produce, *, replace: bool) -> str:
        file_system.reached("opened", final)
        # To a local file first, so that little can fail while an upload is open: pyarrow cannot abort one,
        # and closing it, which leaving the block or the process does, completes it with what there is.
        with tempfile.TemporaryFile() as spool:
            file = HashingFile(spool.fileno())
            produce(file)
            digest = file.hexdigest()
            file_system.reached("written", final)
            if not replace and final.exists():
                self._require_same(final, digest)
                return digest
            target = final if _is_object_store(final) else _temporary_beside(final)
            try:
                spool.seek(0)
                with target.file_system.open_output_stream(target.key) as upload:
                    while piece := spool.read(UPLOAD_BYTES):
                        upload.write(piece)
                        file_system.reached("uploading", final)
                file_system.reached("uploaded", final)
                self.forget(final)
                self._require_same(target, digest)
                if target is not final:
                    target.file_system.move(target.key, final.key)
            except BaseException:
                with contextlib.suppress(OSError):
                    if target is not final:
                        target.file_system.delete_file(target.key)
                    else:
                        self._remove_half(final, spool)
                raise
        file_system.reached("read back", final)
        return digest

    def move(self, source: RemotePath, target: RemotePath) -> None:
        if target.exists():
            raise FileExistsError(f"{target} is there")
        self.forget(source)
        source.file_system.move(source.key, target.key)

    def remove_stale(self, folder: RemotePath) -> None:
        # A temporary name on a file system without locks may be a living writer's: left to its owner, and
        # harmless. An object store has none; what an abandoned upload costs is for its lifecycle rules.
        pass

    def _require_same(self, final: RemotePath, digest: str) -> None:
        if self.sha256(final) != digest:
            raise name_taken(final)

    def _remove_half(self, final: RemotePath, spool: IO[bytes]) -> None:
        """Removes an upload that was completed with the beginning of `spool` alone.

        Whatever else has the name is another writer's, and stays.
        """
        self.forget(final)
        size = self.size(final)
        if size >= os.fstat(spool.fileno()).st_size:
            return
        begin = hashlib.sha256()
        spool.seek(0)
        while size and (piece := spool.read(min(size, READ_BYTES))):
            begin.update(piece)
            size -= len(piece)
        if self.sha256(final) == begin.hexdigest():
            final.file_system.delete_file(final.key)

    def _listed(self, folder: RemotePath, *, recursive: bool) -> dict[str, pa.fs.FileInfo]:
        """Returns what lies in a folder, by its name relative to it."""
        selector = FileSelector(folder.key, recursive=recursive, allow_not_found=True)
        start = folder.key.lstrip("/") + "/"
        listed = {}
        for info in folder.file_system.get_file_info(selector):
            # One that is not below the folder keeps the slash, and is refused.
            name = f"/{info.path.lstrip('/')}".removeprefix(f"/{start}")
            listed[admitted_name(name, folder)] = info
        return listed


def _temporary_beside(final: RemotePath) -> RemotePath:
    return final.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"


def _is_object_store(path: RemotePath) -> bool:
    return path.file_system.type_name in OBJECT_STORES
