"""An answer: what is asked for, under which seed, what came, and the line of JSON that keeps it."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from sparsekd.trainer.corpus.bodies import strings_of
from sparsekd.trainer.generation.prompts import Prompt

FAILED = "failed"
"""In place of a finish reason, where a prompt got no answer."""

STOP, LENGTH = "stop", "length"
"""Finish reasons, in OpenAI's words: the model ended its answer, or `generate.max_tokens` did."""

_OPENED, _CLOSED = "<think>", "</think>"


@dataclass(frozen=True)
class Task:
    """One answer that is asked for.

    Attributes:
        part: Number of the file where it will stand.
        prompt: The prompt.
        sample: Number of the answer among those to this prompt, from 0.
        seed: Of this answer alone.
    """

    part: int
    prompt: Prompt
    sample: int
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from every other one."""
        return self.prompt.digest, self.sample


@dataclass(frozen=True)
class Reply:
    """What came.

    Attributes:
        message: Of the assistant: `content`, and perhaps `reasoning_content` and `tool_calls`; None where
            there is no answer.
        finish_reason: As the source gives it; None where it gives none.
        model: Which model answered, by its own account.
        tokens: Of the answer; None where that is not known.
        reason: Why there is no answer.
    """

    message: dict[str, Any] | None
    finish_reason: str | None
    model: str
    tokens: int | None = None
    reason: str | None = None


def seed_of(seed: int, digest: str, sample: int) -> int:
    """The seed of an answer, 31 bits: what every endpoint and generator takes."""
    content = hashlib.sha256(f"{seed} {digest} {sample}".encode("ascii")).digest()
    return int.from_bytes(content[:4], "little") & 0x7FFFFFFF


def line_of(task: Task, reply: Reply) -> str:
    """An answer with its provenance as a line of JSON; half of a surrogate pair is written escaped."""
    record: dict[str, Any] = {
        "prompt": task.prompt.digest,
        "sample": task.sample,
        "seed": task.seed,
        "place": task.prompt.place,
        "model": reply.model,
        "finish_reason": reply.finish_reason,
        "tokens": reply.tokens,
    }
    if reply.reason is not None:
        record["reason"] = reply.reason
    record["messages"] = task.prompt.messages
    if task.prompt.tools is not None:
        record["tools"] = task.prompt.tools
    record["answer"] = reply.message
    return json.dumps(record, ensure_ascii=True, separators=(",", ":"))


def answer_of(line: str | bytes) -> dict[str, Any]:
    """An answer as `line_of` has written it; what is read of it is of the types that it has there.

    Raises:
        ValueError: The line is something else.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no object")
    for name, kinds in _FIELDS.items():
        if not isinstance(record.get(name), kinds):
            raise ValueError(f"{name} is of type {type(record.get(name)).__name__}")
    answer = record["answer"]
    for message in [*record["messages"], *([] if answer is None else [answer])]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("a message without a role")
    if answer is not None and not isinstance(answer.get("content"), str | None):
        raise ValueError("an answer whose content is no text")
    return record


_FIELDS: dict[str, Any] = {
    "prompt": str,
    "sample": int,
    "place": str,
    "finish_reason": str | None,
    "messages": list,
    "answer": dict | None,
}
"""Of an answer's line: what is read again, with its types."""


def message_of(content: str, reasoning: str | None = None, calls: list[Any] | None = None) -> dict[str, Any]:
    """The assistant's message; what it thought is told from its answer where both are one text."""
    if reasoning is None and _CLOSED in content:
        # A template may have opened the thoughts already.
        thought, _, content = content.partition(_CLOSED)
        reasoning = thought.strip().removeprefix(_OPENED).strip()
        content = content.lstrip("\n")
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def is_unicode(value: Any) -> bool:
    """Whether all texts in a JSON value are Unicode: without half of a surrogate pair."""
    try:
        for text in strings_of(value):
            text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
