"""The probe refuses a head that we misread and a model whose documents see one another."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_stores import write_synthetic_store
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.trainer.models import opened
from sparsekd.trainer.models.causal_lm import decoder_and_head, head_transform
from sparsekd.trainer.models.probe import holds_several, probe_rows
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


def model_of(model_type: str, dtype: torch.dtype = torch.float32, **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = {"vocab_size": VOCABULARY + 7} | fields
    config = AutoConfig.for_model(model_type, **fields)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prove(model: PreTrainedModel, store: LogitStore, *, packed: bool = True, scale: bool = True) -> None:
    transform = head_transform(model.config if scale else AutoConfig.for_model("llama"), VOCABULARY)
    opened.prove(model, transform, store, key="student", packed=packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_models_that_we_read_rightly_pass(store: LogitStore, model_type: str, dtype: torch.dtype) -> None:
    scaling = {"logits_scaling": 4.0} if model_type == "granite" else {}
    model = model_of(model_type, dtype, **LLAMA, **scaling)
    for packed in (True, False):
        prove(model, store, packed=packed)


def test_a_scale_that_is_not_read_is_refused(store: LogitStore) -> None:
    with pytest.raises(ModelError, match=r"The head of the student gives logits that differ .*Granite"):
        prove(model_of("granite", **LLAMA, logits_scaling=4.0), store, scale=False)


def test_a_head_that_reads_no_hidden_states_is_refused(store: LogitStore) -> None:
    """ELECTRA's comes behind a projection to the width of its embeddings."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = model_of("electra", embedding_size=16, is_decoder=True, **sizes)
    with pytest.raises(ModelError, match="takes 16 values a position, and its decoder makes 32"):
        prove(model, store)


def mamba() -> PreTrainedModel:
    return model_of("mamba", hidden_size=16, num_hidden_layers=2, state_size=4)


def lfm2(dtype: torch.dtype) -> PreTrainedModel:
    """Small convolutions, whose leak at random start is less than a rounding of the logits."""
    sizes = {**LLAMA, "layer_types": ["conv", "conv"], "block_auto_adjust_ff_dim": False}
    return model_of("lfm2", dtype, **sizes)


def test_a_model_that_reads_no_borders_is_refused(store: LogitStore) -> None:
    remedy = r"a document of a packed row depends on the one before it .*corpus\.packing=none"
    with pytest.raises(ModelError, match=f"a MambaForCausalLM, {remedy}"):
        prove(mamba(), store)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_that_drowns_in_rounding_is_found_where_it_arises(
    store: LogitStore, dtype: torch.dtype
) -> None:
    model = lfm2(dtype)
    rows = probe_rows(store, torch.device("cpu"), VOCABULARY, packed=True)
    with torch.no_grad():
        first, second = model(rows.token_ids[:2], position_ids=rows.position_ids[:2], use_cache=False).logits
    behind = rows.looked_at
    assert (first - second)[behind].norm() / first[behind].norm() < 3e-3  # all that was looked at before
    with pytest.raises(
        ModelError, match=r"a Lfm2ForCausalLM, a document .*\(in (model\.layers\.[01]|the logits)"
    ):
        prove(model, store)


def test_documents_alone_in_a_row_suit_models_that_read_no_borders(store: LogitStore) -> None:
    for model in (mamba(), lfm2(torch.bfloat16)):
        prove(model, store, packed=False)


def test_the_store_says_whether_documents_share_rows(store: LogitStore, tmp_path: Path) -> None:
    assert holds_several(store)
    manifest = synthetic_manifest(vocabulary_size=VOCABULARY, k=0, n=0)
    row = synthetic_rows(manifest, 1, seed=0)[0]
    alone = replace(row, segment_starts=np.array([0, 9], np.int32), segment_documents=np.array([3, -1]))
    alone = replace(alone, loss_mask=np.arange(16) < 8)
    create_store(tmp_path / "store", manifest, store.tokenizer_path)
    write_shard(tmp_path / "store", manifest, "train", 0, [alone, alone])
    seal(tmp_path / "store", {"train": 1, "heldout": 0})
    unpacked = open_store(tmp_path / "store")
    assert not holds_several(unpacked)
    opened.prove(mamba(), head_transform(mamba().config, VOCABULARY), unpacked, key="student")


def test_a_model_that_sees_what_it_is_to_predict_is_refused(store: LogitStore) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    for packed in (True, False):
        with pytest.raises(ModelError, match=r"sees the tokens that it is to predict.*causal language model"):
            prove(model_of("bert", **sizes), store, packed=packed)


def test_noise_of_a_kernel_is_no_leak(store: LogitStore) -> None:
    """As of kernels that choose their order of sums at run time: equal rows differ as well."""
    model = model_of("llama", **LLAMA)

    def noisy(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 1e-5 * torch.randn_like(output))

    model.model.layers[0].mlp.register_forward_hook(noisy)
    prove(model, store)


class Scores(torch.nn.Module):
    """Scores of all keys, of which an attention leaves the later ones out."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ hidden.transpose(1, 2)


def test_scores_before_they_are_masked_are_no_leak(store: LogitStore) -> None:
    model = model_of("llama", **LLAMA)
    model.scores = Scores()
    seen: list[torch.Size] = []

    def score(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        seen.append(model.scores(args[0]).shape)

    model.model.layers[0].mlp.register_forward_pre_hook(score)
    prove(model, store)
    assert torch.Size([4, 15, 15]) in seen


def test_a_decoder_is_found_by_its_embeddings(store: LogitStore) -> None:
    """The class of Llama 4's text model is made for a place within a larger model."""
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8, "pad_token_id": None}
    model = model_of("llama4_text", **LLAMA, **experts)
    assert getattr(model, model.base_model_prefix, None) is None
    assert decoder_and_head(model) == (model.model, model.lm_head)
    prove(model, store)
