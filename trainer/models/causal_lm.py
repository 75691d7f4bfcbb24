"""A Hugging Face causal language model, cut into the part that makes hidden states and the head.

Teacher, student and evaluation all need the same three things: a model that is loaded with clear errors, its
hidden states for packed rows, and the transform between `hidden @ weight.T` and the model's own logits.

Shapes: B rows, L tokens of a row, H hidden, V rows of the head's weight.
"""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from sparsekd.kernels.objective import HeadTransform
from sparsekd.logit_store.errors import first_line
from sparsekd.trainer.models.config_fields import check_fields, made_config
from sparsekd.trainer.models.gguf_file import gguf_problem
from sparsekd.trainer.models.placement import WHOLE, Placement, is_placed, resident_head, whole
from sparsekd.trainer.run.errors import ModelError

# What transformers' errors about an attention implementation have in common with no others.
_WORDS_OF_ATTENTION = ("attn_implementation", "scaled_dot_product_attention", "FlashAttention", "flash_attn")

# Leaves the choice to transformers.
AUTO_ATTENTION = "auto"

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a folder or hub name, or fields of a configuration for random weights."""

    path: str | None
    revision: str | None
    attention: str
    trust_remote_code: bool
    setting: str  # that names the path, for messages
    config: dict[str, Any] | None = None
    placement: Placement = WHOLE
    gguf_file: str | None = None  # of the path

    @property
    def files(self) -> dict[str, Any]:
        """What `from_pretrained` is told of the place, beside the path."""
        found = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return found | ({"gguf_file": self.gguf_file} if self.gguf_file is not None else {})

    @property
    def named(self) -> str:
        """The path as a setting, for messages."""
        return f"{self.setting}={self.path}"


def for_cpu(source: ModelSource) -> ModelSource:
    """The source with an attention that runs without a GPU: the same weights and, up to rounding, numbers."""
    runs = source.attention in (AUTO_ATTENTION, "sdpa", "eager")
    return source if runs else dataclasses.replace(source, attention="eager")


def load_config(source: ModelSource, key: str) -> PretrainedConfig:
    """Loads or builds the transformers configuration.

    Args:
        source: Where the model comes from.
        key: The configuration group, named in errors ("teacher" or "student").

    Raises:
        ModelError: The folder or hub name cannot be read, or the fields do not make a configuration, or one
            of them would have no effect.
    """
    if source.path is not None:
        try:
            return AutoConfig.from_pretrained(source.path, **source.files)
        except _errors_of(source) as error:
            raise ModelError(_load_problem(source, key, error)) from error
    model_type, fields = _typed_fields(source, key)
    config = made_config(model_type, fields, key)
    check_fields(config, model_type, fields, key)
    return config


def _typed_fields(source: ModelSource, key: str) -> tuple[str, dict[str, Any]]:
    fields = dict(source.config or {})
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ModelError(
            f"{key}.path is not set and {key}.config has no model_type; "
            f"give a model ({key}.path=...) or a configuration ({key}=llama_160m, or "
            f"{key}.config.model_type=llama with its sizes)."
        )
    return model_type, fields


def load_causal_lm(
    source: ModelSource, key: str, *, dtype: torch.dtype, device: torch.device | None = None
) -> PreTrainedModel:
    """Loads a model from a folder or hub name, or makes one with random weights from a configuration.

    With a live `HfDeepSpeedConfig` the parameters are partitioned while they load. Random weights come from
    torch's global generator: seed it first.

    Args:
        source: Where it comes from.
        key: The configuration group, named in errors.
        dtype: Of its weights.
        device: Where it goes, unless the source's placement divides it; None leaves it where it was loaded,
            and no placement counts.

    Raises:
        ModelError: The model cannot be loaded; the message says from where and why.
    """
    if source.gguf_file is not None and source.placement.tensor_parallel > 1:
        raise ModelError(
            f"{source.named} is a GGUF file, which is not divided among ranks: leave {key}.tensor_parallel "
            "out, or name the model as transformers saves it."
        )
    try:
        if source.path is None:
            # Not checked again: that would build a model, here perhaps of partitioned parameters.
            return model_of(made_config(*_typed_fields(source, key), key), source, dtype=dtype)
        placed = source.placement.arguments(load_config(source, key), device) if device is not None else {}
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=dtype,
            attn_implementation=_asked(source),
            **source.files,
            **placed,
        )
    except torch.OutOfMemoryError:
        raise
    except _errors_of(source) as error:
        raise ModelError(_load_problem(source, key, error)) from error
    if device is not None and not is_placed(model):
        nn.Module.to(model, device)  # transformers' own annotation of .to hides its arguments
    return model


def model_of(config: PretrainedConfig, source: ModelSource, *, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a configuration, with random weights; attention and trust are the source's."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config,
        dtype=dtype,
        attn_implementation=_asked(source),
        trust_remote_code=source.trust_remote_code,
    )
    return model


def _asked(source: ModelSource) -> str | None:
    return None if source.attention == AUTO_ATTENTION else source.attention


def attention_of(model: PreTrainedModel) -> str:
    """The attention implementation that a model has, by transformers' name."""
    return str(model.config._attn_implementation)


