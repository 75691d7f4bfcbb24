"""The teacher, loaded and found fit: its tokenizer, vocabulary, length and head, and that no document sees
another.

Shapes: B rows, L positions of a row, H hidden, V rows of the head's weight.
"""

from dataclasses import dataclass

import torch
from torch import nn

from sparsekd.kernels.objective import HeadTransform
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.models.causal_lm import (
    DTYPES,
    check_length,
    decoder_and_head,
    dense_logits,
    head_transform,
    hidden_states,
    load_causal_lm,
    load_config,
)
from sparsekd.trainer.models.probe import check_probe, probe_rows
from sparsekd.trainer.models.source import teacher_source
from sparsekd.trainer.models.tokenizers import check_tokenizer
from sparsekd.trainer.run.errors import ModelError


@dataclass(frozen=True)
class Teacher:
    """A frozen causal language model, cut at its head.

    Attributes:
        decoder: Token ids -> hidden states.
        head: The linear head; its weight is [V, H].
        transform: From the head's product to the model's own logits, over the true vocabulary.
        device: Where it is.
        revision: Commit of a hub model where it is known.
    """

    decoder: nn.Module
    head: nn.Linear
    transform: HeadTransform
    device: torch.device
    revision: str | None


def load_teacher(config: TeacherConfig, path: str, store: LogitStore, device: torch.device) -> Teacher:
    """Loads the teacher and checks that it fits the store's tokens.

    Args:
        config: The teacher's settings.
        path: Its folder or hub name.
        store: A sealed store with the tokens that it will see.
        device: Where it goes.

    Raises:
        ModelError: It cannot be loaded, has another or a larger vocabulary, is too short for the rows, or the
            probe shows that its logits or its attention are not what they must be.
    """
    model = load_causal_lm(teacher_source(config, path), "teacher", dtype=DTYPES[config.dtype])
    nn.Module.to(model, device)  # transformers' own annotation of .to hides its arguments
    model.eval().requires_grad_(False)
    decoder, head = decoder_and_head(model)
    vocabulary_size = store.manifest.tokenizer.vocabulary_size
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    embedded = min(head.weight.shape[0], embeddings.shape[0])
    if embedded < vocabulary_size:
        raise ModelError(
            f"The teacher {path} knows {embedded:,} token ids, but the tokenizer of {store.path} has "
            f"{vocabulary_size:,}: prepare the text again with corpus.tokenizer={path}, or use the teacher "
            "of that tokenizer."
        )
    check_length(model.config, store.manifest.sequence_length, f"teacher.path={path}", store.path)
    teacher = Teacher(
        decoder=decoder,
        head=head,
        transform=head_transform(model.config, vocabulary_size),
        device=device,
        revision=getattr(model.config, "_commit_hash", None) or config.revision,
    )
    with torch.no_grad():
        rows = probe_rows(store, device)
        own = model(input_ids=rows.token_ids, position_ids=rows.position_ids, use_cache=False).logits
        ours = dense_logits(
            hidden_states(decoder, rows.token_ids, rows.position_ids), head, teacher.transform
        )
    check_probe(own, ours, rows, key="teacher", model_name=type(model).__name__)
    return teacher


def check_teacher_tokenizer(config: TeacherConfig, path: str, store: LogitStore) -> bool:
    """Compares the teacher's own tokenizer with the store's; False where it brings none.

    Raises:
        ModelError: The teacher cannot be found, or its tokenizer is another.
    """
    source = teacher_source(config, path)
    load_config(source, "teacher")  # a wrong path is no problem of the tokenizer
    remedy = f"prepare the text again with corpus.tokenizer={path}, or use the teacher of that tokenizer"
    return check_tokenizer(
        source,
        "teacher.path",
        store_tokenizer=store.tokenizer_path,
        identity=store.manifest.tokenizer,
        remedy=remedy,
    )
