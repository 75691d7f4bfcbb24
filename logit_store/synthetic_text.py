"""Synthetic rows with the statistics of a large teacher on text, for sizes and speeds that mean something.

No vocabulary is ever held for a position: the most likely 512 ids stand alone, all others in cells of equal
probability, so a row of 4,096 positions over a vocabulary of 128,256 takes a second. At that vocabulary the
statistics are near those of a real tokenizer and a small model on text: entropy 1.95 nats, 94 to 95 % of the
mass in the first 64 ids, and ids whose static entropy is 12.5 bits (`text`) or 16.2 bits (`uniform`).

Shapes: L positions of a row, C cells of a position, V vocabulary, k head entries, n draws, G temperatures.
"""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.ragged import log_sum_exp
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import NO_ID, Row, TeacherRecord
from sparsekd.logit_store.synthetic import row_frame, with_records

SINGLE_CELLS = 512
"""Ranks whose probabilities differ; those behind them share 60 cells, spaced geometrically."""

HEAD_RANKS = 16
"""Ranks behind which the power laws of a small teacher's positions have exponents of their own."""


@dataclasses.dataclass(frozen=True)
class _Certainty:
    """How the probabilities of a position fall: by power laws with exponents least + exp(mean + deviation *
    normal).

    Attributes:
        head: least, mean and deviation of the first ranks.
        tail: of those behind `HEAD_RANKS`; None where one law holds throughout.
        last: in the place of `_IdStatistics.last`; below it the ids of the tail are more even. None keeps it.
    """

    head: tuple[float, float, float]
    tail: tuple[float, float, float] | None = None
    last: float | None = None


_TEACHERS = {
    "large": _Certainty(head=(1.1, -0.4, 0.8)),
    # Fitted to SmolLM2 (135 M) on English prose and manuals: entropy 2.95 nats, and at k = 16 a tail mass of
    # 0.22 and 22.0 distinct ids of 24 draws.
    "small": _Certainty(head=(1.0, -0.7, 0.8), tail=(1.1, -1.2, 0.4), last=0.8),
}


@dataclasses.dataclass(frozen=True)
class _IdStatistics:
    """How often ids occur: that of frequency rank f in proportion to (f + offset)^-power.

    Attributes:
        power, offset: of the law.
        first, last: exponent of the uniform numbers at the first and the last rank; above 1, frequent ids are
            more frequent there still.
        disorder: noise in the order of ids by frequency; 0 makes the most frequent id 0.
    """

    power: float
    offset: float
    first: float
    last: float
    disorder: float


_IDS = {
    "text": _IdStatistics(power=1.09, offset=20.0, first=2.0, last=1.02, disorder=1.3),
    "uniform": _IdStatistics(power=0.72, offset=100.0, first=1.0, last=1.0, disorder=6.0),
}

_REUSE = 0.35
"""Share of ids taken from one of the eight positions before."""


def can_be_text_like(manifest: Manifest) -> bool:
    """Returns whether `text_like_rows` can make rows of a manifest: its vocabulary must be large enough."""
    spec, vocabulary = manifest.record, manifest.tokenizer.vocabulary_size
    return vocabulary >= _least_vocabulary(manifest) and spec.k <= SINGLE_CELLS // 2


def _least_vocabulary(manifest: Manifest) -> int:
    return max(8 * (manifest.record.k + manifest.record.n + 2), 2 * SINGLE_CELLS)


def text_like_rows(
    manifest: Manifest,
    count: int,
    seed: int,
    *,
    ids: str = "text",
    split: str = "train",
    teacher: str = "large",
) -> list[Row]:
    """Returns random valid rows of several documents.

    Args:
        manifest: of the store; its vocabulary is at least 8 (k + n + 2), and k at most 256.
        count: number of rows.
        seed: of the rows.
        ids: `text` for ids that are as uneven as those of text, `uniform` for nearly uniform ones.
        split: that they are for, on which it depends where records stand.
        teacher: `large`, or `small` for one that is less certain, whose draws are of more different ids.

    Raises:
        StoreError: the vocabulary is too small for that, or `ids` or `teacher` is something else.
    """
    spec, vocabulary = manifest.record, manifest.tokenizer.vocabulary_size
    if ids not in _IDS:
        raise StoreError(f"Rows of ids {ids!r} cannot be made: name {' or '.join(_IDS)}.")
    if teacher not in _TEACHERS:
        raise StoreError(f"Records of a {teacher!r} teacher cannot be made: name {' or '.join(_TEACHERS)}.")
    if not can_be_text_like(manifest):
        raise StoreError(
            f"Text-like rows of k={spec.k}, n={spec.n} need k up to {SINGLE_CELLS // 2} and a vocabulary "
            f"of {_least_vocabulary(manifest)} or more, found {vocabulary}: use synthetic_rows."
        )
    by_frequency = _ids_by_frequency(vocabulary, ids)
    return [
        _row(manifest, ids, split, by_frequency, _TEACHERS[teacher], np.random.default_rng([seed, index, 1]))
        for index in range(count)
    ]