def picked_attention(config: PretrainedConfig, source: ModelSource) -> str:
    """The attention that a source asks for, or where it leaves that open, what transformers picks.

    Found on a model without memory; where such a one cannot be made, it stays open.
    """
    if source.attention != AUTO_ATTENTION:
        return source.attention
    try:
        with torch.device("meta"):
            return attention_of(model_of(config, source, dtype=torch.float32))
    except Exception:  # of code that transformers or the model brings: building the model itself will say it
        return AUTO_ATTENTION


def _errors_of(source: ModelSource) -> tuple[type[Exception], ...]:
    """What transformers raises at a model that it cannot load: at a damaged GGUF file, anything."""
    return (OSError, ValueError, ImportError) if source.gguf_file is None else (Exception,)


def _load_problem(source: ModelSource, key: str, error: Exception) -> str:
    reason = first_line(error)
    what = f"{key}.config" if source.path is None else source.named
    if any(word in str(error) for word in _WORDS_OF_ATTENTION):
        return (
            f"{what} does not support {key}.attention={source.attention} ({reason}); "
            f"use {key}.attention=eager."
        )
    if source.placement.quantization is not None and isinstance(error, ImportError):
        return (
            f"{key}.quantization={source.placement.quantization} needs bitsandbytes ({reason}); "
            "pip install 'sparsekd[quantised]'."
        )
    if source.gguf_file is not None:
        return f"{what}: {gguf_problem(source.gguf_file, error)}"
    if source.path is None:
        return f"{what} does not make a model ({reason}); compare it with the model type's own fields."
    if source.placement.tensor_parallel > 1 and isinstance(error, ValueError):
        ranks = source.placement.tensor_parallel
        return f"{what} cannot be loaded with {key}.tensor_parallel={ranks}: {reason}."
    hint = (
        "the folder holds no model that transformers can load"
        if Path(source.path).is_dir()
        else "it is neither a folder here nor a hub name that can be reached"
    )
    return f"{what} cannot be loaded: {hint} ({reason})"


def decoder_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    """The part that makes hidden states, and the linear head.

    Raises:
        ModelError: The model has no linear output head over a decoder.
    """
    head = model.get_output_embeddings()
    decoder = getattr(model, model.base_model_prefix, None)
    if not isinstance(decoder, nn.Module) or decoder is model:
        # Its class is made for a place within a larger model (Llama 4's text model).
        embeddings = model.get_input_embeddings()
        decoder = next((child for child in model.children() if embeddings in child.modules()), None)
    if not isinstance(head, nn.Linear) or not isinstance(decoder, nn.Module) or decoder is model:
        raise ModelError(
            f"{type(model).__name__} has no linear head over a decoder; "
            "sparsekd distils decoder-only causal language models with an nn.Linear head."
        )
    head = resident_head(head)
    if not head.weight.is_floating_point():
        raise ModelError(
            f"The head of {type(model).__name__} is quantised to {head.weight.dtype}: sparsekd reads its "
            "weight itself; use a model whose head is left out of the quantisation, as is usual."
        )
    return decoder, head


