"""The data sets of the store benchmark: rows with teacher records of any (k, n), and what they are like.

L positions of a row, V vocabulary, k head entries, n draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.positions import recorded_positions
from sparsekd.logit_store.row import (
    IGNORED_LABEL,
    Row,
    TeacherRecord,
    is_real,
    narrowed,
    next_tokens,
    position_ids,
    records_at,
    segment_lengths,
)
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.logit_store.synthetic_text import text_like_rows

SPLIT = "train"
K = 64
"""Entries of the head of every layout for classic top-k."""

SMOOTHING = 0.3
"""Added to each id's count, so that an id that was not seen yet costs finitely many bits."""


@dataclass(frozen=True)
class Case:
    """What a record keeps, and of which positions: by default of all.

    Attributes:
        k: head entries.
        n: draws.
        tail_logprobs: whether the draws' log-probabilities.
        prompts: share of each document that is a prompt; records stand behind it alone (rule `counted`).
        share: of the counted positions, those that are recorded, scattered (rule `sampled`).
    """

    k: int
    n: int
    tail_logprobs: bool = False
    prompts: float = 0.0
    share: float = 1.0

    def __str__(self) -> str:
        words = [f"k={self.k}, n={self.n}"]
        words += ["with log-probabilities"] * self.tail_logprobs
        words += [f"{self.prompts:.0%} prompts"] * (self.prompts > 0)
        words += [f"{self.share:.0%} recorded"] * (self.share < 1)
        return ", ".join(words).replace(", with", " with")

    @property
    def positions(self) -> str:
        """The manifest's rule."""
        if self.share < 1:
            return "sampled"
        return "counted" if self.prompts else "all"

    @property
    def everywhere(self) -> "Case":
        """The same of all positions."""
        return Case(self.k, self.n, self.tail_logprobs)


TOP_K = Case(K, 0)
DRAWN = (Case(8, 24), Case(8, 12), Case(0, 50))
"""Cases with draws; each is measured with and without their log-probabilities."""

THINNED = (Case(K, 0, prompts=0.6), Case(8, 12, prompts=0.6), Case(8, 12, share=0.25))
"""Cases with fewer records than positions."""


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
        rows_per_shard=1 << 16,
        splits=(SPLIT,),
        k=case.k,
        n=case.n,
        tail_logprobs=case.tail_logprobs,
        positions=case.positions,
        share=case.share,
    )


def as_recorded(rows: Sequence[Row], case: Case, manifest: Manifest) -> list[Row]:
    """The rows of a case, from rows with a record at every position."""
    found = []
    for row in rows:
        assert row.recorded is not None and row.recorded.all()
        row = replace(row, loss_mask=next_tokens(row) != IGNORED_LABEL)
        if case.prompts:
            lengths = np.repeat(segment_lengths(row), segment_lengths(row))
            row = narrowed(row, row.loss_mask & (position_ids(row) >= case.prompts * lengths))
        recorded = recorded_positions(row, manifest, SPLIT)
        found.append(replace(row, teacher=records_at(row, recorded), recorded=recorded))
    return found


def synthetic_set(ids: str, *, vocabulary: int, length: int, rows: int) -> DataSet:
    """Rows with the statistics of a large teacher on text (`text_like_rows`), ids `text` or `uniform`."""

    @cache
    def rows_of(case: Case) -> tuple[Manifest, list[Row]]:
        manifest = manifest_of(case, vocabulary, length)
        everywhere = manifest_of(case.everywhere, vocabulary, length)
        # Some rows end in padding, where no record may stand.
        whole = [row for row in text_like_rows(everywhere, 2 * rows, 0, ids=ids) if is_real(row).all()]
        return manifest, as_recorded(whole[:rows], case, manifest)

    how = {"text": "as uneven as those of text", "uniform": "nearly uniform, the worst case"}[ids]
    return DataSet(ids, f"a synthetic heavy-tailed teacher, its ids {how}", rows_of)


def facts_of(data: DataSet) -> Facts:
    """Measures a data set."""
    rows = data.rows_of(TOP_K)[1]
    records = [record_of(row) for row in rows]
    losses = -np.concatenate([records_at(row, row.loss_mask).true_logprob for row in rows])
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
