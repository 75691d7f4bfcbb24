"""Text into ids together with the characters of which each was made.

transformers' tokenizers move the places of tokens in some vocabularies (without the space in front), and make
a control token of each spelling of one. Here both can be had: places as they are, and spellings that stay
text beside control tokens in one text, as a chat template writes them around what people wrote.

Shapes: N tokens of a text.
"""

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from sparsekd.trainer.run.errors import DataError

PRIVATE_USE = range(0xE000, 0xF900)
"""Characters that Unicode gives no meaning."""


class Placed(NamedTuple):
    """Tokens of a text.

    Attributes:
        token_ids: int32 [N].
        spans: int64 [N, 2]: first character, and the one behind the last.
    """

    token_ids: NDArray[np.int32]
    spans: NDArray[np.int64]


def unused_characters(text: str, count: int) -> str:
    """Private characters that do not stand in a text.

    Raises:
        DataError: It has all but a few of them.
    """
    taken = set(text)
    free = [chr(code) for code in PRIVATE_USE if chr(code) not in taken]
    if len(free) < count:
        raise DataError("A text holds every private character of Unicode; nothing can be marked in it.")
    return "".join(free[:count])


class OffsetTokenizer:
    """Encodes texts as a tokenizer does, without special tokens of its own around them.

    Args:
        tokenizer: A fast one.

    Raises:
        DataError: It is not fast, and does not say from where its tokens are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} is no fast tokenizer, and does not say which characters became "
                "which token, by which the loss is placed; give a folder with a tokenizer.json."
            )
        backend: Any = tokenizer
        self._description = json.loads(backend.backend_tokenizer.to_str())
        # What stands around a text, and what moves places.
        self._description |= {"post_processor": None, "truncation": None, "padding": None}
        self._tokenizer = Tokenizer.from_str(json.dumps(self._description))
        self._with_names: dict[str, tuple[Tokenizer, NDArray[np.int64], dict[str, str]]] = {}

    def encode(self, texts: list[str], *, split_special_tokens: bool) -> list[Placed]:
        """Tokens of each text; `split_special_tokens` keeps spellings of special tokens text."""
        self._tokenizer.encode_special_tokens = split_special_tokens
        return [
            Placed(
                np.asarray(found.ids, np.int32),
                np.asarray(found.offsets, np.int64).reshape(-1, 2),
            )
            for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ]

    def encode_with_controls(
        self, text: str, controls: list[tuple[int, int]], spellings: frozenset[str]
    ) -> Placed:
        """Tokens of a text in which a spelling is a control token only where that is said.

        For that the control tokens get private names, in a copy of the tokenizer and in the text.

        Args:
            text: The text.
            controls: First character of each control token and the one behind its last, in order.
            spellings: Those of all control tokens.

        Raises:
            DataError: The tokenizer makes a control token of plain text.
        """
        marks = unused_characters(text, 2)
        if marks not in self._with_names:
            self._with_names.clear()  # each is a whole tokenizer; nearly all texts leave the same free
            self._with_names[marks] = self._renamed(marks, spellings)
        tokenizer, original, names = self._with_names[marks]
        pieces: list[str] = []
        places: list[NDArray[np.int64]] = []
        begin = 0
        for start, stop in [*controls, (len(text), len(text))]:
            pieces.append(text[begin:start])
            places.append(np.arange(begin, start))
            name = names.get(text[start:stop], "")
            pieces.append(name)
            # Any character of the name stands for the beginning of the token.
            places.append(np.full(len(name), start))
            begin = stop
        where = np.concatenate([*places, np.array([len(text)])])
        encoded = tokenizer.encode("".join(pieces), add_special_tokens=False)
        ids = original[np.asarray(encoded.ids, np.int64)].astype(np.int32)
        offsets = np.asarray(encoded.offsets, np.int64).reshape(-1, 2)
        spans = np.column_stack([where[offsets[:, 0]], where[offsets[:, 1]]])
        of = {token["content"]: token["id"] for token in self._description["added_tokens"]}
        wanted = [of[text[start:stop]] for start, stop in controls]
        if ids[np.isin(ids, [of[spelling] for spelling in spellings])].tolist() != wanted:
            raise DataError("the tokenizer makes a control token of plain text that spells it")
        return Placed(ids, spans)

    def _renamed(
        self, marks: str, spellings: frozenset[str]
    ) -> tuple[Tokenizer, NDArray[np.int64], dict[str, str]]:
        """A copy with other spellings, the id here for each id there, and the name of each spelling."""
        names: dict[str, str] = {}
        added = []
        for token in self._description["added_tokens"]:
            if token["content"] in spellings:
                names[token["content"]] = f"{marks[0]}{token['id']}{marks[1]}"
                token = token | {"content": names[token["content"]]}
            added.append(token)
        renamed = Tokenizer.from_str(json.dumps(self._description | {"added_tokens": added}))
        original = np.arange(renamed.get_vocab_size(with_added_tokens=True) + len(added) + 1)
        for before, after in zip(self._description["added_tokens"], added, strict=True):
            original[renamed.token_to_id(after["content"])] = before["id"]
        return renamed, original, names


def within(placed: Placed, spans: list[tuple[int, int]]) -> tuple[NDArray[np.bool_], int]:
    """Which tokens lie in parts of a text.

    Args:
        placed: The tokens.
        spans: First character of each part and the one behind its last, in order, without overlap.

    Returns:
        bool [N], and how many tokens lie across the beginning or end of a part; these are not in it.
    """
    first, last = placed.spans[:, 0], placed.spans[:, 1]
    inside = np.zeros(len(first), np.bool_)
    across = np.zeros(len(first), np.bool_)
    for start, stop in spans:
        inside |= (first >= start) & (last <= stop) & (first < stop)
        across |= (first < start) & (last > start)
        across |= (first < stop) & (last > stop)
    return inside & ~across, int(np.count_nonzero(across))
