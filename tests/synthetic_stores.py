"""Small whole stores of made-up rows, for tests of every part."""

from collections.abc import Mapping
from pathlib import Path

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.synthetic import synthetic_rows, write_synthetic_tokenizer


def write_synthetic_store(path: Path, manifest: Manifest, rows: Mapping[str, int], seed: int) -> str:
    """Writes and seals a store of random rows below an existing folder; returns its digest.

    Args:
        path: of the store; the made-up tokenizer is written beside it.
        manifest: from `synthetic_manifest`.
        rows: number of rows of each split.
        seed: of the rows.
    """
    size = manifest.tokenizer.vocabulary_size
    tokenizer = write_synthetic_tokenizer(path.with_name(path.name + "-tokenizer"), size)
    create_store(path, manifest, tokenizer)
    shards = {}
    for split, count in rows.items():
        content = synthetic_rows(manifest, count, seed + manifest.splits.index(split), split)
        starts = range(0, count, manifest.rows_per_shard)
        shards[split] = len(starts)
        for shard, start in enumerate(starts):
            write_shard(path, manifest, split, shard, content[start : start + manifest.rows_per_shard])
    return seal(path, {**dict.fromkeys(manifest.splits, 0), **shards})
