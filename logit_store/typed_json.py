"""JSON that anybody may have written, read into declared types: a value of another type or range is named.

Bounds come first (bytes, nesting, number of values), so that nothing large is made of a small text. Then each
value is compared with the annotation of the dataclass field that it is for: `int` (64 bits), `float`, `str`,
`bool`, `X | None`, `tuple[X, ...]`, `dict[str, X]`, `dict[str, Any]` (anything, nested at most `DEEPEST`),
an integer `NDArray`, or another dataclass; `Annotated` adds a `Range` or a `Matching`. No field may be
absent or unknown. Refused is also what Python's json takes: keys twice, NaN, infinity, `true` for 1.
"""

import dataclasses
import errno
import functools
import json
import math
import re
import reprlib
import types
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.places.files import explained, read_file
from sparsekd.logit_store.places.paths import StorePath

Kind = TypeVar("Kind")

DEEPEST = 32
"""Levels of nesting of a value of any type."""

LONGEST = 1000
"""Characters of a `str`; a value of any type may hold longer ones."""

_INT64 = 2**63

_SOME = 1000
"""Values that any text may hold, however short it is."""

_RESTORE = "restore it from a copy"


@dataclasses.dataclass(frozen=True)
class Range:
    """The integers from `low` to `high`, both included."""

    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Matching:
    """Texts that a regular expression matches whole, and what these are in words."""

    pattern: str
    words: str


Sha256 = Annotated[str, Matching("[0-9a-f]{64}", "64 lower-case hex digits")]
Count = Annotated[int, Range(0, _INT64 - 1)]


class _Mismatch(Exception):
    """A value is not of its type. Where it is, is entered from the inside to the outside.

    Attributes:
        before: what is wrong, up to the place of the value.
        after: the rest of it.
        path: keys and indices, the innermost first.
    """

    def __init__(self, before: str, after: str = "") -> None:
        super().__init__()
        self.before = before
        self.after = after
        self.path: list[str] = []

    @classmethod
    def of(cls, found: object, expected: str) -> "_Mismatch":
        shown = short(found)
        if isinstance(found, (dict, list)):
            shown = f"{'an object' if isinstance(found, dict) else 'a list'} of {len(found)}"
        return cls(f"has {shown} as", f", expected {expected}")

    def sentence(self, where: str) -> str:
        path = ".".join(reversed(self.path)).replace(".[", "[") or "its content"
        return f"{where} {self.before} {path}{self.after}: {_RESTORE}."


_Read = Callable[[Any], Any]
"""Returns a parsed value as its type has it, or raises _Mismatch."""


def short(value: object) -> str:
    """Returns any value as a short piece of one line, for messages."""
    text = repr(value) if isinstance(value, str) else _SHORT.repr(value)
    return text if len(text) <= 100 else f"{text[:40]}... ({len(text):,} letters)"


def short_pair(left: object, right: object) -> tuple[str, str]:
    """Returns two values as `short` does; of long texts that begin alike, from the word that differs."""
    if isinstance(left, str) and isinstance(right, str) and max(len(left), len(right)) > 90:
        one, other = left.split(" "), right.split(" ")
        pairs = enumerate(zip(one, other, strict=False))
        alike = next((place for place, words in pairs if words[0] != words[1]), min(len(one), len(other)))
        if alike:
            left, right = (f"...{' '.join(words[alike:])}" for words in (one, other))
    return short(left), short(right)


