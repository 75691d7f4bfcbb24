"""Where the files of a store are, by name, and how a place in it is called in messages."""

import re
from collections.abc import Iterable
from typing import TypeVar, cast

from sparsekd.logit_store.places.paths import StorePath

AnyPath = TypeVar("AnyPath", bound=StorePath)

INDEX_NAME = "INDEX.json"
INDEX_FOLDER = "index"
PROJECTIONS_FOLDER = "projections"
TOKENIZER_NAME = "tokenizer"
QUARANTINE_NAME = "quarantine"
WORK_NAME = "work"
"""The folder of what is not a shard yet: only while a store is written."""

SHARDS_PER_FOLDER = 1000
"""A folder of a million names is slow to list, and some file systems refuse it."""

_SHARD_NAME = re.compile(r"(\d{3,})/(\d{6,})\.(arrow|json)")

REMEDY = "restore it from a copy, or have it made again with `sparsekd store verify STORE --repair`"
"""What to do about a damaged shard."""


def table_file(path: AnyPath, split: str, sha256: str) -> AnyPath:
    """Returns the path of a split's table of rows.

    It is named after its content, so that an old index stays readable until the new one is there.
    """
    return cast(AnyPath, path / INDEX_FOLDER / f"{split}-{sha256[:16]}.bin")


def split_folder(path: AnyPath, split: str) -> AnyPath:
    """Returns the folder of a split's shards, which lie in folders of 1,000 below it."""
    return cast(AnyPath, path / "shards" / split)


def shard_file(path: AnyPath, split: str, shard: int) -> AnyPath:
    """Returns the path of a shard's Arrow file."""
    return cast(AnyPath, split_folder(path, split) / _group(shard) / f"{shard:06d}.arrow")


def commit_file(path: AnyPath, split: str, shard: int) -> AnyPath:
    """Returns the path of a shard's commit record."""
    return cast(AnyPath, split_folder(path, split) / _group(shard) / f"{shard:06d}.json")


def _group(shard: int) -> str:
    return f"{shard // SHARDS_PER_FOLDER:03d}"


def shard_names(shard: int) -> tuple[str, str]:
    """Returns the names of a shard's two files, relative to its split's folder."""
    return f"{_group(shard)}/{shard:06d}.arrow", f"{_group(shard)}/{shard:06d}.json"


def shard_number(name: str) -> int | None:
    """Returns the number of the shard that a file belongs to, by its name relative to the split's folder."""
    match = _SHARD_NAME.fullmatch(name)
    if match is None or name not in shard_names(int(match[2])):
        return None
    return int(match[2])


def work_folder(path: AnyPath, split: str, shard: int) -> AnyPath:
    """Returns the folder of what is known of a shard before it is committed."""
    return cast(AnyPath, path / WORK_NAME / split / f"{shard:06d}")


def work_name(rows: range) -> str:
    """Returns the name, without its ending, of what is about some rows of a shard, numbered from 0 in it."""
    return f"{rows.start:06d}-{rows.stop - 1:06d}"


def part_file(path: AnyPath, split: str, shard: int, rows: range) -> AnyPath:
    """Returns the path of a part: rows that are written before the others of their shard."""
    return cast(AnyPath, work_folder(path, split, shard) / f"{work_name(rows)}.part")


def folders_of(path: AnyPath, splits: Iterable[str]) -> list[AnyPath]:
    """Returns the folders that a store has, those within its tokenizer's left out."""
    inner = (TOKENIZER_NAME, PROJECTIONS_FOLDER, QUARANTINE_NAME, INDEX_FOLDER, "shards", WORK_NAME)
    folders = [cast(AnyPath, path / name) for name in inner]
    for split in splits:
        folders += [split_folder(path, split), cast(AnyPath, path / WORK_NAME / split)]
    return folders


def row_place(store: StorePath, split: str, index: int, rows_per_shard: int) -> str:
    """Returns a row's place in words, for messages."""
    return f"{store}, split {split}, shard {index // rows_per_shard:06d}, row {index}"
