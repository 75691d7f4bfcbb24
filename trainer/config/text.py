"""Text settings arrive as they were typed.

Hydra reads `run.name=1e-3` as a number and refuses `run.name=a=b`; its own remedy is quotes. The schema knows
which keys are text, so their values get Hydra's quotes here, before Hydra reads them. YAML has no such
moment: there, what YAML itself takes for a number or a switch is refused (`exact_schema`).
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from sparsekd.trainer.config.options import options
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.run.errors import ConfigError

UNREADABLE = (HydraException, ValueError, RecursionError)
"""What Hydra's parser raises; ValueError for an integer of thousands of digits."""

UNWRITABLE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
"""Line breaks that a YAML writer of Python's confuses with others, and bytes that are not UTF-8."""

EXACT = str | bytes
"""Text and nothing that could become text: OmegaConf converts no value for a union, but would for `str`."""

EXACT_TYPES: dict[Any, Any] = {
    str: EXACT,
    str | None: EXACT | None,
    list[str]: list[EXACT],
    dict[str, str]: dict[str, EXACT],
}

# What stands before the next comma: Hydra's quotes, or anything, in which `${...}` may hold commas.
_VALUE = (
    r"""[ \t]*(?:(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")[ \t]*|(?P<plain>(?:\$\{[^}]*\}|[^,])*)),"""
)
_ELEMENT = re.compile(_VALUE, re.DOTALL)
_ENTRY = re.compile(r"[ \t]*(?P<name>[^:,'\"]+):" + _VALUE, re.DOTALL)


def as_typed(word: str) -> str:
    """Returns an override in which Hydra finds the text that was typed; any other word comes back as it is.

    Text begins behind the first `=` and may hold anything. Three things keep a meaning: a value that Hydra's
    quotes enclose as a whole stands for what is in them, `null` unsets a key that may be unset, and `${...}`
    stays an interpolation (`\\${` for the characters themselves). In lists and mappings of text this holds
    for what stands between the commas, without the spaces around it; only `null` is text there.

    Raises:
        ConfigError: A list or mapping whose elements cannot be told apart, a broken `${`, or a text that
            OmegaConf or YAML cannot keep.
    """
    head, equals, value = word.partition("=")
    key = head.lstrip("+~").partition("@")[0]
    kind = _kind(key) if equals else None
    inside = value.strip(" \t")
    if kind in ("str", "str | None"):
        if value == "null" and kind == "str | None":
            return word
        quoted_text = _quoted(_unquoted(value), word)
    elif kind == "list[str]" and inside.startswith("[") and inside.endswith("]"):
        quoted_text = f"[{','.join(_elements(_ELEMENT, inside[1:-1], word))}]"
    elif kind == "dict[str, str]" and inside.startswith("{") and inside.endswith("}"):
        quoted_text = f"{{{','.join(_elements(_ENTRY, inside[1:-1], word))}}}"
    else:
        return word
    return f"{head}={quoted_text}"


def is_text(key: str) -> bool:
    """Whether the values of a key, or of a group's choice, are text."""
    return _kind(key) in ("str", "str | None")


def separate_texts(word: str) -> list[str]:
    """The values of an override of text, each as it would be typed alone: what stands between the commas.

    Raises:
        ConfigError: They cannot be told apart.
    """
    value = word.partition("=")[2]
    return [found["quoted"] or text for found, text in _separated(_ELEMENT, value, word)] or [value]


def quoted(text: str) -> str:
    """Text in Hydra's quotes."""
    # Hydra keeps the override, too, and OmegaConf reads its `${...}`: no quote in there may be escaped.
    return QuotedString(text, Quote.double if "'" in text else Quote.single).with_quotes()


def without_interpolation(text: str) -> str:
    """Text for OmegaConf, which reads `${...}` in it as these characters."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def exact_schema(section: type = Config) -> type:
    """The schema for Hydra: `Config` with `EXACT` for text, so that no number becomes text on the way."""
    members: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(item.type) and isinstance(item.type, type):
            exact = exact_schema(item.type)
            members.append((item.name, exact, dataclasses.field(default_factory=exact)))
        else:
            default = dataclasses.field(default=item.default, default_factory=item.default_factory)
            members.append((item.name, EXACT_TYPES.get(item.type, item.type), default))
    return dataclasses.make_dataclass(section.__name__, members)


def _kind(key: str) -> str | None:
    """The type of a key, or of an entry in a mapping of text; the choice of a group is text."""
    types = _types()
    parent = key.rpartition(".")[0]
    if types.get(parent) == "dict[str, str]" or "." not in key:
        return "str"
    return types.get(key)


@functools.cache
def _types() -> dict[str, str]:
    return {leaf.key: leaf.type_name for leaf in options()}


def _unquoted(value: str) -> str:
    """What Hydra's quotes enclose, where they enclose the whole value; else the value."""
    if value.strip(" \t")[:1] not in ("'", '"'):
        return value
    try:
        override = OverridesParser.create().parse_override(f"text={value}")
    except UNREADABLE:
        return value
    return value if override.is_sweep_override() else str(override.value())


def _quoted(text: str, word: str) -> str:
    if text == "???":
        raise ConfigError(f"{word!r}: the text ??? stands for a value that is missing; choose another.")
    if UNWRITABLE.search(text):
        raise ConfigError(f"{word!r} holds a character that config.yaml cannot keep; leave it out.")
    if "${" in text:
        try:
            OmegaConf.create({"text": text})
        except GrammarParseError as error:
            raise ConfigError(
                f"{word!r}: ${{ begins the name of another key, as in ${{run.root}}; write \\${{ for the "
                "characters themselves."
            ) from error
    return quoted(text)


def _elements(pattern: re.Pattern[str], inside: str, word: str) -> list[str]:
    """The elements of a list, or the entries of a mapping, with the text of each in quotes."""
    elements = []
    for found, text in _separated(pattern, inside, word):
        name = found.groupdict().get("name")
        elements.append(_quoted(text, word) if name is None else f"{name}:{_quoted(text, word)}")
    return elements


def _separated(pattern: re.Pattern[str], inside: str, word: str) -> Iterator[tuple[re.Match[str], str]]:
    """What stands between the commas, each as it was found and as text without quotes."""
    position = 0
    while inside.strip(" \t") and position <= len(inside):
        found = pattern.match(f"{inside},", position)
        if found is None:
            raise ConfigError(
                f"{word!r} is not a mapping of names to text, written as {{name: text, other: text}}."
            )
        position = found.end()
        if found["quoted"] is not None:
            text = _unquoted(found["quoted"])
        else:
            text = found["plain"].rstrip(" \t")
            # Each of these could be one element with a comma in it, or two.
            if not text or text[0] in "'\"" or text.endswith("\\") or not _is_balanced(text):
                example = "['a, b',c]" if pattern is _ELEMENT else "{name: 'a, b'}"
                raise ConfigError(
                    f"{word!r} can be read in more than one way at {text!r}; write that text in quotes, as "
                    f"in {example}."
                )
        yield found, text


def _is_balanced(text: str) -> bool:
    """Whether brackets are closed: in the elements of `[a[0-9],b]`, not in those of `[[a,b],c]`."""
    return all(text.count(first) == text.count(last) for first, last in ("()", "[]", "{}"))
