"""Fewer rows of one store, or the rows of several: `subset` and `merge`.

A row stays whole, whatever is chosen: its tokens are the context of its records. Rows are copied as they are
stored, and but for their text not decoded, except where `subset` drops records.
"""

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest, compare_manifests
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.planes import planes_of
from sparsekd.logit_store.protocol.message import StoredRow
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import PADDING_DOCUMENT, Row, document_of_position, narrowed
from sparsekd.logit_store.tools.derive import (
    PROVENANCE,
    Progress,
    no_progress,
    origin,
    shards_of,
    with_step,
    write_store,
)
from sparsekd.logit_store.tools.processes import results_of

Result = TypeVar("Result")

KEY_BYTES = 8
"""Of a row's key: two of a billion different rows collide with probability 0.03, and then they are
compared."""

SEED_BYTES = 8
"""Of the seed that a row's key depends on."""

LARGEST_NUMBER = 2**63 - 2
"""Of a row or document: one past it still is an int64."""

Numbers = Sequence[int | range]
"""Numbers and ranges of them, which need not fit in memory."""


def row_key(row: Row, seed: int = 0) -> int:
    """Returns a number from 0 to 2^64 - 1 that depends on the row's token ids and the seed alone."""
    tokens = row.token_ids.astype("<i4").tobytes()
    digest = hashlib.blake2b(tokens, digest_size=KEY_BYTES, key=seed.to_bytes(SEED_BYTES, "little")).digest()
    return int.from_bytes(digest, "little")


def subset_store(
    source: StorePath,
    target: StorePath,
    *,
    split: str | None = None,
    rows: Numbers | None = None,
    documents: Numbers | None = None,
    fraction: float | None = None,
    seed: int = 0,
    jobs: int = 1,
    progress: Progress = no_progress,
) -> str:
    """Writes some rows of a store, in their order, to a new store; returns its digest.

    All splits keep their names; those that are not chosen from are empty. Of `rows`, `documents` and
    `fraction` at most one is given; with none of them a whole split is taken.

    Args:
        source: a sealed store.
        target: the new store.
        split: take rows of this split only.
        rows: numbers of rows; needs `split` where the store has rows in several.
        documents: numbers of documents; a row that holds any of them is taken, and outside of them its loss
            mask is cleared and its records are dropped.
        fraction: expected share of the rows, above 0 and at most 1; a row is taken when its key, which
            depends on its token ids and the seed, is below it. So a row's lot does not depend on its place.
        seed: of the fraction, from 0 to 2^64 - 1.
        jobs: processes that look at rows and write shards.
        progress: told after each shard.

    Raises:
        StoreError: the choice is contradictory, or empty.
    """
    store = open_store(source)
    if sum(choice is not None for choice in (rows, documents, fraction)) > 1:
        raise StoreError("subset takes one of rows, documents and fraction; give one of them.")
    if split is not None:
        store.index(split)
    splits = [split] if split is not None else [name for name in store.manifest.splits if store.rows(name)]
    if fraction is not None and not 0 < fraction <= 1:
        raise StoreError(f"fraction is {fraction}, expected a number above 0 and at most 1.")
    if not 0 <= seed < 2 ** (8 * SEED_BYTES):
        raise StoreError(f"seed is {seed}, expected a whole number from 0 to 2^64 - 1.")
    wanted = None if documents is None else _spans(documents, "documents")
    chosen: dict[str, NDArray[np.int64]]
    if rows is not None:
        only, spans = _only(splits, store), _spans(rows, "rows")
        _check_rows(store, only, spans)
        chosen = {only: np.concatenate([np.arange(start, end) for start, end in spans])}
        step: dict[str, object] = {"row_numbers": spans.tolist()}
    elif fraction is None and wanted is None:
        if split is None:
            raise StoreError(f"subset of {source} needs a choice: a split, rows, documents or a fraction.")
        chosen, step = {split: np.arange(store.rows(split))}, {}
    else:
        limit = 0 if fraction is None else int(fraction * 2 ** (8 * KEY_BYTES))
        search = _Search(store, wanted, seed, limit)
        chosen = {name: np.empty(0, np.int64) for name in splits}
        for name, found in _of_each_shard(store, splits, search.taken, jobs, progress):
            chosen[name] = np.append(chosen[name], found)
        step = {"fraction": fraction, "seed": seed} if wanted is None else {"documents": wanted.tolist()}
    if not sum(map(len, chosen.values())):
        raise StoreError(f"No row of {source} is chosen: choose others; nothing was written.")

    dataset = with_step(store.manifest.dataset, "subset", [store], splits=splits, **step)
    manifest = replace(store.manifest, dataset=dataset)
    nothing = np.empty(0, np.int64)
    content = {name: _Chosen(store, name, chosen.get(name, nothing), wanted) for name in manifest.splits}
    return write_store(target, manifest, store, content, progress, jobs)


