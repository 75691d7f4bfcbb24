"""The load-balancing loss is that of plain transformers, where the configuration or a key says so."""

from typing import Any

import pytest
import torch

from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.config.checks import objective_of
from sparsekd.trainer.config.schema import Config, StudentConfig
from sparsekd.trainer.models.causal_lm import decoder_and_head, load_causal_lm, load_config
from sparsekd.trainer.models.router import check_router, router_coefficient, states_and_balance
from sparsekd.trainer.models.source import student_source
from sparsekd.trainer.run.errors import ConfigError, ModelError
from sparsekd.trainer.state.resume import settings_of

TOKENIZER = synthetic_manifest(vocabulary_size=97).tokenizer
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
}


def coefficient(**fields: Any) -> float:
    student = StudentConfig(
        config={"model_type": "mixtral", **SIZES, **EXPERTS["mixtral"], **fields.pop("config", {})}, **fields
    )
    return router_coefficient(student, load_config(student_source(student, TOKENIZER), "student"))


def test_the_configuration_says_and_the_key_wins() -> None:
    on = {"output_router_logits": True, "router_aux_loss_coef": 5.0}
    assert coefficient() == 0.0  # transformers' own default leaves it out as well
    assert coefficient(config={"router_aux_loss_coef": 5.0}) == 0.0
    assert coefficient(config=on) == 5.0
    assert coefficient(config=on, router_loss=0.0) == 0.0
    assert coefficient(config=on, router_loss=0.25) == 0.25
    assert coefficient(router_loss=0.25) == 0.25


def test_what_would_do_nothing_is_refused() -> None:
    student = StudentConfig(config={"model_type": "llama"}, router_loss=0.1)
    with pytest.raises(
        ModelError, match=r"student\.router_loss=0\.1, but a LlamaConfig has no load-balancing"
    ):
        router_coefficient(student, load_config(student_source(student, TOKENIZER), "student"))
    # The first pass over a layer that is recomputed keeps no gradient, the router's logits among it.
    with pytest.raises(ConfigError, match=r"activation_checkpointing=false, or student\.router_loss=0"):
        coefficient(router_loss=0.1, activation_checkpointing=True)
    assert coefficient(router_loss=0.0, activation_checkpointing=True) == 0.0
    llama = student_source(StudentConfig(config={"model_type": "llama", **SIZES}), TOKENIZER)
    del llama.config["num_experts_per_tok"]  # type: ignore[union-attr]  # it is a configuration's
    with pytest.raises(ModelError, match="no load-balancing loss for a LlamaForCausalLM"):
        check_router(load_causal_lm(llama, "student", dtype=torch.float32))


@pytest.mark.parametrize("model_type", EXPERTS)
def test_it_is_that_of_transformers(model_type: str) -> None:
    config = {"model_type": model_type, **SIZES, **EXPERTS[model_type]}
    source = student_source(StudentConfig(config=config), TOKENIZER)
    torch.manual_seed(0)
    model = load_causal_lm(source, "student", dtype=torch.float32)
    check_router(model)
    ids = torch.randint(0, 97, (2, 12))
    places = torch.arange(12).expand(2, -1)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 7:] = False
    decoder = decoder_and_head(model)[0]
    for routed in (torch.ones_like(real), real):
        hidden, found = states_and_balance(model, decoder, ids, places, routed)
        # A real token sees nothing of the padding behind it, masked or not.
        theirs = model(ids, attention_mask=routed.long(), output_router_logits=True, use_cache=False)
        assert found.item() == pytest.approx(theirs.aux_loss.item(), rel=1e-6)
        assert torch.equal(hidden, decoder(ids, position_ids=places, use_cache=False).last_hidden_state)
    gradient = torch.autograd.grad(
        found, [p for name, p in model.named_parameters() if name.endswith(".gate.weight")]
    )
    assert all(part.abs().sum() > 0 for part in gradient)


def test_over_no_token_at_all_it_is_0_with_a_gradient_of_0() -> None:
    config = {"model_type": "qwen3_moe", **SIZES, **EXPERTS["qwen3_moe"]}
    source = student_source(StudentConfig(config=config), TOKENIZER)
    model = load_causal_lm(source, "student", dtype=torch.float32)
    ids = torch.zeros(1, 6, dtype=torch.int64)
    _, loss = states_and_balance(model, decoder_and_head(model)[0], ids, ids, ids == 1)
    loss.backward()
    assert loss.item() == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.equal(part, torch.zeros_like(part)) for part in gradients)


def test_with_it_the_micro_batch_is_part_of_the_numbers() -> None:
    def numbers(rows: int, weight: float) -> Any:
        config = Config()
        config.train.micro_batch_rows = rows
        objective = objective_of(config.objective)
        return settings_of(
            config, objective, impl="torch", student_content=None, order={}, router_coefficient=weight
        )["numbers"]

    assert numbers(1, 0.0) == numbers(2, 0.0)
    assert numbers(1, 0.1) != numbers(2, 0.1) != numbers(2, 0.2)
