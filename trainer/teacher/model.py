"""The teacher, loaded and found fit: its tokenizer, vocabulary, length and head, and that no document sees
another.
"""

import torch

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.data.used_ids import UsedIds
from sparsekd.trainer.models.causal_lm import load_config
from sparsekd.trainer.models.opened import OpenModel, open_model
from sparsekd.trainer.models.source import teacher_source
from sparsekd.trainer.models.tokenizers import check_tokenizer


def load_teacher(
    config: TeacherConfig,
    path: str,
    store: LogitStore,
    device: torch.device,
    *,
    used: UsedIds | None = None,
    vocabulary_size: int | None = None,
) -> OpenModel:
    """Loads the teacher and checks that it fits the store's tokens.

    Args:
        config: The teacher's settings.
        path: Its folder or hub name.
        store: A sealed store with the tokens that it will see.
        device: Where it goes.
        used: Which ids the text has, where that was asked before.
        vocabulary_size: Over how many ids its distribution is to be; None for as many as it and the store
            have.

    Raises:
        ModelError: It cannot be loaded, has another or a larger vocabulary, is too short for the rows, or the
            probe shows that its logits or its attention are not what they must be.
    """
    return open_model(
        teacher_source(config, path),
        "teacher",
        store,
        dtype=config.dtype,
        device=device,
        used=used,
        vocabulary_size=vocabulary_size,
        remedy="prepare the text so that it has no such id (corpus.end_token, "
        "corpus.split_special_tokens), or give the model the missing entries (transformers' "
        "resize_token_embeddings)",
    )


def check_teacher_tokenizer(
    config: TeacherConfig, path: str, store: LogitStore, *, used: UsedIds | None = None
) -> bool:
    """Compares the teacher's own tokenizer with the store's; False where it brings none.

    Raises:
        ModelError: The teacher cannot be found, or its tokenizer is another.
    """
    source = teacher_source(config, path)
    load_config(source, "teacher")  # a wrong path is no problem of the tokenizer
    return check_tokenizer(
        source,
        store=store,
        used=used or UsedIds(store),
        remedy=f"prepare the text again with corpus.tokenizer={path}, or use the teacher of that tokenizer",
    )
