"""The plan's numbers against what is really built, and that it costs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from sparsekd.logit_store.manifest import CodecSpec
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
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
    config = _config()
    config.store.k, config.store.n, config.store.codec = k, n, codec
    config.corpus.sequence_length = 256
    config.plan.vocabulary_size = vocabulary
    found = plan.bytes_per_token(config, plan.corpus_of(config))
    fields = {"k": k, "n": n, "vocabulary_size": vocabulary, "sequence_length": 256}
    manifest = synthetic_manifest(**fields, splits=("train",), codec=CodecSpec(codec, {}))
    rows = (text_like_rows if vocabulary > 300 else synthetic_rows)(manifest, 3, seed=7)
    path = tmp_path / "store"
    create_store(path, manifest, write_synthetic_tokenizer(tmp_path / "tokenizer", vocabulary))
    write_shard(path, manifest, "train", 0, rows)
    seal(path, {"train": 1})
    written = open_store(path).index("train").plane_bytes
    assert set(found) == set(written)
    assert sum(found.values()) == pytest.approx(sum(written.values()) / (3 * 256), rel=0.15)


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
    assert (corpus.vocabulary_size, corpus.sequence_length) == (77, 16)


def test_without_numbers_it_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"plan\.tokens is not set"):
        plan.run(Config())
    config = _config(teacher_tokens_per_second=100.0)
    plan.run(config)
    printed = capsys.readouterr().out
    assert "2.78 hours" in printed and "not counted" in printed and "text-like rows" in printed


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
