"""The teacher, loaded and found fit: its tokenizer, vocabulary, length and head, and that no document sees
another.

Shapes: B rows, L positions of a row, H hidden, V rows of the head's weight.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsekd.kernels.objective import HeadTransform
from sparsekd.logit_store.reader import LogitStore
from sparsekd.trainer.causal_lm import (
    DTYPES,
    ModelSource,
    check_head,
    decoder_and_head,
    dense_logits,
    head_transform,
    hidden_states,
    load_causal_lm,
    load_config,
)
from sparsekd.trainer.config import TeacherConfig
from sparsekd.trainer.errors import ModelError
from sparsekd.trainer.tokenizers import check_tokenizer

# Positions of the probe: enough for several documents' worth of attention, few beside a forward pass.
PROBE_POSITIONS = 64

# Relative norms. The two probes have equal shapes, so what is left is the noise of kernels that choose their
# order of sums at run time (0 in every model that was tried on the CPU). Where documents do see each other,
# random weights of width 32 gave from 5e-3 (Bloom) to 0.7 (RWKV).
ISOLATION_BOUNDS = {torch.bfloat16: 3e-3, torch.float32: 1e-4}


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


def model_source(config: TeacherConfig, path: str) -> ModelSource:
    """Where the teacher comes from."""
    return ModelSource(
        path=path,
        revision=config.revision,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )


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
    model = load_causal_lm(model_source(config, path), "teacher", dtype=DTYPES[config.dtype])
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
    length = store.manifest.sequence_length
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and longest < length:
        raise ModelError(
            f"The teacher {path} takes at most {longest:,} positions, but the rows of {store.path} have "
            f"{length:,}: prepare again with corpus.sequence_length={longest}."
        )
    teacher = Teacher(
        decoder=decoder,
        head=head,
        transform=head_transform(model.config, vocabulary_size),
        device=device,
        revision=getattr(model.config, "_commit_hash", None) or config.revision,
    )
    probe(model, teacher, store)
    return teacher


def check_teacher_tokenizer(config: TeacherConfig, path: str, store: LogitStore) -> bool:
    """Compares the teacher's own tokenizer with the store's; False where it brings none.

    Raises:
        ModelError: The teacher cannot be found, or its tokenizer is another.
    """
    source = model_source(config, path)
    load_config(source, "teacher")  # a wrong path is no problem of the tokenizer
    remedy = f"prepare the text again with corpus.tokenizer={path}, or use the teacher of that tokenizer"
    return check_tokenizer(
        source,
        "teacher.path",
        store_tokenizer=store.tokenizer_path,
        identity=store.manifest.tokenizer,
        remedy=remedy,
    )


@torch.no_grad()
def probe(model: PreTrainedModel, teacher: Teacher, store: LogitStore) -> None:
    """Runs two small rows through the model and through our way, before any record is made.

    The first document of the second row is another than in the first; the second document is the same, so its
    hidden states must be the same as well.

    Raises:
        ModelError: Our logits are not the model's own, or a document's hidden states depend on the document
            before it in the row.
    """
    split = next(name for name in store.manifest.splits if store.rows(name))
    length = min(PROBE_POSITIONS, store.manifest.sequence_length)
    border = max(1, length // 2)
    tokens = torch.from_numpy(store.read_row(split, 0).token_ids[:length]).long()
    other = tokens.clone()
    other[:border] = (tokens[:border] + 1) % teacher.transform.vocabulary_size
    token_ids = torch.stack([tokens, other]).to(teacher.device)
    positions = torch.cat([torch.arange(border), torch.arange(length - border)])
    position_ids = positions.expand(2, -1).to(teacher.device)
    hidden = hidden_states(teacher.decoder, token_ids, position_ids)
    own = model(input_ids=token_ids, position_ids=position_ids, use_cache=False).logits
    check_head(own, dense_logits(hidden, teacher.head, teacher.transform), "teacher")
    first, second = hidden[:, border:].float()
    deviation = float((first - second).norm() / first.norm().clamp_min(1e-30))
    bound = ISOLATION_BOUNDS[hidden.dtype]
    if not deviation <= bound:
        raise ModelError(
            f"In {type(model).__name__} a document in a packed row depends on the one before it (hidden "
            f"states differ by {deviation:.1e} in relative norm, at most {bound:.0e} is rounding): it does "
            "not read borders from position_ids; use teacher.attention=sdpa or eager, or another teacher."
        )
