"""What a record holds beside plain text: a conversation, a pair of prompt and completion, or token ids.

Each is made of the values of a record's fields and checked as far as it can be without a tokenizer.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.row import IGNORED_LABEL
from sparsekd.trainer.corpus.fields import RecordError

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",  # ShareGPT's words
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
    "function": "tool",  # OpenAI's, before there were tools
}
LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: In order, each with a role, a text as content, and whatever else the template reads.
        tools: JSON schemas of tools; None without.
        given: So many messages at the beginning are a prompt, of which nothing is learned.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    given: int = 0

    @property
    def answers(self) -> list[int]:
        """Numbers of the messages that may be learned, from 0: the assistant's, but for those of weight 0."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and index >= self.given and message.get("weight", 1)
        ]


@dataclass(frozen=True)
class Pair:
    """A prompt, and the text that is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class TokenIds:
    """Tokens that were made before.

    Attributes:
        token_ids: int32 [N].
        counted: bool [N], which of them are learned.
    """

    token_ids: NDArray[np.int32]
    counted: NDArray[np.bool_]


Body = Conversation | Pair | TokenIds


def strings_of(value: Any) -> Iterator[str]:
    """Yields the texts in a JSON value, names of fields among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from strings_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner)


def text_of(body: Body) -> str:
    """All text of a body, in which spellings of special tokens are looked for and a tokenizer is trained."""
    match body:
        case Conversation():
            return "\n".join(strings_of([body.messages, body.tools]))
        case Pair():
            return body.prompt + body.completion
        case TokenIds():
            return ""


def content_of(body: Body, where: str) -> bytes:
    """Bytes that tell a body from every other one of its kind.

    Raises:
        RecordError: It holds a number that JSON has not.
    """
    match body:
        case Conversation():
            value: Any = [body.messages, body.tools, body.given]
        case Pair():
            value = [body.prompt, body.completion]
        case TokenIds():
            return body.token_ids.astype("<i4").tobytes() + body.counted.tobytes()
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:  # bytes and dates of tables; NaN
        raise RecordError("a value that is no JSON", f"{where}: {error}; mend the record.") from error
    return text.encode("ascii")


def conversation_of(
    messages: Any,
    tools: Any,
    where: str,
    name: str,
    *,
    system: Any = None,
    given: int = 0,
    is_table: bool = False,
) -> Conversation:
    """A conversation of the values of a record's fields.

    Args:
        messages: List of messages, or its JSON text; each has `role` and `content`, or `from` and `value`.
        tools: List of tools, its JSON text, or None.
        where: The record, for messages.
        name: The field of the messages, for messages.
        system: What the system says where no message of it begins the conversation; None for nothing.
        given: As `Conversation.given`.
        is_table: Whether null fields inside of messages are what a table puts where there was none.

    Raises:
        RecordError: It is no conversation, or has nothing to learn.
    """
    found = _list_of(messages, where, name)
    if not found:
        raise RecordError("no messages", f"{where}: {name!r} holds no messages; remove the record.")
    made = [
        _message(message, f"{where}: message {number} of {name!r}", is_table)
        for number, message in enumerate(found, start=1)
    ]
    if system is not None and not isinstance(system, str):
        raise RecordError(
            "a system of another form",
            f"{where}: the system's field is of type {type(system).__name__}, expected text; mend it, or set "
            "corpus.system_field=null.",
        )
    if system and system.strip() and made[0]["role"] not in ("system", "developer"):
        made, given = [{"role": "system", "content": system}, *made], given + (given > 0)
    listed = None if tools is None or tools == "" else _list_of(tools, where, "tools")
    if listed is not None and not all(isinstance(tool, Mapping) for tool in listed):
        raise RecordError("tools of another form", f"{where}: a tool is no object, expected JSON schemas.")
    conversation = Conversation(made, (_without_nulls(listed) if is_table else listed) or None, given)
    if not conversation.answers:
        raise RecordError(
            "no assistant turn",
            f"{where}: {name!r} has no message of the assistant, so that nothing can be learned of it; "
            "remove the record, or set corpus.invalid=skip to leave such records out.",
        )
    return conversation


def _list_of(value: Any, where: str, name: str) -> list[Any]:
    if isinstance(value, str):  # a cell of CSV; tools of different forms in a table
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RecordError(
                f"{name} of another form", f"{where}: {name!r} is a text but no JSON ({error}); mend it."
            ) from error
    if not isinstance(value, list):
        raise RecordError(
            f"{name} of another form",
            f"{where}: {name!r} is of type {type(value).__name__}, expected a list.",
        )
    return value


