"""Stores over dense made-up logits, for tests that compare with the whole distribution in float64.

Shapes: L positions of a row, V vocabulary, k head entries, G grid temperatures.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.manifest import CodecSpec, Manifest
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row, TeacherRecord, take_records
from sparsekd.logit_store.synthetic import synthetic_manifest, write_synthetic_tokenizer

V, L, GRID = 50, 12, (1.0, 2.0, 4.0)


def dense_manifest(k: int, **overrides: object) -> Manifest:
    """Returns the manifest of `dense_store`."""
    settings = {
        "vocabulary_size": V,
        "sequence_length": L,
        "n": 0,
        "temperatures": GRID,
        "codec": CodecSpec("exact", {}),
    }
    return synthetic_manifest(k=k, **{**settings, **overrides})


def dense_logprobs(rows: int, seed: int) -> NDArray[np.float64]:
    """Returns log-probabilities [rows, L, V] of various sharpness."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((rows, L, V)) * random.uniform(0.5, 6, (rows, L, 1))
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def dense_record(logprobs: NDArray[np.float64], true: NDArray[np.int64], k: int) -> TeacherRecord:
    """Returns the record of log-probabilities [L, V], by the definitions of docs/format.md."""
    order = np.argsort(-logprobs.astype(np.float32), axis=1, kind="stable")
    head, rest = order[:, :k], order[:, k:]
    rest_values = np.take_along_axis(logprobs, rest, axis=1)
    share = np.exp(rest_values) / np.exp(rest_values).sum(axis=1, keepdims=True)
    true_values = logprobs[np.arange(len(true)), true]
    true_values[-1] = 0
    return TeacherRecord(
        head_ids=head.astype(np.int32),
        head_logprobs=np.take_along_axis(logprobs, head, axis=1).astype(np.float32),
        tail_ids=np.empty((len(true), 0), np.int32),
        tail_counts=np.empty((len(true), 0), np.int32),
        log_rest=np.stack([np.log(np.exp(rest_values / T).sum(axis=1)) for T in GRID], axis=1).astype(
            np.float32
        ),
        rest_entropy=-(share * np.log(share)).sum(axis=1).astype(np.float32),
        true_logprob=true_values.astype(np.float32),
        entropy=-(np.exp(logprobs) * logprobs).sum(axis=1).astype(np.float32),
    )


def dense_rows(logprobs: NDArray[np.float64], k: int, text_seed: int = 0) -> list[Row]:
    """Returns one-document rows over the text of a seed, with records where the loss counts: M = L - 1."""
    tokens = np.random.default_rng([9, text_seed]).integers(0, V, logprobs.shape[:2])
    mask = np.ones(L, np.bool_)
    mask[-1] = False
    return [
        Row(
            token_ids=ids.astype(np.int32),
            loss_mask=mask,
            segment_starts=np.zeros(1, np.int32),
            segment_documents=np.array([number], np.int64),
            teacher=take_records(dense_record(values, np.roll(ids, -1), k), mask),
        )
        for number, (ids, values) in enumerate(zip(tokens, logprobs, strict=True))
    ]


def write_rows(path: Path, manifest: Manifest, content: dict[str, list[Row]]) -> Path:
    """Writes and seals a store of given rows; returns its path."""
    tokenizer = write_synthetic_tokenizer(path.with_name("tokenizer"), manifest.tokenizer.vocabulary_size)
    create_store(path, manifest, tokenizer)
    size, shards = manifest.rows_per_shard, {}
    for split in manifest.splits:
        rows = content.get(split, [])
        starts = range(0, len(rows), size)
        shards[split] = len(starts)
        for shard, start in enumerate(starts):
            write_shard(path, manifest, split, shard, rows[start : start + size])
    seal(path, shards)
    return path