def merge_stores(
    sources: Sequence[StorePath],
    target: StorePath,
    *,
    allow_repeated_rows: bool = False,
    jobs: int = 1,
    progress: Progress = no_progress,
) -> str:
    """Writes the rows of several stores, one after the other in each split, to a new store; returns its
    digest.

    Stores whose dataset differs only in its provenance number the same corpus, and their documents keep their
    numbers. Otherwise each further corpus's numbers go on behind those before, so that documents stay apart.

    Args:
        sources: at least two sealed stores that are equal in all but dataset, splits and rows per shard.
        target: the new store; its rows per shard are the first one's.
        allow_repeated_rows: take rows with equal tokens more than once instead of refusing them.
        jobs: processes that look at rows and write shards.
        progress: told after each shard.

    Raises:
        StoreError: they are not of the same kind (naming the fields), or a row is there twice (naming both).
    """
    stores = [open_store(source) for source in sources]
    if len(stores) < 2:
        raise StoreError(f"merge joins two stores or more, found {len(stores)}.")
    first = stores[0].manifest
    for store in stores[1:]:
        _require_same_kind(stores[0], store)
    splits = tuple(dict.fromkeys(split for store in stores for split in store.manifest.splits))
    highest = _survey(stores, allow_repeated_rows, jobs, progress)
    shifts = _document_shifts(stores, highest)
    manifest = replace(first, splits=splits, dataset=_merged_dataset(stores, shifts))
    content = {split: _Joined.of(stores, shifts, split) for split in splits}
    return write_store(target, manifest, stores[0], content, progress, jobs)


@dataclass(frozen=True)
class _Chosen:
    """Rows of a split by their numbers; where `documents` [N, 2] are given, with what these have alone."""

    store: LogitStore
    split: str
    numbers: NDArray[np.int64]
    documents: NDArray[np.int64] | None

    @property
    def count(self) -> int:
        return len(self.numbers)

    def get(self, index: int) -> Row:
        number = int(self.numbers[index])
        if self.documents is None:
            return self.store.read_stored(self.split, number)
        row = self.store.read_row(self.split, number)
        features = self.store.manifest.features
        of_records = [spec.plane for spec in features if spec.positions == "recorded"]
        # A mask is never widened.
        return narrowed(row, _within(document_of_position(row), self.documents), of_records)


@dataclass(frozen=True)
class _Joined:
    """The rows that several stores have in a split, one store after the other.

    Attributes:
        parts: the stores, and what is added to their documents' numbers.
        ends: of each store's rows.
    """

    parts: list[tuple[LogitStore, int]]
    split: str
    ends: NDArray[np.int64]

    @staticmethod
    def of(stores: Sequence[LogitStore], shifts: Sequence[int], split: str) -> "_Joined":
        parts = [part for part in zip(stores, shifts, strict=True) if split in part[0].manifest.splits]
        return _Joined(parts, split, np.cumsum([store.rows(split) for store, _ in parts]))

    @property
    def count(self) -> int:
        return int(self.ends[-1])

    def get(self, index: int) -> Row:
        part = int(np.searchsorted(self.ends, index, side="right"))
        store, shift = self.parts[part]
        row = store.read_stored(self.split, index - int(self.ends[part]) + store.rows(self.split))
        return _shifted(row, shift, store.manifest) if shift else row


