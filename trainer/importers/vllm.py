"""Answers of vLLM's OpenAI-compatible server that were asked for `prompt_logprobs`.

Layout, as of vLLM 0.10 to 0.12 (vllm/logprobs.py and the entrypoints' protocol): lines of JSON, one answer
each, or one array of answers. `/v1/completions` has `prompt_logprobs` and `prompt_token_ids` in each of
`choices`, `/v1/chat/completions` has them at the top. `prompt_logprobs[i]` is null for i = 0 and otherwise an
object {id: {"logprob": ..., "rank": ..., "decoded_token": ...}} that describes token i: here, the record at
position i - 1. It holds the k most likely ids, and token i itself in any case, so that it has k or k + 1
entries; the true token's log-probability is always given. `prompt_token_ids` are there only when the request
says `"return_token_ids": true`; without them it is not certain which entry is the token, and the answer is
refused.

The values are log-probabilities over the whole vocabulary at temperature 1 where the server runs with
`--logprobs-mode raw_logprobs`, the default since 0.10; other modes cannot be told from the file, except that
their values sum to more than 1. Values at or below -9999 stand for -inf. Generated tokens are not read.

Shapes: T tokens of a prompt, K most entries of a position.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.document import (
    LINES,
    NOT_LISTED,
    Document,
    Format,
    Options,
    Source,
    padded_lists,
    source_files,
)
from sparsekd.trainer.importers.jsonl import read_objects

CLAMPED = -9999.0
"""What vLLM writes for -inf."""

ID_LIMIT = 1 << 63
"""Ids are below it, in any vocabulary: what int64 cannot hold is damage."""


def read_vllm(path: Path, options: Options) -> Source:
    """Opens a file, or a folder of files, of answers.

    Raises:
        StoreError: there is none.
    """
    files = source_files(path, LINES, "vLLM's answers")

    def documents() -> Iterator[Document]:
        for file in files:
            for where, answer in read_objects(file):
                yield from _documents(where, answer)

    return Source(files=files, rest="derived", documents=documents, gives_true=True)


FORMAT = Format(
    name="vllm",
    reads='answers of vLLM\'s server to "prompt_logprobs": k, "return_token_ids": true',
    suffixes=LINES,
    fields=(frozenset({"choices"}), frozenset({"prompt_logprobs"})),
    read=read_vllm,
    cannot_give=(
        "the mode of the log-probabilities (raw is assumed, the server's default)",
        "a loss mask (every token of a prompt counts) and document boundaries inside a prompt",
    ),
)


def _documents(where: str, answer: Mapping[str, Any]) -> Iterator[Document]:
    if "prompt_logprobs" in answer and answer["prompt_logprobs"] is not None:
        yield _document(where, answer)
        return
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        raise StoreError(f"{where} has neither prompt_logprobs nor choices: it is no answer of vLLM.")
    for number, choice in enumerate(choices):
        place = where if len(choices) == 1 else f"{where}, choice {number}"
        if not isinstance(choice, dict) or choice.get("prompt_logprobs") is None:
            raise StoreError(f'{place} has no prompt_logprobs: ask for them with "prompt_logprobs": k.')
        yield _document(place, choice)


def _document(where: str, holder: Mapping[str, Any]) -> Document:
    tokens, positions = holder.get("prompt_token_ids"), holder["prompt_logprobs"]
    if tokens is None:
        raise StoreError(
            f"{where} has no prompt_token_ids, so its tokens are not certain: ask with "
            '"return_token_ids": true.'
        )
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise StoreError(f"{where}: prompt_token_ids are no list of integers.")
    if outside := [token for token in tokens if not -ID_LIMIT <= token < ID_LIMIT]:
        raise StoreError(
            f"{where}: prompt_token_ids hold {outside[0]}, which is no id: the answer is damaged, ask again."
        )
    if not isinstance(positions, list) or len(positions) != len(tokens):
        found = len(positions) if isinstance(positions, list) else "no"
        raise StoreError(
            f"{where} has {len(tokens)} prompt_token_ids and {found} prompt_logprobs, expected equal "
            "numbers: the answer is cut off."
        )
    length = len(tokens)
    entries = [_entries(where, place, positions[place], tokens[place]) for place in range(1, length)]
    # The last token has no record: nothing is listed there.
    lengths = np.array([*(len(ids) for ids, _, _ in entries), *[0] * min(length, 1)], np.int64)
    ids = np.array([number for listed, _, _ in entries for number in listed], np.int64)
    values = np.array([value for _, listed, _ in entries for value in listed], np.float64)
    mask = np.ones(length, np.bool_)
    mask[-1:] = False
    return Document(
        where=where,
        token_ids=np.asarray(tokens, np.int64),
        loss_mask=mask,
        head_ids=padded_lists(ids, lengths, NOT_LISTED, where),
        head_logprobs=padded_lists(values, lengths, -np.inf, where),
        true_logprob=np.array([*(own for _, _, own in entries), *[np.nan] * min(length, 1)], np.float64),
    )


def _entries(where: str, place: int, listed: Any, token: int) -> tuple[list[int], list[float], float]:
    """Returns ids and values of the most likely ids, and the token's own value."""
    if not isinstance(listed, dict) or str(token) not in listed:
        raise StoreError(
            f"{where}, prompt_logprobs {place} does not hold its token {token}: the answer is damaged, or "
            "its prompt_token_ids are another prompt's."
        )
    values: dict[int, float] = {}
    ranks: dict[int, int] = {}
    for name, entry in listed.items():
        try:
            number, value, rank = int(name), float(entry["logprob"]), int(entry["rank"])
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise StoreError(
                f"{where}, prompt_logprobs {place}, entry {name!r} has no logprob or rank: it is no entry "
                "of vLLM."
            ) from error
        if not -ID_LIMIT <= number < ID_LIMIT:
            raise StoreError(
                f"{where}, prompt_logprobs {place}, entry {name!r} is no id: the answer is damaged, ask "
                "again."
            )
        values[number], ranks[number] = (-np.inf if value <= CLAMPED else value), rank
    own = values[token]
    # Behind as many ids as there are, the token is not one of the most likely: it is there for its own sake.
    if ranks[token] > len(values):
        del values[token]
    return list(values), list(values.values()), own