def _ids_by_frequency(vocabulary: int, ids: str) -> NDArray[np.int32]:
    """Returns int32 [V], the id of each frequency rank: frequent ids tend to be low, as in merge order."""
    noise = np.random.default_rng(0).standard_normal(vocabulary) * _IDS[ids].disorder
    order = np.argsort(np.log(np.arange(1, vocabulary + 1)) + noise, kind="stable")
    return np.argsort(order, kind="stable").astype(np.int32)


def _row(
    manifest: Manifest,
    ids: str,
    split: str,
    by_frequency: NDArray[np.int32],
    certainty: _Certainty,
    random: np.random.Generator,
) -> Row:
    length, spec = manifest.sequence_length, manifest.record
    plain, followed = row_frame(manifest, random)
    shape = _IDS[ids]
    if manifest.teacher is not None and certainty.last is not None:
        shape = dataclasses.replace(shape, last=certainty.last)
    pool = _pool(length, spec.k + spec.n + 2, shape, by_frequency, random)
    if manifest.teacher is None:
        return dataclasses.replace(plain, token_ids=pool[:, 0].copy())
    logprobs, sizes = _distributions(length, manifest.tokenizer.vocabulary_size, certainty, random)
    record, true_ids = _record(manifest, logprobs, sizes, pool, followed, random)
    tokens = np.concatenate([pool[:1, -1], true_ids[:-1]]).astype(np.int32)
    return with_records(dataclasses.replace(plain, token_ids=tokens), record, manifest, split)


def _pool(
    length: int,
    wanted: int,
    shape: _IdStatistics,
    by_frequency: NDArray[np.int32],
    random: np.random.Generator,
) -> NDArray[np.int32]:
    """Returns int32 [L, wanted], distinct ids at each position: more frequent ones first."""
    vocabulary = len(by_frequency)
    columns = 2 * wanted + 32
    weights = (np.arange(vocabulary) + shape.offset) ** -shape.power
    cumulative = np.cumsum(weights)
    power = np.geomspace(shape.first, shape.last, wanted)
    power = np.append(power, np.full(columns - wanted, shape.last))
    uniforms = random.random((length + 8, columns)) ** power
    ranks = np.searchsorted(cumulative, uniforms.reshape(-1) * cumulative[-1], side="right")
    fresh = by_frequency[np.minimum(ranks, vocabulary - 1)].reshape(uniforms.shape)
    back = np.where(random.random((length, columns)) < _REUSE, random.integers(1, 9, (length, columns)), 0)
    found = fresh[np.arange(8, length + 8)[:, None] - back, np.arange(columns)]
    # A stable sort by id shows repetitions; the first of each keeps its place.
    order = np.argsort(found, axis=1, kind="stable")
    ascending = np.take_along_axis(found, order, axis=1)
    repeated = np.zeros(found.shape, np.bool_)
    np.put_along_axis(repeated, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], axis=1)
    places = np.argsort(repeated, axis=1, kind="stable")[:, :wanted]
    pool = np.take_along_axis(found, places, axis=1)
    # The few positions with too many repetitions take what ids are left, whatever they are.
    short = np.flatnonzero(np.take_along_axis(repeated, places, axis=1).any(axis=1))
    for position in short:
        own = found[position][~repeated[position]]
        others = np.setdiff1d(np.arange(4 * wanted), own)
        pool[position] = np.concatenate([own, others])[:wanted]
    return pool


