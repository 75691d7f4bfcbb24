"""The teacher, loaded and found fit: its tokenizer, vocabulary, length and head, and that no document sees
another.
"""

import torch

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.models.causal_lm import load_config
from sparsekd.trainer.models.opened import OpenModel, open_model
from sparsekd.trainer.models.source import teacher_source
from sparsekd.trainer.models.tokenizers import check_tokenizer


def load_teacher(config: TeacherConfig, path: str, store: LogitStore, device: torch.device) -> OpenModel:
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
    return open_model(
        teacher_source(config, path),
        "teacher",
        store,
        dtype=config.dtype,
        device=device,
        remedy=_remedy(path),
    )


def check_teacher_tokenizer(config: TeacherConfig, path: str, store: LogitStore) -> bool:
    """Compares the teacher's own tokenizer with the store's; False where it brings none.

    Raises:
        ModelError: The teacher cannot be found, or its tokenizer is another.
    """
    source = teacher_source(config, path)
    load_config(source, "teacher")  # a wrong path is no problem of the tokenizer
    return check_tokenizer(
        source,
        store_tokenizer=store.tokenizer_path,
        identity=store.manifest.tokenizer,
        remedy=_remedy(path),
    )


def _remedy(path: str) -> str:
    return f"prepare the text again with corpus.tokenizer={path}, or use the teacher of that tokenizer"
