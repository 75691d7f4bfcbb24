"""A model's folder as plain transformers takes it: written, loaded again, and compared with what went in.

`export` writes trained models so, and `train` a tiny twin of the one that it is about to train (`twin`): what
cannot be exported is found while there is nothing yet to lose.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparsekd.logit_store.errors import first_line
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.row import segment_lengths
from sparsekd.trainer.models.causal_lm import ModelSource
from sparsekd.trainer.models.tokenizers import tokenizer_difference
from sparsekd.trainer.run.errors import ModelError

# Relative difference of logits that is still the same model; bit for bit is what is seen.
TOLERANCE = 1e-6

_PROBE_TOKENS = 64
_PROBE_ROWS = 4  # of each split, whose text the exported tokenizer must cut as the store's does
_TEXT_TOKENS = 2048  # of one row
_TOKENIZER_CONFIG = "tokenizer_config.json"
# As transformers names the class that takes tokenizer.json as it is, in version 5 and before.
_AS_IT_STANDS = "PreTrainedTokenizerFast"

# Fields of generation_config.json that generate reads only while it samples, or with beams, and the value
# beside None that says nothing.
_OF_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_OF_BEAMS = {"early_stopping": False, "length_penalty": 1.0}


def write_model(model: PreTrainedModel, source: ModelSource, store: LogitStore, folder: Path) -> list[str]:
    """Writes weights (safetensors), configuration, generation defaults, code, and the store's tokenizer.

    Args:
        model: The model; its generation defaults are set here.
        source: Where its configuration came from.
        store: Whose tokenizer goes with it.
        folder: A folder that is not there yet.

    Returns:
        What to tell of it, a sentence each.

    Raises:
        ModelError: transformers would take another tokenizer from the folder, or refuses to write the model.
    """
    remarks = _set_generation_defaults(model, source, store)
    # The tokenizer first: where a tokenizer's folder came with a model's config.json, ours must win.
    shutil.copytree(store.tokenizer_path, folder)
    try:
        model.save_pretrained(folder)
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the model
        raise ModelError(
            f"transformers does not write a {type(model).__name__} ({first_line(error)}), so the student "
            "cannot be exported; choose another model."
        ) from error
    _write_tokenizer_class(model.config, source, store, folder)
    code = sorted(path.name for path in folder.glob("*.py"))
    if code:
        remarks.append(
            f"code that the model comes with is copied ({', '.join(code)}): load the folder with "
            "trust_remote_code=True."
        )
    return remarks


def reload_difference(model: PreTrainedModel, source: ModelSource, store: LogitStore, folder: Path) -> float:
    """Relative difference of the logits of a model in memory and of the same one loaded from a folder.

    Raises:
        ModelError: The folder does not load, or the loaded model has another dtype, or lost the tie of
            embedding and head.
    """
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            attn_implementation=model.config._attn_implementation,
            trust_remote_code=source.trust_remote_code,
        ).eval()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"The exported {type(model).__name__} cannot be loaded again ({first_line(error)}); report the "
            "model type."
        ) from error
    for name, found, wanted in (
        ("dtype", loaded.dtype, model.dtype),
        ("tied weights", _is_tied(loaded), _is_tied(model)),
    ):
        if found != wanted:
            raise ModelError(
                f"The exported {type(model).__name__} comes back with {name} {found}, expected {wanted}; "
                "report the model type."
            )
    token_ids = _probe(store)
    with torch.inference_mode():
        ours, theirs = (
            each(input_ids=token_ids, use_cache=False).logits.double() for each in (model, loaded)
        )
    return float((ours - theirs).norm() / ours.norm().clamp_min(1e-30))


def _is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _probe(store: LogitStore) -> Tensor:
    """Token ids of the beginning of a row, int64 [1, L]."""
    split = "heldout" if store.rows("heldout") else "train"
    row = store.read_row(split, 0)
    first = min(int(segment_lengths(row)[0]), _PROBE_TOKENS)
    return torch.from_numpy(row.token_ids[:first].astype("int64"))[None]


def _set_generation_defaults(model: PreTrainedModel, source: ModelSource, store: LogitStore) -> list[str]:
    """A pretrained student's own defaults where there are any, and the tokenizer's special tokens."""
    own = None
    if source.path is not None:
        # Most models have such a file; for those that do not, the model's configuration speaks.
        with contextlib.suppress(OSError):
            own = GenerationConfig.from_pretrained(source.path, revision=source.revision or "main")
    found = own or GenerationConfig.from_model_config(model.config)
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    end = store.manifest.tokenizer.eos_token_id
    if found.eos_token_id is None:
        found.eos_token_id = end
    if found.bos_token_id is None:
        found.bos_token_id = tokenizer.bos_token_id
    if found.pad_token_id is None:
        found.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    model.generation_config = found
    # transformers reads such a file, generates without these fields, and refuses to write it.
    ineffective = {
        **({} if found.do_sample is True else _OF_SAMPLING),
        **({} if (found.num_beams or 1) > 1 else _OF_BEAMS),
    }
    dropped = []
    for name, neutral in ineffective.items():
        value = getattr(found, name, None)
        if value is not None and value != neutral:
            dropped.append(f"{name}={value}")
            setattr(found, name, None)
    if not dropped:
        return []
    return [
        f"{', '.join(dropped)} of the model's generation_config.json left out: without do_sample=true or "
        "num_beams > 1 beside it, generate does not read it."
    ]


def _write_tokenizer_class(
    config: PretrainedConfig, source: ModelSource, store: LogitStore, folder: Path
) -> None:
    """Sees to it that transformers takes the store's tokenizer from the folder, and not the model type's own.

    For some model types its AutoTokenizer prefers the class of config.json's `model_type` to what
    tokenizer_config.json says or leaves out, and that class keeps the vocabulary alone.
    """
    stored = AutoTokenizer.from_pretrained(store.tokenizer_path)
    texts = _texts(store, stored)
    problem = _tokenizer_problem(folder, source, stored, texts)
    if problem is not None and stored.is_fast:
        place = folder / _TOKENIZER_CONFIG
        settings: dict[str, Any] = json.loads(place.read_text("utf-8")) if place.is_file() else {}
        place.write_text(
            json.dumps({**settings, "tokenizer_class": _AS_IT_STANDS}, indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        problem = _tokenizer_problem(folder, source, stored, texts)
    if problem is not None:
        raise ModelError(
            f"A student of model type {config.model_type} cannot be exported with the store's tokenizer "
            f"({store.manifest.tokenizer.name}): transformers takes another one from its folder, whatever "
            f"tokenizer_config.json says ({problem}). Choose a model type that comes without a tokenizer of "
            "its own, such as llama or qwen3, or prepare the text with a tokenizer of this type "
            "(corpus.tokenizer=...)."
        )


def _tokenizer_problem(
    folder: Path, source: ModelSource, stored: PreTrainedTokenizerBase, texts: list[str]
) -> str | None:
    """How the tokenizer that transformers takes from a folder differs from the store's, in words."""
    try:
        own = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        return f"its files do not load: {first_line(error)}"
    name = type(own).__name__
    difference = tokenizer_difference(own, stored)
    if difference is not None:
        return f"a {name}: {difference}"
    for text in texts:
        ours, theirs = (item(text, verbose=False)["input_ids"] for item in (own, stored))
        if ours != theirs:
            return f"a {name}: it cuts text of the store into other ids"
    return None


def _texts(store: LogitStore, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Some of the store's text, as its own tokenizer writes it."""
    rows = [
        store.read_row(split, row).token_ids[:_TEXT_TOKENS]
        for split in store.manifest.splits
        for row in range(min(_PROBE_ROWS, store.rows(split)))
    ]
    return [str(tokenizer.decode(ids.tolist())) for ids in rows]
