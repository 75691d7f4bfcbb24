"""Conversations through a tokenizer's chat template: the text, and which parts of it the assistant wrote.

Where the template marks what is generated (`{% generation %}`), its marks say so. Elsewhere a turn is what
the rendering gains by it: it begins where the messages before it, with the generation prompt, end, and ends
where the messages up to it end. Both must be beginnings of the whole rendering, turn by turn. A template
that writes a turn otherwise once others follow (Qwen3 leaves the thinking away) breaks this; then the turn is
found by writing another text in its place: what changes is the turn, and what stands behind its text when it
is the last one is its end. Where this does not fit exactly either, the conversation is refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sparsekd.logit_store.errors import first_line
from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.bodies import Conversation, strings_of
from sparsekd.trainer.corpus.fields import RecordError
from sparsekd.trainer.corpus.offsets import unused_characters
from sparsekd.trainer.run.errors import DataError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message in which templates look for what was thought before the answer."""

PROBE = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]
"""A conversation that every template takes."""

Span = tuple[int, int]
"""First character of a part of a text, and the one behind its last."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as its template writes it.

    Attributes:
        text: The text.
        spans: The parts that are learned.
        controls: Where the control tokens stand, in a text that spells some as mere text; elsewhere None, and
            each spelling is one.
        rewritten: Whether the template writes turns otherwise once others follow them.
        unwritten: Whether it leaves a message's text away, or changes it.
    """

    text: str
    spans: list[Span]
    controls: list[Span] | None = None
    rewritten: bool = False
    unwritten: bool = False


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.
        config: What is learned, what spellings of special tokens become, and values for the template.

    Raises:
        DataError: There is no template, its marks are not where the assistant speaks, or it writes today's
            date.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: CorpusConfig) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                "The corpus holds conversations, and the tokenizer has no chat template to write them; give "
                "one as the file corpus.chat_template, or an instruct model's folder as corpus.tokenizer."
            )
        self._tokenizer = tokenizer
        self._train_on = config.train_on
        self._split = config.split_special_tokens
        self._values: dict[str, Any] = tokenizer.special_tokens_map | config.chat_template_kwargs
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        # By which a turn ends; Gemma has entries for line breaks, too.
        self._added = tuple(spelling for spelling in added if spelling.strip())
        special = {name for name, is_special in added.items() if is_special}
        self._check_marks()
        # Marks of turns are no special tokens everywhere (DeepSeek's are not).
        turns = self._render(PROBE[:3], None)
        self.control_spellings = frozenset(special | {name for name in self._added if name in turns}) - {""}
        longest_first = sorted(self.control_spellings, key=lambda name: (-len(name), name))
        if "strftime_now" in self._template(None) and str(date.today().year) in turns:
            raise DataError(
                "The chat template writes today's date, so that tomorrow's rows would be others; fix it "
                "by corpus.chat_template_kwargs, for most templates {date_string: 26 Jul 2024}, or give a "
                "template without it as the file corpus.chat_template."
            )
        self._spelled = "|".join(map(re.escape, longest_first)) or "(?!)"

    def render(self, conversation: Conversation, where: str) -> Rendered:
        """Writes a conversation.

        Raises:
            RecordError: The template refuses it, or what the assistant wrote cannot be told for certain.
        """
        try:
            return self._rendered(conversation, where)
        except RecordError:
            # DeepSeek's template writes calls only of messages whose content is null, others fail at that.
            empty = [{"content": None} if _only_calls(message) else {} for message in conversation.messages]
            if not any(empty):
                raise
            messages = [message | other for message, other in zip(conversation.messages, empty, strict=True)]
            try:
                return self._rendered(replace(conversation, messages=messages), where)
            except RecordError:
                pass
            raise

    def _rendered(self, conversation: Conversation, where: str) -> Rendered:
        conversation = self._with_calls_as_it_wants(conversation, where)
        messages, tools = conversation.messages, conversation.tools
        try:
            text, marked = self._render_with_marks(messages, tools)
        except Exception as error:  # a template may raise anything about what it is given
            raise RecordError(
                "refused by the chat template",
                f"{where}: the chat template refuses the conversation ({first_line(error)}); mend or remove "
                "the record, or set corpus.invalid=skip to leave such records out.",
            ) from error
        learned = conversation.answers
        rewritten = False
        if self._train_on == "all":
            spans = [(0, len(text))]
        elif self._is_marked(tools):
            spans = self._chosen_marks(conversation, learned, marked, where)
        else:
            learned = learned[-1:] if self._train_on == "last" else learned
            spans = []
            for index in learned:
                span, is_rewritten = self._turn(messages, tools, index, text, where)
                rewritten |= is_rewritten
                spans.append(self._without_trailing_space(text, span))
            if any(after[0] < before[1] for before, after in pairwise(spans)):
                raise _unclear(where, learned[0])
        learned_text = "".join(text[start:stop] for start, stop in spans)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        is_whole = self._train_on == "assistant" and learned == turns
        _check_tools(conversation, text, learned_text if is_whole else text, where)
        return Rendered(
            text,
            spans,
            self._controls(conversation, text, where),
            rewritten,
            unwritten=not all(_said(message).strip() in text for message in messages),
        )

    def _template(self, tools: Any) -> str:
        return self._tokenizer.get_chat_template(None, tools)

    def _is_marked(self, tools: Any) -> bool:
        return GENERATION.search(self._template(tools)) is not None

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, *, prompt: bool = False) -> str:
        return self._render_with_marks(messages, tools, prompt=prompt)[0]

    def _render_with_marks(
        self, messages: Sequence[dict[str, Any]], tools: Any, *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=self._template(tools),
            return_assistant_tokens_mask=self._is_marked(tools),
            add_generation_prompt=prompt,
            **self._values,
        )
        texts, marks = rendered
        return texts[0], [(start, stop) for start, stop in marks[0] if start < stop] if marks else []

    def _check_marks(self) -> None:
        """Checks on a conversation that the template takes it, and that marks hold answers alone.

        transformers counts characters that were written before a mark; in a macro, say, it counts wrongly.
        """
        try:
            text, marks = self._render_with_marks(PROBE, None)
        except Exception as error:  # a template may raise anything
            raise DataError(
                "The tokenizer's chat template cannot write a plain conversation "
                f"({first_line(error)}); give another as the file corpus.chat_template."
            ) from error
        if not self._is_marked(None):
            return
        inside = "".join(text[start:stop] for start, stop in marks)
        for message in PROBE:
            if (message["content"] in inside) != (message["role"] == "assistant"):
                raise DataError(
                    "The chat template's {% generation %} marks do not hold what the assistant writes, and "
                    f"nothing else: they hold {inside!r}; mend the template (they may stand in no macro)."
                )

    def _chosen_marks(
        self, conversation: Conversation, learned: list[int], marked: list[Span], where: str
    ) -> list[Span]:
        """Of the parts that the template marks those that are learned."""
        turns = [
            index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"
        ]
        wanted = learned[-1:] if self._train_on == "last" else learned
        if wanted == turns:
            return marked
        if len(marked) != len(turns):
            raise RecordError(
                "marks that are not one a turn",
                f"{where}: the chat template marks {len(marked)} parts as generated in {len(turns)} turns of "
                "the assistant, so that some turns alone cannot be chosen; set corpus.train_on=assistant.",
            )
        return [span for index, span in zip(turns, marked, strict=True) if index in wanted]

    def _turn(
        self, messages: list[dict[str, Any]], tools: Any, index: int, text: str, where: str
    ) -> tuple[Span, bool]:
        """What the assistant wrote as a message, and whether it stands otherwise at a conversation's end."""
        before = self._part(messages[:index], tools, prompt=True)
        until = self._part(messages[: index + 1], tools)
        start = len(before) if before is not None and text.startswith(before) else None
        stop = len(until) if until is not None and text.startswith(until) else None
        if start is not None and stop is not None and start <= stop:
            return (start, stop), False
        mark = unused_characters(text, 1)
        other = {key: value for key, value in messages[index].items() if key not in REASONING}
        changed = [*messages[:index], other | {"content": mark}, *messages[index + 1 :]]
        there = self._part(changed, tools)
        alone = self._part(changed[: index + 1], tools)
        if (
            until is None
            or there is None
            or alone is None
            or there.count(mark) != 1
            or alone.count(mark) != 1
        ):
            raise _unclear(where, index)
        behind = there.partition(mark)[2]
        closing = alone.partition(mark)[2]
        end = len(text) - len(behind)
        if not (text.endswith(behind) and until.endswith(closing) and behind.startswith(closing)):
            raise _unclear(where, index)
        if start is None:
            start = there.index(mark)
            if text[:start] != there[:start]:
                raise _unclear(where, index)
        if start > end + len(closing):
            raise _unclear(where, index)
        return (start, end + len(closing)), stop is None

    def _part(self, messages: list[dict[str, Any]], tools: Any, *, prompt: bool = False) -> str | None:
        """What the template writes of some of the messages; None where it refuses these."""
        try:
            return self._render(messages, tools, prompt=prompt)
        except Exception:  # it may raise anything; the whole conversation it has taken
            return None

    def _with_calls_as_it_wants(self, conversation: Conversation, where: str) -> Conversation:
        """The conversation with calls' arguments as objects where the template writes JSON of them itself.

        OpenAI's are JSON in a text. Some templates write that as it stands, others would quote it once more:
        calls that nothing can read.
        """
        given = [text for text in map(_arguments, _calls(conversation)) if isinstance(text, str)]
        if not given:
            return conversation
        text = self._part(conversation.messages, conversation.tools)
        if text is None or not any(json.dumps(each, ensure_ascii=False) in text for each in given):
            return conversation
        try:
            messages = [_with_read_arguments(message) for message in conversation.messages]
        except (ValueError, RecursionError) as error:
            raise RecordError(
                "arguments that are no JSON",
                f"{where}: the arguments of a call of a tool are a text but no JSON ({first_line(error)}), "
                "and the chat template would quote it once more; mend them.",
            ) from error
        return replace(conversation, messages=messages)

    def _without_trailing_space(self, text: str, span: Span) -> Span:
        """A turn up to the control token that ends it: a line break behind it is never generated."""
        start, stop = span
        end = start + len(text[start:stop].rstrip())
        return (start, end) if text.endswith(self._added, start, end) else span

    def _controls(self, conversation: Conversation, text: str, where: str) -> list[Span] | None:
        """Where the template wrote control tokens; None where the messages spell none.

        A private character is put before each spelling in the messages; those without one are the template's.
        """
        if not self._split:
            return None
        spoken = "\0".join(strings_of([conversation.messages, conversation.tools]))
        found = re.search(self._spelled, spoken)
        if found is None:
            return None
        mark = unused_characters(spoken + text, 1)
        messages, tools = (
            _mapped(value, lambda words: re.sub(f"(?={self._spelled})", mark, words))
            for value in (conversation.messages, conversation.tools)
        )
        marked = self._part(messages, tools)
        if marked is None or marked.replace(mark, "") != text:
            raise RecordError(
                "spellings that the chat template reads",
                f"{where} spells {found[0]}, and the chat template goes by it, so that it cannot stay text; "
                "mend the record, or set corpus.split_special_tokens=false to make it the control token.",
            )
        controls, marks, place = [], 0, 0
        for control in re.finditer(f"(?<!{mark})(?:{self._spelled})", marked):
            marks += marked.count(mark, place, control.start())
            place = control.start()
            controls.append((control.start() - marks, control.end() - marks))
        return controls


