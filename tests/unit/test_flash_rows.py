"""Flash attention knows packed documents of one row alone: there a micro-batch's rows pass as one.

It runs on GPUs alone. What stands here for it has its rule, transformers' own, for what is packed, and
computes each document by itself.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_stores import write_synthetic_store
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.models.causal_lm import (
    decoder_and_head,
    head_transform,
    hidden_states,
    states_of_layers,
)
from sparsekd.trainer.models.opened import prove
from sparsekd.trainer.models.router import states_and_balance
from sparsekd.trainer.run.errors import ModelError

NAME = "flash_for_tests"
VOCABULARY = 60
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
seen: list[torch.Size] = []


def flash(
    module: nn.Module,
    query: Tensor,  # (B, heads, L, D)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    seen.append(query.shape)
    assert attention_mask is None
    starts = [0, query.shape[2]]
    if bool(_is_packed_sequence(position_ids, query.shape[0])):
        assert position_ids is not None
        starts = [*torch.nonzero(position_ids[0] == 0)[:, 0].tolist(), query.shape[2]]
    parts = [
        nn.functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        for start, end in itertools.pairwise(starts)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    AttentionInterface.register(NAME, flash)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    yield
    del AttentionInterface._global_mapping[NAME], AttentionMaskInterface._global_mapping[NAME]


def both(kind: str, **more: object) -> dict[str, Any]:
    """One model twice, by its attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    other.load_state_dict(model.state_dict())
    for part in other.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = NAME
    return {"sdpa": model, NAME: other}


def rows() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    lengths = ([20], [7, 13], [1, 4, 15])
    places = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
    return ids, torch.stack(places)


def far(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def test_its_hidden_states_are_those_of_each_document_alone() -> None:
    models = both("llama")
    ids, places = rows()
    seen.clear()
    with torch.no_grad():
        found, layers = states_of_layers(decoder_and_head(models[NAME])[0], ids, places, [1, 2])
        expected, of_layers = states_of_layers(decoder_and_head(models["sdpa"])[0], ids, places, [1, 2])
    assert set(seen) == {torch.Size((1, 4, 60, 8))}
    assert far(found, expected) < 1e-5
    assert all(far(layers[layer], of_layers[layer]) < 1e-5 for layer in (1, 2))


def test_a_mixture_of_experts_balances_the_same_tokens() -> None:
    models = both("qwen3_moe", moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8)
    ids, places = rows()
    routed = torch.ones_like(ids, dtype=torch.bool)
    routed[2, 12:] = False
    with torch.no_grad():
        (found, balance), (expected, of_balance) = (
            states_and_balance(models[name], decoder_and_head(models[name])[0], ids, places, routed)
            for name in (NAME, "sdpa")
        )
    assert far(found, expected) < 1e-5 and float(balance) == pytest.approx(float(of_balance), rel=1e-5)


def test_the_probe_passes_it_and_sees_rows_that_were_not_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = synthetic_manifest(vocabulary_size=VOCABULARY, sequence_length=24, rows_per_shard=8)
    write_synthetic_store(tmp_path / "store", manifest, {"train": 8, "heldout": 2}, seed=3)
    store, model = open_store(tmp_path / "store"), both("llama")[NAME]
    transform = head_transform(model.config, VOCABULARY)
    prove(model, transform, store, key="teacher")
    monkeypatch.setattr(
        "sparsekd.trainer.models.causal_lm.is_flash_attention_requested", lambda config: False
    )
    with torch.no_grad():
        apart = hidden_states(decoder_and_head(model)[0], *rows())
    monkeypatch.undo()
    with torch.no_grad():
        assert far(apart, hidden_states(decoder_and_head(model)[0], *rows())) > 0.01
    monkeypatch.setattr(
        "sparsekd.trainer.models.causal_lm.is_flash_attention_requested", lambda config: False
    )
    with pytest.raises(ModelError, match="document of a packed row"):
        prove(model, transform, store, key="teacher")
