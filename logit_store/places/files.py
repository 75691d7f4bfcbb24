"""The files of a store, wherever it is: whole or absent, read by ranges; texts that carry their digest."""

from collections.abc import Iterable
from pathlib import Path

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places.file_system import (
    READ_BYTES,
    TEMPORARY_PREFIX,
    Files,
    HashingFile,
    Produce,
    explained,
)
from sparsekd.logit_store.places.local_files import LocalFiles
from sparsekd.logit_store.places.paths import LARGEST_FILE, RemotePath, StorePath

__all__ = ["READ_BYTES", "TEMPORARY_PREFIX", "HashingFile", "explained"]

LOCAL = LocalFiles()


def files_of(path: StorePath) -> Files:
    """Returns the file system that a path is on."""
    files: Files = path.files if isinstance(path, RemotePath) else LOCAL
    return files


def publish(final: StorePath, produce: Produce, *, replace: bool = False) -> str:
    """Makes the file `final` with what `produce` writes, whole or not at all.

    The bytes are read back and compared. A file of that name with the same bytes is left as it is, and then
    nothing is written at all, on a local disk not even for a moment. Whatever fails, no half file has the
    name, and no temporary file stays behind.

    Args:
        final: the file to make. Its folder, where it alone is missing, is made when the content is whole.
        produce: writes the content; may be called twice.
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


def require_no_links(folders: Iterable[StorePath]) -> None:
    """Raises StoreError where a folder is a link: files would be written and removed where it leads."""
    for folder in folders:
        if isinstance(folder, Path) and folder.is_symlink():
            raise StoreError(
                f"{folder} is a link: a store has files and folders only; move the folder that it leads to "
                "here, or let the store's own folder be the link."
            )


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
    """Returns whether there is such a file."""
    with explained(path):
        return files_of(path).exists(path)


def size_of(path: StorePath) -> int:
    """Returns the bytes of a file."""
    with explained(path):
        return files_of(path).size(path)


def names_in(folder: StorePath) -> list[str]:
    """Returns the names of what lies directly in a folder, sorted; empty where there is none.

    Raises:
        StoreError: a name that is not admitted (see `names`), or something that is neither file nor folder,
            such as a link.
    """
    with explained(folder):
        return files_of(folder).names(folder)


def sizes_in(folder: StorePath) -> dict[str, int]:
    """Returns the bytes of each file directly in a folder, by its name, sorted; empty where there is none."""
    with explained(folder):
        return files_of(folder).sizes(folder, below=False, most=None)


def sizes_below(folder: StorePath, *, most: int | None = None) -> dict[str, int]:
    """Returns the bytes of all files below a folder, by their names relative to it, with `/`, sorted.

    Args:
        folder: there need not be one.
        most: more files than this are refused.

    Raises:
        StoreError: too many, a name that is not admitted (see `names`), or something that is neither file
            nor folder, such as a link.
    """
    with explained(folder):
        return files_of(folder).sizes(folder, below=True, most=most)


def files_below(folder: StorePath) -> list[str]:
    """Returns the names of `sizes_below`."""
    return list(sizes_below(folder))


def read_file(path: StorePath, largest: int = LARGEST_FILE) -> bytes:
    """Returns a whole file. Raises OSError as it comes, also where it has more than `largest` bytes."""
    return files_of(path).read_file(path, largest)


def is_exclusive(path: StorePath) -> bool:
    """Returns whether `publish` of a file never replaces one that another writer makes at the same moment.

    On an object store this is tried out, once in a process, by uploading a small object twice.
    """
    with explained(path.parent):
        return files_of(path).is_exclusive(path.parent)


def forget(path: StorePath) -> None:
    """Has the next read of a file that was wrong go to the file system itself."""
    files_of(path).forget(path)


def sha256_of(path: StorePath) -> str:
    """Returns the sha256 (hex) of a file, read in pieces. Raises OSError as it comes."""
    return files_of(path).sha256(path)


def read_range(path: StorePath, offset: int, length: int) -> bytes:
    """Returns up to `length` bytes from `offset`, fewer only where the file ends; one positional read.

    Raises OSError as it comes.
    """
    return files_of(path).read_range(path, offset, length)
