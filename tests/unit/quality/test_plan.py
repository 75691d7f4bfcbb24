"""The plan's numbers against what is really built, and that it costs no torch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from sparsekd.logit_store.manifest import CodecSpec, Manifest
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import (
    synthetic_manifest,
    synthetic_rows,
    write_synthetic_store,
    write_synthetic_tokenizer,
)
from sparsekd.logit_store.synthetic_text import text_like_rows
from sparsekd.trainer.config import Config
from sparsekd.trainer.errors import ConfigError
from sparsekd.trainer.quality import plan

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def _config(**fields: float) -> Config:
    config = Config()
    config.plan.tokens, config.plan.vocabulary_size = 1_000_000, 151_936
    for name, value in fields.items():
        setattr(config.plan, name, value)
    return config


@pytest.mark.parametrize("codec", ["tkq8", "compact", "exact"])
@pytest.mark.parametrize(
    ("k", "n", "vocabulary"), [(4, 6, 300), (0, 50, 2000), (16, 0, 70_000), (0, 0, 2000)]
)
def test_bytes_per_token_are_those_of_a_store(
    tmp_path: Path, k: int, n: int, vocabulary: int, codec: str
) -> None:
    """Prompts, padding and document ends have no record: how many there are, the token store knows."""
    manifest = _manifest(k, n, vocabulary, codec)
    rows = (text_like_rows if vocabulary > 300 else synthetic_rows)(manifest, 3, seed=7)
    _assert_planned(tmp_path, manifest, rows)


@pytest.mark.parametrize(("positions", "share"), [("all", 1.0), ("sampled", 0.25)])
@pytest.mark.parametrize("codec", ["tkq8", "plain"])
def test_bytes_per_token_go_by_the_rule(tmp_path: Path, codec: str, positions: str, share: float) -> None:
    manifest = _manifest(8, 12, 70_000, codec, positions=positions, share=share, rows_per_shard=9)
    _assert_planned(tmp_path, manifest, text_like_rows(manifest, 9, seed=7))


def _manifest(k: int, n: int, vocabulary: int, codec: str, **fields: object) -> Manifest:
    sizes = {"k": k, "n": n, "vocabulary_size": vocabulary, "sequence_length": 256}
    return synthetic_manifest(**sizes, splits=("train",), codec=CodecSpec(codec, {}), **fields)


def _assert_planned(folder: Path, manifest: Manifest, rows: list[Row]) -> None:
    """Plans from the token store of these rows, and compares with the store of their records."""
    vocabulary = manifest.tokenizer.vocabulary_size
    bare = synthetic_manifest(
        k=0, n=0, vocabulary_size=vocabulary, sequence_length=256, splits=("train",), rows_per_shard=len(rows)
    )
    tokenizer = write_synthetic_tokenizer(folder / "tokenizer", vocabulary)
    contents = {"tokens": (bare, [replace(row, teacher=None) for row in rows]), "store": (manifest, rows)}
    for name, (kind, content) in contents.items():
        create_store(folder / name, kind, tokenizer)
        write_shard(folder / name, kind, "train", 0, content)
        seal(folder / name, {"train": 1})
    config = Config()
    config.store.tokens = str(folder / "tokens")
    for name in ("k", "n", "positions", "share"):
        setattr(config.store, name, getattr(manifest.record, name))
    config.store.codec = manifest.codec.name
    corpus = plan.corpus_of(config)
    index = open_store(folder / "store").index("train")
    assert corpus.recorded == pytest.approx(index.counts.tokens_recorded, rel=0.1)
    if manifest.record.positions != "sampled":
        assert corpus.recorded == index.counts.tokens_recorded < corpus.tokens == index.counts.tokens
    found = plan.bytes_per_token(config, corpus)
    assert set(found) == set(index.plane_bytes)
    tokens = len(rows) * 256
    assert sum(found.values()) == pytest.approx(sum(index.plane_bytes.values()) / tokens, rel=0.15)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "extra",
    [{}, {"num_key_value_heads": 2}, {"head_dim": 32, "num_key_value_heads": 4, "model_type": "qwen3"}],
)
def test_parameters_against_transformers(tied: bool, extra: dict) -> None:
    fields = LLAMA | {"tie_word_embeddings": tied, "vocab_size": 500} | extra
    kind = fields.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    found = plan.count_parameters(fields | {"model_type": kind}, 999)
    assert found == pytest.approx(model.num_parameters(), rel=0.01)
    if kind == "llama":
        assert found == model.num_parameters()


def test_parameters_that_cannot_be_counted() -> None:
    assert plan.count_parameters({}, 100) is None
    assert plan.count_parameters(LLAMA | {"model_type": "mamba"}, 100) is None
    assert plan.count_parameters(LLAMA | {"model_type": "qwen3"}, 100) is None
    assert plan.count_parameters({"model_type": "llama", "hidden_size": 8}, 100) is None


def test_model_states_by_stage() -> None:
    found = [plan.model_state_bytes(1000, stage=stage, dtype="bfloat16", ranks=4) for stage in (0, 1, 2, 3)]
    assert found == [18_000, 6_000 + 3_000, 2_000 + 4_000, 4_500]
    assert plan.model_state_bytes(1000, stage=3, dtype="float32", ranks=1) == 20_000


def test_a_token_store_is_counted(tmp_path: Path) -> None:
    manifest = synthetic_manifest(k=0, n=0, vocabulary_size=77)
    write_synthetic_store(tmp_path / "tokens", manifest, {"train": 7, "heldout": 2}, seed=0)
    config = Config()
    config.store.tokens = str(tmp_path / "tokens")
    corpus = plan.corpus_of(config)
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
        assert plan.corpus_of(config).recorded == expected
    config.store.k = config.store.n = 0
    assert plan.corpus_of(config).recorded == 0
    assert (corpus.vocabulary_size, corpus.sequence_length) == (77, 16)


def test_without_numbers_it_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"plan\.tokens is not set"):
        plan.run(Config())
    config = _config(teacher_tokens_per_second=100.0)
    plan.run(config)
    printed = capsys.readouterr().out
    assert "2.78 hours" in printed and "not counted" in printed and "text-like rows" in printed
    assert "as if every token counted: prompts and padding take no record" in printed
    assert "at every position that the loss counts" in printed


def test_a_record_costs_the_same_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    config = _config()
    config.store.positions, config.store.share, config.corpus.heldout_fraction = "sampled", 0.25, 0.0

    def printed() -> dict[str, str]:
        plan.run(config)
        lines = (line.strip().partition("  ") for line in capsys.readouterr().out.splitlines())
        return {name: value.strip() for name, _, value in lines}

    quarter = printed()
    config.store.positions, config.store.share = "counted", 1.0
    whole = printed()
    assert quarter["a record"] == whole["a record"]
    tokens = plan.corpus_of(config).tokens
    assert quarter["records"].startswith(f"{tokens // 4:,} of {tokens:,} positions, at 0.25 of the positions")
    bytes_of = {
        name: float(lines["head_logprobs"].split()[0])
        for name, lines in (("quarter", quarter), ("whole", whole))
    }
    assert bytes_of["quarter"] == pytest.approx(bytes_of["whole"] / 4, rel=0.01)


def test_the_loss_has_a_line_for_each_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(hidden_size=1024)
    config.corpus.sequence_length, config.train.micro_batch_rows = 1024, 4
    config.engine.dtype = "float32"
    plan.run(config)
    printed = capsys.readouterr().out
    vocabulary, positions, hidden = 151_936, 4096, 1024
    backward = 4 * hidden * (2 * vocabulary + positions)
    # 4 C V + 4 B V + 4 V H + 4 N H with C = 512 and all positions in one buffer.
    triton = 4 * (512 + positions) * vocabulary + 4 * hidden * (vocabulary + positions)
    assert f"{12 * positions * vocabulary / 1e9:.2f} GB = 12 N V" in printed
    lines = {
        name: text.strip() for name, _, text in (line.strip().partition(" ") for line in printed.splitlines())
    }
    assert lines["torch"].startswith(f"{backward / 1e9:.2f} GB on a CPU, logits of 256 positions")
    assert lines["triton"].startswith(f"{triton / 1e9:.2f} GB on a GPU, logits of 512 positions")


def test_no_torch() -> None:
    code = """
import sys
from sparsekd.trainer.config import Config
from sparsekd.trainer.quality.plan import run
config = Config()
config.plan.tokens, config.plan.vocabulary_size = 1e6, 1000
run(config)
assert not {"torch", "transformers", "deepspeed", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "next: sparsekd prepare" in done.stdout