def _distributions(
    length: int, vocabulary: int, certainty: _Certainty, random: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns (log-probability of an id of each cell [L, C], ids in each cell [C]), in falling order."""
    exponent = _exponents(certainty.head, length, random)
    of_tail = exponent if certainty.tail is None else _exponents(certainty.tail, length, random)
    ranks = np.arange(1, SINGLE_CELLS)
    exponents = np.where(ranks < HEAD_RANKS, exponent, of_tail)
    # Gaps of order statistics of an exponential tail are independent (Renyi): so large ones come with small.
    gaps = random.exponential(size=(length, SINGLE_CELLS - 1)) * exponents / ranks
    single = np.concatenate([np.zeros((length, 1)), -np.cumsum(gaps, axis=1)], axis=1)
    edges = np.unique(np.round(np.geomspace(SINGLE_CELLS, vocabulary, 61)).astype(np.int64))
    middle = np.sqrt(edges[1:].astype(np.float64) * edges[:-1])
    far = single[:, -1:] - of_tail * np.log(middle / SINGLE_CELLS)
    logits = np.concatenate([single, far], axis=1)
    sizes = np.concatenate([np.ones(SINGLE_CELLS), np.diff(edges)])
    return logits - log_sum_exp(logits + np.log(sizes))[:, None], sizes


def _exponents(
    law: tuple[float, float, float], length: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Returns an exponent for each position, [L, 1]."""
    least, mean, deviation = law
    return least + np.exp(mean + deviation * random.standard_normal((length, 1)))


def _record(
    manifest: Manifest,
    logprobs: NDArray[np.float64],
    sizes: NDArray[np.float64],
    pool: NDArray[np.int32],
    followed: NDArray[np.bool_],
    random: np.random.Generator,
) -> tuple[TeacherRecord, NDArray[np.int32]]:
    """Returns the record and the true next ids [L]; head and drawn ids come from `pool` in this order."""
    spec = manifest.record
    k, n, length = spec.k, spec.n, len(logprobs)
    log_sizes = np.log(sizes)
    head = logprobs[:, :k].astype(np.float32)
    rest, rest_sizes = logprobs[:, k:], log_sizes[k:]
    log_rest = np.stack([log_sum_exp(rest / t + rest_sizes) for t in spec.temperatures], axis=1)
    at_draw = logprobs / spec.draw_temperature
    at_draw -= log_sum_exp(at_draw + log_sizes)[:, None]
    at_one = rest - log_sum_exp(rest + rest_sizes)[:, None]
    tail_ids, counts = np.full((length, n), NO_ID, np.int32), np.zeros((length, n), np.int32)
    tail_logprobs = np.full((length, n), -np.inf, np.float32)
    if n:
        cells, keys = _draws(rest / spec.draw_temperature + rest_sizes, sizes[k:], n, random)
        order = np.argsort(keys, axis=1, kind="stable")
        keys, cells = np.take_along_axis(keys, order, axis=1), np.take_along_axis(cells, order, axis=1)
        new = np.concatenate([np.ones((length, 1), np.bool_), keys[:, 1:] != keys[:, :-1]], axis=1)
        place = np.cumsum(new, axis=1) - 1
        np.add.at(counts, (np.arange(length)[:, None], place), 1)
        position, column = np.nonzero(new)
        filled = place[position, column]
        tail_ids[position, filled] = pool[position, k + filled]
        tail_logprobs[position, filled] = rest[position, cells[position, column]]
        ascending = np.argsort(tail_ids.view(np.uint32), axis=1, kind="stable")
        tail_ids = np.take_along_axis(tail_ids, ascending, axis=1)
        counts = np.take_along_axis(counts, ascending, axis=1)
        tail_logprobs = np.take_along_axis(tail_logprobs, ascending, axis=1)
    cells, _ = _draws(logprobs + log_sizes, sizes, 1, random)
    true_cell = cells[:, 0]
    places = np.minimum(true_cell, pool.shape[1] - 1)
    true_ids = np.where(true_cell < k, pool[np.arange(length), places], pool[:, -1])
    true = np.where(followed, logprobs[np.arange(length), true_cell], 0)
    values: dict[str, NDArray[Any]] = {
        "log_rest": log_rest,
        "rest_entropy": -(np.exp(at_one + rest_sizes) * at_one).sum(axis=1),
        "true_logprob": true,
        "entropy": -(np.exp(at_draw + log_sizes) * at_draw).sum(axis=1),
    }
    record = TeacherRecord(
        head_ids=_ties_by_id(pool[:, :k].copy(), head),
        head_logprobs=head,
        tail_ids=tail_ids,
        tail_counts=counts,
        **{name: value.astype(np.float32) for name, value in values.items()},
        tail_logprobs=tail_logprobs[:, : n if spec.tail_logprobs else 0],
    )
    return record, true_ids


def _draws(
    logits: NDArray[np.float64], sizes: NDArray[np.float64], draws: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns (cell [L, draws], a number that tells the ids of a cell apart [L, draws])."""
    length, cells = logits.shape
    cumulative = np.cumsum(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
    # One search for all positions: each has its own interval of length 1.
    ladder = cumulative / cumulative[:, -1:] + np.arange(length)[:, None]
    uniforms = random.random((length, draws)) + np.arange(length)[:, None]
    found = np.searchsorted(ladder.reshape(-1), uniforms.reshape(-1), side="right").reshape(length, draws)
    cell = np.clip(found - np.arange(length)[:, None] * cells, 0, cells - 1)
    inside = (random.random((length, draws)) * sizes[cell]).astype(np.int64)
    return cell, cell * np.int64(1 << 32) + inside


def _ties_by_id(ids: NDArray[np.int32], values: NDArray[np.float32]) -> NDArray[np.int32]:
    """Returns ids [L, k] with those of equal values in ascending order."""
    tied = (values[:, 1:] == values[:, :-1]).any(axis=1)
    for position in np.flatnonzero(tied):
        ids[position] = ids[position][np.lexsort((ids[position], -values[position]))]
    return ids
