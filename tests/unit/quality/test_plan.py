"""The plan's numbers against what is really built (stores: `test_store_size`), and that it costs no torch."""

import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.planning import plan
from sparsekd.trainer.run.errors import ConfigError

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


def test_without_numbers_it_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"plan\.tokens is not set"):
        plan.run(Config())
    config = _config(teacher_tokens_per_second=100.0)
    plan.run(config)
    printed = capsys.readouterr().out
    assert "2 h 47 min at" in printed and "not counted" in printed and "text-like rows" in printed
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
    # But for the beginnings of frames, which fewer records in a row share.
    each = {name: float(lines["a record"].split()[0]) for name, lines in (("q", quarter), ("w", whole))}
    assert each["w"] < each["q"] < 1.06 * each["w"]
    tokens = 977 * 1024
    assert quarter["records"].startswith(f"{tokens // 4:,} of {tokens:,} positions, at 0.25 of the positions")
    bytes_of = {
        name: float(lines["head_logprobs"].split()[0])
        for name, lines in (("quarter", quarter), ("whole", whole))
    }
    assert bytes_of["quarter"] == pytest.approx(bytes_of["whole"] / 4, rel=0.06)


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
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.planning.plan import run
config = Config()
config.plan.tokens, config.plan.vocabulary_size = 1e6, 1000
run(config)
assert not {"torch", "transformers", "deepspeed", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "next: sparsekd prepare" in done.stdout
