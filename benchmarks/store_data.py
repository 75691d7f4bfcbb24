"""The data sets of the store benchmark: rows with teacher records of any (k, n), and what they are like.

L positions of a row, V vocabulary, k head entries, n draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import Row, TeacherRecord
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.logit_store.synthetic_text import text_like_rows

K = 64
"""Entries of the head of every layout for classic top-k."""

SMOOTHING = 0.3
"""Added to each id's count, so that an id that was not seen yet costs finitely many bits."""


@dataclass(frozen=True)
class Case:
    """What a record keeps: k head entries, n draws, and whether the draws' log-probabilities."""

    k: int
    n: int
    tail_logprobs: bool = False

    def __str__(self) -> str:
        return f"k={self.k}, n={self.n}" + (" with log-probabilities" if self.tail_logprobs else "")


TOP_K = Case(K, 0)
DRAWN = (Case(8, 24), Case(8, 12), Case(0, 50))
"""Cases with draws; each is measured with and without their log-probabilities."""


@dataclass(frozen=True)
class DataSet:
    """One teacher's records.

    Attributes:
        name: one word.
        story: where the records are from.
        rows_of: a case -> its manifest and rows; every case has the same number of rows of equal length.
    """

    name: str
    story: str
    rows_of: Callable[[Case], tuple[Manifest, list[Row]]]

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.rows_of(TOP_K)[0].tokenizer.vocabulary_size

    @property
    def length(self) -> int:
        """L."""
        return self.rows_of(TOP_K)[0].sequence_length


@dataclass(frozen=True)
class Facts:
    """What sizes depend on.

    Attributes:
        entropy: of the teacher, nats, mean over positions.
        loss: of the teacher on the true tokens, nats.
        head_mass: of the k = 64 most likely ids, mean.
        id_bits: what a head id costs under the frequencies of the other rows.
        distinct: case -> distinct drawn ids of a position, mean.
    """

    entropy: float
    loss: float
    head_mass: float
    id_bits: float
    distinct: dict[Case, float]


def manifest_of(case: Case, vocabulary: int, length: int) -> Manifest:
    """The manifest of a case's records, with the made-up tokenizer of its vocabulary."""
    return synthetic_manifest(
        vocabulary_size=vocabulary,
        sequence_length=length,
        rows_per_shard=1 << 20,
        splits=("train",),
        k=case.k,
        n=case.n,
        tail_logprobs=case.tail_logprobs,
    )


def synthetic_set(ids: str, *, vocabulary: int, length: int, rows: int) -> DataSet:
    """Rows with the statistics of a large teacher on text (`text_like_rows`), ids `text` or `uniform`."""

    @cache
    def rows_of(case: Case) -> tuple[Manifest, list[Row]]:
        manifest = manifest_of(case, vocabulary, length)
        return manifest, text_like_rows(manifest, rows, 0, ids=ids)

    how = {"text": "as uneven as those of text", "uniform": "nearly uniform, the worst case"}[ids]
    return DataSet(ids, f"a synthetic heavy-tailed teacher, its ids {how}", rows_of)


def facts_of(data: DataSet) -> Facts:
    """Measures a data set."""
    rows = data.rows_of(TOP_K)[1]
    records = [record_of(row) for row in rows]
    counted = np.concatenate([row.loss_mask for row in rows])
    losses = -np.concatenate([record.true_logprob for record in records])[counted]
    return Facts(
        entropy=float(np.mean([record.entropy.mean() for record in records])),
        loss=float(losses.mean()),
        head_mass=float(np.mean([np.exp(record.head_logprobs).sum(axis=1).mean() for record in records])),
        id_bits=static_id_bits(records, data.vocabulary),
        distinct={case: distinct_draws(data.rows_of(case)[1]) for case in DRAWN},
    )


def static_id_bits(records: Sequence[TeacherRecord], vocabulary: int) -> float:
    """Bits of a head id of the last record under the frequencies of all others."""
    *seen, held_out = [record.head_ids.ravel() for record in records]
    counts = np.bincount(np.concatenate(seen), minlength=vocabulary) + SMOOTHING
    return float(-np.log2(counts / counts.sum())[held_out].mean())


def distinct_draws(rows: Sequence[Row]) -> float:
    """Distinct drawn ids of a position, mean."""
    return float(np.mean([(record_of(row).tail_counts > 0).sum(axis=1).mean() for row in rows]))


def record_of(row: Row) -> TeacherRecord:
    """The record of a row that has one."""
    assert row.teacher is not None
    return row.teacher
