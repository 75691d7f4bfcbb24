"""A model opened for use: loaded, cut at its head, found fit for a store's tokens, and proved by a probe.

The one way for a teacher, for models that are judged and for those that write. A student is built by its
engine and passes the same checks there (`check_fit` before, `probe.check_probe` after).
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sparsekd.kernels.objective import HeadTransform
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.data.used_ids import UsedIds
from sparsekd.trainer.models.causal_lm import (
    DTYPES,
    ModelSource,
    decoder_and_head,
    dense_logits,
    head_transform,
    hidden_states,
    load_causal_lm,
    load_config,
    model_arguments,
)
from sparsekd.trainer.models.placement import check_head_part
from sparsekd.trainer.models.probe import check_probe, probe_rows, watched_parts
from sparsekd.trainer.run.errors import ModelError


class OpenModel(NamedTuple):
    """A frozen causal language model, cut at its head.

    Attributes:
        model: The whole of it.
        decoder: Token ids -> hidden states.
        head: The linear head; its weight is [V, H].
        transform: From the head's product to the model's own logits, over the true vocabulary.
        saved_dtype: In which its weights are saved, where its configuration says so.
    """

    model: PreTrainedModel
    decoder: nn.Module
    head: nn.Linear
    transform: HeadTransform
    saved_dtype: torch.dtype | None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.head.weight.device

    @property
    def commit(self) -> str | None:
        """Of a hub model, where it is known."""
        return getattr(self.model.config, "_commit_hash", None)

    @property
    def weight_bytes(self) -> int:
        """Of its weights in the dtype in which they are saved."""
        return self.model.num_parameters() * (self.saved_dtype or torch.float32).itemsize


def open_model(
    source: ModelSource,
    key: str,
    store: LogitStore,
    *,
    dtype: str,
    device: torch.device,
    used: UsedIds | None = None,
    vocabulary_size: int | None = None,
    compared: bool = False,
    remedy: str = "name a model that has all of these ids",
) -> OpenModel:
    """Loads a model, checks that it fits a store, and that our logits are its own.

    Args:
        source: Where it comes from.
        key: The configuration group with its settings ("teacher" or "student"), for messages.
        store: With the tokens that it will see.
        dtype: Of its weights, one of DTYPES.
        device: Where it goes.
        used: Which ids the store's text has, where that was asked before.
        vocabulary_size: Take its distribution over so many ids only; None over all that it and the store
            have.
        compared: Whether its distribution is compared with the store's records, or with other models'.
        remedy: What to do where its vocabulary is too small, the end of the sentence.

    Raises:
        ModelError: It cannot be loaded, its vocabulary or its length is too small, or the probe shows that
            its logits or its attention are not what they must be.
    """
    # Of the model in memory it is the dtype that was asked for.
    saved = getattr(load_config(source, key), "dtype", None)
    model = load_causal_lm(source, key, dtype=DTYPES[dtype], device=device)
    model.eval().requires_grad_(False)
    decoder, head = decoder_and_head(model)
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    vocabulary = check_fit(
        model.config,
        entries=min(head.weight.shape[0], embeddings.shape[0]),
        used=used or UsedIds(store),
        wanted=vocabulary_size,
        compared=compared,
        name=source.named,
        remedy=remedy,
    )
    check_head_part(head, vocabulary, source.named)
    opened = OpenModel(
        model,
        decoder,
        head,
        head_transform(model.config, vocabulary),
        saved if isinstance(saved, torch.dtype) else None,
    )
    prove(model, opened.transform, store, key=source.setting.removesuffix(".path"))
    return opened


@torch.no_grad()
def prove(
    model: PreTrainedModel,
    transform: HeadTransform,
    store: LogitStore,
    *,
    key: str,
    packed: bool | None = None,
) -> None:
    """Checks that our logits are a model's own, and that a document's depend on nothing else.

    Args:
        model: In evaluation mode.
        transform: From its head's product to its logits.
        store: With rows such as the model sees.
        key: The configuration group or key of the model, for messages.
        packed: Whether documents share rows; None: as they do in the store.

    Raises:
        ModelError: It is not so.
    """
    decoder, head = decoder_and_head(model)
    rows = probe_rows(store, head.weight.device, transform.vocabulary_size, packed=packed)
    own = model(**model_arguments(model, rows.token_ids, rows.position_ids)).logits
    own = own.reshape(*rows.token_ids.shape, -1)
    with watched_parts(model, rows) as parts:
        hidden = hidden_states(decoder, rows.token_ids, rows.position_ids)
    ours = dense_logits(hidden, head, transform)
    check_probe(own, ours, parts, rows, key=key, model_name=type(model).__name__)


def check_fit(
    config: PretrainedConfig,
    *,
    entries: int,
    used: UsedIds,
    name: str,
    remedy: str,
    compared: bool,
    wanted: int | None = None,
) -> int:
    """Checks that a model knows every id of a store's text, and takes rows as long as its.

    A vocabulary padded beyond the tokenizer's is normal: whoever reads the logits leaves the padding out. So
    are tokens that a tokenizer has and the model has not, where the text has them nowhere (Gemma 3: 262,145
    and 262,144).

    Args:
        config: The model's configuration.
        entries: Of its vocabulary.
        used: The ids of the store's text.
        name: How the model is named in messages, such as "student.path=models/small".
        remedy: What to do where its vocabulary is too small, the end of the sentence.
        compared: Whether its distribution is compared with another over the store's vocabulary: then it must
            have all of that.
        wanted: Over how many ids its distribution is to be; None for as many as it and the store have.

    Returns:
        Over how many ids, from 0 on, its distribution is: its true vocabulary.

    Raises:
        ModelError: It lacks an id of the text or, where it is compared, of the vocabulary, or takes fewer
            positions.
    """
    store = used.store
    tokenizer, length = store.manifest.tokenizer, store.manifest.sequence_length
    size = min(tokenizer.vocabulary_size, entries, wanted or entries)
    found = used.first(range(size, tokenizer.vocabulary_size))
    if found is not None:
        asked = "" if size == entries else f", of which store.vocabulary_size takes {size:,}"
        raise ModelError(
            f"{name} has {entries:,} vocabulary entries{asked}, but of the {tokenizer.vocabulary_size:,} ids "
            f"of {tokenizer.name} the text of {store.path} has {found.token_id} ({found.place}); {remedy}."
        )
    if compared and size < tokenizer.vocabulary_size:
        raise ModelError(
            f"{name} has {entries:,} vocabulary entries, but what it is compared with in {store.path} speaks "
            f"of {tokenizer.vocabulary_size:,} ids; the text has no other than these {entries:,}, so capture "
            f"again with store.vocabulary_size={entries}, or {remedy}."
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and longest < length:
        raise ModelError(
            f"{name} takes at most {longest:,} positions, but the rows of {store.path} have {length:,}; "
            f"use a longer model, or prepare again with corpus.sequence_length={longest}."
        )
    return size