def _unclear(where: str, index: int) -> RecordError:
    return RecordError(
        "turns that the chat template writes anew",
        f"{where}: the chat template writes message {index + 1} otherwise in the whole conversation than at "
        "its end, so that it cannot be told for certain what the assistant wrote; give a template that marks "
        "it ({% generation %}) as the file corpus.chat_template, or set corpus.train_on=all.",
    )


def _check_tools(conversation: Conversation, text: str, answers: str, where: str) -> None:
    """Many templates know no tools, and leave calls away without a word."""
    lost = [name for name in _tool_names(conversation.tools or []) if name not in text]
    if lost:
        raise RecordError(
            "tools that the chat template does not write",
            f"{where}: the chat template does not write the tool {lost[0]!r}; give one that does as the file "
            "corpus.chat_template, or set corpus.tools_field=null to leave tools away.",
        )
    lost = [name for name in _tool_names(_calls(conversation)) if name not in answers]
    if lost:
        raise RecordError(
            "tool calls that the chat template does not write",
            f"{where}: the chat template does not write the assistant's call of {lost[0]!r}, so that an "
            "empty answer would be learned; give one that does as the file corpus.chat_template.",
        )


def _only_calls(message: dict[str, Any]) -> bool:
    return bool(message.get("tool_calls")) and not message["content"]


