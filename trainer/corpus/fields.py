"""The fields of one record: a line of JSON, a row of a table. A name with dots leads into inner records."""

import math
import struct
from collections.abc import Mapping
from typing import Any

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.run.errors import DataError

MOST_NAMES = 20
"""Names that a message lists."""


class RecordError(DataError):
    """A record that cannot be used. `corpus.invalid=skip` leaves it out.

    Attributes:
        reason: What is wrong in a few words, the same for all records with this fault.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["RecordError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))  # as another process sends it


def lookup(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, `a.b` meaning field `b` of the record in field `a`.

    A field whose own name has the dot wins; a record that is null has null fields.

    Raises:
        KeyError: There is no such field.
    """
    if name in record:
        return record[name]
    end = name.rfind(".")
    while end > 0:  # the longest name of its own first
        inner = record.get(name[:end], "")
        if inner is None:
            return None
        if isinstance(inner, Mapping):
            try:
                return lookup(inner, name[end + 1 :])
            except KeyError:
                pass
        end = name.rfind(".", 0, end)
    raise KeyError(name)


def text_of_record(record: Mapping[str, Any], config: CorpusConfig, where: str, kind: str) -> str:
    """The text of a record, null counting as empty.

    Raises:
        DataError: The field is not there, or holds something else.
    """
    text = _value(record, config, "text_field", where, kind)
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise RecordError(
            "text of another form",
            f"{where}: {config.text_field!r} is of type {type(text).__name__}, expected text; "
            "set corpus.text_field to the field that holds the text.",
        )
    return text


def weight_of_record(record: Mapping[str, Any], config: CorpusConfig, where: str, kind: str) -> float:
    """The weight of a record (float32; 1 where none is configured).

    Raises:
        DataError: The field is not there, or holds something else.
    """
    if config.weight_field is None:
        return 1.0
    value = _value(record, config, "weight_field", where, kind)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            weight = struct.unpack("<f", struct.pack("<f", value))[0]
        except OverflowError:
            weight = math.inf
        if math.isfinite(weight) and weight >= 0:
            return weight
    raise RecordError(
        "a weight that is no number",
        f"{where}: {config.weight_field!r} is {value!r}, expected a finite number, 0 or more; mend it, or "
        "leave corpus.weight_field away to weigh all documents alike.",
    )


def require_fields(
    found: Mapping[str, Any], config: CorpusConfig, where: str, kind: str, *, with_text: bool = True
) -> None:
    """Checks that a table has the columns of text and weight that are asked for.

    Args:
        found: Columns by name; one of records maps to its own fields in turn, any other to anything.
        config: What is asked for.
        where: The table, for the message.
        kind: What the message calls a field.
        with_text: Whether there must be a text.

    Raises:
        DataError: One is missing; the message names its key.
    """
    for key in ("text_field", "weight_field") if with_text else ("weight_field",):
        if getattr(config, key) is not None:
            _value(found, config, key, where, kind)


def _value(record: Mapping[str, Any], config: CorpusConfig, key: str, where: str, kind: str) -> Any:
    name = getattr(config, key)
    try:
        return lookup(record, name)
    except KeyError:
        remedy = f"corpus.{key} to the {key.removesuffix('_field')}'s"
        raise missing_field(record, name, where, kind, remedy) from None


def missing_field(record: Mapping[str, Any], name: str, where: str, kind: str, remedy: str) -> DataError:
    """The error of a record or table that lacks a field; `remedy` is what is to be set."""
    names = sorted(_names(record)) if kind == "field" else _names(record)
    shown = ", ".join(repr(name) for name in names[:MOST_NAMES])
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    of = "the fields " if kind == "field" else ""
    return DataError(f"{where} has no {kind} {name!r}, found {of}[{shown}]{more}; set {remedy}.")


def _names(record: Mapping[str, Any]) -> list[str]:
    """The names of a record's fields, those of a record in it with a dot."""
    names = []
    for name, value in record.items():
        names += [f"{name}.{inner}" for inner in value] if isinstance(value, Mapping) and value else [name]
    return names
