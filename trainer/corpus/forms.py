"""What the records of a corpus hold, by their fields: a text, or one of the bodies that `bodies` knows."""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from sparsekd.trainer.config.corpus import CorpusConfig, with_escapes
from sparsekd.trainer.corpus.bodies import MASKS, Body, Conversation, Pair, conversation_of, tokens_of
from sparsekd.trainer.corpus.fields import (
    RecordError,
    lookup,
    missing_field,
    require_fields,
    text_of_record,
)
from sparsekd.trainer.run.errors import DataError

SHAREGPT_FIELD = "conversations"
ALPACA_TEMPLATE = "{instruction}\n\n{input}\n\n"
CHOSEN_FIELD, REJECTED_FIELD = "chosen", "rejected"
"""Two answers of a preference: the first is learned."""
COMPLETION_FIELDS = ("completion", "output", CHOSEN_FIELD)
TOKEN_FIELDS = ("input_ids", "labels", *MASKS, "attention_mask")


class Forms:
    """Says what records hold, the same of all.

    Attributes:
        kind: As `corpus.kind`; where that is null, None until the first record was seen.
        others: Fields of the first record by which it could have been of another kind.
        rejected: How many records had an answer that is no more than counted, since another was preferred.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self._config = config
        self.kind = "text" if config.format == "text" else config.kind
        self.others: list[str] = []
        self.rejected = 0
        self._by = ""
        self._filled = False
        self._met: set[str] = set()  # fields of the template that a record had

    def begin(self, found: Mapping[str, Any], where: str, noun: str) -> None:
        """Looks at the fields of a table, or of the first record.

        Raises:
            DataError: One that is needed is missing.
        """
        if self.kind is None:
            kinds = _kinds(found, self._config)
            self.kind = next(iter(kinds), "text")
            self.others = [name for kind, name in kinds.items() if kind != self.kind]
            self._by = kinds.get(self.kind, "")
        by_template = self.kind == "text" and self._config.template is not None
        require_fields(found, self._config, where, noun, with_text=self.kind == "text" and not by_template)
        if by_template and not _text_fields(found, self._config):
            name = _named(self._config.template or "")[0]
            raise missing_field(found, name, where, noun, "corpus.template to fields that there are")
        needed = {
            "conversation": _conversation_fields(found, self._config) or _pair_fields(found, self._config),
            "pair": _pair_fields(found, self._config),
            "tokens": ("input_ids",) if _has(found, "input_ids") else (),
        }
        if self.kind in needed and not needed[self.kind]:
            wanted = {
                "conversation": self._config.messages_field,
                "pair": "prompt and completion",
                "tokens": "input_ids",
            }
            raise missing_field(found, wanted[self.kind], where, noun, _REMEDIES[self.kind])

    def lines(self) -> list[str]:
        """What is to be said: what records hold where the configuration is silent, and what nobody learns."""
        found = []
        if self._config.kind is None and (self.kind not in (None, "text") or self.others):
            could = f", and not by {' or '.join(self.others)}" if self.others else ""
            found.append(f"records are read as corpus.kind={self.kind}, by {self._by}{could}")
        if self.rejected:
            found.append(
                f"{self.rejected:,} records have a {REJECTED_FIELD!r} answer beside the one that is learned; "
                "nothing is made of it"
            )
        return found

    def check(self) -> None:
        """Looks, after all records were read, whether the user's template goes with them.

        Raises:
            DataError: It names a field that none of them has: each prompt would lack that paragraph.
        """
        template = self._config.template
        lacking = [name for name in _named(template or "") if name not in self._met]
        if self._filled and template is not None and lacking:
            raise DataError(
                f"corpus.template names the field {lacking[0]!r}, which no record has; correct the name, or "
                "leave it away."
            )

    def fields(self) -> list[str]:
        """The fields that records of this kind may have."""
        config = self._config
        names = [] if config.weight_field is None else [config.weight_field]
        if self.kind == "text":
            texts = [config.text_field] if config.template is None else _named(config.template)
            return [*texts, *names]
        if self.kind == "tokens":
            return [*TOKEN_FIELDS, *names]
        names += [name for name in (config.prompt_field, config.completion_field) if name is not None]
        names += ["prompt", *COMPLETION_FIELDS, REJECTED_FIELD, *_named(config.template or ALPACA_TEMPLATE)]
        names += [name for name in (config.tools_field, config.system_field) if name is not None]
        return [*names, config.messages_field, SHAREGPT_FIELD]

    def text(self, record: Mapping[str, Any], where: str, noun: str) -> str:
        """The text of a record that holds one, null counting as empty.

        Raises:
            RecordError: A field holds something else.
            DataError: The field is not there.
        """
        template = self._config.template
        if template is None:
            return text_of_record(record, self._config, where, noun)
        return self._filled_template(template, record, where).strip("\n")

    def _filled_template(self, template: str, record: Mapping[str, Any], where: str) -> str:
        self._filled = True
        self._met.update(name for name in _named(template) if _has(record, name))
        return filled(template, record, where)

    def body(self, record: Mapping[str, Any], where: str, *, is_table: bool) -> Body:
        """What a record holds that is no text.

        Raises:
            RecordError: A field is not there, or cannot be used.
        """
        if _has(record, REJECTED_FIELD) and lookup(record, REJECTED_FIELD) is not None:
            self.rejected += 1
        if self.kind == "tokens":
            if not _has(record, "input_ids"):
                raise RecordError("a field that is missing", f"{where} has no input_ids.")
            return tokens_of(record, where)
        name = _conversation_fields(record, self._config)
        if self.kind == "conversation" and name:
            return conversation_of(
                lookup(record, name[0]),
                self._optional(record, self._config.tools_field),
                where,
                name[0],
                system=self._optional(record, self._config.system_field),
                is_table=is_table,
            )
        return self._pair(record, where, is_table)

    def _optional(self, record: Mapping[str, Any], name: str | None) -> Any:
        return None if name is None or not _has(record, name) else lookup(record, name)

    def _pair(self, record: Mapping[str, Any], where: str, is_table: bool) -> Body:
        names = _pair_fields(record, self._config)
        if not names:
            raise RecordError(
                "a field that is missing",
                f"{where} has neither messages nor a prompt with its completion, found the fields "
                f"[{', '.join(map(repr, record))}]; set corpus.messages_field, or corpus.prompt_field (or "
                "corpus.template) and corpus.completion_field.",
            )
        first, last = names[0], names[-1]
        completion = lookup(record, last)
        template, _ = _prompt(record, self._config)
        if template is None:
            prompt = lookup(record, first)
            if isinstance(prompt, list) or isinstance(completion, list):
                return self._joined(record, prompt, completion, where, is_table)
            prompt = _text(prompt, first, where)
        else:
            prompt = self._filled_template(template, record, where)
        answer = _text(completion, last, where)
        if not answer:
            raise RecordError(
                "an empty completion", f"{where}: {last!r} is empty; mend or remove the record."
            )
        if self.kind == "pair":
            return Pair(prompt, answer)
        messages = [
            {"role": "user", "content": prompt.strip()},
            {"role": "assistant", "content": answer},
        ]
        tools, system = (
            self._optional(record, name) for name in (self._config.tools_field, self._config.system_field)
        )
        return conversation_of(messages, tools, where, "messages", system=system)

    def _joined(
        self, record: Mapping[str, Any], prompt: Any, completion: Any, where: str, is_table: bool
    ) -> Conversation:
        """Prompt and completion as messages, or a text for one message of the user and of the assistant."""
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if not isinstance(before, list) or not isinstance(after, list):
            raise RecordError(
                "prompt of another form", f"{where}: prompt and completion are no lists of messages."
            )
        if isinstance(prompt, str) and any(_content(message) == prompt for message in after):
            before = []  # the answer is the whole conversation, as in UltraFeedback's pairs
        return conversation_of(
            before + after,
            self._optional(record, self._config.tools_field),
            where,
            "prompt and completion",
            system=self._optional(record, self._config.system_field),
            given=len(before),
            is_table=is_table,
        )


def _content(message: Any) -> Any:
    return message.get("content") if isinstance(message, Mapping) else None


_REMEDIES = {
    "conversation": "corpus.messages_field to the messages'",
    "pair": "corpus.prompt_field or corpus.template, and corpus.completion_field",
    "tokens": "corpus.kind to what the records hold",
}


def _kinds(found: Mapping[str, Any], config: CorpusConfig) -> dict[str, str]:
    """The kinds of which a record with these fields may be, most certain first, each with a field."""
    text, pair = _text_fields(found, config), _pair_fields(found, config)
    named = {
        "text": text if config.template is None else [],
        "conversation": _conversation_fields(found, config),
        "tokens": ["input_ids"] if _has(found, "input_ids") else [],
        "pair": pair,
    }
    if config.template is not None and not pair:
        named["text"] = text
    return {kind: ", ".join(names) for kind, names in named.items() if names}


def _has(found: Mapping[str, Any], name: str) -> bool:
    try:
        lookup(found, name)
    except KeyError:
        return False
    return True


def _text_fields(found: Mapping[str, Any], config: CorpusConfig) -> list[str]:
    names = [config.text_field] if config.template is None else _named(config.template)
    return [name for name in names if _has(found, name)]


def _conversation_fields(found: Mapping[str, Any], config: CorpusConfig) -> list[str]:
    names = [config.messages_field, SHAREGPT_FIELD]
    # Of preferences without a prompt of their own, each answer is a whole conversation.
    if _has(found, REJECTED_FIELD) and not any(_has(found, name) for name in _prompt(found, config)[1]):
        names.append(CHOSEN_FIELD)
    return [name for name in names if _has(found, name)][:1]


def _prompt(found: Mapping[str, Any], config: CorpusConfig) -> tuple[str | None, list[str]]:
    """The template that makes a pair's prompt, None where it is a field as it stands, and its fields."""
    if config.template is not None:
        return config.template, _named(config.template)
    if config.prompt_field is not None or _has(found, "prompt"):
        return None, [config.prompt_field or "prompt"]
    return ALPACA_TEMPLATE, ["instruction"]