def _shifted(row: StoredRow, shift: int, manifest: Manifest) -> StoredRow:
    """Returns a stored row whose documents have numbers that are higher by `shift`; padding stays padding."""
    codec = codec_of(manifest)
    stored, crc32 = dict(row.stored), list(row.crc32)
    for place, plane in enumerate(planes_of(manifest)):
        if plane.merged == "documents":
            numbers = getattr(row, plane.name)
            row = replace(
                row, **{plane.name: np.where(numbers == PADDING_DOCUMENT, numbers, numbers + shift)}
            )
            stored[plane.name] = codec.encode_text(row, plane.name, manifest)
            crc32[place] = zlib.crc32(stored[plane.name])
    return replace(row, stored=stored, crc32=crc32)


def _require_same_kind(one: LogitStore, other: LogitStore) -> None:
    def kind(manifest: Manifest) -> Manifest:
        return replace(manifest, dataset={}, splits=("train",), rows_per_shard=1)

    differing = compare_manifests(kind(other.manifest), kind(one.manifest))
    if differing:
        raise StoreError(
            f"{other.path} and {one.path} cannot be merged, they differ in {'; '.join(differing)}: capture "
            "with equal settings, or bring codec and k together with `store reencode` first."
        )


def _survey(
    stores: Sequence[LogitStore], allow_repeated_rows: bool, jobs: int, progress: Progress
) -> list[int]:
    """Returns the highest document number of each store (-1 for none); refuses a row that is there twice."""
    places = [(number, split) for number, store in enumerate(stores) for split in store.manifest.splits]
    starts = np.cumsum([0] + [stores[number].rows(split) for number, split in places])
    keys = np.empty(int(starts[-1]), np.uint64)
    highest = [PADDING_DOCUMENT] * len(stores)
    done = 0
    for number, store in enumerate(stores):
        looked = _of_each_shard(store, store.manifest.splits, partial(_keys_of_shard, store), jobs, progress)
        for _, (found, last) in looked:
            keys[done : done + len(found)] = found
            highest[number] = max(highest[number], last)
            done += len(found)
    if allow_repeated_rows:
        return highest
    order = np.argsort(keys, kind="stable")

    def read(flat: int) -> tuple[str, Row]:
        part = int(np.searchsorted(starts, flat, side="right")) - 1
        number, split = places[part]
        index = flat - int(starts[part])
        store = stores[number]
        return f"row {index} of split {split} of {store.path}", store.read_text(split, index)

    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    # In the order of the rows, so that the first that is there again is named.
    for place in same[np.argsort(order[same + 1])]:
        (where, row), (where_again, again) = read(int(order[place])), read(int(order[place + 1]))
        if np.array_equal(row.token_ids, again.token_ids):
            raise StoreError(
                f"{where_again} has the tokens of {where}: the stores overlap; leave one of them out, or "
                "take such rows twice with --allow-repeated-rows."
            )
    return highest


def _keys_of_shard(store: LogitStore, place: tuple[str, int]) -> tuple[NDArray[np.uint64], int]:
    """Returns the key of each row of a shard, and their highest document number."""
    rows = [store.read_text(place[0], index) for index in store.shard_rows(*place)]
    return (
        np.array([row_key(row) for row in rows], np.uint64),
        max(int(row.segment_documents.max()) for row in rows),
    )


def _document_shifts(stores: Sequence[LogitStore], highest: Sequence[int]) -> list[int]:
    """Returns what is added to each store's document numbers; stores of one corpus share it."""
    corpora: list[dict[str, object]] = []
    ends: list[int] = []
    number_of = []
    for store, last in zip(stores, highest, strict=True):
        corpus = origin(store.manifest.dataset)
        if corpus not in corpora:
            corpora.append(corpus)
            ends.append(0)
        number_of.append(corpora.index(corpus))
        ends[number_of[-1]] = max(ends[number_of[-1]], last + 1)
    shifts = list(itertools.accumulate(ends, initial=0))
    if shifts[-1] > LARGEST_NUMBER:
        raise StoreError(
            f"The documents of {', '.join(str(store.path) for store in stores)} have numbers up to "
            f"{shifts[-1] - 1:,} when they are kept apart, expected at most {LARGEST_NUMBER:,}: one of the "
            "stores numbers them wrongly; leave it out."
        )
    return [shifts[number] for number in number_of]


