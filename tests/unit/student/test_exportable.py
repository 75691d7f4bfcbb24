"""What train accepts can be exported: shown on a tiny twin, or refused before the first step."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_models import CODE, write_custom_model
from synthetic_stores import write_synthetic_store
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsekd.logit_store.places.tokenizer_folder import tokenizer_digest
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.trainer.config.schema import StudentConfig
from sparsekd.trainer.corpus.tokenizer import save_tokenizer, train_tokenizer
from sparsekd.trainer.models.causal_lm import load_causal_lm, load_config
from sparsekd.trainer.models.saved import reload_difference, write_model
from sparsekd.trainer.models.source import student_source
from sparsekd.trainer.models.twin import check_exportable
from sparsekd.trainer.run.errors import ModelError

# Sizes of real students, billions of parameters, which no test can hold.
LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
TEXT = "def f(x12345):\n    return  x12345 + 678  # it's not, they'll say\n"


def store_of(folder: Path, tokenizer: PreTrainedTokenizerFast) -> LogitStore:
    """A store with a byte-level tokenizer of its own, and random ids."""
    save_tokenizer(tokenizer, folder / "tokenizer-files")
    manifest = synthetic_manifest(vocabulary_size=len(tokenizer), k=0, n=0)
    identity = manifest.tokenizer
    manifest = type(manifest)(
        **{
            **{name: getattr(manifest, name) for name in manifest.__dataclass_fields__},
            "tokenizer": type(identity)(
                name="own",
                vocabulary_size=len(tokenizer),
                digest=tokenizer_digest(folder / "tokenizer-files"),
                chat_template_digest=None,
                eos_token_id=tokenizer.eos_token_id,
            ),
        }
    )
    create_store(folder / "store", manifest, folder / "tokenizer-files")
    write_shard(folder / "store", manifest, "train", 0, synthetic_rows(manifest, 2, 5))
    seal(folder / "store", {"train": 1, "heldout": 0})
    return open_store(folder / "store")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LogitStore:
    return store_of(tmp_path_factory.mktemp("bpe"), train_tokenizer([TEXT * 50], 300))


def remarks(student: StudentConfig, store: LogitStore) -> list[str]:
    source = student_source(student, store.manifest.tokenizer)
    return check_exportable(load_config(source, "student"), source, store, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("model_type", "further"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 128}),
        ("gemma3_text", {"head_dim": 256, "sliding_window": 1024}),
        ("mixtral", {"num_local_experts": 8}),
        ("qwen3_moe", {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}),
        ("deepseek_v3", {}),
        ("phi3", {}),
        ("olmo3", {}),
        ("cohere", {}),
        ("granite", {}),
    ],
)
def test_a_large_student_is_proved_on_a_tiny_twin(
    model_type: str, further: dict[str, Any], store: LogitStore
) -> None:
    assert remarks(StudentConfig(config={"model_type": model_type, **LARGE, **further}), store) == []


def test_gpt2_s_own_names_are_shrunk(store: LogitStore) -> None:
    config = {"model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 48}
    assert remarks(StudentConfig(config=config), store) == []


def test_an_attention_that_needs_a_gpu_is_left_out_of_the_proof(store: LogitStore) -> None:
    student = StudentConfig(config={"model_type": "llama", **LARGE}, attention="flash_attention_2")
    assert remarks(student, store) == []


def test_a_tokenizer_class_that_transformers_insists_on_is_refused(store: LogitStore) -> None:
    """transformers 5 takes Qwen2Tokenizer for qwen2 over whatever tokenizer_config.json says."""
    with pytest.raises(
        ModelError, match=r"type qwen2 cannot be exported .*a Qwen2Tokenizer: .* cuts text differently"
    ):
        remarks(StudentConfig(config={"model_type": "qwen2", **LARGE}), store)


def test_the_class_s_own_tokenizer_is_taken(tmp_path: Path) -> None:
    qwen = train_tokenizer([TEXT * 50], 300)
    save_tokenizer(qwen, tmp_path / "own")
    load_config(
        student_source(StudentConfig(config={"model_type": "qwen2"}), synthetic_manifest().tokenizer), "x"
    ).save_pretrained(tmp_path / "own")
    as_qwen = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert type(as_qwen).__name__ == "Qwen2Tokenizer"
    as_qwen.eos_token = "<|endoftext|>"
    store = store_of(tmp_path, as_qwen)
    assert remarks(StudentConfig(config={"model_type": "qwen2", **LARGE}), store) == []


def test_a_folder_without_a_class_gets_one(tmp_path: Path) -> None:
    """The synthetic tokenizer is a tokenizer.json alone, for which qwen3 would be given Qwen2Tokenizer."""
    manifest = synthetic_manifest(vocabulary_size=97)
    write_synthetic_store(tmp_path / "store", manifest, {"train": 3}, seed=3)
    store = open_store(tmp_path / "store")
    student = StudentConfig(
        config={"model_type": "qwen3", **LARGE, "num_hidden_layers": 1, "hidden_size": 32}
    )
    source = student_source(student, store.manifest.tokenizer)
    assert remarks(student, store) == []
    small = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    source = student_source(
        StudentConfig(config={**small, "num_attention_heads": 2, "num_key_value_heads": 2}),
        store.manifest.tokenizer,
    )
    model = load_causal_lm(source, "student", dtype=torch.float32)
    write_model(model, source, store, tmp_path / "export")
    assert reload_difference(model, source, store, tmp_path / "export") == 0
    settings = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path / "export")("w3 w5")["input_ids"] == [3, 5]


def test_a_loss_on_the_way_is_seen(store: LogitStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof can fail: a model whose folder loses a weight."""
    from transformers import LlamaForCausalLM

    whole = LlamaForCausalLM.save_pretrained

    def lossy(model: LlamaForCausalLM, folder: Path) -> None:
        weights = {name: value for name, value in model.state_dict().items() if "norm" not in name}
        weights |= {
            name: 2 * value for name, value in model.state_dict().items() if name == "model.norm.weight"
        }
        whole(model, folder, state_dict=weights)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lossy)
    with pytest.raises(ModelError, match="trained but not exported"):
        remarks(StudentConfig(config={"model_type": "llama", **LARGE}), store)


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


