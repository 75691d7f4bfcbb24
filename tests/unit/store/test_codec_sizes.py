"""What the codecs cost on rows like those of a large teacher on text: bytes of the file, and exactness."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from whole import whole_manifest, whole_rows

from sparsekd.logit_store.codecs.codec import codec_of, stored_record
from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.manifest import CodecSpec, Manifest
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row, TeacherRecord
from sparsekd.logit_store.synthetic import write_synthetic_tokenizer
from sparsekd.logit_store.synthetic_text import text_like_rows

VOCABULARY, LENGTH = 128_256, 4096


@functools.cache
def _rows(k: int, n: int, ids: str, tail_logprobs: bool, count: int = 2) -> tuple[Manifest, tuple[Row, ...]]:
    """Rows with a record at every position: bytes per token are then bytes per record."""
    manifest = whole_manifest(
        vocabulary_size=VOCABULARY,
        sequence_length=LENGTH,
        rows_per_shard=2,
        splits=("train",),
        k=k,
        n=n,
        tail_logprobs=tail_logprobs,
    )
    return manifest, tuple(whole_rows(manifest, count, 0, functools.partial(text_like_rows, ids=ids)))


def divergence(exact: TeacherRecord, decoded: TeacherRecord, temperature: float, column: int) -> np.ndarray:
    """KL in nats, float64 [L], of the decoded head and rest from the exact ones, both normalised."""
    sides = []
    for record in (exact, decoded):
        order = np.argsort(record.head_ids, axis=1, kind="stable")
        head = np.take_along_axis(record.head_logprobs, order, axis=1).astype(np.float64) / temperature
        together = np.concatenate([head, record.log_rest[:, column : column + 1].astype(np.float64)], axis=1)
        sides.append(together - np.log(np.exp(together).sum(axis=1, keepdims=True)))
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(sides[0]), 0, np.exp(sides[0]) * (sides[0] - sides[1]))
    return terms.sum(axis=1)


# Bytes per token of the file, ids, side planes, checksums and container included. With 2 rows in a shard, its
# header and footer weigh 0.4 of them.
@pytest.mark.parametrize(
    ("codec", "ids", "k", "n", "tail_logprobs", "most"),
    [
        ("tkq8", "text", 64, 0, False, 157),
        ("tkq8", "uniform", 64, 0, False, 182),
        ("plain", "text", 64, 0, False, 222),
        ("compact", "text", 64, 0, False, 102),
        ("tkq8", "text", 8, 24, False, 70),
        ("tkq8", "text", 8, 12, False, 54),
        ("tkq8", "text", 0, 50, False, 36),
        ("tkq8", "text", 8, 24, True, 85),
        ("tkq8", "text", 8, 12, True, 64),
        ("tkq8", "text", 0, 50, True, 48),
    ],
)
def test_bytes_per_token_and_divergence(
    tmp_path: Path, codec: str, ids: str, k: int, n: int, tail_logprobs: bool, most: float
) -> None:
    manifest, rows = _rows(k, n, ids, tail_logprobs)
    parameters = {}
    if codec == "compact":
        counts = np.bincount(np.concatenate([row.token_ids for row in rows]), minlength=VOCABULARY)
        parameters = compact_parameters(counts, mass=0.99)
    manifest = dataclasses.replace(manifest, codec=CodecSpec(codec, parameters))
    path = tmp_path / "store"
    create_store(path, manifest, write_synthetic_tokenizer(tmp_path / "tokenizer", VOCABULARY))
    write_shard(path, manifest, "train", 0, rows)
    seal(path, {"train": 1})
    store = open_store(path)
    assert store.index("train").file_bytes / (2 * LENGTH) <= most
    found = []
    for index, row in enumerate(rows):
        decoded = store.read_row("train", index).teacher
        assert row.teacher is not None and decoded is not None
        if k:
            exact = stored_record(row.teacher, manifest)
            found.append([divergence(exact, decoded, t, c) for c, t in enumerate((1.0, 2.0, 4.0))])
    if k:
        at_one, *others = np.concatenate(found, axis=1)
        assert at_one.mean() <= 2e-5 and np.quantile(at_one, 0.999) <= 6e-5 and at_one.max() <= 1e-4
        assert max(other.mean() for other in others) <= 3e-5


@pytest.mark.parametrize("codec", ["tkq8", "plain"])
@pytest.mark.parametrize("mask", [-np.inf, -1e9, -200.0])
def test_masked_entries_cost_the_others_nothing(codec: str, mask: float) -> None:
    """Logits masked with -1e9 are as good as with -inf: the divergence stays below that of whole heads."""
    manifest, rows = _rows(64, 0, "text", False)
    manifest = dataclasses.replace(manifest, codec=CodecSpec(codec, {}))
    assert rows[0].teacher is not None
    values, ids = rows[0].teacher.head_logprobs.copy(), rows[0].teacher.head_ids.copy()
    values[:, 50:] = mask
    ids[:, 50:].sort(axis=1)
    row = dataclasses.replace(
        rows[0], teacher=dataclasses.replace(rows[0].teacher, head_logprobs=values, head_ids=ids)
    )
    decoded = codec_of(manifest).decode(codec_of(manifest).encode(row, manifest), manifest).teacher
    assert row.teacher is not None and decoded is not None
    found = divergence(stored_record(row.teacher, manifest), decoded, 1.0, 0)
    assert found.mean() <= 2e-5 and np.quantile(found, 0.999) <= 6e-5 and found.max() <= 1e-4


@pytest.mark.parametrize(("ids", "static"), [("text", 12.5), ("uniform", 16.2)])
def test_statistics_of_the_rows(ids: str, static: float) -> None:
    """The teacher's entropy, the mass of its head, the static entropy of ids, as the sizes above assume."""
    _, rows = _rows(64, 0, ids, False, count=4)
    records = [row.teacher for row in rows if row.teacher is not None]
    assert 1.8 < np.mean([record.entropy.mean() for record in records]) < 2.1
    assert 0.93 < np.mean([np.exp(record.head_logprobs).sum(axis=1).mean() for record in records]) < 0.96
    losses = np.concatenate([row.teacher.true_logprob[row.loss_mask] for row in rows if row.teacher])
    assert 1.8 < -losses.mean() < 2.1, "tokens are drawn from the teacher"
    # What ids cost under the frequencies of other rows.
    *seen, held_out = [record.head_ids.ravel() for record in records]
    counts = np.bincount(np.concatenate(seen), minlength=VOCABULARY) + 0.3
    assert abs(-np.log2(counts / counts.sum())[held_out].mean() - static) < 0.3
