"""Fewer rows of one store, or the rows of several: `subset` and `merge`.

A row stays whole, whatever is chosen: its tokens are the context of its records.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest, compare_manifests
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import PADDING_DOCUMENT, Row, document_of_position, narrowed
from sparsekd.logit_store.tools.derive import (
    PROVENANCE,
    Progress,
    Rows,
    no_progress,
    origin,
    rows_of,
    with_step,
    write_store,
)

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
        progress: told of rows that were looked at, and after each shard.

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

        def is_taken(row: Row) -> bool:
            if wanted is not None:
                return bool(_within(row.segment_documents, wanted).any())
            return row_key(row, seed) < limit

        chosen = _search(store, splits, is_taken, progress)
        step = {"fraction": fraction, "seed": seed} if wanted is None else {"documents": wanted.tolist()}
    if not sum(map(len, chosen.values())):
        raise StoreError(f"No row of {source} is chosen: choose others; nothing was written.")

    of_records = [spec.plane for spec in store.manifest.features if spec.positions == "recorded"]

    def content(name: str) -> Rows:
        numbers = chosen.get(name, np.empty(0, np.int64))

        def get(index: int) -> Row:
            row = store.read_row(name, int(numbers[index]))
            return row if wanted is None else _masked(row, wanted, of_records)

        return Rows(len(numbers), get)

    dataset = with_step(store.manifest.dataset, "subset", [store], splits=splits, **step)
    manifest = replace(store.manifest, dataset=dataset)
    return write_store(target, manifest, store, {name: content(name) for name in manifest.splits}, progress)


def merge_stores(
    sources: Sequence[StorePath],
    target: StorePath,
    *,
    allow_repeated_rows: bool = False,
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
        progress: told of rows that were looked at, and after each shard.

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
    highest = _survey(stores, allow_repeated_rows, progress)
    shifts = _document_shifts(stores, highest)

    def content(split: str) -> Rows:
        parts = [
            (rows_of(store, split), shift)
            for store, shift in zip(stores, shifts, strict=True)
            if split in store.manifest.splits
        ]
        ends = np.cumsum([rows.count for rows, _ in parts])

        def get(index: int) -> Row:
            part = int(np.searchsorted(ends, index, side="right"))
            rows, shift = parts[part]
            row = rows.get(index - int(ends[part]) + rows.count)
            numbers = row.segment_documents
            return replace(
                row, segment_documents=np.where(numbers == PADDING_DOCUMENT, numbers, numbers + shift)
            )

        return Rows(int(ends[-1]), get)

    manifest = replace(first, splits=splits, dataset=_merged_dataset(stores, shifts))
    return write_store(target, manifest, stores[0], {split: content(split) for split in splits}, progress)


def _require_same_kind(one: LogitStore, other: LogitStore) -> None:
    def kind(manifest: Manifest) -> Manifest:
        return replace(manifest, dataset={}, splits=("train",), rows_per_shard=1)

    differing = compare_manifests(kind(other.manifest), kind(one.manifest))
    if differing:
        raise StoreError(
            f"{other.path} and {one.path} cannot be merged, they differ in {'; '.join(differing)}: capture "
            "with equal settings, or bring codec and k together with `store reencode` first."
        )


def _survey(stores: Sequence[LogitStore], allow_repeated_rows: bool, progress: Progress) -> list[int]:
    """Returns the highest document number of each store (-1 for none); refuses a row that is there twice."""
    places = [(number, split) for number, store in enumerate(stores) for split in store.manifest.splits]
    total = sum(stores[number].rows(split) for number, split in places)
    keys = np.empty(total, np.uint64)
    highest = [PADDING_DOCUMENT] * len(stores)
    done = 0
    for number, split in places:
        for index in range(stores[number].rows(split)):
            row = stores[number].read_text(split, index)
            keys[done] = row_key(row)
            highest[number] = max(highest[number], int(row.segment_documents.max()))
            done += 1
            progress("rows looked at", done, total)
    if allow_repeated_rows:
        return highest
    order = np.argsort(keys, kind="stable")
    starts = np.cumsum([0] + [stores[number].rows(split) for number, split in places])

    def read(flat: int) -> tuple[str, Row]:
        part = int(np.searchsorted(starts, flat, side="right")) - 1
        number, split = places[part]
        index = flat - int(starts[part])
        store = stores[number]
        return f"row {index} of split {split} of {store.path}", store.read_text(split, index)

    for place in np.flatnonzero(keys[order][1:] == keys[order][:-1]):
        (where, row), (where_again, again) = read(int(order[place])), read(int(order[place + 1]))
        if np.array_equal(row.token_ids, again.token_ids):
            raise StoreError(
                f"{where_again} has the tokens of {where}: the stores overlap; leave one of them out, or "
                "take such rows twice with --allow-repeated-rows."
            )
    return highest


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
    shifts = np.cumsum([0, *ends[:-1]])
    return [int(shifts[number]) for number in number_of]


def _merged_dataset(stores: Sequence[LogitStore], shifts: Sequence[int]) -> dict[str, object]:
    datasets = [origin(store.manifest.dataset) for store in stores]
    if all(dataset == datasets[0] for dataset in datasets):
        merged = datasets[0]
    else:
        distinct = [dataset for place, dataset in enumerate(datasets) if dataset not in datasets[:place]]
        merged = {"corpora": distinct}
    merged = {name: value for name, value in merged.items() if name != PROVENANCE}
    return with_step(merged, "merge", stores, document_shifts=list(shifts))


def _search(
    store: LogitStore, splits: Sequence[str], is_taken: Callable[[Row], bool], progress: Progress
) -> dict[str, NDArray[np.int64]]:
    """Returns the numbers of the rows that are taken, by split, after reading every row once."""
    total = sum(store.rows(split) for split in splits)
    chosen, done = {}, 0
    for split in splits:
        taken = []
        for index in range(store.rows(split)):
            if is_taken(store.read_text(split, index)):
                taken.append(index)
            done += 1
            progress("rows looked at", done, total)
        chosen[split] = np.asarray(taken, np.int64)
    return chosen


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


def _masked(row: Row, documents: NDArray[np.int64], of_records: Collection[str]) -> Row:
    """Returns the row without loss and records outside of some documents; a mask is never widened."""
    return narrowed(row, _within(document_of_position(row), documents), of_records)


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
