"""What the loader benchmark reads: the same rows as a store of ours and as files of the peers.

The rows are few, written over and over as they are stored: a loader does not look into them, and the files
are of a real length.
"""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loader_contestants import DATASETS, MOSAICML, Task
from store_data import SPLIT, Case, synthetic_set

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.synthetic import write_synthetic_tokenizer

CASE = Case(16, 24)
"""The default record."""

ROWS_PER_SHARD = 256
DISTINCT = 4
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Shape:
    """One data set.

    Attributes:
        length: positions of a row.
        rows: of the training split.
        vocabulary: of the teacher.
    """

    length: int
    rows: int
    vocabulary: int


@dataclass(frozen=True)
class Data:
    """The data set, written.

    Attributes:
        shape: of it.
        folders: contestant -> its files.
        sizes: contestant -> bytes of its files.
        row_bytes: mean of a stored row.
        longest: bytes of the longest row.
    """

    shape: Shape
    folders: dict[str, Path]
    sizes: dict[str, int]
    row_bytes: float
    longest: int


def asked(python: Path | str, task: Task, environment: Mapping[str, str]) -> dict[str, Any]:
    """What a contestant answers, in a process of its own.

    Raises:
        RuntimeError: it fails; with the end of what it said.
    """
    command = [str(python), str(HERE / "loader_contestants.py"), json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment))
    if done.returncode:
        raise RuntimeError(f"{task.name} ({task.action}): {done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def write_data(
    folder: Path, shape: Shape, pythons: Mapping[str, Path | str], environment: Mapping[str, str]
) -> Data:
    """Writes a data set as every contestant's files.

    Args:
        folder: an empty one.
        shape: of the data set.
        pythons: peer -> the Python that has its library; peers that are not named are left out.
        environment: of its processes.
    """
    folder.mkdir(parents=True)
    store = _write_store(folder, shape)
    source = folder / "rows.bin"
    lengths = []
    with open(source, "wb") as file:
        for row in range(shape.rows):
            lengths.append(file.write(store.read_message(SPLIT, row)))
    folders = {"sparsekd": folder / "store"}
    sizes = {"sparsekd": sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())}
    for name in (MOSAICML, DATASETS):
        if name in pythons:
            folders[name] = folder / name
            task = Task("write", name, str(folders[name]), shape.rows, source=str(source), lengths=lengths)
            sizes[name] = int(asked(pythons[name], task, environment)["bytes"])
    source.unlink()
    return Data(shape, folders, sizes, sum(lengths) / len(lengths), max(lengths))


def _write_store(folder: Path, shape: Shape) -> Any:
    made = synthetic_set("text", vocabulary=shape.vocabulary, length=shape.length, rows=DISTINCT)
    manifest, rows = made.rows_of(CASE)
    manifest = replace(manifest, rows_per_shard=ROWS_PER_SHARD)
    tokenizer = write_synthetic_tokenizer(folder / "tokenizer", shape.vocabulary)
    for name, content in (("few", rows), ("store", None)):
        create_store(folder / name, manifest, tokenizer)
        if content is not None:
            write_shard(folder / name, manifest, SPLIT, 0, content)
            seal(folder / name, {SPLIT: 1})
    few = open_store(folder / "few")
    starts = range(0, shape.rows, ROWS_PER_SHARD)
    for shard, start in enumerate(starts):
        stop = min(start + ROWS_PER_SHARD, shape.rows)
        copies = [few.read_stored(SPLIT, row % DISTINCT) for row in range(start, stop)]
        write_shard(folder / "store", manifest, SPLIT, shard, copies)
    seal(folder / "store", {SPLIT: len(starts)})
    return open_store(folder / "store")