def _pair_fields(found: Mapping[str, Any], config: CorpusConfig) -> list[str]:
    """The fields of which a prompt is made, and behind them that of the completion; none where one lacks."""
    completions = COMPLETION_FIELDS if config.completion_field is None else (config.completion_field,)
    prompts = [name for name in _prompt(found, config)[1] if _has(found, name)]
    last = [name for name in completions if _has(found, name)][:1]
    return [*prompts, *last] if prompts and last else []


def _named(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def filled(template: str, record: Mapping[str, Any], where: str) -> str:
    r"""A template with a record's fields in it, without the paragraphs whose fields are all empty.

    Args:
        template: Text with names in braces; paragraphs end at blank lines, and `\n` stands for a line break.
        record: The record; a field that it lacks is empty.
        where: The record, for messages.

    Raises:
        RecordError: A field holds something else than text.
    """
    made, paragraph, names, values = [], "", 0, 0
    for literal, name, _, _ in Formatter().parse(with_escapes(template)):
        *ended, rest = literal.split("\n\n")
        for part in ended:
            if values or not names:
                made.append(f"{paragraph}{part}\n\n")
            paragraph, names, values = "", 0, 0
        paragraph += rest
        if name is not None:
            value = _text(lookup(record, name) if _has(record, name) else None, name, where)
            paragraph, names, values = paragraph + value, names + 1, values + bool(value.strip())
    if values or not names:
        made.append(paragraph)
    return "".join(made)


def _text(value: Any, name: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecordError(
            f"{name} of another form",
            f"{where}: {name!r} is of type {type(value).__name__}, expected text; mend it, or name another "
            "field (corpus.prompt_field, corpus.completion_field, corpus.template).",
        )
    return value
