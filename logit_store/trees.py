"""Nested values, such as settings and manifests: their leaves by name, and where two of them differ."""

from collections.abc import Mapping
from typing import Any


def flat(value: object, *, lists: bool = True, prefix: str = "") -> dict[str, Any]:
    """Returns a nested value as {dotted path: leaf}; what is empty inside of it is a leaf.

    Args:
        value: mappings, and lists or tuples, of plain values.
        lists: whether their elements are leaves (`a[0]`), or they themselves are.
        prefix: the path of the value.
    """
    if isinstance(value, Mapping) and (value or not prefix):
        pairs = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
    elif lists and isinstance(value, (list, tuple)) and value:
        pairs = [(f"{prefix}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {prefix: value}
    return {name: leaf for path, item in pairs for name, leaf in flat(item, lists=lists, prefix=path).items()}


def differing(
    left: object, right: object, *, absent: object, lists: bool = True
) -> list[tuple[str, Any, Any]]:
    """Returns the leaves in which two nested values differ as (dotted path, left, right), by path.

    Args:
        left: a nested value.
        right: another one.
        absent: what stands for a leaf that is on one side only.
        lists: as in `flat`.
    """
    before, after = flat(left, lists=lists), flat(right, lists=lists)
    pairs = [
        (name, before.get(name, absent), after.get(name, absent))
        for name in sorted(before.keys() | after.keys())
    ]
    return [(name, old, new) for name, old, new in pairs if old != new]
