"""The estimated size of a store against the bytes of small stores that are really written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.manifest import CodecSpec, FeatureSpec, Manifest
from sparsekd.logit_store.planes import text_planes
from sparsekd.logit_store.projections import Projection, digest_of
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
from sparsekd.logit_store.synthetic_text import text_like_rows
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.planning.store_size import corpus_of, store_size
from sparsekd.trainer.run.errors import ConfigError

LENGTH = 256

FACTOR = 1.15
"""By how much all planes together may differ from the estimate, either way."""


@pytest.mark.parametrize("codec", ["tkq8", "compact", "exact"])
@pytest.mark.parametrize(
    ("k", "n", "vocabulary"), [(4, 6, 300), (0, 50, 2000), (16, 0, 70_000), (0, 0, 2000)]
)
def test_a_store_has_the_planned_bytes(tmp_path: Path, k: int, n: int, vocabulary: int, codec: str) -> None:
    """Prompts, padding and document ends have no record: how many there are, the token store knows."""
    manifest = _manifest(k, n, vocabulary, codec)
    _assert_planned(
        tmp_path, manifest, _rows(manifest, 3) if vocabulary > 300 else synthetic_rows(manifest, 3, 7)
    )


@pytest.mark.parametrize(("positions", "share"), [("all", 1.0), ("sampled", 0.25), ("sampled", 0.03)])
@pytest.mark.parametrize("codec", ["tkq8", "plain"])
def test_it_goes_by_the_rule(tmp_path: Path, codec: str, positions: str, share: float) -> None:
    manifest = _manifest(8, 12, 70_000, codec, positions=positions, share=share, rows_per_shard=30)
    _assert_planned(tmp_path, manifest, _rows(manifest, 30))


# Bytes of a record that SmolLM2-135M-Instruct left on 132 rows of 512 tokens of English (Austen, the Jargon
# File, manuals of Linux and Python), by plane: k = 16, n = 24, tkq8, vocabulary of 49,152.
REAL = {
    "head_ids": 23.07,
    "head_logprobs": 12.79,
    "tail_ids": 31.85,
    "tail_counts": 2.58,
    "log_rest": 4.47,
    "rest_entropy": 1.43,
    "true_logprob": 1.78,
    "entropy": 1.55,
}


def test_records_take_what_those_of_a_real_teacher_take() -> None:
    config = Config()
    config.plan.tokens, config.plan.vocabulary_size = 75_000, 49_152
    config.corpus.sequence_length = 512
    config.store.k, config.store.n = 16, 24
    size = store_size(config, corpus_of(config))
    assert set(REAL) < set(size.planes)
    assert sum(size.planes[name] for name in REAL) == pytest.approx(sum(REAL.values()), rel=0.03)
    assert size.planes["tail_ids"] == pytest.approx(REAL["tail_ids"], rel=0.03)


@pytest.mark.parametrize("codec", ["tkq8", "plain"])
@pytest.mark.parametrize("positions", ["masked", "counted", "all", "sampled"])
def test_masked_tokens(tmp_path: Path, positions: str, codec: str) -> None:
    share = 0.5 if positions == "sampled" else 1.0
    rule: dict[str, Any] = {"positions": positions, "share": share}
    manifest = _manifest(8, 4, 2000, codec, target="masked_token", rows_per_shard=9, **rule)
    # Made-up records are of noise here: those of text, for which the plan takes them, are smaller.
    _assert_planned(tmp_path, manifest, synthetic_rows(manifest, 9, seed=7), factor=1.6)


@pytest.mark.parametrize("codec", ["tkq8", "plain"])
def test_classes(tmp_path: Path, codec: str) -> None:
    """A record or three in a row: what stands around it is most of it."""
    outcomes = tuple(f"class-{number}" for number in range(7))
    manifest = _manifest(3, 0, 2000, codec, target="class", outcomes=outcomes, rows_per_shard=9)
    found = _assert_planned(tmp_path, manifest, synthetic_rows(manifest, 9, seed=7))
    assert {"labels", "head_ids"} <= set(found)


@pytest.mark.parametrize("codec", ["tkq8", "plain"])
def test_optional_planes(tmp_path: Path, codec: str) -> None:
    manifest = _manifest(4, 0, 300, codec, planes=("weights", "token_types"), rows_per_shard=9)
    found = _assert_planned(tmp_path, manifest, synthetic_rows(manifest, 9, seed=7))
    assert {"weights", "weight_starts", "token_types"} <= set(found)


@pytest.mark.parametrize("codec", ["tkq8", "plain"])
@pytest.mark.parametrize("k", [4, 0])
@pytest.mark.parametrize("outlier", [1, 50])
def test_hidden_states(tmp_path: Path, k: int, codec: str, outlier: int) -> None:
    """Whole and narrowed, in both kinds and at both sets of positions; k = 0: nothing but them is kept."""
    random = np.random.default_rng(3)
    projection = Projection(np.zeros(48, np.float32), random.standard_normal((48, 16)).astype(np.float32))
    content = projection.to_bytes()
    features = (
        FeatureSpec(0, 48, 48, "none", None, 1.0, "float16", "recorded"),
        FeatureSpec(3, 16, 48, "pca", digest_of(content), 0.9, "int8", "all"),
    )
    plain = _manifest(max(k, 1), 0, 300, codec, rows_per_shard=9)
    manifest = replace(plain, record=replace(plain.record, k=k), features=features)
    rows = []
    for row in synthetic_rows(manifest, 9, seed=7):
        states = {}
        for spec in features:
            values = random.standard_normal(row.optional[spec.plane].shape, np.float32)
            values[:, 0] *= outlier
            states[spec.plane] = values
        rows.append(replace(row, optional=states))
    _assert_planned(tmp_path, manifest, rows, {"feature_3": content}, factor=1.15 if outlier == 1 else 1.6)


def _rows(manifest: Manifest, count: int) -> list[Row]:
    return text_like_rows(manifest, count, seed=7, teacher="small")


def _manifest(k: int, n: int, vocabulary: int, codec: str, **fields: object) -> Manifest:
    sizes = {"k": k, "n": n, "vocabulary_size": vocabulary, "sequence_length": LENGTH}
    return synthetic_manifest(**sizes, splits=("train",), codec=CodecSpec(codec, {}), **fields)


def _assert_planned(
    folder: Path,
    manifest: Manifest,
    rows: list[Row],
    projections: dict[str, bytes] | None = None,
    factor: float = FACTOR,
) -> dict[str, float]:
    """Plans from the token store of these rows, and compares with the store of their records."""
    vocabulary = manifest.tokenizer.vocabulary_size
    kept = ("target", "outcomes", "planes")
    bare = synthetic_manifest(
        k=0,
        n=0,
        vocabulary_size=vocabulary,
        sequence_length=LENGTH,
        splits=("train",),
        rows_per_shard=len(rows),
        **{name: getattr(manifest, name) for name in kept},
    )
    tokenizer = write_synthetic_tokenizer(folder / "tokenizer", vocabulary)
    texts = [
        replace(
            row,
            teacher=None,
            optional={name: plane for name, plane in row.optional.items() if "feature" not in name},
        )
        for row in rows
    ]
    contents = {"tokens": (bare, texts, {}), "store": (manifest, rows, projections or {})}
    for name, (kind, content, files) in contents.items():
        create_store(folder / name, kind, tokenizer, files)
        write_shard(folder / name, kind, "train", 0, content)
        seal(folder / name, {"train": 1})
    config = Config()
    config.store.tokens = str(folder / "tokens")
    for name in ("k", "n", "positions", "share"):
        setattr(config.store, name, getattr(manifest.record, name))
    config.store.codec = manifest.codec.name
    config.plan.teacher_hidden_size = 48
    config.store.features = [
        {"layer": spec.layer, "kind": spec.kind, "positions": spec.positions}
        | ({} if spec.projection == "none" else {"width": spec.width, "projection": spec.projection})
        for spec in manifest.features
    ]
    corpus = corpus_of(config)
    index = open_store(folder / "store").index("train")
    assert corpus.recorded == pytest.approx(index.counts.tokens_recorded, rel=0.25)
    if manifest.record.positions != "sampled":
        assert corpus.recorded == index.counts.tokens_recorded < corpus.tokens == index.counts.tokens
    size = store_size(config, corpus)
    assert set(size.planes) == set(index.plane_bytes)
    tokens = len(rows) * LENGTH
    found = {name: count / tokens for name, count in index.plane_bytes.items()}
    # Text is measured, not estimated, though the token store has another codec.
    for name in text_planes(manifest):
        assert size.planes[name] == pytest.approx(found[name]), name
    assert 1 / factor < sum(found.values()) / sum(size.planes.values()) < factor, (size.planes, found)
    files = [path for path in (folder / "store").rglob("*") if path.is_file()]
    left_out = ("tokenizer.json", "MANIFEST.json", "INDEX.json")
    whole = sum(path.stat().st_size for path in files if path.name not in left_out)
    assert 1 / factor < whole / size.total < factor, (whole, size)
    return size.planes


def test_a_token_store_is_counted(tmp_path: Path) -> None:
    manifest = synthetic_manifest(k=0, n=0, vocabulary_size=77)
    write_synthetic_store(tmp_path / "tokens", manifest, {"train": 7, "heldout": 2}, seed=0)
    config = Config()
    config.store.tokens = str(tmp_path / "tokens")
    corpus = corpus_of(config)
    assert (corpus.rows, corpus.train_rows, corpus.tokens, corpus.shards) == (9, 7, 9 * 16, 3 + 1)
    counts = {split: open_store(tmp_path / "tokens").index(split).counts for split in manifest.splits}
    counted = {split: count.tokens_counted for split, count in counts.items()}
    real = sum(count.tokens - count.tokens_padding for count in counts.values())
    assert 0 < corpus.recorded == counted["train"] + counted["heldout"] < real < corpus.tokens
    for positions, expected in (
        ("all", real),
        ("sampled", round(counted["train"] * 0.25) + counted["heldout"]),
    ):
        config.store.positions = positions
        config.store.share = 0.25 if positions == "sampled" else 1.0
        assert corpus_of(config).recorded == expected
    config.store.k = config.store.n = 0
    assert corpus_of(config).recorded == 0
    assert (corpus.vocabulary_size, corpus.sequence_length) == (77, 16)


def test_hidden_states_of_unknown_width_are_asked_for(tmp_path: Path) -> None:
    config = Config()
    config.plan.tokens, config.plan.vocabulary_size = 100_000, 5000
    config.store.features = [{"layer": 3}]
    with pytest.raises(ConfigError, match=r"layer 3 whole.* give teacher\.path=FOLDER, or plan\.teacher_hid"):
        store_size(config, corpus_of(config))
    config.plan.teacher_hidden_size = 64
    asked = store_size(config, corpus_of(config)).planes["feature_3"]
    (tmp_path / "config.json").write_text('{"hidden_size": 128}')
    config.teacher.path = str(tmp_path)
    assert store_size(config, corpus_of(config)).planes["feature_3"] == pytest.approx(2 * asked, rel=0.1)


def test_weights_of_a_corpus_to_come() -> None:
    config = Config()
    config.plan.tokens, config.plan.vocabulary_size = 100_000, 5000
    assert "weights" not in store_size(config, corpus_of(config)).planes
    config.corpus.weight_field = "quality"
    assert 0 < store_size(config, corpus_of(config)).planes["weights"] < 1
