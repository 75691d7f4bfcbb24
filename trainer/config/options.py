"""The leaves of the configuration, one by one, for help texts and checks."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from sparsekd.trainer.config.schema import Config


@dataclass(frozen=True)
class Option:
    """One leaf of the configuration, for help texts and checks."""

    key: str
    type_name: str
    default: Any
    comment: str
    choices: tuple[str, ...] | None
    minimum: float | None
    maximum: float | None


def options(node: Any = Config, prefix: str = "") -> Iterator[Option]:
    """Yields every leaf of the configuration tree in the order of the schema."""
    instance = node() if isinstance(node, type) else node
    for item in fields(instance):
        value = getattr(instance, item.name)
        key = f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from options(value, f"{key}.")
            continue
        type_name = (
            item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
        )
        if not isinstance(item.type, type):
            type_name = str(item.type).replace("typing.", "")
        yield Option(
            key=key,
            type_name=type_name,
            default=value,
            comment=item.metadata["comment"],
            choices=item.metadata["choices"],
            minimum=item.metadata["minimum"],
            maximum=item.metadata["maximum"],
        )
