"""Whether a model's own tokenizer is the one that made a store's ids: by content, not by name.

What counts is what decides the ids: the vocabulary with its added tokens and, for tokenizers with a
`tokenizer.json`, its normaliser, pre-tokeniser and model (merges). Special roles, chat templates, padding and
the names of files do not. Files are compared as they are first: for some model types transformers takes the
type's own class, whatever the files say, and makes another tokenizer of the same bytes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.data.used_ids import UsedIds
from sparsekd.trainer.models.causal_lm import ModelSource
from sparsekd.trainer.models.gguf_file import gguf_place, gguf_tokens
from sparsekd.trainer.run.errors import ModelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
TEXT_TO_IDS = ("normalizer", "pre_tokenizer", "model")


def check_tokenizer(source: ModelSource, *, store: LogitStore, used: UsedIds, remedy: str) -> bool:
    """Refuses a model whose own tokenizer is not the store's, as far as the store's text goes.

    Args:
        source: The model's folder or hub name.
        store: The store whose ids the model will see or predict.
        used: Which ids its text has.
        remedy: What to do when they differ, the end of the sentence.

    Returns:
        False where the model brings no tokenizer, so that there is nothing to compare.

    Raises:
        ModelError: An id of the text is another token, text is cut differently, or a tokenizer cannot be
            loaded.
    """
    assert source.path is not None
    if source.gguf_file is not None:
        return _check_gguf(source, source.gguf_file, store=store, used=used, remedy=remedy)
    if not _has_tokenizer(source.path, source.revision):
        return False
    name = store.manifest.tokenizer.name
    files = [
        _file(place) for place in (_found(source.path, source.revision, _FAST), store.tokenizer_path / _FAST)
    ]
    if all(files) and _difference(files[0], files[1], used) is None:
        return True
    try:
        own = AutoTokenizer.from_pretrained(source.path, **source.files)
        stored = AutoTokenizer.from_pretrained(str(store.tokenizer_path))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"The tokenizer of {source.named} cannot be loaded ({error}), so it cannot be compared with "
            f"the store's ({name}); mend or remove its files."
        ) from error
    difference = _difference(_description(own), _description(stored), used)
    if difference is not None:
        raise _other(source, store, difference, remedy)
    return True


def _check_gguf(source: ModelSource, file: str, *, store: LogitStore, used: UsedIds, remedy: str) -> bool:
    """The same of a GGUF file, whose tokens are compared; how it cuts text is not said in words of files."""
    assert source.path is not None
    tokens = gguf_tokens(gguf_place(source.path, file, source.revision), source.named)
    if not tokens:
        return False
    stored = AutoTokenizer.from_pretrained(str(store.tokenizer_path))
    difference = _difference(_Description(tokens, None), _description(stored), used)
    if difference is not None:
        raise _other(source, store, difference, remedy)
    return True


def _other(source: ModelSource, store: LogitStore, difference: str, remedy: str) -> ModelError:
    return ModelError(
        f"The tokenizer of {source.named} is not the store's ({store.manifest.tokenizer.name}): "
        f"{difference}; {remedy}."
    )


def tokenizer_difference(own: Any, stored: Any) -> str | None:
    """How two tokenizers of transformers differ, in words; None where they do not."""
    return _difference(_description(own), _description(stored), None)


_FAST = "tokenizer.json"


@dataclass(frozen=True)
class _Description:
    """What decides the ids.

    Attributes:
        tokens: By id.
        parts: Those of TEXT_TO_IDS; None for a tokenizer written in Python, which has no such description.
    """

    tokens: dict[int, str]
    parts: dict[str, Any] | None


def _description(tokenizer: Any) -> _Description:
    """Of a tokenizer of transformers."""
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    return _Description(
        tokens, _parts(json.loads(tokenizer.backend_tokenizer.to_str())) if tokenizer.is_fast else None
    )


def _file(place: Path | None) -> _Description | None:
    """Of a `tokenizer.json` as it stands; None where there is none that can be read."""
    if place is None or not place.is_file():
        return None
    try:
        content = json.loads(place.read_text("utf-8"))
        vocabulary = content["model"]["vocab"]
        tokens = (
            {index: entry[0] for index, entry in enumerate(vocabulary)}
            if isinstance(vocabulary, list)
            else {index: token for token, index in vocabulary.items()}
        )
        tokens |= {entry["id"]: entry["content"] for entry in content["added_tokens"]}
        return _Description(tokens, _parts(content))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None  # transformers says what is wrong with it


def _parts(content: dict[str, Any]) -> dict[str, Any]:
    parts = {part: content[part] for part in TEXT_TO_IDS}
    merges = parts["model"].get("merges")
    if merges:  # of older files a pair is one text
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
        parts["model"] = {**parts["model"], "merges": pairs}
    return parts


def _difference(own: _Description | None, stored: _Description | None, used: UsedIds | None) -> str | None:
    """How they differ where it matters, in words; ids that the text does not have may differ.

    Args:
        own: The model's.
        stored: The store's.
        used: The ids of the store's text; None where all matter.
    """
    assert own is not None and stored is not None
    differing = sorted(
        index
        for index in own.tokens.keys() | stored.tokens.keys()
        if own.tokens.get(index) != stored.tokens.get(index)
    )
    if differing:
        found = None if used is None else used.first(differing)
        if used is None or found is not None:
            first = differing[0] if found is None else found.token_id
            where = "" if found is None else f" ({found.place})"
            return (
                f"it has {len(own.tokens):,} entries and the store's {len(stored.tokens):,}, and id {first} "
                f"is {own.tokens.get(first)!r} in it and {stored.tokens.get(first)!r} in the store's{where}"
            )
    if own.parts is None or stored.parts is None:
        return None
    left_out = set(differing)
    ours, theirs = (_without(each.parts, left_out) for each in (own, stored))
    parts = [part for part in TEXT_TO_IDS if ours[part] != theirs[part]]
    return f"it has the same ids, but cuts text differently (its {' and '.join(parts)})" if parts else None


def _without(parts: dict[str, Any] | None, left_out: set[int]) -> dict[str, Any]:
    """The parts, their vocabulary without some ids."""
    assert parts is not None
    vocabulary = parts["model"].get("vocab")
    if not left_out or vocabulary is None:
        return parts
    kept: Any
    if isinstance(vocabulary, list):
        kept = [entry for index, entry in enumerate(vocabulary) if index not in left_out]
    else:
        kept = {token: index for token, index in vocabulary.items() if index not in left_out}
    return {**parts, "model": {**parts["model"], "vocab": kept}}


def _has_tokenizer(path: str, revision: str | None) -> bool:
    return any(_found(path, revision, name) is not None for name in TOKENIZER_FILES)


def _found(path: str, revision: str | None, name: str) -> Path | None:
    """A file of a model's folder, or of a hub model; None where it has none."""
    if Path(path).is_dir():
        place = Path(path, name)
        return place if place.is_file() else None
    quiet: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    found = cached_file(path, name, revision=revision, **quiet)
    return None if found is None else Path(found)
