"""Lines of JSON, one object each, compressed or not, with the place of each for messages.

A small file may unpack to a huge one: no more of it is in memory than one line, which is bounded.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.document import one_line
from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.run.streams import LARGEST_DOCUMENT, open_text, read_lines


def read_objects(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Returns (place, object) for each line; a file that is one JSON array gives its elements.

    Raises:
        StoreError: the file cannot be read or unpacked, a line is longer than `LARGEST_DOCUMENT`, or is no
            JSON object, such as one that was cut off.
    """
    try:
        with open_text(file) as stream:
            yield from _objects((line.decode() for line in read_lines(stream, file)), file)
    except UnicodeDecodeError as error:
        raise StoreError(f"{file} cannot be read as text ({one_line(error)}): fetch it again.") from error
    except DataError as error:
        raise StoreError(str(error)) from error


def _objects(lines: Iterator[str], file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number, first = 0, ""
    while not first.strip():
        number, first = number + 1, next(lines, "")
        if not first:
            return
    if first.lstrip().startswith("["):  # an array has to be read as a whole
        parsed = _parse(_whole(first, lines, file), str(file))
        if not isinstance(parsed, list):
            raise StoreError(f"{file} holds a {type(parsed).__name__}, expected an array of objects.")
        for number, item in enumerate(parsed):
            yield _an_object(item, f"{file}, element {number}")
        return
    if _is_whole(first):
        yield _an_object(json.loads(first), f"{file}, line {number}")
        for further, line in enumerate(lines, start=number + 1):
            if line.strip():
                yield _an_object(_parse(line, f"{file}, line {further}"), f"{file}, line {further}")
        return
    # One object over several lines.
    yield _an_object(_parse(_whole(first, lines, file), str(file)), str(file))


def _whole(first: str, lines: Iterator[str], file: Path) -> str:
    parts, length = [first], len(first)
    for line in lines:
        parts.append(line)
        length += len(line)
        if length > LARGEST_DOCUMENT:
            raise StoreError(
                f"{file} is one JSON text of more than {LARGEST_DOCUMENT:,} characters, which would have to "
                "be in memory as a whole: write one object per line (jq -c '.[]')."
            )
    return "".join(parts)


def array_of(value: Any, dtype: type, dimensions: int, name: str, where: str) -> NDArray[Any]:
    """Returns nested lists of numbers as an array.

    Raises:
        StoreError: they are no numbers, or the lists are of unequal length.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # the latter: an integer beyond float64 among fractions
        array = np.empty(0, object)
    numbers = array.dtype.kind in ("iu" if dtype is np.int64 else "iuf") or array.size == 0
    if array.ndim != dimensions or not numbers or array.dtype == object:
        kind = "integers" if dtype is np.int64 else "numbers"
        raise StoreError(f"{where}: {name} is no {dimensions}-dimensional list of {kind} of equal lengths.")
    return array.astype(dtype)


def _an_object(item: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(item, dict):
        raise StoreError(f"{where} holds a {type(item).__name__}, expected an object.")
    return where, item


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{where} is no JSON ({one_line(error)}): a write was cut off there; remove the rest of it, or "
            "capture again."
        ) from error
