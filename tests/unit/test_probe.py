"""The probe refuses a head that we misread and a model whose documents see one another."""

import pytest
import torch
from synthetic_stores import write_synthetic_store
from transformers import AutoConfig, AutoModelForCausalLM

from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.models.causal_lm import decoder_and_head, dense_logits, head_transform, hidden_states
from sparsekd.trainer.models.probe import check_probe, probe_rows
from sparsekd.trainer.run.errors import ModelError

VOCABULARY = 97
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LogitStore:
    path = tmp_path_factory.mktemp("probe") / "store"
    write_synthetic_store(
        path, synthetic_manifest(vocabulary_size=VOCABULARY), {"train": 2, "heldout": 1}, seed=0
    )
    return open_store(path)


def probe(store: LogitStore, model_type: str, dtype: torch.dtype = torch.float32, **fields: object) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY + 7, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    decoder, head = decoder_and_head(model)
    rows = probe_rows(store, torch.device("cpu"), VOCABULARY)
    with torch.no_grad():
        own = model(input_ids=rows.token_ids, position_ids=rows.position_ids, use_cache=False).logits
        hidden = hidden_states(decoder, rows.token_ids, rows.position_ids)
        ours = dense_logits(hidden, head, head_transform(config, VOCABULARY))
    check_probe(own, ours, rows, key="student", model_name=type(model).__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_models_that_we_read_rightly_pass(store: LogitStore, model_type: str, dtype: torch.dtype) -> None:
    scaling = {"logits_scaling": 4.0} if model_type == "granite" else {}
    probe(store, model_type, dtype, **LLAMA, **scaling)


def test_a_scale_that_is_not_read_is_refused(store: LogitStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = head_transform(AutoConfig.for_model("llama"), VOCABULARY)
    monkeypatch.setitem(globals(), "head_transform", lambda config, size: plain)
    with pytest.raises(ModelError, match=r"The head of the student gives logits that differ .*Granite"):
        probe(store, "granite", **LLAMA, logits_scaling=4.0)


def test_a_model_that_reads_no_borders_is_refused(store: LogitStore) -> None:
    with pytest.raises(ModelError, match="a MambaForCausalLM, a document of a packed row depends"):
        probe(store, "mamba", hidden_size=16, num_hidden_layers=2, state_size=4)
