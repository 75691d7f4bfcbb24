"""The same records in another codec, or with a smaller head: neither needs the teacher.

A head entry that is dropped joins the rest, and what is stored about the rest gains it exactly
(`ragged.join_rest`).

Shapes: M recorded positions of a row, k head entries, G grid temperatures, D dropped entries.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.frequency import compact_parameters, mass_of
from sparsekd.logit_store.codecs.ragged import join_rest, log_sum_exp
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import CodecSpec, RecordSpec
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import Row, TeacherRecord
from sparsekd.logit_store.spacing import evenly
from sparsekd.logit_store.tools.derive import Progress, no_progress, with_step, write_store

SAMPLE_ROWS = 64
"""Rows of each split in which ids are counted for the table of `compact`."""


def narrowed_record(
    record: TeacherRecord, spec: RecordSpec, k: int, *, drop_draws: bool = False
) -> TeacherRecord:
    """Returns a record with its first k head entries; the others join the rest.

    Args:
        record: of a row.
        spec: what it holds.
        k: from 0 to spec.k.
        drop_draws: leave the sampled tail away.
    """
    kept, dropped = record.head_logprobs[:, :k], record.head_logprobs[:, k:].astype(np.float64)
    tail = 0 if drop_draws else spec.n
    narrowed = replace(
        record,
        head_ids=np.ascontiguousarray(record.head_ids[:, :k]),
        head_logprobs=np.ascontiguousarray(kept),
        tail_ids=np.ascontiguousarray(record.tail_ids[:, :tail]),
        tail_counts=np.ascontiguousarray(record.tail_counts[:, :tail]),
        tail_logprobs=record.tail_logprobs[:, :tail],
    )
    if k == spec.k:
        return narrowed
    if spec.rest == "unknown":
        # The head is all there is: it sums to 1 again.
        values = kept.astype(np.float64)
        shift = log_sum_exp(values)[:, None]
        return replace(
            narrowed,
            head_logprobs=np.minimum(values - shift, 0).astype(np.float32),
            entropy=_entropy(values - shift).astype(np.float32),
            true_logprob=_bounded(record.true_logprob, shift[:, 0]),
        )
    log_rest, rest_entropy = join_rest(record, dropped, spec.temperatures)
    return replace(narrowed, log_rest=log_rest, rest_entropy=rest_entropy)


def reencode_store(
    source: StorePath,
    target: StorePath,
    *,
    codec: str | None = None,
    mass: float | None = None,
    k: int | None = None,
    drop_draws: bool = False,
    jobs: int = 1,
    progress: Progress = no_progress,
) -> str:
    """Writes a store's rows to a new store; returns its digest.

    Args:
        source: a sealed store.
        target: the new store.
        codec: name of the new codec; None keeps codec and parameters.
        mass: of `compact`, where heads end; its table of frequent ids is counted in a sample of the rows.
            None keeps the mass of heads that were cut short already, and otherwise whole heads.
        k: head entries to keep; None keeps all.
        drop_draws: leave the sampled tail away.
        jobs: processes that write shards.
        progress: told after each shard.

    Raises:
        StoreError: k is larger than the store's, the draws would belong to another rest, or the grid lacks
            temperature 1, without which the new rest's entropy is not known; or heads were cut short at a
            smaller mass than is asked for. Nothing was written then.
    """
    store = open_store(source)
    spec = _check(store, k, drop_draws)
    new_codec = _new_codec(store, codec, mass)
    manifest = replace(
        store.manifest,
        record=spec,
        codec=new_codec,
        dataset=with_step(
            store.manifest.dataset,
            "reencode",
            [store],
            codec=[store.manifest.codec.name, new_codec.name],
            k=[store.manifest.record.k, spec.k],
            n=[store.manifest.record.n, spec.n],
        ),
    )

    rows = {split: _Narrowed(store, split, spec) for split in manifest.splits}
    return write_store(target, manifest, store, rows, progress, jobs)


@dataclass(frozen=True)
class _Narrowed:
    """A split's rows with what is left of their records."""

    store: LogitStore
    split: str
    spec: RecordSpec

    @property
    def count(self) -> int:
        return self.store.rows(self.split)

    def get(self, index: int) -> Row:
        row, before = self.store.read_row(self.split, index), self.store.manifest.record
        if row.teacher is None or self.spec == before:
            return row
        drop_draws = self.spec.n < before.n
        return replace(row, teacher=narrowed_record(row.teacher, before, self.spec.k, drop_draws=drop_draws))


