"""The files of a tokenizer: which they are, and their digest."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from sparsekd.logit_store.errors import StoreError


def tokenizer_digest(folder: Path) -> str:
    """Returns the sha256 (hex) over the files of a tokenizer folder, see `digest_of_files`."""
    if not folder.is_dir():
        raise StoreError(f"The tokenizer folder {folder} does not exist: give a folder with tokenizer.json.")
    return digest_of_files((name, path.read_bytes()) for name, path in files_of_tokenizer(folder))


def files_of_tokenizer(folder: Path) -> list[tuple[str, Path]]:
    """Returns (name relative to the folder, path) of every file below it, sorted by name."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".tmp-"))
    return sorted((path.relative_to(folder).as_posix(), path) for path in paths)


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
