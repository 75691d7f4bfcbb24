"""A new store from the rows of others: written shard by shard, continued when it was cut off, sealed at the
end. The shards are written in any order, by as many processes and machines as run the command.

What the new manifest says of the data is decided here too: the source's `dataset` stays, and the step that
was taken is added to its list `provenance`, with the digests of the stores that went in.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.places.files import exists
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.projections import projections_of
from sparsekd.logit_store.protocol.layout import commit_file, shard_file
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.protocol.rows import OneByOne, Rows
from sparsekd.logit_store.protocol.writer import committed_shards, create_store, seal, write_shard
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.tools.processes import require_jobs, results_of

PROVENANCE = "provenance"

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""


def no_progress(what: str, done: int, total: int) -> None:
    """Tells nobody."""


def write_store(
    path: StorePath,
    manifest: Manifest,
    source: LogitStore,
    content: Mapping[str, Rows],
    progress: Progress,
    jobs: int = 1,
) -> str:
    """Writes and seals a store of rows that can be read in any order; shards that are there are not read
    again.

    The same call may run on several machines at once. Each takes the shards in an order of its own and passes
    by those that are there, so that they seldom write the same one, which does no harm.

    Args:
        path: of the new store: a folder that is not there, empty, or holds what this call began before.
        manifest: its identity.
        source: the store whose tokenizer and projections it takes.
        content: the rows of each split of the manifest, picklable.
        progress: told after each shard.
        jobs: processes of this machine that write shards.

    Returns:
        The digest of the new store.

    Raises:
        StoreError: there is no row, the folder holds another store, or a row cannot be read or written.
    """
    require_jobs(jobs)
    per_shard = manifest.rows_per_shard
    plan = {split: _ceil(rows.count, per_shard) for split, rows in content.items()}
    total = sum(plan.values())
    if total == 0:
        raise StoreError(f"{path} would hold no row: choose some rows; nothing was written.")
    create_store(path, manifest, source.tokenizer_path, projections_of(source.path, source.manifest))
    missing = []
    for split, count in plan.items():
        committed = committed_shards(path, split)
        missing += [(split, shard) for shard in range(count) if shard not in committed]
    random.shuffle(missing)
    write = partial(_write_shard, path, manifest, content)
    for done, _ in enumerate(results_of(write, missing, jobs, what="writing shards"), start=1):
        progress("shards", total - len(missing) + done, total)
    return seal(path, plan)


def _write_shard(
    path: StorePath, manifest: Manifest, content: Mapping[str, Rows], place: tuple[str, int]
) -> None:
    """Writes one shard, unless another process has written it meanwhile."""
    split, shard = place
    if exists(commit_file(path, split, shard)) and exists(shard_file(path, split, shard)):
        return
    first = shard * manifest.rows_per_shard
    places = range(first, min(first + manifest.rows_per_shard, content[split].count))
    write_shard(path, manifest, split, shard, OneByOne(content[split], places))


def write_stream(
    path: StorePath,
    manifest: Manifest,
    tokenizer_files: Path,
    content: Mapping[str, Iterable[Row]],
    progress: Progress,
) -> str:
    """Like `write_store` for rows that come in one order only; at most one shard of them is in memory."""
    create_store(path, manifest, tokenizer_files)
    plan = {}
    for split, rows in content.items():
        shard = 0
        for batch in _batches(iter(rows), manifest.rows_per_shard):
            write_shard(path, manifest, split, shard, batch)
            shard += 1
            progress(f"{split} shards", shard, 0)
        plan[split] = shard
    return seal(path, plan)


def shards_of(store: LogitStore, splits: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yields (split, shard) of each shard of some splits."""
    return ((split, shard) for split in splits for shard in range(store.shards(split)))


def origin(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a dataset's identity without the steps that were taken since: which corpus its documents
    number."""
    return {name: value for name, value in dataset.items() if name != PROVENANCE}


def with_step(
    dataset: Mapping[str, Any], action: str, sources: Sequence[LogitStore], **parameters: object
) -> dict[str, Any]:
    """Returns a dataset's identity with one more step.

    Args:
        dataset: of the new store so far.
        action: what was done.
        sources: the stores that went in, in order.
        **parameters: what decides the result, as JSON values.
    """
    inputs = [
        {"store": store.digest, "rows": {split: store.rows(split) for split in store.manifest.splits}}
        for store in sources
    ]
    if len(sources) > 1:  # one source's earlier steps stay in the list itself
        inputs = [
            {**entry, PROVENANCE: store.manifest.dataset.get(PROVENANCE, [])}
            for entry, store in zip(inputs, sources, strict=True)
        ]
    before = dataset.get(PROVENANCE, [])
    return {**dataset, PROVENANCE: [*before, {"action": action, "sources": inputs, **parameters}]}


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while batch := list(islice(rows, size)):
        yield batch


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
