"""Where a store is: a local folder, or a place on a remote file system.

A local store is a plain `pathlib.Path`. A remote place has the few methods of one that code above the store
needs; everything that decides whether a file is whole goes through `files`.
"""

import importlib
import re
from pathlib import Path
from typing import Any

from pyarrow import ArrowException
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from sparsekd.logit_store.errors import StoreError, first_line

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

_CREDENTIALS = re.compile(r"(?<=://)(?:[^/@]*:[^/@]*@|[^/@:]*:(?!\d+/)[^@]*@)")
"""What precedes a host or bucket as `KEY:SECRET@`; also where the secret holds a slash, which is refused."""


class RemotePath:
    """A place on a remote file system. Two are equal when they have the same address.

    Attributes:
        files: the file system, a `file_system.Files`.
        key: the place in it, such as `runs/a/store` in a bucket.
        root: what precedes the key in an address, such as `s3://bucket/`.
    """

    def __init__(self, files: Any, root: str, key: str) -> None:
        self.files = files
        self.root = root
        self.key = key.rstrip("/")

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.files, self.root, f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        # Without what followed a question mark or preceded an @: there may be keys in it, and this goes into
        # messages.
        return f"{self.root}{self.key}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        """Returns the last part."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """Returns the folder."""
        return RemotePath(self.files, self.root, self.key.rpartition("/")[0])

    def resolve(self) -> "RemotePath":
        """Returns the place itself: its address is absolute."""
        return self

    def read_bytes(self) -> bytes:
        """Returns a whole file.

        Raises:
            FileNotFoundError: there is none.
        """
        content: bytes = self.files.read_file(self, LARGEST_FILE)
        return content


StorePath = Path | RemotePath

LARGEST_FILE = 1 << 30
"""Bytes of the largest file that is read whole: the index of a million shards has 120 million."""


def store_path(text: str | StorePath) -> StorePath:
    """Returns the place that a word in a configuration names.

    `s3://bucket/folder` is one on S3 or a server that speaks its language; `gs://` and `abfs://` likewise,
    see `object_stores`. `hdfs://` is opened by pyarrow, other addresses by fsspec where it is installed.
    Credentials and endpoint come from where the file system's own tools take them (`AWS_ACCESS_KEY_ID`,
    `AWS_ENDPOINT_URL`, ...), or follow a question mark: `s3://bucket/folder?region=eu-west-1`. Those that
    precede the bucket, as in `s3://KEY:SECRET@bucket/folder`, work, and are not part of what is shown.
    `file://` and everything without an address is a local path.

    Raises:
        StoreError: there is no such file system, or it cannot be reached.
    """
    if not isinstance(text, str):
        return text
    match = _URI.match(text)
    if match is None:
        return Path(text)
    scheme = match[1].lower()
    if scheme == "file":
        return Path(text[len("file://") :])
    # These open what is below them, and know of a place.
    from sparsekd.logit_store.places.object_stores import SCHEMES, open_object_store
    from sparsekd.logit_store.places.remote_files import RemoteFiles

    address = text.partition("?")[0]
    shown = _CREDENTIALS.sub("", address, count=1).rstrip("/")
    if scheme in SCHEMES:
        return open_object_store(scheme, text, shown)
    try:
        file_system, key = FileSystem.from_uri(text)
    except (ArrowException, ValueError, OSError) as error:
        if "nrecognized filesystem type" not in str(error):
            # Not from the error: what --traceback shows of it holds the address as it was given.
            reason = first_line(error).replace(text, shown)
            raise StoreError(f"{shown} cannot be opened: {reason}.") from None
        file_system, key = _by_fsspec(address, shown, scheme)
    key = key.rstrip("/")
    root = shown.removesuffix(key)
    return RemotePath(RemoteFiles(file_system), root if root != shown else f"{scheme}://", key)


def _by_fsspec(address: str, shown: str, scheme: str) -> tuple[FileSystem, str]:
    try:
        # An optional library, so not imported at the top of a module.
        fsspec: Any = importlib.import_module("fsspec")
        found, key = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"{shown}: neither pyarrow nor fsspec opens {scheme}:// addresses here "
            f"({first_line(error).replace(address, shown)}); use a local path or s3://, or install fsspec's "
            "library for it."
        ) from None
    return PyFileSystem(FSSpecHandler(found)), key.strip("/")
