"""Whether a model's own tokenizer is the one that made a store's ids: by content, not by name.

What counts is what decides the ids: the vocabulary with its added tokens and, for tokenizers with a
`tokenizer.json`, its normaliser, pre-tokeniser and model (merges). Special roles, chat templates, padding and
the names of files do not.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from sparsekd.logit_store.manifest import TokenizerIdentity
from sparsekd.trainer.models.causal_lm import ModelSource
from sparsekd.trainer.run.errors import ModelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
TEXT_TO_IDS = ("normalizer", "pre_tokenizer", "model")


def check_tokenizer(
    source: ModelSource, *, store_tokenizer: Path, identity: TokenizerIdentity, remedy: str
) -> bool:
    """Refuses a model whose own tokenizer is not the store's.

    Args:
        source: The model's folder or hub name.
        store_tokenizer: The tokenizer folder of the store whose ids the model will see or predict.
        identity: The same tokenizer in the store's manifest.
        remedy: What to do when they differ, the end of the sentence.

    Returns:
        False where the model brings no tokenizer, so that there is nothing to compare.

    Raises:
        ModelError: The same id is another token, text is cut differently, or a tokenizer cannot be loaded.
    """
    assert source.path is not None
    if not _has_tokenizer(source.path, source.revision):
        return False
    try:
        own = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        stored = AutoTokenizer.from_pretrained(str(store_tokenizer))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"The tokenizer of {source.named} cannot be loaded ({error}), so it cannot be compared with "
            f"the store's ({identity.name}); mend or remove its files."
        ) from error
    difference = tokenizer_difference(own, stored)
    if difference is not None:
        raise ModelError(
            f"The tokenizer of {source.named} is not the store's ({identity.name}): {difference}; {remedy}."
        )
    return True


def tokenizer_difference(own: Any, stored: Any) -> str | None:
    """How two tokenizers of transformers differ, in words; None where they do not."""
    own_tokens, stored_tokens = (
        {index: token for token, index in item.get_vocab().items()} for item in (own, stored)
    )
    if own_tokens != stored_tokens:
        first = min(
            index
            for index in own_tokens.keys() | stored_tokens.keys()
            if own_tokens.get(index) != stored_tokens.get(index)
        )
        return (
            f"it has {len(own_tokens):,} entries and the store's {len(stored_tokens):,}, and id {first} is "
            f"{own_tokens.get(first)!r} in it and {stored_tokens.get(first)!r} in the store's"
        )
    if not (own.is_fast and stored.is_fast):  # tokenizers written in Python have no such description
        return None
    ours, theirs = (json.loads(item.backend_tokenizer.to_str()) for item in (own, stored))
    differing = [part for part in TEXT_TO_IDS if ours[part] != theirs[part]]
    return (
        f"it has the same ids, but cuts text differently (its {' and '.join(differing)})"
        if differing
        else None
    )


def _has_tokenizer(path: str, revision: str | None) -> bool:
    if Path(path).is_dir():
        return any(Path(path, name).is_file() for name in TOKENIZER_FILES)
    quiet: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    return any(cached_file(path, name, revision=revision, **quiet) is not None for name in TOKENIZER_FILES)
