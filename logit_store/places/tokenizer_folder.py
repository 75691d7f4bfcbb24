"""The folder of a tokenizer's files: a user's own, that in a store, and the local copy of a remote one's.

A user's own may be made of links, as in Hugging Face's cache. In a store there are none, and names and sizes
are looked at before a byte is read: what lies there is copied and handed to other libraries.
"""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.places.cache import Cache
from sparsekd.logit_store.places.file_system import TEMPORARY_PREFIX, explained
from sparsekd.logit_store.places.files import read_range, sizes_below
from sparsekd.logit_store.places.names import admitted_name
from sparsekd.logit_store.places.paths import RemotePath, StorePath

MOST_FILES = 1_000
"""Tokenizers have about ten files; a chat template or a vocabulary for each of many languages adds some."""

LARGEST_BYTES = 256 << 20
"""Of all files together: the largest tokenizers known to us have some 40 MB, weights have more than this."""


def tokenizer_digest(folder: Path) -> str:
    """Returns the sha256 (hex) over the files of a user's tokenizer folder, see `digest_of_files`.

    Raises:
        StoreError: as `files_of_tokenizer`.
    """
    return digest_of_files((name, path.read_bytes()) for name, path in files_of_tokenizer(folder))


def files_of_tokenizer(folder: Path) -> list[tuple[str, Path]]:
    """Returns (name relative to the folder, path) of every file below a user's own folder, sorted by name.

    Links are followed.

    Raises:
        StoreError: there is no such folder, or a store could not hold its files.
    """
    if not folder.is_dir():
        raise StoreError(f"The tokenizer folder {folder} does not exist: give a folder with tokenizer.json.")
    with explained(folder):
        paths = [path for path in folder.rglob("*") if path.is_file() and not _is_temporary(path.name)]
        files = sorted((admitted_name(path.relative_to(folder).as_posix(), folder), path) for path in paths)
        _require_small(folder, {name: path.stat().st_size for name, path in files})
    return files


def stored_tokenizer_sizes(folder: StorePath) -> dict[str, int]:
    """Returns the bytes of each tokenizer file in a store, by its name, sorted.

    Raises:
        StoreError: too many or too large, a name that is not admitted, or a link.
    """
    listed = sizes_below(folder, most=MOST_FILES)
    sizes = {name: size for name, size in listed.items() if not _is_temporary(name.rpartition("/")[2])}
    _require_small(folder, sizes)
    return sizes


def stored_tokenizer_digest(folder: StorePath) -> str:
    """Returns the `tokenizer_digest` of a tokenizer folder in a store.

    Raises:
        StoreError: as `stored_tokenizer_sizes`, or a file cannot be read.
    """
    with explained(folder):
        return digest_of_files(
            (name, read_range(folder / name, 0, size))
            for name, size in stored_tokenizer_sizes(folder).items()
        )


def require_tokenizer(folder: StorePath, digest: str) -> None:
    """Raises DamagedStoreError where a tokenizer folder in a store is not the one of that digest."""
    if stored_tokenizer_digest(folder) != digest:
        raise _another_tokenizer(folder)


def local_tokenizer(folder: RemotePath, digest: str, cache: Cache) -> Path:
    """Returns a local folder with a remote store's tokenizer, copied there once.

    It stays outside of the cache's bound: libraries hold on to its path, and it has a few megabytes.

    Raises:
        DamagedStoreError: the files are not the tokenizer of that digest.
        StoreError: they are not such as a store has, or cannot be read or written.
    """
    final = cache.folder / "tokenizers" / digest
    with contextlib.suppress(StoreError):
        if final.is_dir() and stored_tokenizer_digest(final) == digest:
            return final
    sizes = stored_tokenizer_sizes(folder)
    working = final.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    with explained(working):
        working.mkdir(parents=True)
        try:
            for name, size in sizes.items():
                with explained(folder / name):
                    content = read_range(folder / name, 0, size)
                (working / name).parent.mkdir(parents=True, exist_ok=True)
                (working / name).write_bytes(content)
            if stored_tokenizer_digest(working) != digest:
                raise _another_tokenizer(folder)
            shutil.rmtree(final, ignore_errors=True)  # damaged
            try:
                os.rename(working, final)
            except OSError:
                if not final.is_dir():  # of another process, which was faster
                    raise
        finally:
            shutil.rmtree(working, ignore_errors=True)
    return final


def digest_of_files(files: Iterable[tuple[str, bytes]]) -> str:
    """Returns the sha256 (hex) over names and bytes.

    Each file adds its name in UTF-8, a zero byte, its length as 8 bytes little-endian, and its bytes.

    Args:
        files: (name, bytes), sorted by name.
    """
    total = hashlib.sha256()
    for name, content in files:
        total.update(name.encode() + b"\0" + len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()


def _is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY_PREFIX)


def _another_tokenizer(folder: StorePath) -> DamagedStoreError:
    return DamagedStoreError(
        f"{folder} does not hold the manifest's tokenizer: a file is damaged, missing or too many; restore "
        "it from a copy."
    )


def _require_small(folder: StorePath, sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    if len(sizes) > MOST_FILES or total > LARGEST_BYTES:
        raise StoreError(
            f"{folder} holds {len(sizes):,} files of {total:,} bytes, a tokenizer has {MOST_FILES:,} files "
            f"and {LARGEST_BYTES:,} bytes at most: give a folder with the tokenizer's files alone, or "
            "restore the store's from a copy."
        )