def _merged_dataset(stores: Sequence[LogitStore], shifts: Sequence[int]) -> dict[str, object]:
    datasets = [origin(store.manifest.dataset) for store in stores]
    if all(dataset == datasets[0] for dataset in datasets):
        merged = datasets[0]
    else:
        distinct = [dataset for place, dataset in enumerate(datasets) if dataset not in datasets[:place]]
        merged = {"corpora": distinct}
    merged = {name: value for name, value in merged.items() if name != PROVENANCE}
    return with_step(merged, "merge", stores, document_shifts=list(shifts))


@dataclass(frozen=True)
class _Search:
    """Which rows `subset` takes: those of the documents [N, 2], else those whose key is below the limit."""

    store: LogitStore
    documents: NDArray[np.int64] | None
    seed: int
    limit: int

    def taken(self, place: tuple[str, int]) -> NDArray[np.int64]:
        """Returns the numbers of a shard's rows that are taken, after reading the text of each."""
        split, shard = place
        numbers = self.store.shard_rows(split, shard)
        taken = (index for index in numbers if self._is_taken(self.store.read_text(split, index)))
        return np.fromiter(taken, np.int64)

    def _is_taken(self, row: Row) -> bool:
        if self.documents is not None:
            return bool(_within(row.segment_documents, self.documents).any())
        return row_key(row, self.seed) < self.limit


def _of_each_shard(
    store: LogitStore,
    splits: Sequence[str],
    work: Callable[[tuple[str, int]], Result],
    jobs: int,
    progress: Progress,
) -> Iterator[tuple[str, Result]]:
    """Yields (split, what `work` finds) for each shard of some splits, in order."""
    total = sum(map(store.shards, splits))
    results = results_of(work, shards_of(store, splits), jobs, what=f"reading {store.path}")
    for done, ((split, _), result) in enumerate(zip(shards_of(store, splits), results, strict=True), start=1):
        progress("shards looked at", done, total)
        yield split, result


def _only(splits: Sequence[str], store: LogitStore) -> str:
    if len(splits) != 1:
        raise StoreError(
            f"Row numbers count within a split, and {store.path} has rows in {', '.join(splits)}: name one "
            "with --split."
        )
    return splits[0]


def _check_rows(store: LogitStore, split: str, spans: NDArray[np.int64]) -> None:
    count, (start, end) = store.rows(split), spans[-1].tolist()
    if end > count:
        raise StoreError(f"{store.path}, split {split} has no row {max(start, count)}: it has {count} rows.")


def _spans(numbers: Numbers, name: str) -> NDArray[np.int64]:
    """Returns numbers as ascending [first, one past the last] pairs, int64 [N, 2], with gaps between them.

    Raises:
        StoreError: there is none, or one that no row or document can have.
    """
    pairs: list[list[int]] = []
    for start, end in sorted(_pairs(numbers)):
        if start < 0 or end - 1 > LARGEST_NUMBER:
            bad = start if start < 0 else end - 1
            raise StoreError(f"{name} holds {bad}, expected numbers from 0 to {LARGEST_NUMBER}.")
        if pairs and start <= pairs[-1][1]:
            pairs[-1][1] = max(pairs[-1][1], end)
        else:
            pairs.append([start, end])
    if not pairs:
        raise StoreError(f"{name} is empty: name at least one number, or leave {name} away.")
    return np.asarray(pairs, np.int64)


def _pairs(numbers: Numbers) -> Iterator[tuple[int, int]]:
    for item in [numbers] if isinstance(numbers, range) else numbers:
        if isinstance(item, range) and item.step == 1:
            if item.start < item.stop:
                yield item.start, item.stop
        else:
            yield from ((int(one), int(one) + 1) for one in (item if isinstance(item, range) else [item]))


def _within(numbers: NDArray[np.int64], spans: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns which numbers [M] are in one of the spans [N, 2]."""
    place = np.searchsorted(spans[:, 0], numbers, side="right") - 1
    return (place >= 0) & (numbers < spans[place, 1])
