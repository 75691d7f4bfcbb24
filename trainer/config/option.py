"""How the schema writes down one leaf of the configuration."""

from dataclasses import field
from typing import Any


def option(
    default: Any,
    comment: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with the comment that `--help` shows and the values that it may take.

    Args:
        default: The default; lists and dicts are copied for each instance.
        comment: One sentence for a reader of `--help`.
        choices: Legal values of a string field, or of a list's entries; `None` for any.
        minimum: Smallest legal number (elementwise for lists), inclusive.
        maximum: Largest legal number (elementwise for lists), inclusive.
    """
    metadata = {"comment": comment, "choices": choices, "minimum": minimum, "maximum": maximum}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
