"""The load-balancing loss of a mixture of experts, as the student's own model computes it.

Plain transformers adds it, times `router_aux_loss_coef`, to the loss of each batch where the configuration
says `output_router_logits`. It is a mean over the tokens of a batch, no sum of parts: see docs/losses.md, 12.

Shapes: B rows, L tokens of a row, H hidden.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sparsekd.trainer.config.schema import StudentConfig
from sparsekd.trainer.models.causal_lm import model_arguments
from sparsekd.trainer.run.errors import ConfigError, ModelError

_FUNCTION = "load_balancing_loss_func"  # what each of transformers' models with such a loss calls

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def router_coefficient(student: StudentConfig, config: PretrainedConfig) -> float:
    """The weight of the load-balancing loss in a run's loss; 0 leaves it out.

    Args:
        student: `router_loss`: the weight, or None for what the model's configuration says.
        config: The model's configuration.

    Raises:
        ModelError: There is to be such a loss, and the model has none.
        ConfigError: Activations are to be recomputed, in which the loss would have no gradient.
    """
    own = own_coefficient(config)
    wanted = student.router_loss
    if wanted is None:
        says_so = getattr(config.get_text_config(), "output_router_logits", False)
        wanted = own if says_so and own is not None else 0.0
    elif wanted and own is None:
        raise ModelError(
            f"student.router_loss={wanted:g}, but a {type(config).__name__} has no load-balancing loss (no "
            "router_aux_loss_coef); leave student.router_loss out."
        )
    if wanted and student.activation_checkpointing:
        raise ConfigError(
            f"The load-balancing loss (x {wanted:g}) has no gradient where activations are recomputed: "
            "set student.activation_checkpointing=false, or student.router_loss=0."
        )
    return wanted


def is_routed(config: PretrainedConfig) -> bool:
    """Whether a token meets only some of a model's parameters, as far as its text configuration says."""
    return any(getattr(config, name, None) for name in _EXPERTS)


def own_coefficient(config: PretrainedConfig) -> float | None:
    """The weight that a mixture of experts' configuration has for it; None for other models."""
    own = getattr(config.get_text_config(), "router_aux_loss_coef", None)
    return None if own is None else float(own)


def check_router(model: PreTrainedModel) -> None:
    """Checks that the load-balancing loss of a model can be had.

    Raises:
        ModelError: transformers computes none for it.
    """
    if _function_of(model) is None or not (
        hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")
    ):
        raise ModelError(
            f"transformers computes no load-balancing loss for a {type(model).__name__}; set "
            "student.router_loss=0 to train without one."
        )


def states_and_balance(
    model: PreTrainedModel,
    decoder: nn.Module,
    token_ids: Tensor,  # (B, L) int64
    position_ids: Tensor,  # (B, L) int64, restarting at each document
    routed: Tensor,  # (B, L) bool
) -> tuple[Tensor, Tensor]:  # (B, L, H), and a scalar
    """`causal_lm.hidden_states`, and the load-balancing loss over the positions that are `routed`.

    The loss is 0 where none is: a mean over nothing.
    """
    output = decoder(**model_arguments(decoder, token_ids, position_ids), output_router_logits=True)
    loss_function = _function_of(model)
    assert loss_function is not None
    there = routed.any()
    loss = loss_function(
        output.router_logits,
        model.num_experts,
        model.num_experts_per_tok,
        # Also where all are routed: whether they are is known on the device alone.
        torch.where(there, routed, True),
    )
    return output.last_hidden_state.reshape(*token_ids.shape, -1), loss * there


def _function_of(model: PreTrainedModel) -> Any:
    return getattr(sys.modules[type(model).__module__], _FUNCTION, None)