def head_transform(config: PretrainedConfig, vocabulary_size: int) -> HeadTransform:
    """The model's own way from `hidden @ weight.T + bias` to logits.

    Gemma caps its logits (`final_logit_softcapping`), Cohere multiplies (`logit_scale`), Granite divides
    (`logits_scaling`). `probe.check_probe` proves the result against the model itself.

    Args:
        config: The model's configuration.
        vocabulary_size: True vocabulary; rows of the head beyond it are padding.
    """
    text = config.get_text_config()
    scale = 1.0
    if getattr(text, "logit_scale", None) is not None:
        scale *= float(text.logit_scale)
    if getattr(text, "logits_scaling", None) is not None:
        scale /= float(text.logits_scaling)
    softcap = getattr(text, "final_logit_softcapping", None)
    return HeadTransform(
        vocabulary_size=vocabulary_size, scale=scale, softcap=None if softcap is None else float(softcap)
    )


def hidden_states(
    decoder: nn.Module,
    token_ids: Tensor,  # (B, L) int64
    position_ids: Tensor,  # (B, L) int64, restarting at each document
) -> Tensor:  # (B, L, H)
    """Hidden states of packed rows in which no document sees another.

    transformers recognises packed documents by restarting position ids, but only without an attention mask
    and without a cache: either of the two silently lets attention cross (measured; tests show it on logits).
    """
    output = decoder(**model_arguments(decoder, token_ids, position_ids))
    states: Tensor = output.last_hidden_state.reshape(*token_ids.shape, -1)
    return states.to(token_ids.device)  # of a model over several devices the head's, where the ids are


def model_arguments(model: nn.Module, token_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """What a model or its decoder is called with for packed rows.

    Flash attention knows packed documents by position ids of one row alone: there the rows are one, of
    (1, B * L), in which each begins as a document does. What comes out is reshaped by whoever calls.

    Args:
        model: Of transformers.
        token_ids: (B, L) int64.
        position_ids: (B, L) int64, restarting at each document.
    """
    config = model.config
    assert isinstance(config, PretrainedConfig)
    if is_flash_attention_requested(config.get_text_config()):
        token_ids, position_ids = token_ids.reshape(1, -1), position_ids.reshape(1, -1)
    return {"input_ids": token_ids, "position_ids": position_ids, "use_cache": False}


def states_of_layers(
    decoder: nn.Module,
    token_ids: Tensor,  # (B, L) int64
    position_ids: Tensor,  # (B, L) int64
    layers: Collection[int],
) -> tuple[Tensor, dict[int, Tensor]]:  # (B, L, H) each
    """`hidden_states`, and the hidden states that have passed so many of the decoder's layers.

    0 are the embeddings, the number of layers is what the head reads (behind the last norm): the numbering of
    transformers' `output_hidden_states`, which would keep every layer's in memory.
    """
    inner = {layer: block for layer, block in enumerate(layers_of(decoder)) if layer in layers}
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            found[layer] = states.reshape(*token_ids.shape, -1).to(token_ids.device)

        return hook

    handles = [
        block.register_forward_pre_hook(keep(layer), with_kwargs=True) for layer, block in inner.items()
    ]
    try:
        last = hidden_states(decoder, token_ids, position_ids)
    finally:
        for handle in handles:
            handle.remove()
    if len(layers_of(decoder)) in layers:
        found[len(layers_of(decoder))] = last
    return last, found


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's blocks, in order.

    Raises:
        ModelError: There is no list of them.
    """
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ModelError(
            f"{type(decoder).__name__} has no list of layers, so that their hidden states cannot be kept: "
            "leave store.features empty."
        )
    return lists[0]


def dense_logits(
    hidden: Tensor,  # (..., H)
    head: nn.Linear,
    transform: HeadTransform,
) -> Tensor:  # (..., vocabulary_size) float32
    """The model's logits over the true vocabulary, in float32. Gathers [..., V]: for small batches only.

    Raises:
        ModelError: The head takes something else than what the decoder makes.
    """
    if hidden.shape[-1] != head.in_features:
        raise ModelError(
            f"The head of the model takes {head.in_features:,} values a position, and its decoder makes "
            f"{hidden.shape[-1]:,}: something stands between them that sparsekd does not know (ELECTRA and "
            "RoFormer are so); choose a model whose head reads the decoder's hidden states."
        )
    logits = torch.nn.functional.linear(hidden.float(), whole(head.weight).float())
    if head.bias is not None:
        logits = logits + whole(head.bias).float()
    logits = transform.scale * logits[..., : transform.vocabulary_size]
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits
