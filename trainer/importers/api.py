"""Answers of OpenAI-compatible servers with `top_logprobs`: at most 20 or so log-probabilities of each token.

Layout, as of the API's reference and vLLM 0.10 to 0.12: lines of JSON (or one array), each the request and
what was answered in one object. What the model was asked stands in `messages` (spelled by the chat template,
with the beginning of an answer), in `prompt` (a text, or ids) or in `prompt_token_ids`, which vLLM gives
(`"return_token_ids": true`) and which come first; without any of them an answer stands alone. What it
answered stands in each of `choices`, or at the top, under `logprobs`, in one of two forms:

- chat: `{"content": [{"token", "bytes", "logprob", "top_logprobs": [{"token", "bytes", "logprob"}, ...]}]}`;
- completions: `{"tokens": [...], "token_logprobs": [...], "top_logprobs": [{token: logprob, ...}, ...]}`;
  with `"echo": true` these are the prompt's, too (the first has null): leave the line's own prompt empty.

A line, or one of its choices, may have a `weight`, 0 or more: a judge's score, or what a ranking makes of it.
Tokens become ids by their exact bytes, or as `token_id:17` (`token_bytes.py`). Entry i of an answer describes
token i of it: the record at the position before. Completions list the sampled token also where it is not
among the most likely, as one entry more, which a head of `--k` entries, or of as many as every position
lists, leaves out. Values at or below -9999 stand for -inf.

Shapes: P tokens of a prompt, T tokens of prompt and answer, K most entries of a position.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.document import (
    LINES,
    NOT_LISTED,
    Document,
    Format,
    Options,
    Source,
    one_line,
    padded_lists,
    source_files,
)
from sparsekd.trainer.importers.jsonl import read_objects
from sparsekd.trainer.importers.token_bytes import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLAMPED = -9999.0
"""What servers write for -inf."""

MOST_WEIGHT = 1e30
"""Of an answer in the loss; beyond is soon no float32."""

MOST_LISTED = 1_000
"""Entries of a position. APIs give 20; more than this is no list of the most likely, but damage."""

ROUNDING = 1e-3
"""By how much a log-probability may lie above 0."""

ASK = 'ask with "logprobs": true, "top_logprobs": 20 (completions: "logprobs": 5)'


def read_api(path: Path, options: Options) -> Source:
    """Opens a file, or a folder of files, of requests with their answers.

    Raises:
        StoreError: there is none.
    """
    files = source_files(path, LINES, "answers with top_logprobs")

    def documents() -> Iterator[Document]:
        tokenizer = options.tokenizer()
        ids = TokenIds(tokenizer)
        for file in files:
            for where, line in read_objects(file):
                yield from _documents(where, line, tokenizer, ids)

    return Source(files=files, rest="derived", documents=documents, gives_true=True)


FORMAT = Format(
    name="api",
    reads="requests with answers of OpenAI-compatible servers that have top_logprobs",
    suffixes=LINES,
    fields=tuple(
        frozenset({answer, asked})
        for asked in ("prompt", "prompt_token_ids", "messages")
        for answer in ("choices", "logprobs")
        if (answer, asked) != ("logprobs", "messages")  # which is axolotl's
    ),
    read=read_api,
    cannot_give=(
        "the temperature of the log-probabilities (1 is assumed; some servers give what they sampled from)",
        "the end of an answer (servers list no token for it)",
    ),
)


def _documents(
    where: str, line: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", ids: TokenIds
) -> Iterator[Document]:
    choices = line.get("choices", [line])
    if not isinstance(choices, list) or not choices or not all(isinstance(one, dict) for one in choices):
        raise StoreError(f"{where}: choices are no list of objects: the answer is damaged.")
    for number, choice in enumerate(choices):
        place = where if len(choices) == 1 else f"{where}, choice {number}"
        prompt = _prompt(place, {**line, **choice}, tokenizer)
        weight = choice.get("weight", line.get("weight", 1))
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight <= MOST_WEIGHT:
            raise StoreError(
                f"{place} has the weight {weight!r:.40}, expected a number from 0 to {MOST_WEIGHT:g}: mend "
                "the line, or leave the weight out."
            )
        document = _document(place, prompt, _entries(place, choice.get("logprobs")), ids)
        weights = np.full(len(document.token_ids), weight, np.float32)
        yield document if weight == 1 else replace(document, weights=weights)


def _prompt(where: str, line: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Returns the ids of what was asked, [P]; none where the line does not say."""
    given = line.get("prompt_token_ids")
    prompt, messages = line.get("prompt"), line.get("messages")
    if given is None and isinstance(prompt, list):
        given = prompt
    if given is not None:
        if not isinstance(given, list) or not all(type(token) is int for token in given):
            raise StoreError(f"{where}: the prompt's ids are no list of integers: the answer is damaged.")
        return [min(max(token, -1), 1 << 62) for token in given]  # beyond is refused with its place
    try:
        if messages is not None:
            made: Any = tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=True
            )
            return [int(token) for token in made["input_ids"]]
        if prompt is not None:
            return [int(token) for token in tokenizer(prompt)["input_ids"]]
    except Exception as error:  # a template may raise anything about what it is given
        raise StoreError(
            f"{where}: its {'prompt' if messages is None else 'messages'} cannot be spelled by the tokenizer "
            f"({one_line(error)}): the line is damaged, or --tokenizer another than the teacher's."
        ) from error
    return []


def _entries(where: str, logprobs: Any) -> Sequence[tuple[Any, Any, Any, Any]]:
    """Returns (token, bytes, its log-probability, its list) of each token of an answer, in either form."""
    if isinstance(logprobs, dict) and logprobs.get("content") is not None:
        logprobs = logprobs["content"]
    if isinstance(logprobs, list):
        if not all(isinstance(one, dict) for one in logprobs):
            raise StoreError(f"{where}: logprobs hold more than objects: the answer is damaged.")
        return [
            (one.get("token"), one.get("bytes"), one.get("logprob"), one.get("top_logprobs"))
            for one in logprobs
        ]
    if not isinstance(logprobs, dict):
        raise StoreError(f"{where} has no logprobs: {ASK}.")
    tokens, own, listed = (logprobs.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not isinstance(tokens, list) or not isinstance(own, list) or not isinstance(listed, list):
        raise StoreError(
            f"{where}: logprobs have neither content nor tokens, token_logprobs and top_logprobs: {ASK}."
        )
    if not len(tokens) == len(own) == len(listed):
        raise StoreError(
            f"{where} has {len(tokens)} tokens, {len(own)} token_logprobs and {len(listed)} top_logprobs, "
            "expected equal numbers: the answer is cut off."
        )
    return [
        (token, None, value, None if lists is None else _pairs(lists))
        for token, value, lists in zip(tokens, own, listed, strict=True)
    ]


def _pairs(lists: Any) -> Any:
    """Returns a completion's {token: logprob} as the list of objects that a chat's answer has."""
    if not isinstance(lists, dict):
        return lists
    return [{"token": token, "logprob": value} for token, value in lists.items()]


def _document(
    where: str, prompt: list[int], entries: Sequence[tuple[Any, Any, Any, Any]], ids: TokenIds
) -> Document:
    length = len(prompt) + len(entries)
    tokens, true = [*prompt], [math.nan] * length
    lists: list[dict[int, float]] = [{} for _ in range(length)]
    for number, (token, spelled, own, listed) in enumerate(entries):
        place = f"{where}, token {number} of the answer"
        tokens.append(ids.id_of(token, spelled, place))
        position = len(tokens) - 2
        # What begins a document has no position before it; an echoed prompt's first token has no values.
        if position < 0 or (own is None and not listed and number == 0):
            continue
        lists[position] = _list(place, listed, ids)
        true[position] = _value(place, own)
    lengths = np.array([len(one) for one in lists], np.int64)
    flat = np.array([number for one in lists for number in one], np.int64)
    values = np.array([value for one in lists for value in one.values()], np.float64)
    return Document(
        where=where,
        token_ids=np.asarray(tokens, np.int64),
        loss_mask=lengths > 0,
        head_ids=padded_lists(flat, lengths, NOT_LISTED, where),
        head_logprobs=padded_lists(values, lengths, -np.inf, where),
        true_logprob=np.asarray(true, np.float64),
    )


def _list(where: str, listed: Any, ids: TokenIds) -> dict[int, float]:
    """Returns {id: log-probability} of the most likely tokens."""
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        given = "no top_logprobs" if listed is None else f"top_logprobs {listed!r:.40}"
        raise StoreError(f"{where} has {given}, expected a list of tokens with logprob: {ASK}.")
    if not 1 <= len(listed) <= MOST_LISTED:
        raise StoreError(
            f"{where} has {len(listed):,} top_logprobs, expected 1 to {MOST_LISTED:,}: {ASK}; of answers "
            "without them, train on the text alone: sparsekd prepare, then train objective=ce_only."
        )
    found: dict[int, float] = {}
    for entry in listed:
        number = ids.id_of(entry.get("token"), entry.get("bytes"), where)
        if number in found:
            raise StoreError(f"{where} lists the token {entry.get('token')!r:.80} twice: it is damaged.")
        found[number] = _value(where, entry.get("logprob"))
    return found


def _value(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= ROUNDING:
        raise StoreError(
            f"{where} has the logprob {value!r:.40}, expected a number of at most 0: the answer is damaged, "
            "or its values are no log-probabilities."
        )
    return -math.inf if value <= CLAMPED else min(float(value), 0.0)
