"""Whether a student can be exported, tried before it is trained: on a tiny twin of its configuration.

The twin has the student's class and flags, and small sizes. It goes the way of `export`: written, loaded
again by plain transformers, compared. That takes seconds, and a run takes days.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sparsekd.logit_store.errors import first_line
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.models.causal_lm import ModelSource, for_cpu, model_of
from sparsekd.trainer.models.saved import TOLERANCE, reload_difference, write_model
from sparsekd.trainer.run.errors import ConfigError, ModelError

_HIDDEN, _HEADS, _INNER, _LAYERS, _EXPERTS = 64, 4, 64, 2, 4
_RANK, _PART_OF_HEAD = 16, 8  # of latent attention (DeepSeek)

# Widths that must only be at most so large.
_AT_MOST = {
    "intermediate_size": _INNER,
    "moe_intermediate_size": _INNER,
    "shared_expert_intermediate_size": _INNER,
    "ffn_dim": _INNER,
    "num_local_experts": _EXPERTS,
    "num_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": _RANK,
    "kv_lora_rank": _RANK,
    "qk_nope_head_dim": _PART_OF_HEAD,
    "qk_rope_head_dim": _PART_OF_HEAD,
    "qk_head_dim": 2 * _PART_OF_HEAD,
    "v_head_dim": 2 * _PART_OF_HEAD,
    "word_embed_proj_dim": _HIDDEN,
}
# A student that is as small as a twin is its own.
_SMALL_PARAMETERS = 4_000_000
# Beyond this a twin would take more than seconds, and memory beside the student's.
_MOST_PARAMETERS = 200_000_000


def check_exportable(
    config: PretrainedConfig, source: ModelSource, store: LogitStore, *, dtype: torch.dtype
) -> list[str]:
    """Exports a tiny twin of a student into a folder that goes again, and compares what comes back.

    Args:
        config: The student's configuration.
        source: Where it came from.
        store: Whose tokenizer an export gets.
        dtype: In which `export` would write.

    Returns:
        What to tell: that there is no twin of such a model, or nothing.

    Raises:
        ModelError: The student could be trained, but not exported.
        ConfigError: The folder for temporary files takes nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = _twin(config, for_cpu(source), dtype)
    if isinstance(twin, str):
        return [
            f"warning: no tiny twin of a {type(config).__name__} can be made ({twin}), so that nothing shows "
            "before training that the student can be exported; try it on a run of one step."
        ]
    name = type(twin).__name__
    try:
        difference = _difference_on_disk(twin, source, store)
    except ModelError:
        raise
    except OSError as error:
        raise ConfigError(
            f"A tiny twin of the student cannot be written below {tempfile.gettempdir()} to try its export "
            f"({error}); make room there, or set TMPDIR to a folder that can be written."
        ) from error
    except Exception as error:  # of code that transformers or the model brings: the user cannot mend it
        raise ModelError(
            f"A {name} could be trained but not exported: writing a tiny twin of it and loading it again "
            f"with transformers ends with {type(error).__name__} ({error}); report the model type."
        ) from error
    if not difference <= TOLERANCE:
        raise ModelError(
            f"A {name} could be trained but not exported: a tiny twin of it gives logits that "
            f"differ by {difference:.1e} (relative) after it was written and loaded again with transformers; "
            "report the model type."
        )
    return []


def _difference_on_disk(twin: PreTrainedModel, source: ModelSource, store: LogitStore) -> float:
    with _no_progress_bars(), tempfile.TemporaryDirectory(prefix="sparsekd-twin-") as place:
        folder = Path(place, "twin")
        write_model(twin, source, store, folder)
        return reload_difference(twin, source, store, folder)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _twin(config: PretrainedConfig, source: ModelSource, dtype: torch.dtype) -> PreTrainedModel | str:
    """The first that can be made of twins in the order of their likeness and size; where none can, why."""
    problem = "its sizes cannot be made small"
    fewer_layers, tiny = shrunk(config, widths=False), shrunk(config, widths=True)
    for candidate, most in (
        (config, _SMALL_PARAMETERS),
        (tiny, _MOST_PARAMETERS),
        (fewer_layers, _MOST_PARAMETERS),
        (config, _MOST_PARAMETERS),
    ):
        if candidate is None:
            continue
        try:
            with torch.device("meta"):
                size = model_of(candidate, source, dtype=dtype).num_parameters()
            if size > most:
                continue
            twin = model_of(candidate, source, dtype=dtype).eval()
            twin(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
        # Whatever a configuration of sizes that its authors never tried breaks: the next is less unusual.
        except Exception as error:
            problem = first_line(error)
            continue
        return twin
    return problem


def shrunk(config: PretrainedConfig, *, widths: bool) -> PretrainedConfig | None:
    """The configuration with few layers and, with `widths`, small sizes; None where that makes none."""
    fields = config.to_dict()
    text = fields
    if config.get_text_config() is not config:
        text = next(
            (value for value in fields.values() if value == config.get_text_config().to_dict()), fields
        )
    names = config.get_text_config().attribute_map

    def value_of(name: str) -> Any:
        return text.get(names.get(name, name))

    changes: dict[str, Any] = {"num_hidden_layers": min(value_of("num_hidden_layers") or 1, _LAYERS)}
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(value_of(name), list):
            changes[name] = _each_kind(value_of(name))
            changes["num_hidden_layers"] = len(changes[name])
    if isinstance(value_of("first_k_dense_replace"), int):
        changes["first_k_dense_replace"] = min(value_of("first_k_dense_replace"), 1)
    hidden, heads = value_of("hidden_size"), value_of("num_attention_heads")
    if widths and isinstance(hidden, int) and isinstance(heads, int) and hidden > _HIDDEN:
        changes |= {"hidden_size": _HIDDEN, "num_attention_heads": math.gcd(heads, _HEADS)}
        groups = value_of("num_key_value_heads")
        if isinstance(groups, int):
            changes["num_key_value_heads"] = math.gcd(groups, changes["num_attention_heads"])
        if value_of("head_dim") is not None:
            latent = value_of("qk_rope_head_dim") is not None
            changes["head_dim"] = _PART_OF_HEAD if latent else _HIDDEN // changes["num_attention_heads"]
        for name, most in _AT_MOST.items():
            if isinstance(value_of(name), int):
                changes[name] = min(value_of(name), most)
    text.update({names.get(name, name): value for name, value in changes.items()})
    try:
        made: PretrainedConfig = type(config).from_dict(fields)
    except Exception:  # as in _twin
        return None
    made._name_or_path = config._name_or_path  # where code that comes with the model is
    return made


def _each_kind(kinds: list[Any]) -> list[Any]:
    """The shortest beginning of a list that holds each of its values, and two at least."""
    return kinds[: max(_LAYERS, 1 + max(kinds.index(kind) for kind in kinds))]