def _calls(conversation: Conversation) -> list[Any]:
    return [call for message in conversation.messages for call in message.get("tool_calls") or []]


def _arguments(call: Mapping[str, Any]) -> Any:
    """Of a call, which is an object with arguments or with a function that has them."""
    inner = call.get("function", call)
    return inner.get("arguments") if isinstance(inner, Mapping) else None


def _with_read_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have the value of a JSON text for it.

    Raises:
        ValueError: One is no JSON.
    """
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = _arguments(call)
        if isinstance(arguments, str):
            read = {"arguments": json.loads(arguments)}
            call = (
                {**call, "function": {**call["function"], **read}} if "function" in call else {**call, **read}
            )
        calls.append(call)
    return message | {"tool_calls": calls}


def _said(message: dict[str, Any]) -> str:
    """The text of a message without the thinking in front, which templates leave away in earlier turns."""
    content: str = message["content"] or ""
    return content.rpartition("</think>")[2] if message["role"] == "assistant" else content


def _tool_names(tools: list[Any]) -> list[str]:
    """The names of tools or of calls, each an object with a name or with a function that has one."""
    found = []
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, dict) else {}
        name = inner.get("name") if isinstance(inner, dict) else None
        found += [name] if isinstance(name, str) else []
    return found


def _mapped(value: Any, change: Any) -> Any:
    """A JSON value with other texts; roles, by which templates go, stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            change(name): inner if name == "role" else _mapped(inner, change) for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_mapped(inner, change) for inner in value]
    return value
