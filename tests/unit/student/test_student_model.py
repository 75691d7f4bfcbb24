"""A student that does not fit its store is refused before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.synthetic import synthetic_manifest, write_synthetic_tokenizer
from sparsekd.trainer.config.schema import StudentConfig
from sparsekd.trainer.models.causal_lm import load_causal_lm, load_config
from sparsekd.trainer.models.source import student_source
from sparsekd.trainer.run.errors import ModelError
from sparsekd.trainer.student.model import check_student

MANIFEST = synthetic_manifest(vocabulary_size=97)
TOKENIZER = MANIFEST.tokenizer
SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def check(student: StudentConfig, store: LogitStore) -> None:
    source = student_source(student, TOKENIZER)
    check_student(load_config(source, "student"), source, store, reads_records=True)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> LogitStore:
    path = tmp_path_factory.mktemp("stored") / "store"
    write_synthetic_store(path, MANIFEST, {"train": 20, "heldout": 1}, seed=0)
    return open_store(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A student's folder with a configuration, a padded vocabulary and no tokenizer."""
    place = tmp_path / "model"
    load_config(
        student_source(StudentConfig(config={**SIZES, "vocab_size": 128}), TOKENIZER), "x"
    ).save_pretrained(place)
    return place


def test_a_configuration_takes_the_store_s_vocabulary(stored: LogitStore) -> None:
    source = student_source(StudentConfig(config=dict(SIZES)), TOKENIZER)
    config = load_config(source, "student")
    assert config.vocab_size == 97 and config.eos_token_id == TOKENIZER.eos_token_id
    check(StudentConfig(config=dict(SIZES)), stored)
    check(StudentConfig(config={**SIZES, "vocab_size": 104}), stored)


def test_a_smaller_vocabulary_is_refused(stored: LogitStore) -> None:
    with pytest.raises(
        ModelError, match=r"has 96 vocabulary entries, .* 97 ids .*leave student\.config\.vocab_size out"
    ):
        check(StudentConfig(config={**SIZES, "vocab_size": 96}), stored)


def test_the_student_s_own_tokenizer_is_compared_by_content(folder: Path, stored: LogitStore) -> None:
    student = StudentConfig(path=str(folder))
    check(student, stored)  # it has none
    write_synthetic_tokenizer(folder, 97)
    check(student, stored)
    # The same content in another layout of the file is the same tokenizer.
    place = folder / "tokenizer.json"
    description = json.loads(place.read_text())
    place.write_text(json.dumps(description, indent=3, sort_keys=True))
    check(student, stored)
    vocabulary = description["model"]["vocab"]
    swapped = {**vocabulary, "w5": 6, "w6": 5}
    place.write_text(json.dumps({**description, "model": {**description["model"], "vocab": swapped}}))
    with pytest.raises(ModelError, match=r"id ([56]) is 'w[56]' in it and 'w\1' in the store's \("):
        check(student, stored)
    write_synthetic_tokenizer(folder, 98)
    check(student, stored)  # one more than the store's, which its text cannot have
    write_synthetic_tokenizer(folder, 60)
    with pytest.raises(
        ModelError,
        match=r"60 entries and the store's 97, and id (\d+) is None in it and 'w\1' in the store's \(",
    ):
        check(student, stored)
    place.write_text(json.dumps({**description, "pre_tokenizer": {"type": "WhitespaceSplit"}}))
    with pytest.raises(ModelError, match=r"the same ids, but cuts text differently \(its pre_tokenizer\)"):
        check(student, stored)


def test_rows_longer_than_the_student_s_positions_are_refused(stored: LogitStore) -> None:
    length = MANIFEST.sequence_length
    check(StudentConfig(config={**SIZES, "max_position_embeddings": length}), stored)
    with pytest.raises(
        ModelError, match=rf"student\.config takes at most {length - 1} positions.*have {length}"
    ):
        check(StudentConfig(config={**SIZES, "max_position_embeddings": length - 1}), stored)


@pytest.mark.parametrize("attention", ["flash_attention_2", "no_such_attention"])
def test_an_attention_that_does_not_run_here_is_one_sentence(attention: str) -> None:
    source = student_source(StudentConfig(config=dict(SIZES), attention=attention), TOKENIZER)
    with pytest.raises(ModelError, match=rf"student\.config does not support student\.attention={attention}"):
        load_causal_lm(source, "student", dtype=torch.float32)


def test_a_field_that_the_model_type_does_not_know_is_refused(stored: LogitStore) -> None:
    with pytest.raises(ModelError, match=r"student\.config\.num_layers .* did you mean num_hidden_layers"):
        check(StudentConfig(config={**SIZES, "num_layers": 1}), stored)
    # Consumed by transformers under another name, so it has an effect.
    check(StudentConfig(config={**SIZES, "rope_theta": 5e5}), stored)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
        ("mixtral", {"head_dim": 16}),
        ("phi3", {"partial_rotary_factor": 0.5}),
    ],
)
def test_a_field_that_the_model_reads_is_taken_though_its_class_has_none(
    model_type: str, fields: dict[str, Any], stored: LogitStore
) -> None:
    """What the model is made of decides, and the misspelt neighbour is refused as before."""
    student = {**SIZES, "model_type": model_type, **fields}
    check(StudentConfig(config=student), stored)
    with pytest.raises(ModelError, match=r"student\.config\.num_layers .* did you mean num_hidden_layers"):
        check(StudentConfig(config={**student, "num_layers": 1}), stored)


def test_the_field_reaches_the_model() -> None:
    fields = {**SIZES, "model_type": "qwen3_moe", "num_experts": 4, "head_dim": 16}
    source = student_source(StudentConfig(config=fields), TOKENIZER)
    model = load_causal_lm(source, "student", dtype=torch.float32)
    assert model.get_parameter("model.layers.0.self_attn.q_norm.weight").shape == (16,)
    assert type(model.config).__module__.startswith("transformers.")
