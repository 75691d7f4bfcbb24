"""The index of a sealed store: which shards it has, and what is counted over them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.json_text import read_signed_json
from sparsekd.logit_store.manifest import (
    MANIFEST_NAME,
    Manifest,
    manifest_digest,
    manifest_to_json,
)
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.commit import RowCounts, check_sums
from sparsekd.logit_store.protocol.layout import INDEX_NAME
from sparsekd.logit_store.typed_json import Count, Sha256, read_bounded, require, typed

INDEX_BYTES = 128 << 20
"""Bytes of an index at most; a shard takes about 120."""


@dataclass(frozen=True)
class SplitIndex:
    """What the index says of one split.

    Attributes:
        rows: in all shards.
        counts: over these rows.
        plane_bytes: stored bytes of each plane, over these rows.
        file_bytes: of all Arrow files.
        record_digests: of each shard's commit record, in order; 64 bytes each.
    """

    rows: int
    counts: RowCounts
    plane_bytes: dict[str, int]
    file_bytes: int
    record_digests: NDArray[np.bytes_]  # [shards] S64: objects would be ten times as large


@dataclass(frozen=True, slots=True)
class _Shard:
    """An entry of a split's list of shards."""

    record_digest: Sha256
    rows: Count


@dataclass(frozen=True)
class _Split:
    """A split as the file has it; see `SplitIndex`."""

    rows: Count
    counts: RowCounts
    plane_bytes: dict[str, Count]
    file_bytes: Count
    shards: tuple[_Shard, ...]


@dataclass(frozen=True)
class _Index:
    """The file, without its envelope.

    Attributes:
        manifest_sha256: of the store's `MANIFEST.json`.
        splits: by name.
    """

    manifest_sha256: Sha256
    splits: dict[str, _Split]


def read_index(
    path: StorePath, manifest: Manifest, manifest_text: bytes
) -> tuple[dict[str, SplitIndex], str]:
    """Reads the index of a store.

    Args:
        path: of the store.
        manifest: of that store.
        manifest_text: the bytes of its file.

    Returns:
        (what it says of each split, its digest).

    Raises:
        DamagedStoreError: it is damaged, of another manifest, or contradicts the manifest or itself.
        StoreError: there is none, or it cannot be read.
    """
    place = path / INDEX_NAME
    try:
        data = read_bounded(place, INDEX_BYTES)
    except FileNotFoundError:
        raise StoreError(
            f"{path} is not finished: it has no {INDEX_NAME}; run the command that writes it again, which "
            "continues and seals it."
        ) from None
    content, digest = read_signed_json(place, data, FORMAT_VERSION)
    index = typed(_Index, content, str(place))
    is_canonical = manifest_text == manifest_to_json(manifest).encode("ascii")
    if index.manifest_sha256 != manifest_digest(manifest) or not is_canonical:
        raise DamagedStoreError(
            f"{path / MANIFEST_NAME} is not the manifest that was sealed: it was edited or damaged; restore "
            "it from a copy."
        )
    names = sorted(index.splits)
    require(names == sorted(manifest.splits), place, "splits", ", ".join(manifest.splits), names)
    splits = {name: _split_index(index.splits[name], manifest, f"{place}, {name}") for name in names}
    return {name: splits[name] for name in manifest.splits}, digest


def _split_index(split: _Split, manifest: Manifest, where: str) -> SplitIndex:
    """Returns a split of the file, compared with the manifest and with its own sums."""
    rows = np.array([shard.rows for shard in split.shards], np.int64)
    full = manifest.rows_per_shard
    wrong = rows != full
    wrong[-1:] = (rows[-1:] < 1) | (rows[-1:] > full)
    for shard in np.flatnonzero(wrong)[:1].tolist():
        name, found = f"rows of shard {shard:06d}", int(rows[shard])
        require(False, where, name, f"{full}, or from 1 in the last shard", found)
    total = sum(rows.tolist())
    require(split.rows == total, where, "rows", f"{total}, the sum over its shards", split.rows)
    check_sums(split.counts, split.plane_bytes, split.rows, manifest, where)
    stored = sum(split.plane_bytes.values())
    require(split.file_bytes >= stored, where, "file_bytes", f"at least {stored} of planes", split.file_bytes)
    none = split.rows > 0 or split.file_bytes == 0
    require(none, where, "file_bytes", "0, because it has no shards", split.file_bytes)
    return SplitIndex(
        rows=split.rows,
        counts=split.counts,
        plane_bytes=split.plane_bytes,
        file_bytes=split.file_bytes,
        record_digests=np.array([shard.record_digest for shard in split.shards], "S64"),
    )
