"""The last pass of `prepare`: tokens of documents into rows, and these into the shards of a store."""

import time
from collections.abc import Iterable

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.row import Row
from sparsekd.trainer.corpus import packing
from sparsekd.trainer.corpus.encoding import Encoded
from sparsekd.trainer.corpus.workers import Shard, Workers
from sparsekd.trainer.run.console import Interval
from sparsekd.trainer.run.errors import DataError, Stopped
from sparsekd.trainer.run.stop import StopWatch


def write_rows(
    path: StorePath,
    manifest: Manifest,
    batches: Iterable[list[Encoded]],
    total: int,
    workers: Workers,
    watch: StopWatch,
    *,
    packed: bool,
) -> dict[str, int]:
    """Packs and writes the tokens of every document.

    Args:
        path: The store, created with `manifest`.
        manifest: Its manifest.
        batches: The tokens, in the documents' order.
        total: How many documents they are of, for messages.
        workers: Who writes.
        watch: What asks to stop.
        packed: Whether documents follow one another in a row.

    Returns:
        Number of shards by split.

    Raises:
        DataError: There is no token.
        StoreError: A shard cannot be written.
        Stopped: It was asked to stop.
    """
    length, per_shard = manifest.sequence_length, manifest.rows_per_shard
    weighted = "weights" in manifest.planes
    streams = dict.fromkeys(manifest.splits, packing.EMPTY)
    waiting: dict[str, list[Row]] = {split: [] for split in manifest.splits}
    written = dict.fromkeys(manifest.splits, 0)
    read, tokens, newest = 0, 0, -1
    started, interval = time.monotonic(), Interval()
    end = manifest.tokenizer.eos_token_id
    assert end is not None  # end_token_id
    for batch in batches:
        for part in batch:
            if part.number != newest:
                newest, read = part.number, read + 1
        for split in manifest.splits:
            chosen = [part for part in batch if part.split == split]
            stream = packing.append(
                streams[split],
                [part.token_ids for part in chosen],
                [part.number for part in chosen],
                [part.weight for part in chosen],
                [part.counted for part in chosen],
            )
            rows, streams[split] = packing.take_rows(
                stream, length, weighted=weighted, padding_id=None if packed else end
            )
            waiting[split] += rows
            while len(waiting[split]) >= per_shard:
                if watch.request is not None:
                    workers.finish()
                    shards = sum(written.values())
                    raise Stopped(f"{path} was asked to stop ({watch.request}); {shards} shards are written")
                workers.write(Shard(path, manifest, split, written[split], waiting[split][:per_shard]))
                written[split] += 1
                waiting[split] = waiting[split][per_shard:]
        tokens += sum(len(part.token_ids) for part in batch)
        if interval.is_over():
            speed = tokens / (time.monotonic() - started)
            print(f"prepare: {read:,} of {total:,} documents, {tokens:,} tokens, {speed:,.0f}/s", flush=True)
    if tokens == 0:
        raise DataError(f"The tokenizer {manifest.tokenizer.name} makes no token of any document.")
    for split in manifest.splits:
        waiting[split] += packing.take_last_row(streams[split], length, end, weighted=weighted)
        if waiting[split]:  # never more than a full shard: one row was added to less than that
            workers.write(Shard(path, manifest, split, written[split], waiting[split]))
            written[split] += 1
    workers.finish()
    return written