def test_code_that_comes_with_a_student_goes_with_its_export(store: LogitStore, tmp_path: Path) -> None:
    student = StudentConfig(path=str(write_custom_model(tmp_path / "own", SMALL)), trust_remote_code=True)
    assert remarks(student, store) == []
    source = student_source(student, store.manifest.tokenizer)
    model = load_causal_lm(source, "student", dtype=torch.float32)
    told = write_model(model, source, store, tmp_path / "export")
    assert any("trust_remote_code=True" in remark and "modeling_halved.py" in remark for remark in told)
    shutil.rmtree(tmp_path / "own")
    assert reload_difference(model, source, store, tmp_path / "export") == 0
    for name, text in CODE.items():
        assert (tmp_path / "export" / name).read_text() == text
    with pytest.raises(ModelError, match="cannot be loaded again"):
        reload_difference(
            model, dataclasses.replace(source, trust_remote_code=False), store, tmp_path / "export"
        )


@pytest.mark.parametrize(
    ("given", "kept", "told"),
    [
        ({"temperature": 0.6, "top_p": 0.95}, {}, "temperature=0.6, top_p=0.95"),
        ({"temperature": 0.6, "do_sample": False}, {"do_sample": False}, "temperature=0.6"),
        ({"temperature": 0.6, "do_sample": True}, {"do_sample": True, "temperature": 0.6}, None),
        ({"length_penalty": 2.0}, {}, "length_penalty=2.0"),
        ({"length_penalty": 2.0, "num_beams": 2}, {"length_penalty": 2.0, "num_beams": 2}, None),
        ({"temperature": 1.0, "top_k": 50}, {"temperature": 1.0, "top_k": 50}, None),
    ],
)
def test_generation_defaults_without_effect_are_left_out(
    given: dict[str, Any], kept: dict[str, Any], told: str | None, store: LogitStore, tmp_path: Path
) -> None:
    """transformers reads such a file with a warning, and refuses to write it again."""
    config = {"model_type": "llama", **SMALL}
    source = student_source(StudentConfig(config=config), store.manifest.tokenizer)
    load_causal_lm(source, "student", dtype=torch.float32).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(given))
    student = StudentConfig(path=str(tmp_path / "base"))
    assert remarks(student, store) == []
    source = student_source(student, store.manifest.tokenizer)
    model = load_causal_lm(source, "student", dtype=torch.float32)
    said = write_model(model, source, store, tmp_path / "export")
    assert [remark.partition(" of the model")[0] for remark in said] == ([told] if told else [])
    written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert {key: value for key, value in written.items() if key in {**given, **kept}} == kept
    assert written["eos_token_id"] == 0


def test_a_large_student_with_code_has_a_twin(store: LogitStore, tmp_path: Path) -> None:
    folder = write_custom_model(tmp_path / "own", SMALL)
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | LARGE | {"head_dim": 128}))
    (folder / "model.safetensors").unlink()
    assert remarks(StudentConfig(path=str(folder), trust_remote_code=True), store) == []
