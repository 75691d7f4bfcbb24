"""Real DeepSpeed checkpoints of every ZeRO stage become folders that transformers loads without sparsekd."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from custom_models import write_custom_model
from safetensors.torch import load_file
from synthetic_stores import write_synthetic_store
from transformers import AutoModelForCausalLM

from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.export.export import EXPORT_NAME, run
from sparsekd.trainer.run.errors import CheckpointError, ConfigError
from sparsekd.trainer.state.record import read_commit

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).with_name("export_runs.py")
CASES = ("zero3-tied", "zero3-untied", "zero2-tied", "zero1-untied", "zero0-tied")

# Forbids the import of sparsekd, so that a model that needs it cannot be loaded.
STRANGER = """
import importlib.abc, sys, torch
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sparsekd":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w3 w5 w7", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)[0])
    assert len(text.split()) == 8, text
    assert model.config.use_cache and model.generation_config.eos_token_id == 0
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == ("untied" not in folder), folder
assert not any(name.partition(".")[0] == "sparsekd" for name in sys.modules)
print("loaded", len(sys.argv) - 1)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of every stage, trained by two ranks in processes of their own."""
    folder = tmp_path_factory.mktemp("export")
    write_synthetic_store(
        folder / "store", synthetic_manifest(vocabulary_size=101), {"train": 8, "heldout": 3}, seed=3
    )
    fields = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    custom = write_custom_model(folder / "custom-model", fields | heads)
    (custom / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    made = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(SCRIPT), str(folder / "runs"), str(folder / "store")),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return folder / "runs"


def _config(runs: Path, name: str, dtype: str = "bfloat16") -> Config:
    config = Config()
    config.run.root, config.run.name = str(runs), name
    config.export.dtype = dtype
    return config


@pytest.mark.parametrize("name", CASES)
def test_exported_weights_are_the_master_weights(
    runs: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against what DeepSpeed's own accessor reported while the engine still lived."""
    oracle = torch.load(runs / name / "weights-3.pt")
    for dtype in (torch.float32, torch.bfloat16):
        run(_config(runs, name, str(dtype).removeprefix("torch.")))
        folder = runs / name / "export"
        exported = load_file(folder / "model.safetensors")
        for key, value in oracle.items():
            assert torch.equal(exported.pop(key), value.to(dtype)), key
        assert not exported
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        assert json.loads((folder / EXPORT_NAME).read_text()) == {
            "config_digest": read_commit(runs / name / "checkpoints" / "step-00000003").config_digest,
            "run": name,
            "step": 3,
        }
    assert "bit for bit" in capsys.readouterr().out
    assert not list((runs / name).glob(".export*"))


def test_a_stranger_loads_and_generates(runs: Path) -> None:
    for name in CASES:
        run(_config(runs, name))
    folders = [str(runs / name / "export") for name in CASES]
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, *folders],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert f"loaded {len(CASES)}" in loaded.stdout


def test_a_student_with_code_of_its_own(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(_config(runs, "custom"))
    said = capsys.readouterr().out
    assert "bit for bit" in said and "trust_remote_code=True" in said and "temperature=0.6" in said
    folder = runs / "custom" / "export"
    assert (folder / "modeling_halved.py").is_file()
    assert 'dtype="auto", trust_remote_code=True)' in (folder / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    assert type(loaded).__name__ == "HalvedForCausalLM"
    oracle = torch.load(runs / "custom" / "weights-3.pt")
    assert all(torch.equal(oracle[name].bfloat16(), value) for name, value in loaded.named_parameters())


def test_model_card(runs: Path) -> None:
    metrics = runs / "zero3-tied" / "metrics.jsonl"
    lines = [
        {"kind": "heldout", "step": 2, "ce": 4.5, "loss": 1.0, "kd": 1.0, "agreement": 0.1},
        {"kind": "heldout", "step": 3, "ce": 4.25, "loss": 1.0, "kd": 1.0, "agreement": 0.1},
        {"kind": "heldout", "step": 4, "ce": 4.0, "loss": 1.0, "kd": 1.0, "agreement": 0.1},
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(_config(runs, "zero3-tied"))
    card = (runs / "zero3-tied" / "export" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["library_name"] == "transformers" and "license" not in facts
    assert "license" in front and "No license" in body
    # What ran, with "auto" settled, and nothing that the loss does not read.
    assert "kd_weight=1.0, ce_weight=0.0, divergence=forward_kl, target_mode=sampled" in body
    assert "impl=torch" in body and "=auto" not in body and "mixture" not in body and "None" not in body
    assert "k=4 exact, n=6 draws" in body and "4.2500" in body and "4.0000" not in body


def test_what_is_refused(runs: Path, tmp_path: Path) -> None:
    name = "zero3-tied"
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        run(_config(runs, "nowhere"))

    strangers = tmp_path / "strangers"
    strangers.mkdir()
    (strangers / "thesis.txt").write_text("precious")
    config = _config(runs, name)
    config.export.path = str(strangers)
    with pytest.raises(ConfigError, match="no export of sparsekd"):
        run(config)
    assert (strangers / "thesis.txt").read_text() == "precious"

    other = _config(runs, "zero2-tied")
    other.export.path = str(tmp_path / "shared")
    run(other)
    config.export.path = str(tmp_path / "shared")
    with pytest.raises(ConfigError, match="export of run 'zero2-tied'"):
        run(config)

    missing = _config(runs, name)
    missing.export.checkpoint = "step-00000099"
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        run(missing)


def test_a_damaged_checkpoint_is_left_out(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "zero3-tied", tmp_path / "runs" / "zero3-tied")
    folder = tmp_path / "runs" / "zero3-tied" / "checkpoints" / "step-00000003" / "engine"
    part = next(folder.glob("*_optim_states.pt"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    config = _config(tmp_path / "runs", "zero3-tied")
    run(config)
    mark = json.loads((tmp_path / "runs" / "zero3-tied" / "export" / EXPORT_NAME).read_text())
    assert mark["step"] == 2
    config.export.checkpoint = "step-00000003"
    with pytest.raises(CheckpointError, match="checksum"):
        run(config)
    shutil.rmtree(tmp_path / "runs" / "zero3-tied" / "checkpoints")
    config.export.checkpoint = "latest"
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        run(config)
