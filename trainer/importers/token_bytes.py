"""From the tokens of an API's answer to ids: exact bytes or ids, never a guess by likeness.

Servers name a token by what it spells. That is an id only where the student's tokenizer has one token of
exactly these bytes, and the teacher cuts text as it does; nothing here can prove the latter, and
`store verify` compares records with tokens afterwards.
"""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsekd.logit_store.errors import StoreError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BY_ID = "token_id:"
"""vLLM writes `token_id:17` where it was asked with `return_tokens_as_token_ids`."""

BY_BYTES = "bytes:"
"""OpenAI's `/v1/completions` writes `bytes:\\xe2\\x80` for tokens that are no whole characters."""

LOST = "\ufffd".encode()
"""What servers spell pieces of characters as, all of them alike."""

ROAD = (
    "a teacher with tokens of its own teaches by text alone: sparsekd generate, then prepare, then train "
    "objective=ce_only"
)
"""What is left where tokens do not map to ids."""

AMBIGUOUS = -1
_ESCAPED = re.compile(r"\\x([0-9a-fA-F]{2})")
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class TokenIds:
    """The ids of tokens, by the bytes that they spell."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._by_bytes: dict[bytes, int] = {}
        added = {int(number): token.content for number, token in tokenizer.added_tokens_decoder.items()}
        spell = _speller(tokenizer)
        weak: dict[bytes, int] = {}  # of single bytes that stand in for characters without a token
        for token, number in tokenizer.get_vocab().items():
            if number in added:
                self._add(added[number].encode(), number)
            elif spell.falls_back and (single := _FALLBACK.fullmatch(token)):
                weak[bytes([int(single[1], 16)])] = number
            elif (spelled := spell(token)) is not None:
                self._add(spelled, number)
        for spelled, number in weak.items():
            self._by_bytes.setdefault(spelled, number)

    def id_of(self, token: Any, spelled: Any, where: str) -> int:
        """Returns the id of one token of an answer.

        Args:
            token: its text, `token_id:17` or `bytes:\\x..`.
            spelled: its bytes as a list of numbers, or None where the server gives none.
            where: its place, for messages.

        Raises:
            StoreError: it is no token, or none of the tokenizer's, or of several; the message tells which
                road is left.
        """
        if not isinstance(token, str):
            raise StoreError(f"{where} has the token {token!r:.80}, expected a text: the answer is damaged.")
        if token.startswith(BY_ID) and (digits := token.removeprefix(BY_ID)).isdecimal() and len(digits) < 12:
            return int(digits)
        content = _bytes_of(token, spelled, where)
        found = self._by_bytes.get(content)
        if LOST in content and (found is None or spelled is None or token == LOST.decode()):
            found = AMBIGUOUS
        if found is None:
            raise StoreError(
                f"{where}: the token {token!r:.80} is none of --tokenizer's, so its id is not known; name "
                f"the teacher's own tokenizer, or, where the student has another, {ROAD}."
            )
        if found == AMBIGUOUS:
            raise StoreError(
                f"{where}: the token {token!r:.80} may be one of several ids, which its spelling does not "
                'tell; ask the server for ids (vLLM: "return_tokens_as_token_ids": true); where it has none, '
                f"{ROAD}."
            )
        return found

    def _add(self, spelled: bytes, number: int) -> None:
        self._by_bytes[spelled] = AMBIGUOUS if spelled in self._by_bytes else number


class _Speller:
    """Bytes of an entry of the vocabulary, by how the tokenizer decodes."""

    def __init__(self, decoder: str) -> None:
        self._of_letter = _byte_letters() if "ByteLevel" in decoder else None
        self._space = "\u2581" in decoder or "Metaspace" in decoder
        self.falls_back = "ByteFallback" in decoder

    def __call__(self, token: str) -> bytes | None:
        """Returns None where an entry spells no bytes, such as one that no text leads to."""
        if self._of_letter is None:
            return (token.replace("\u2581", " ") if self._space else token).encode()
        if not all(letter in self._of_letter for letter in token):
            return None
        return bytes(self._of_letter[letter] for letter in token)


def _speller(tokenizer: "PreTrainedTokenizerBase") -> _Speller:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise StoreError(
            "--tokenizer is none of the library tokenizers (no tokenizer.json), so which bytes its ids spell "
            'is not known: ask the server for ids (vLLM: "return_tokens_as_token_ids": true).'
        )
    return _Speller(json.dumps(json.loads(backend.to_str()).get("decoder"), ensure_ascii=False))


def _byte_letters() -> Mapping[str, int]:
    """Returns GPT-2's letters: bytes that print stand for themselves, the others follow from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printing]
    letters = {chr(byte): byte for byte in printing}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _bytes_of(token: str, spelled: Any, where: str) -> bytes:
    if spelled is not None:
        try:
            return bytes(list(spelled))
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"{where}: the bytes of the token {token!r:.80} are no list of numbers from 0 to 255: the "
                "answer is damaged."
            ) from error
    if token.startswith(BY_BYTES):
        escaped = token.removeprefix(BY_BYTES)
        if _ESCAPED.sub("", escaped) == "" and escaped:
            return bytes(int(pair, 16) for pair in _ESCAPED.findall(escaped))
    return token.encode("utf-8", "surrogatepass")