def one_line(text: str) -> str:
    """Returns a text that may quote anything, without control characters and cut in its middle."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text[:_SENTENCE])
    if len(text) <= _SENTENCE:
        return clean
    return f"{clean[: _SENTENCE // 2]} ... {one_line(text[-_SENTENCE // 2 :])}"


_SENTENCE = 800

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 4
_SHORT.maxlevel = 3


def read_bounded(place: StorePath, limit: int, read: Callable[[Any, int], bytes] = read_file) -> bytes:
    """Returns a whole file of at most `limit` bytes.

    Args:
        place: of the file.
        limit: bytes; a larger file is not read at all.
        read: gives the bytes of a place with that limit.

    Raises:
        FileNotFoundError: there is none.
        DamagedStoreError: it is larger.
        StoreError: it is no file, or cannot be read.
    """
    try:
        return read(place, limit)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise DamagedStoreError(f"{place} {error.strerror}: {_RESTORE}.") from None
        with explained(place):
            raise
    except ValueError as error:
        raise StoreError(f"{place} cannot be read ({error}): name a store by a path of letters.") from error


def parse_json(data: bytes, where: str) -> Any:
    """Parses ASCII JSON, strictly and within bounds.

    Args:
        data: whose length the caller has bounded.
        where: the place the text is from, for messages.

    Raises:
        DamagedStoreError: it is not ASCII or no JSON, has a key twice or a number that is none, is nested too
            deeply, or has more values than a text of its length that is written as stores write it.
    """
    # On one line each, with their indentation, values take at least that much of a text.
    if (
        data.count(b",") > _SOME + len(data) // 5
        or data.count(b"[") + data.count(b"{") > _SOME + len(data) // 32
    ):
        raise DamagedStoreError(
            f"{where} holds more values than its length of {len(data):,} bytes should: {_RESTORE}."
        )
    try:
        return json.loads(
            data.decode("ascii"), object_pairs_hook=_without_repetition, parse_constant=_no_number
        )
    except UnicodeDecodeError as error:
        raise DamagedStoreError(f"{where} is damaged at byte {error.start}: {_RESTORE}.") from error
    except ValueError as error:
        raise DamagedStoreError(f"{where} is not valid JSON ({error}): {_RESTORE}.") from error
    except RecursionError as error:
        raise DamagedStoreError(f"{where} is nested too deeply to be read: {_RESTORE}.") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {short(twice)} stands twice in one object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def typed(kind: type[Kind], value: object, where: str) -> Kind:
    """Returns a parsed value as an instance of a dataclass.

    Args:
        kind: the dataclass.
        value: from `parse_json`.
        where: the place the text is from, for messages.

    Raises:
        DamagedStoreError: a field is missing, unknown, or not of its type; names it, with both.
    """
    try:
        return _reader(kind)(value)  # type: ignore[arg-type]  # a class is hashable
    except _Mismatch as wrong:
        raise DamagedStoreError(wrong.sentence(where)) from None


def require(holds: bool, where: object, name: str, expected: str, found: object) -> None:
    """Raises DamagedStoreError for a value that contradicts others, unless it holds.

    Args:
        holds: whether it fits them.
        where: the file that it stands in.
        name: of the value.
        expected: what would fit, in words.
        found: the value.
    """
    if not holds:
        raise DamagedStoreError(f"{where} has {short(found)} as {name}, expected {expected}: {_RESTORE}.")


@functools.cache
def _reader(kind: Any) -> _Read:
    """Returns what reads values of a type; made once for each."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass_reader(kind)
    if origin is Annotated:
        inner, *rules = arguments
        return _ruled_reader(_reader(inner), rules)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _nullable_reader(_reader(inner))
    if origin is tuple:
        return _list_reader(_reader(arguments[0]))
    if origin is dict:
        return _any_object if arguments[1] is Any else _object_reader(_reader(arguments[1]))
    if origin is np.ndarray:
        return _array_reader(np.dtype(get_args(arguments[1])[0]))
    return {int: _int, float: _float, str: _str, bool: _bool}[kind]


def _int(value: Any) -> int:
    if type(value) is not int or not -_INT64 <= value < _INT64:
        raise _Mismatch.of(value, "an int of 64 bits")
    return value


def _float(value: Any) -> float:
    if type(value) not in (int, float) or not -_INT64 <= value < _INT64:  # neither NaN nor inf is
        raise _Mismatch.of(value, "a number")
    return value