def _new_codec(store: LogitStore, codec: str | None, mass: float | None) -> CodecSpec:
    """Returns the codec of the new store."""
    same = store.manifest.codec
    if codec is None and mass is None:
        return same
    name = same.name if codec is None else codec
    cut_at = mass_of(store.manifest)
    if name != "compact":
        if mass is not None:
            raise StoreError(f"The codec {name} keeps heads whole: give --mass with --codec compact alone.")
        if cut_at is not None:
            raise StoreError(
                f"{store.path} has heads that were cut short at a mass of {cut_at:g}, which {name} cannot "
                "hold: keep its codec, or capture again."
            )
        return CodecSpec(name, {})
    if cut_at is not None:
        mass = cut_at if mass is None else mass
        if not mass <= cut_at:
            raise StoreError(
                f"{store.path} has heads that were cut short at a mass of {cut_at:g}, so they cannot reach "
                f"{mass:g}: give --mass of at most {cut_at:g}, or capture again."
            )
    counts = np.zeros(store.manifest.tokenizer.vocabulary_size, np.int64)
    has_ids = store.manifest.outcomes is None
    for split in store.manifest.splits:
        for index in evenly(store.rows(split), SAMPLE_ROWS):
            row = store.read_row(split, index)
            heads = row.teacher.head_ids if row.teacher is not None and has_ids else np.empty(0, np.int32)
            ids = np.concatenate([row.token_ids, heads[heads >= 0]])
            counts += np.bincount(ids, minlength=len(counts))
    return CodecSpec(name, compact_parameters(counts, mass=mass))


def _check(store: LogitStore, k: int | None, drop_draws: bool) -> RecordSpec:
    """Returns the new record's spec."""
    spec = store.manifest.record
    if k is not None and not 0 <= k <= spec.k:
        raise StoreError(
            f"{store.path} has k = {spec.k} head entries, so k = {k} cannot be made from it: choose 0 to "
            f"{spec.k}, or capture the teacher again."
        )
    new_k, new_n = spec.k if k is None else k, 0 if drop_draws else spec.n
    if new_k < spec.k and new_n > 0:
        raise StoreError(
            f"{store.path} has n = {spec.n} draws from what its {spec.k} head entries leave over; with k = "
            f"{new_k} they would stand for another rest: keep k, or leave the draws away with --drop-draws."
        )
    if store.manifest.teacher is not None and new_k + new_n == 0:
        raise StoreError(f"Nothing of the teacher would be left of {store.path}: keep k or n above 0.")
    if new_k < spec.k and 1.0 not in spec.temperatures:
        raise StoreError(
            f"{store.path} has no temperature 1 on its grid {list(spec.temperatures)}, so the entropy of a "
            "larger rest is not known: keep k, or capture the teacher again."
        )
    return replace(spec, k=new_k, n=new_n, tail_logprobs=spec.tail_logprobs and new_n > 0)


def _entropy(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    return -(np.exp(logprobs) * _finite(logprobs)).sum(axis=-1)


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the values with 0 for -inf, whose factor exp(-inf) is 0."""
    return np.where(np.isneginf(values), 0.0, values)


def _bounded(true_logprob: NDArray[np.float32], shift: NDArray[np.float64]) -> NDArray[np.float32]:
    """Returns true log-probabilities [M] under the new normaliser; 0 stays 0 where no token follows."""
    moved = np.minimum(true_logprob.astype(np.float64) - shift, 0)
    return np.where(true_logprob == 0, 0, moved).astype(np.float32)
