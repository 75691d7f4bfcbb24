"""What every importer gives: documents with the most likely ids that their source lists at each position.

Shapes: T tokens of a document, K most ids listed at a position.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError

NOT_LISTED = -1
"""Fills `head_ids` behind the ids that a position lists."""


@dataclass(frozen=True)
class Document:
    """One sequence of the source. The record at position t speaks of token t + 1, as everywhere.

    Attributes:
        where: its place in the source, for messages.
        token_ids: int64 [T].
        loss_mask: bool [T], where token t + 1 counts; the last is False.
        head_ids: int64 [T, K], the listed ids in any order, then `NOT_LISTED`; a row of these where the
            source has no record.
        head_logprobs: float64 [T, K], their log-probabilities at temperature 1 (logits where the source has
            no normaliser), -inf behind them.
        true_logprob: float64 [T], of token t + 1; NaN where the source does not give it.
    """

    where: str
    token_ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    head_ids: NDArray[np.int64]
    head_logprobs: NDArray[np.float64]
    true_logprob: NDArray[np.float64]


@dataclass(frozen=True)
class Source:
    """Somebody else's capture.

    Attributes:
        format: its name, as in `FORMATS`.
        files: that were read, in order.
        rest: `derived` where values are full-vocabulary log-probabilities, `unknown` where they are not.
        cannot_give: what a store holds and this source does not, one phrase each; the manifest remembers
            them.
        documents: begins to read; each call reads anew, and gives the same documents in the same order.
        details: further facts for the manifest, as JSON values.
    """

    format: str
    files: tuple[Path, ...]
    rest: str
    cannot_give: tuple[str, ...]
    documents: Callable[[], Iterator[Document]]
    details: dict[str, Any]


def source_files(path: Path, suffixes: tuple[str, ...], what: str) -> tuple[Path, ...]:
    """Returns the file, or the folder's files with one of the suffixes in natural order (data_2 before
    data_10).

    Raises:
        StoreError: there is none.
    """
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise StoreError(f"{path} is not there; give the folder or the file that holds {what}.")
    found = [item for item in path.iterdir() if item.is_file() and item.name.endswith(suffixes)]
    if not found:
        raise StoreError(
            f"{path} has no file that ends in {' or '.join(suffixes)}, where {what} is expected."
        )
    return tuple(sorted(found, key=_natural))


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts: list[tuple[int, int, str]] = []
    digits = text = ""
    for letter in path.name + "\0":
        if letter.isdigit():
            if text:
                parts.append((1, 0, text))
                text = ""
            digits += letter
            continue
        if digits:
            parts.append((0, int(digits), ""))
            digits = ""
        text += letter
    return [*parts, (1, 0, text)]
