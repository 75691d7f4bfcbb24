"""From listed ids to a record, where the source did not keep the rest.

A source with full-vocabulary log-probabilities tells the rest's mass at temperature 1 and nothing else of it:
R_1 = 1 - sum of what it lists. Its rounding may bring that sum above 1: then the listed ids are scaled to sum
to 1 and the rest is empty. A source of logits without a normaliser tells ratios within its list alone. A
source of sampled ids tells nothing but these: its records are draws, from a rest that is everything.

Shapes: T tokens of a document, K most ids listed at a position, k head entries, D most samples of a position,
n draws, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.row import NO_ID, TeacherRecord
from sparsekd.logit_store.tools.reencode import log_sum_exp
from sparsekd.trainer.importers.document import NOT_LISTED, Document

MOST_NATS = 1e30
"""Of a value, either way: beyond are no logits, and soon no float32, as which values are stored."""

LARGEST_MASS = 2.0
"""A listed sum above this is no rounding: the values are not log-probabilities."""


@dataclass(frozen=True)
class Checked:
    """What was found when a document's list was put in order.

    Attributes:
        ids: int64 [T, K], by descending value, equal values by ascending id, then `NOT_LISTED`.
        values: float64 [T, K], then -inf; their exponentials sum to at most 1 where the rest is derived.
        true_logprob: float64 [T], NaN where unknown.
        listed: int64 [T], ids (of sampled ones: samples) at each position.
        excess: float64 [T], by how much the listed probabilities summed to more than 1.
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    true_logprob: NDArray[np.float64]
    listed: NDArray[np.int64]
    excess: NDArray[np.float64]


def put_in_order(document: Document, rest: str, vocabulary_size: int) -> Checked:
    """Sorts and checks what a document lists.

    Raises:
        StoreError: an id is outside of the vocabulary or listed twice, or a value is no log-probability; the
            message names place, position and value.
    """
    tokens = document.token_ids
    bad = np.flatnonzero((tokens < 0) | (tokens >= vocabulary_size))
    if bad.size:
        raise StoreError(
            f"{document.where}, position {bad[0]}: token id {tokens[bad[0]]} is not in the tokenizer, whose "
            f"ids are 0 to {vocabulary_size - 1}: name the tokenizer that made these ids."
        )
    if document.drawn_ids is not None:
        drawn, known = document.drawn_ids, document.drawn_ids != NOT_LISTED
        _refuse(
            known & ((drawn < 0) | (drawn >= vocabulary_size)), document, drawn, _not_an_id(vocabulary_size)
        )
        nothing = np.zeros(len(drawn))
        return Checked(document.head_ids, document.head_logprobs, nothing, known.sum(axis=1), nothing)
    used = (document.head_ids != NOT_LISTED) & (document.head_logprobs != -np.inf)
    broken = used & ~(np.abs(document.head_logprobs) <= MOST_NATS)
    _refuse(broken, document, document.head_logprobs, "is no finite value")
    outside = used & ((document.head_ids < 0) | (document.head_ids >= vocabulary_size))
    _refuse(outside, document, document.head_ids, _not_an_id(vocabulary_size))
    values = np.where(used, document.head_logprobs, -np.inf)
    ids = np.where(used, document.head_ids, vocabulary_size)
    together = np.sort(ids, axis=1)
    twice = (together[:, 1:] == together[:, :-1]) & (together[:, 1:] < vocabulary_size)
    if twice.any():
        position, column = np.argwhere(twice)[0]
        raise StoreError(
            f"{document.where}, position {position}: id {together[position, column]} is listed twice: the "
            "file is damaged, or its description does not fit it."
        )
    true = np.full(len(ids), np.nan) if document.true_logprob is None else document.true_logprob
    true = np.where(true < -MOST_NATS, -np.inf, true)
    excess = np.zeros(len(ids))
    if rest == "derived":
        mass = np.exp(log_sum_exp(values))
        wrong = np.flatnonzero(~(mass <= LARGEST_MASS))
        if wrong.size:
            raise StoreError(
                f"{document.where}, position {wrong[0]}: the listed probabilities sum to "
                f"{mass[wrong[0]]:.3g}, so these are no log-probabilities (raw logits, perhaps), or the "
                "description does not fit the file."
            )
        excess = np.maximum(mass - 1, 0)
        shift = np.log(np.maximum(mass, 1))
        values, true = values - shift[:, None], np.minimum(true - shift, 0)
    ids, values = _by_value(ids, values)
    used = ids < vocabulary_size
    return Checked(
        ids=np.where(used, ids, NOT_LISTED),
        values=values,
        true_logprob=true,
        listed=used.sum(axis=1),
        excess=excess,
    )