def _message(message: Any, where: str, is_table: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RecordError(
            "messages of another form",
            f"{where} is of type {type(message).__name__}, expected an object with role and content.",
        )
    # What is null was not there: templates print "None" for it. transformers has it so, too.
    made = {key: value for key, value in message.items() if value is not None}
    made = _without_nulls(made) if is_table else made
    if "role" not in made and "from" in made:  # ShareGPT's form
        made["role"] = made.pop("from")
        if "value" in made:
            made["content"] = made.pop("value")
    role = made.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(
            "an unknown role",
            f"{where} has the role {role!r}, expected one of {', '.join(ROLES)}; mend or remove the record.",
        )
    made["role"] = ROLES[role]
    if role == "function_call":  # ShareGPT's, of a call in JSON
        made["tool_calls"] = _called(made.pop("content", ""), where)
    elif "function_call" in made:  # OpenAI's, before there were tools
        made["tool_calls"] = _called(made.pop("function_call"), where)
    if made.get("weight", 1) not in (0, 1):  # OpenAI's, of an answer
        raise RecordError(
            "a weight of a message",
            f"{where} has the weight {made['weight']!r}, expected 0 (not learned) or 1; corpus.weight_field "
            "weighs whole conversations.",
        )
    if "tool_calls" in made:
        made["tool_calls"] = _list_of(made["tool_calls"], where, "tool_calls")
        if not all(isinstance(call, Mapping) for call in made["tool_calls"]):
            raise RecordError("tool_calls of another form", f"{where}: a call of a tool is no object.")
    content = made.get("content", "")
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise RecordError(
            "content of another form", f"{where} has content of type {type(content).__name__}, expected text."
        )
    if not content.strip() and made["role"] in ("user", "assistant") and not made.get("tool_calls"):
        raise RecordError(
            "an empty message",
            f"{where} ({made['role']}) is empty; mend or remove the record, or set corpus.invalid=skip.",
        )
    return made | {"content": content}


def _called(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of tools that a value holds, an object or a list of them, or its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RecordError(
                "a function_call of another form",
                f"{where}: the call is a text but no JSON ({error}); mend it.",
            ) from error
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(
        isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls
    ):
        raise RecordError(
            "a function_call of another form",
            f"{where}: the call is no object with name and arguments, nor a list of such; mend it.",
        )
    return [{"type": "function", "function": dict(call)} for call in calls]


def _joined(parts: list[Any], where: str) -> str:
    """The text of content that is a list of parts."""
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RecordError(
                "content that is no text", f"{where} has content of the type {kind}, expected text alone."
            )
    return "".join(part["text"] for part in parts)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def tokens_of(record: Mapping[str, Any], where: str) -> TokenIds:
    """Ids with what of them is learned.

    Args:
        record: `input_ids`, and if there are any: `labels`, the ids themselves or -100; a mask of 0 and 1 at
            the tokens themselves (`loss_mask`, `completion_mask` or `assistant_masks`); `attention_mask`,
            0 at padding, which is left away. Without labels and mask all are learned.
        where: The record, for messages.

    Raises:
        RecordError: They do not fit one another.
    """
    ids = _integers(record, "input_ids", where)
    if ids.size and not 0 <= ids.min() <= ids.max() <= LARGEST_ID:
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise RecordError("an id outside", f"{where}: input_ids hold {bad}, expected ids of 0 or more.")
    counted = np.ones(len(ids), np.bool_)
    for name in ("labels", *MASKS, "attention_mask"):
        if record.get(name) is None:
            continue
        values = _integers(record, name, where)
        if len(values) != len(ids):
            raise RecordError(
                f"{name} of another length",
                f"{where}: {len(ids):,} input_ids and {len(values):,} {name}, expected equal numbers.",
            )
        if name == "labels":
            learned = values != IGNORED_LABEL
            other = np.flatnonzero(learned & (values != ids))
            if other.size:
                place = int(other[0])
                raise RecordError(
                    "labels that are not the ids",
                    f"{where}: labels[{place}] is {values[place]} where input_ids have {ids[place]}; "
                    "expected the id itself or -100, as transformers has them, not shifted by one.",
                )
            counted &= learned
        elif not np.isin(values, (0, 1)).all():
            raise RecordError(f"{name} of another form", f"{where}: {name} hold other numbers than 0, 1.")
        elif name == "attention_mask":
            real = np.flatnonzero(values)
            if real.size != (real[-1] - real[0] + 1 if real.size else 0):
                raise RecordError(
                    "an attention_mask with holes", f"{where}: attention_mask is 0 between tokens."
                )
            ids, counted = ids[real], counted[real]
        else:
            counted &= values != 0
    return TokenIds(ids.astype(np.int32), counted)


MASKS = ("loss_mask", "completion_mask", "assistant_masks")
"""Names of masks: many tools', TRL's, transformers'."""


def _integers(record: Mapping[str, Any], name: str, where: str) -> NDArray[np.int64]:
    values = _list_of(record[name], where, name)
    if not all(type(value) in (int, bool) for value in values):
        raise RecordError(f"{name} of another form", f"{where}: {name} hold something else than integers.")
    try:
        return np.asarray(values, np.int64)
    except OverflowError as error:
        raise RecordError(f"{name} of another form", f"{where}: {name} hold too large a number.") from error
