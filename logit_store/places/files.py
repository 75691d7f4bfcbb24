"""The files of a store, wherever it is: whole or absent, read by ranges; texts that carry their digest."""

from sparsekd.logit_store.places.file_system import (
    READ_BYTES,
    TEMPORARY_PREFIX,
    Files,
    HashingFile,
    Produce,
    explained,
)
from sparsekd.logit_store.places.local_files import LocalFiles
from sparsekd.logit_store.places.paths import RemotePath, StorePath
from sparsekd.logit_store.places.remote_files import RemoteFiles

__all__ = ["READ_BYTES", "TEMPORARY_PREFIX", "HashingFile", "explained"]

LOCAL = LocalFiles()
REMOTE = RemoteFiles()


def files_of(path: StorePath) -> Files:
    """Returns the file system that a path is on."""
    return REMOTE if isinstance(path, RemotePath) else LOCAL


def publish(final: StorePath, produce: Produce, *, replace: bool = False) -> str:
    """Makes the file `final` with what `produce` writes, whole or not at all.

    The bytes are read back and compared. A file of that name with the same bytes is left as it is. Whatever
    fails, no half file has the name, and no temporary file stays behind.

    Args:
        final: the file to make; its folder exists.
        produce: writes the content.
        replace: whether a file of that name gives way.

    Returns:
        The sha256 (hex) of the file.

    Raises:
        NameTakenError: there is a file of that name with other bytes.
        StoreError: no room, or a failing disk or connection.
    """
    with explained(final):
        return files_of(final).publish(final, produce, replace=replace)


def publish_bytes(final: StorePath, content: bytes, *, replace: bool = False) -> str:
    """Makes the file `final` with the given content, see `publish`."""

    def produce(file: HashingFile) -> None:
        file.write(content)

    return publish(final, produce, replace=replace)


def make_folder(folder: StorePath) -> None:
    """Makes a folder and its parents, and has their names reach the disk."""
    with explained(folder):
        files_of(folder).make_folder(folder)


def remove_stale(folder: StorePath) -> None:
    """Removes from a folder the temporary files whose writers are dead."""
    with explained(folder):
        files_of(folder).remove_stale(folder)


def move(source: StorePath, target: StorePath) -> None:
    """Gives a file another name, never over another file.

    Raises:
        FileExistsError: there is a file of that name.
        StoreError: it cannot be moved.
    """
    try:
        files_of(source).move(source, target)
    except FileExistsError:
        raise
    except OSError:
        with explained(source):
            raise


def exists(path: StorePath) -> bool:
    """Returns whether there is such a file or folder."""
    with explained(path):
        return files_of(path).exists(path)


def size_of(path: StorePath) -> int:
    """Returns the bytes of a file."""
    with explained(path):
        return files_of(path).size(path)


def names_in(folder: StorePath) -> list[str]:
    """Returns the names of what lies directly in a folder, sorted; empty where there is none."""
    with explained(folder):
        return files_of(folder).names(folder)


def files_below(folder: StorePath) -> list[str]:
    """Returns the names, relative to a folder and with `/`, of all files below it, sorted."""
    with explained(folder):
        return files_of(folder).files_below(folder)


def sha256_of(path: StorePath) -> str:
    """Returns the sha256 (hex) of a file, read in pieces. Raises OSError as it comes."""
    return files_of(path).sha256(path)


def read_range(path: StorePath, offset: int, length: int) -> bytes:
    """Returns up to `length` bytes from `offset`, fewer only where the file ends; one positional read.

    Raises OSError as it comes.
    """
    return files_of(path).read_range(path, offset, length)
