"""The loader benchmark's contestants. Each runs in a process of its own, some in another environment.

    python loader_contestants.py '{"action": "read", "name": "...", "folder": "...", ...}'

Prints one line of JSON. Nothing is imported but what the contestant itself needs: MosaicML's library wants
versions of numpy and transformers that sparsekd does not.

Every contestant gives the stored bytes of each row once, in an order drawn anew; who takes them copies each
into its place in a batch, as collation does.
"""

import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Rows = Iterator[Any]
"""Something with the buffer protocol for each row."""

MANY = 8
"""Readers that wait for S3 together."""

SHARD_BYTES = 1 << 26
"""MosaicML's own default."""


@dataclass(frozen=True)
class Task:
    """What a process is asked for.

    Attributes:
        action: "read", or "write" of a peer's files.
        name: of the contestant, one of `LOADERS` or `REMOTE`.
        folder: of its files; an address for a store that is elsewhere.
        rows: of one epoch.
        longest: bytes of a row at most.
        batch: rows.
        checked: whether the taker computes a crc32 of each row, which sparsekd's reader does by itself.
        seed: of the order.
        streams: of the chunked order.
        window: of the chunked order.
        local: a folder of its own for what a contestant copies from elsewhere.
        source: rows as one file, for "write".
        lengths: of these rows.
    """

    action: str
    name: str
    folder: str
    rows: int
    longest: int = 0
    batch: int = 1
    checked: bool = False
    seed: int = 0
    streams: int = 1
    window: int = 1
    local: str = ""
    source: str = ""
    lengths: Sequence[int] = ()


def _sparsekd(task: Task) -> Rows:
    from sparsekd.logit_store.protocol.reader import open_store
    from sparsekd.trainer.config.schema import DataConfig
    from sparsekd.trainer.data.mixed import SourceOfRows, order_of
    from sparsekd.trainer.data.reading import SPLIT, PlacedRows, Readers
    from sparsekd.trainer.data.sources import Records, Sources

    data = DataConfig(task.name.split()[1].rstrip(","), task.streams, task.window)
    order = order_of(data, [SourceOfRows("", task.rows, 1)], seed=task.seed, slots=task.batch)
    store = open_store(task.folder, access="mapped" if "mapped" in task.name else "positional")
    planes: frozenset[str] = frozenset()
    if "decoded" in task.name:
        from store_ours import sampled_planes

        planes = sampled_planes(store.manifest.record)
    sources = Sources.of_one(store, planes, Records(None))
    placed = PlacedRows(sources, keep=False, readers=Readers(MANY if "readers" in task.name else 1))

    def rows() -> Rows:
        for start in range(0, task.rows, task.batch):
            places = order.places(start, min(task.batch, task.rows - start))
            for place, message in zip(places, placed.messages(places), strict=True):
                yield store.read_part(SPLIT, place.row, planes, message=message) if planes else message

    return rows()


def _mosaicml(task: Task) -> Rows:
    from streaming import StreamingDataset

    place: dict[str, Any] = {"local": task.folder}
    if task.local:
        place = {"remote": task.folder, "local": task.local}
    found = StreamingDataset(**place, shuffle=True, shuffle_seed=task.seed, batch_size=task.batch)
    return (sample["row"] for sample in found)


def _datasets(task: Task) -> Rows:
    from datasets import load_from_disk

    found = load_from_disk(task.folder).shuffle(seed=task.seed)
    return (found[index]["row"] for index in range(len(found)))


def _datasets_arrow(task: Task) -> Rows:
    from datasets import load_from_disk

    found = load_from_disk(task.folder).shuffle(seed=task.seed).with_format("arrow")
    return (found[index]["row"][0].as_buffer() for index in range(len(found)))


def _datasets_iterable(task: Task) -> Rows:
    from datasets import load_from_disk

    whole = load_from_disk(task.folder)
    found = whole.to_iterable_dataset(num_shards=16).shuffle(seed=task.seed, buffer_size=16 * task.batch)
    return (example["row"] for example in found)


CHUNKED, GLOBAL = "sparsekd chunked", "sparsekd global"
CHUNKED_MAPPED, GLOBAL_MAPPED = f"{CHUNKED}, mapped", f"{GLOBAL}, mapped"
DECODED = f"{CHUNKED}, decoded"
CHUNKED_MANY, GLOBAL_MANY = f"{CHUNKED}, {MANY} readers", f"{GLOBAL}, {MANY} readers"
MOSAICML = "mosaicml-streaming"
DATASETS, DATASETS_ARROW, DATASETS_ITERABLE = "datasets", "datasets, format arrow", "datasets, iterable"

LOADERS: dict[str, Callable[[Task], Rows]] = {
    CHUNKED: _sparsekd,
    GLOBAL: _sparsekd,
    CHUNKED_MAPPED: _sparsekd,
    GLOBAL_MAPPED: _sparsekd,
    DECODED: _sparsekd,
    MOSAICML: _mosaicml,
    DATASETS: _datasets,
    DATASETS_ARROW: _datasets_arrow,
    DATASETS_ITERABLE: _datasets_iterable,
}
REMOTE: dict[str, Callable[[Task], Rows]] = {
    CHUNKED: _sparsekd,
    CHUNKED_MANY: _sparsekd,
    GLOBAL: _sparsekd,
    GLOBAL_MANY: _sparsekd,
    MOSAICML: _mosaicml,
}


def read(task: Task) -> dict[str, float]:
    """One epoch: rows, their bytes, wall and CPU seconds of this process with all its threads."""
    rows = {**LOADERS, **REMOTE}[task.name](task)
    places = np.empty((task.batch, max(task.longest, 1)), np.uint8)
    count = size = 0
    wall, processor = time.perf_counter(), time.process_time()
    for row in rows:
        if task.longest:
            content = np.frombuffer(row, np.uint8)
            if task.checked:
                zlib.crc32(row)
            places[count % task.batch, : len(content)] = content
            size += len(content)
        count += 1
    return {
        "rows": count,
        "bytes": size,
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
    }


def _pieces(task: Task) -> Iterator[dict[str, bytes]]:
    with open(task.source, "rb") as file:
        for length in task.lengths:
            yield {"row": file.read(length)}


def write(task: Task) -> dict[str, float]:
    """Writes the rows as a peer's files."""
    if task.name == MOSAICML:
        from streaming import MDSWriter

        with MDSWriter(out=task.folder, columns={"row": "bytes"}, size_limit=SHARD_BYTES) as writer:
            for piece in _pieces(task):
                writer.write(piece)
    else:
        from datasets import Dataset, Features, Value

        features = Features({"row": Value("large_binary")})
        made = Dataset.from_generator(
            _pieces, gen_kwargs={"task": task}, features=features, cache_dir=f"{task.folder}-cache"
        )
        made.save_to_disk(task.folder)
    size = sum(path.stat().st_size for path in Path(task.folder).rglob("*") if path.is_file())
    return {"rows": task.rows, "bytes": size}


if __name__ == "__main__":
    # The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
    sys.path.insert(0, str(Path(__file__).parent))
    asked = Task(**json.loads(sys.argv[1]))
    print(json.dumps(read(asked) if asked.action == "read" else write(asked)))