def _str(value: Any) -> str:
    if type(value) is not str:
        raise _Mismatch.of(value, "a str")
    if len(value) > LONGEST:
        raise _Mismatch.of(value, f"at most {LONGEST} characters")
    if not value.isprintable():  # so that no page that shows it can be led astray by it
        raise _Mismatch.of(value, "printable characters")
    return value


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise _Mismatch.of(value, "a bool")
    return value


def _ruled_reader(inner: _Read, rules: list[Any]) -> _Read:
    (rule,) = rules
    if isinstance(rule, Range):

        def read_number(value: Any) -> Any:
            number = inner(value)
            if not rule.low <= number <= rule.high:
                raise _Mismatch.of(value, f"from {rule.low} to {rule.high}")
            return number

        return read_number
    matches = re.compile(rule.pattern).fullmatch

    def read_text(value: Any) -> Any:
        if matches(inner(value)) is None:
            raise _Mismatch.of(value, rule.words)
        return value

    return read_text


def _nullable_reader(inner: _Read) -> _Read:
    return lambda value: None if value is None else inner(value)


def _list_reader(inner: _Read) -> _Read:
    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise _Mismatch.of(value, "a list")
        found: list[Any] = []
        try:
            for item in value:
                found.append(inner(item))
        except _Mismatch as wrong:
            wrong.path.append(f"[{len(found)}]")
            raise
        return tuple(found)

    return read


def _array_reader(dtype: np.dtype[Any]) -> _Read:
    limits = np.iinfo(dtype)

    def read(value: Any) -> Any:
        if type(value) is not list:
            raise _Mismatch.of(value, "a list")
        for index, item in enumerate(value):
            if type(item) is not int or not limits.min <= item <= limits.max:
                wrong = _Mismatch.of(item, f"an int from {limits.min} to {limits.max}")
                wrong.path.append(f"[{index}]")
                raise wrong
        return np.array(value, dtype)

    return read


def _object_reader(inner: _Read) -> _Read:
    def read(value: Any) -> dict[str, Any]:
        found = {}
        for key, item in _object(value).items():
            try:
                found[key] = inner(item)
            except _Mismatch as wrong:
                wrong.path.append(_key(key))
                raise
        return found

    return read


def _object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise _Mismatch.of(value, "an object (dict)")
    return value


def _any_object(value: Any) -> dict[str, Any]:
    """Takes an object of any content that is not nested too deeply and whose numbers are numbers."""
    layer: list[Any] = [_object(value)]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for item in layer:
            for inner in item.values() if type(item) is dict else item:
                if type(inner) in (dict, list):
                    below.append(inner)
                elif type(inner) is float and not math.isfinite(inner):
                    raise _Mismatch.of(inner, "a finite number everywhere in it")
                elif type(inner) is int:
                    _int(inner)
        if not below:
            return value
        layer = below
    raise _Mismatch(f"has more than {DEEPEST} levels of nesting in")


def _dataclass_reader(kind: Any) -> _Read:
    hints = get_type_hints(kind, include_extras=True)
    readers = {field.name: _reader(hints[field.name]) for field in dataclasses.fields(kind)}

    def read(value: Any) -> Any:
        keys = _object(value).keys()
        if missing := sorted(readers.keys() - keys):
            raise _Mismatch(f"lacks {', '.join(missing)} in")
        if unknown := sorted(keys - readers.keys()):
            raise _Mismatch(f"has the unknown {', '.join(map(_key, unknown[:5]))} in")
        found = {}
        for key, item in value.items():
            try:
                found[key] = readers[key](item)
            except _Mismatch as wrong:
                wrong.path.append(key)
                raise
        return kind(**found)

    return read


def _key(key: str) -> str:
    """Returns a key for messages: a word as it is, everything else quoted and short."""
    return key if re.fullmatch(r"[\w.-]{1,60}", key, re.ASCII) else short(key)
