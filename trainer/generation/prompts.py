"""The prompts: records of JSON lines, or lines that a template makes into prompts."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparsekd.trainer.config.generate import GenerateConfig
from sparsekd.trainer.corpus.bodies import content_of, conversation_of, text_of
from sparsekd.trainer.corpus.documents import checked_text, json_record
from sparsekd.trainer.corpus.fields import RecordError, missing_field
from sparsekd.trainer.corpus.files import list_files
from sparsekd.trainer.corpus.findings import Tally
from sparsekd.trainer.corpus.forms import ALPACA_TEMPLATE, SHAREGPT_FIELD, filled
from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.run.streams import open_text, read_lines

_MESSAGES = ("messages", SHAREGPT_FIELD)
_ANSWER = {"role": "assistant", "content": "answer"}
"""Stands where the answer will, so that a prompt is checked as the conversation that it becomes."""


@dataclass(frozen=True)
class Prompt:
    """What a teacher is asked.

    Attributes:
        messages: Up to the question; the last is the user's or a tool's.
        tools: JSON schemas of tools; None without.
        digest: SHA-256 of both, in hexadecimal.
        place: Where it stood, for messages.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    digest: str
    place: str


@dataclass(frozen=True)
class Prompts:
    """All prompts, each once.

    Attributes:
        entries: In the order of the files.
        repeated: Those that stood there before; left out.
        unusable: Records that make no prompt, by reason; left out.
    """

    entries: list[Prompt]
    repeated: Tally
    unusable: dict[str, Tally]

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of all, in hexadecimal."""
        return hashlib.sha256("".join(prompt.digest for prompt in self.entries).encode()).hexdigest()


def read_prompts(config: GenerateConfig) -> Prompts:
    """Reads the prompts.

    Raises:
        DataError: A path matches nothing, a record makes no prompt (with generate.failed=refuse), or there is
            no prompt.
    """
    found: dict[str, Prompt] = {}
    prompts = Prompts([], Tally(), {})
    for prompt in _made(config, prompts.unusable):
        if prompt.digest in found:
            prompts.repeated.add(prompt.place)
            continue
        found[prompt.digest] = prompt
        if len(found) == config.max_prompts:
            break
    prompts.entries.extend(found.values())
    if not prompts.entries:
        raise DataError(
            f"generate.prompts={config.prompts} hold no prompt; give JSON lines with a field prompt, "
            "messages or instruction, or lines with generate.format=lines."
        )
    return prompts


def _made(config: GenerateConfig, unusable: dict[str, Tally]) -> Iterator[Prompt]:
    for given in config.prompts:
        for file in list_files(given, "*", [], compressed=True, key="generate.prompts"):
            with open_text(file.path) as stream:
                for number, line in enumerate(read_lines(stream, file.path), start=1):
                    if not line.strip():
                        continue
                    where, place = f"{file.path}, line {number}", f"{file.name}:{number}"
                    try:
                        yield replace(prompt_of(_record(line, where, config), where, config), place=place)
                    except RecordError as error:
                        if config.failed == "refuse":
                            raise
                        unusable.setdefault(error.reason, Tally()).add(place)


def _record(line: bytes, where: str, config: GenerateConfig) -> Mapping[str, Any]:
    if config.format == "jsonl":
        return json_record(line, where, "prompt")
    try:
        return {"topic": line.decode("utf-8").strip()}
    except UnicodeDecodeError as error:
        raise RecordError("no UTF-8", f"{where} is not UTF-8; convert the file.") from error


def prompt_of(record: Mapping[str, Any], where: str, config: GenerateConfig) -> Prompt:
    """The prompt of a record: its messages, its prompt, or a template filled with its fields.

    Answers behind the last question are left away: they are what is asked for. Answers before it are part of
    the prompt, and not to be learned.

    Raises:
        RecordError: It makes none.
    """
    messages = _messages(record, where, config)
    if not isinstance(messages, list):
        raise RecordError(
            "messages of another form",
            f"{where}: the messages are of type {type(messages).__name__}, expected a list.",
        )
    roles = [
        message.get("role", message.get("from")) if isinstance(message, dict) else None
        for message in messages
    ]
    while roles and roles[-1] in ("assistant", "gpt"):
        roles.pop()
    messages = messages[: len(roles)]
    if config.system is not None and not (roles and roles[0] in ("system", "developer")):
        messages = [{"role": "system", "content": config.system}, *messages]
    conversation = conversation_of([*messages, _ANSWER], record.get("tools"), where, "messages")
    asked = conversation.messages[:-1]
    if not asked or asked[-1]["role"] not in ("user", "tool"):
        raise RecordError(
            "no question", f"{where}: the messages end without a question of the user; mend or remove it."
        )
    content = content_of(conversation, where)
    checked_text(text_of(conversation), where)
    return Prompt(asked, conversation.tools, hashlib.sha256(content).hexdigest(), where)


def _messages(record: Mapping[str, Any], where: str, config: GenerateConfig) -> Any:
    if config.template is not None:
        return _question(filled(config.template, record, where))
    for name in _MESSAGES:
        if record.get(name) is not None:
            return _read(record[name])
    if record.get("prompt") is not None:
        prompt = record["prompt"]
        return _question(prompt) if isinstance(prompt, str) else prompt
    if "instruction" in record:
        return _question(filled(ALPACA_TEMPLATE, _with_input_of_seed(record), where))
    error = missing_field(
        record, "prompt", where, "field", "generate.template to text with the record's fields"
    )
    raise RecordError("no prompt", str(error))


def _question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text.strip()}]


def _read(messages: Any) -> Any:
    if not isinstance(messages, str):
        return messages
    try:
        return json.loads(messages)
    except (ValueError, RecursionError):
        return messages


def _with_input_of_seed(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A self-instruct seed keeps its input, with an answer, in the first of its instances."""
    instances = record.get("instances")
    if "input" in record or not isinstance(instances, list) or not instances:
        return record
    first = instances[0]
    return {**record, "input": first.get("input")} if isinstance(first, dict) else record
