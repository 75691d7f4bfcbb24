"""The tokenizer of a corpus: loaded as it is, or a byte-level BPE trained on the training split.

It travels with the store in Hugging Face's form, so that capture, training, evaluation and the exported
student use the very same files.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsekd.logit_store.errors import first_line
from sparsekd.logit_store.json_text import canonical_json
from sparsekd.logit_store.manifest import TokenizerIdentity
from sparsekd.logit_store.places.tokenizer_folder import tokenizer_digest
from sparsekd.trainer.run.errors import DataError

END_OF_TEXT = "<|endoftext|>"

# What transformers notes about where a tokenizer was loaded from: different on each machine, read by nobody.
PLACE_FIELDS = ("is_local", "local_files_only", "name_or_path")


def load_tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or hub name.

    Raises:
        DataError: It cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"corpus.tokenizer={source} cannot be loaded as a tokenizer ({first_line(error)}); give the "
            "teacher's folder or hub name, or train one with corpus.train_vocabulary_size."
        ) from error
    return tokenizer


def end_token_id(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> int:
    """The id of the token that closes documents.

    Args:
        tokenizer: As `load_tokenizer` gives it.
        wanted: The token's text, or its id in digits; None for the tokenizer's own end-of-text token. That of
            a tokenizer for conversations is often the end of a turn.

    Raises:
        DataError: There is no such token.
    """
    if wanted is None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "The tokenizer has no end-of-text token, with which documents are closed; name one of its "
                "tokens by corpus.end_token."
            )
        return int(tokenizer.eos_token_id)
    by_text = tokenizer.get_vocab()
    found = int(wanted) if wanted.isdecimal() else by_text.get(wanted)
    if found is None or found not in by_text.values():
        near = difflib.get_close_matches(wanted, tokenizer.all_special_tokens, n=1, cutoff=0)
        hint = f", such as {near[0]}" if near else ""
        raise DataError(
            f"corpus.end_token={wanted} is no token of the tokenizer; give the text of one{hint}, or its id."
        )
    return found


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE: every text can be written with it, and decoding gives the text back.

    Deterministic: the same texts in the same order give the same files, whatever the number of threads.

    Args:
        texts: Documents of the training split.
        vocabulary_size: Entries at most, the 256 bytes and the end-of-text token (id 0) among them; a small
            corpus runs out of pairs before.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer's files so that equal tokenizers give equal bytes, wherever they came from."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in PLACE_FIELDS:
        settings.pop(name, None)
    path.write_text(canonical_json(settings), encoding="ascii")


def tokenizer_identity(
    tokenizer: PreTrainedTokenizerBase, folder: Path, name: str, *, end: int | None = None
) -> TokenizerIdentity:
    """What the manifest says of a tokenizer whose files are in `folder`.

    The vocabulary size is one more than the largest id, added tokens included: len(tokenizer) for every
    tokenizer without holes in its ids.

    Args:
        tokenizer: As `load_tokenizer` gives it.
        folder: Where `save_tokenizer` has put it.
        name: For people.
        end: The token that closes documents; None for the tokenizer's own.
    """
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return TokenizerIdentity(
        name=name,
        vocabulary_size=max(tokenizer.get_vocab().values()) + 1,
        digest=tokenizer_digest(folder),
        chat_template_digest=None if template is None else hashlib.sha256(text.encode("utf-8")).hexdigest(),
        eos_token_id=tokenizer.eos_token_id if end is None else end,
    )


def special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """The special tokens that a tokenizer puts before and behind a text; None where that cannot be seen."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if bare and framed[start : start + len(bare)] == bare:
            before, behind = framed[:start], framed[start + len(bare) :]
            return np.asarray(before, dtype=np.int32), np.asarray(behind, dtype=np.int32)
    return None


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    split_special_tokens: bool = True,
    end: int | None = None,
) -> list[NDArray[np.int32]]:
    """Tokens of each document, closed by the end token; empty for a text that gives no token.

    A document begins as the tokenizer itself begins a text (with Llama's or Gemma's start token, say).

    Args:
        tokenizer: As `load_tokenizer` gives it.
        texts: The documents.
        split_special_tokens: Whether the name of a special token inside a text is text, which cannot end a
            document. Otherwise it is that token, and a start token that the text brings stands once.
        end: The token that closes documents; None for the tokenizer's own.

    Returns:
        int32 arrays, one for each text.
    """
    end = tokenizer.eos_token_id if end is None else end
    encoded = tokenizer(
        texts,
        add_special_tokens=True,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    bare = len(tokenizer("", add_special_tokens=True)["input_ids"])
    documents = []
    for ids in encoded:
        if len(ids) <= bare:
            documents.append(np.empty(0, dtype=np.int32))
            continue
        if not split_special_tokens and ids[:2] == [tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        closed = ids if ids[-1] == end else [*ids, end]
        documents.append(np.asarray(closed, dtype=np.int32))
    return documents
