"""Tables of plain top logits: arcee's published captures of LLaMA-405B, and others with their columns.

Layout, as of the data set arcee-ai/LLama-405B-Logits (Parquet, August 2024) and of what DistillKit takes
without decompression. A row is one text: `input_ids` [T]; `token_ids` [T][k] and `top_values` [T][k], the
most likely ids and their logits at each position, which describe the token that follows. Also read where they
are there: `normalized_logits` [T][k], the softmax of these logits, and `attention_mask` [T], 0 at padding
before or behind the text.

Whether that softmax was taken over the vocabulary or over the list alone is not said anywhere, and decides
what the probabilities mean. Over the list, every position sums to 1; over the vocabulary, positions where the
teacher was unsure fall short of it. So the first texts decide, and later ones that contradict them are
refused. Without the column the logits have no normaliser. The normaliser of a position is its largest logit
less the logarithm of its probability: the logits themselves are more precise than small probabilities.

Shapes: T tokens of a text, k entries of a position.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.columns import TableRow, lists_of, read_rows, table_files, vector
from sparsekd.trainer.importers.document import (
    LINES,
    NOT_LISTED,
    Document,
    Format,
    Options,
    Source,
    padded_lists,
)

COLUMNS = ("input_ids", "token_ids", "top_values")
SOFTMAX = "normalized_logits"
MASK = "attention_mask"

DECIDING_TEXTS = 8

SUM_TOLERANCE = 1e-3
"""By how much probabilities of a list may sum to other than 1: rounding of float32 or bfloat16 sums."""

SOFTMAX_TOLERANCE = 2e-2
"""Nats by which the logarithm of a probability may differ from its logit less the normaliser."""

SEEN = 1e-5
"""Probabilities below say nothing about the normaliser: they may have been rounded to 0."""


def read_topk(path: Path, options: Options) -> Source:
    """Opens a file, or a folder of files, of such tables.

    Raises:
        StoreError: there is none, columns are missing, or the first text is damaged.
    """
    files = table_files(path, "tables of top logits")

    def rows() -> Iterator[TableRow]:
        return read_rows(files, COLUMNS, (SOFTMAX, MASK))

    first = list(islice(rows(), DECIDING_TEXTS))
    if not first:
        raise StoreError(f"{path} is empty.")
    normalised = any(SOFTMAX in row[1] and _is_over_vocabulary(_entries(row)[2]) for row in first)

    def documents() -> Iterator[Document]:
        for row in rows():
            yield _document(row, normalised)

    return Source(files=files, rest="derived" if normalised else "unknown", documents=documents)


FORMAT = Format(
    name="topk",
    reads="tables with token_ids and top_values, such as arcee's LLaMA-405B logits",
    suffixes=(".parquet", *LINES),
    fields=(frozenset(COLUMNS),),
    read=read_topk,
    cannot_give=("a loss mask (every token of a text counts) and document boundaries inside a text",),
)


def _document(row: TableRow, normalised: bool) -> Document:
    where, cells = row
    tokens = vector(row, "input_ids", integer=True)
    ids, logits, probabilities = _entries(row)
    if len(ids) != len(tokens):
        raise StoreError(
            f"{where} has {len(tokens)} input_ids and {len(ids)} token_ids, expected equal numbers: the row "
            "is damaged."
        )
    if SOFTMAX in cells:
        if not normalised and _is_over_vocabulary(probabilities):
            raise StoreError(
                f"{where}: {SOFTMAX} are a softmax over the vocabulary, those of the first rows over the "
                "list: import the two kinds apart."
            )
        normaliser = _normaliser(where, ids, logits, probabilities)
        logits = logits - normaliser[:, None] if normalised else logits
    elif normalised:
        raise StoreError(f"{where} lacks {SOFTMAX}, which the first rows have: import the two kinds apart.")
    begin, end = _span(row, len(tokens))
    mask = np.ones(end - begin, np.bool_)
    mask[-1:] = False
    return Document(where, tokens[begin:end], mask, ids[begin:end], logits[begin:end])


def _entries(row: TableRow) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Returns ids, logits and probabilities, [T, k] each; the last are 0 where the column is missing."""
    where, cells = row
    listed, values = lists_of(row, "token_ids", integer=True), lists_of(row, "top_values", integer=False)
    softmax = lists_of(row, SOFTMAX, integer=False) if SOFTMAX in cells else None
    for name, other in (("top_values", values), (SOFTMAX, softmax)):
        if other is None:
            continue
        if len(other.lengths) != len(listed.lengths):
            raise StoreError(
                f"{where} has {len(listed.lengths)} token_ids and {len(other.lengths)} {name}, expected "
                "equal numbers: the row is damaged."
            )
        bad = np.flatnonzero(other.lengths != listed.lengths)
        if bad.size:
            raise StoreError(
                f"{where}, position {bad[0]} lists {listed.lengths[bad[0]]} token_ids and "
                f"{other.lengths[bad[0]]} {name}, expected equal numbers: the row is damaged."
            )
    ids = padded_lists(listed.flat, listed.lengths, NOT_LISTED, where)
    logits = padded_lists(values.flat, values.lengths, -np.inf, where)
    if softmax is None:
        return ids, logits, np.zeros(ids.shape)
    return ids, logits, padded_lists(softmax.flat, softmax.lengths, 0.0, where)


def _is_over_vocabulary(probabilities: NDArray[np.float64]) -> bool:
    return bool((probabilities.sum(axis=1) < 1 - SUM_TOLERANCE).any())


def _normaliser(
    where: str,
    ids: NDArray[np.int64],
    logits: NDArray[np.float64],
    probabilities: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Returns the logits' log sum exp, [T], by the most likely entry; refuses others that contradict it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.where(ids != NOT_LISTED, logits - np.log(probabilities), np.nan)
        best = np.take_along_axis(apart, probabilities.argmax(axis=1)[:, None], axis=1)
        wrong = (probabilities > SEEN) & ~(np.abs(apart - best) <= SOFTMAX_TOLERANCE)
    wrong |= ~((probabilities >= 0) & (probabilities <= 1))
    if wrong.any():
        position, column = np.argwhere(wrong)[0]
        raise StoreError(
            f"{where}, position {position}, entry {column}: the probability "
            f"{probabilities[position, column]:.4g} is not the softmax of the logit "
            f"{logits[position, column]:.4g}: the row is damaged, or was captured at another temperature."
        )
    return best[:, 0]


def _span(row: TableRow, length: int) -> tuple[int, int]:
    """Returns where the text begins and ends between padding."""
    where, cells = row
    if MASK not in cells:
        return 0, length
    mask = vector(row, MASK, integer=True)
    inside = np.flatnonzero(mask)
    begin, end = (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, 0)
    if len(mask) != length or not np.isin(mask, (0, 1)).all() or inside.size != end - begin:
        raise StoreError(
            f"{where}: {MASK} is no run of ones among {length} positions: several texts in a row, or a "
            "damaged one."
        )
    return begin, end
