"""Which fields of a configuration have an effect: what a person typed may be misspelt, and nobody says so.

transformers keeps a field that a configuration class does not know as an attribute. Some models read such
attributes all the same (qwen3_moe its `head_dim`): what the model reads when it is built decides.
"""

import contextlib
import difflib
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sparsekd.trainer.run.errors import ModelError


def made_config(model_type: str, fields: dict[str, Any], key: str) -> PretrainedConfig:
    """Makes the configuration of a model type.

    Args:
        model_type: As transformers names it.
        fields: What a person gave, without `model_type`.
        key: The configuration group, named in errors.

    Raises:
        ModelError: The fields make no configuration.
    """
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{key}.config does not make a {model_type!r} configuration: {error}") from error


def check_fields(config: PretrainedConfig, model_type: str, fields: dict[str, Any], key: str) -> None:
    """Checks that each of the fields of which `made_config` made a configuration has an effect.

    Raises:
        ModelError: One of them would change nothing.
    """
    plain = AutoConfig.for_model(model_type)
    strange = {name for name in fields if hasattr(config, name) and not hasattr(plain, name)}
    strange -= {name for name in strange if _changes_others(model_type, fields, name)}
    for name in sorted(strange - _read_by_the_model(config) if strange else strange):
        near = difflib.get_close_matches(name, [*plain.to_dict(), *plain.attribute_map], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ModelError(
            f"{key}.config.{name} is not a field of a {model_type!r} configuration and would have no "
            f"effect{hint}"
        )


def _changes_others(model_type: str, fields: dict[str, Any], name: str) -> bool:
    """Whether the class itself makes other fields of this one (phi3 `rope_parameters`)."""
    rest = {key: value for key, value in fields.items() if key != name}
    with_it, without = (AutoConfig.for_model(model_type, **given).to_dict() for given in (fields, rest))
    return {**with_it, name: None} != {**without, name: None}


def _read_by_the_model(config: PretrainedConfig) -> set[str]:
    """Names of the attributes that a model reads of its configuration, built and called without memory."""
    read: set[str] = set()
    plain_class = type(config)

    def noted(self: PretrainedConfig, name: str) -> Any:
        read.add(name)
        return plain_class.__getattribute__(self, name)

    watched = plain_class.from_dict(config.to_dict())
    object.__setattr__(
        watched, "__class__", type(plain_class.__name__, (plain_class,), {"__getattribute__": noted})
    )
    # What cannot be built is told where the student is; what cannot be called was built, which says most.
    with torch.device("meta"), torch.no_grad(), contextlib.suppress(Exception):
        model = AutoModelForCausalLM.from_config(watched)
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    return read
