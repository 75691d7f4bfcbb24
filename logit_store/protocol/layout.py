"""Where the files of a store are, by name, and how a place in it is called in messages."""

import re
from collections.abc import Iterable
from typing import TypeVar, cast

from sparsekd.logit_store import projections
from sparsekd.logit_store.places.paths import StorePath

AnyPath = TypeVar("AnyPath", bound=StorePath)

INDEX_NAME = "INDEX.json"
TOKENIZER_NAME = "tokenizer"
QUARANTINE_NAME = "quarantine"

SHARD_NAME = re.compile(r"(\d{6,})\.(arrow|json)")

REMEDY = "restore it from a copy, or have it made again with `sparsekd store verify STORE --repair`"
"""What to do about a damaged shard."""


def shard_file(path: AnyPath, split: str, shard: int) -> AnyPath:
    """Returns the path of a shard's Arrow file."""
    return cast(AnyPath, path / "shards" / split / f"{shard:06d}.arrow")


def commit_file(path: AnyPath, split: str, shard: int) -> AnyPath:
    """Returns the path of a shard's commit record."""
    return cast(AnyPath, path / "shards" / split / f"{shard:06d}.json")


def folders_of(path: AnyPath, splits: Iterable[str]) -> list[AnyPath]:
    """Returns the folders that a store has, those within its tokenizer's left out."""
    inner = (TOKENIZER_NAME, projections.FOLDER, QUARANTINE_NAME, "shards")
    return [cast(AnyPath, path / name) for name in inner] + [
        cast(AnyPath, shard_file(path, split, 0).parent) for split in splits
    ]


def row_place(store: StorePath, split: str, index: int, rows_per_shard: int) -> str:
    """Returns a row's place in words, for messages."""
    return f"{store}, split {split}, shard {index // rows_per_shard:06d}, row {index}"