def record_of(document: Document, checked: Checked, rest: str, k: int, vocabulary_size: int) -> TeacherRecord:
    """Returns the record of a document, its head cut to k entries.

    Positions that list fewer than k ids get the uniform distribution, which says that nothing is known; they
    must not count in the loss.

    Args:
        document: of the source.
        checked: `put_in_order` of it.
        rest: `derived` or `unknown`.
        k: head entries, at most V.
        vocabulary_size: V.
    """
    length = len(document.token_ids)
    ids, values = checked.ids[:, :k], checked.values[:, :k]
    if ids.shape[1] < k:
        missing = k - ids.shape[1]
        ids = np.pad(ids, ((0, 0), (0, missing)), constant_values=NOT_LISTED)
        values = np.pad(values, ((0, 0), (0, missing)), constant_values=-np.inf)
    known = checked.listed >= k
    log_v = math.log(vocabulary_size)
    ids = np.where(known[:, None], ids, np.arange(k))
    values = np.where(known[:, None], values, -log_v)
    true = np.where(known, checked.true_logprob, -log_v)
    if rest == "unknown":
        shift = np.where(known, log_sum_exp(values), math.log(k) - log_v)
        values, true = np.minimum(values - shift[:, None], 0), true - shift
        ids, values = _by_value(ids, values)
        log_rest = np.full(length, -np.inf)
    else:
        left = np.maximum(1 - np.exp(values).sum(axis=1), 0)
        left[~known] = (vocabulary_size - k) / vocabulary_size
        if k == vocabulary_size:
            left[:] = 0
        with np.errstate(divide="ignore"):
            log_rest = np.log(left)
    following = np.roll(document.token_ids, -1)
    in_head = ids == following[:, None]
    listed = np.where(in_head, values, -np.inf).max(axis=1)
    # Outside of the head nothing is as likely as its last entry, and nothing more likely than the whole rest.
    bound = values[:, -1] if rest == "unknown" else np.minimum(values[:, -1], log_rest)
    true = np.where(in_head.any(axis=1), listed, np.where(np.isnan(true), bound, np.minimum(true, 0)))
    true[lasts(document)] = 0
    probabilities, mass = np.exp(values), np.exp(log_rest)
    entropy = -(probabilities * values).sum(axis=1) - mass * np.where(mass > 0, log_rest, 0)
    return TeacherRecord(
        head_ids=ids.astype(np.int32),
        head_logprobs=np.minimum(values, 0).astype(np.float32),
        tail_ids=np.empty((length, 0), np.int32),
        tail_counts=np.empty((length, 0), np.int32),
        log_rest=log_rest[:, None].astype(np.float32),
        rest_entropy=np.zeros(length, np.float32),
        true_logprob=true.astype(np.float32),
        entropy=np.maximum(entropy, 0).astype(np.float32),
    )


def record_of_draws(document: Document, n: int) -> TeacherRecord:
    """Returns the record of a document of sampled ids: its draws, and 0 for what they do not tell.

    Positions with fewer than n samples get draws of id 0, which say nothing; they must not count in the loss.

    Args:
        document: of a source whose rest is `counts`, checked.
        n: draws, the first of each position.
    """
    drawn = document.drawn_ids
    assert drawn is not None
    length = len(document.token_ids)
    some = np.zeros((length, n), np.int64)
    width = min(n, drawn.shape[1])
    known = (drawn != NOT_LISTED).sum(axis=1) >= n
    some[known, :width] = drawn[known, :width]
    some.sort(axis=1)
    # The first of equal ids takes the counts of all, and goes to the front.
    first = np.ones(some.shape, np.bool_)
    first[:, 1:] = some[:, 1:] != some[:, :-1]
    runs = first.cumsum(axis=1) - 1
    ids, counts = np.full(some.shape, NO_ID, np.int32), np.zeros(some.shape, np.int32)
    rows = np.repeat(np.arange(length)[:, None], n, axis=1)
    ids[rows, runs] = some
    np.add.at(counts, (rows, runs), 1)
    unknown = np.zeros(length, np.float32)
    return TeacherRecord(
        head_ids=np.empty((length, 0), np.int32),
        head_logprobs=np.empty((length, 0), np.float32),
        tail_ids=ids,
        tail_counts=counts,
        log_rest=np.zeros((length, 1), np.float32),
        rest_entropy=unknown,
        true_logprob=unknown.copy(),
        entropy=unknown.copy(),
    )


def lasts(document: Document) -> NDArray[np.int64]:
    """Returns the last position of each document inside a document, int64 [S]: no token follows there."""
    starts = np.zeros(1, np.int64) if document.segment_starts is None else document.segment_starts
    return np.append(starts[1:], len(document.token_ids)) - 1


def _by_value(
    ids: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns both [T, K] by descending value, equal values by ascending id."""
    # Equal is what float32 cannot tell apart, for so values are stored. A shift moves them across its steps
    # and makes unequal ones equal, or equal ones unequal: sort behind it, not before.
    order = np.lexsort((ids, -values.astype(np.float32)), axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(values, order, axis=1)


def _not_an_id(vocabulary_size: int) -> str:
    return f"is not an id of the tokenizer, which has 0 to {vocabulary_size - 1}"


def _refuse(
    bad: NDArray[np.bool_], document: Document, values: NDArray[np.int64] | NDArray[np.float64], rule: str
) -> None:
    if bad.any():
        position, column = np.argwhere(bad)[0]
        raise StoreError(
            f"{document.where}, position {position}, entry {column}: {values[position, column]} {rule}."
        )
