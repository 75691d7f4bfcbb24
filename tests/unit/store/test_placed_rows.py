"""Training rows by their places in the stream: how many requests they take, what is held, what is kept."""

import os
import shutil
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.places.cache import FOLDER_VARIABLE
from sparsekd.logit_store.places.files import files_below
from sparsekd.logit_store.places.paths import RemotePath, StorePath
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.data.chunked import CHUNK_ROWS, chunked_order
from sparsekd.trainer.data.order import GlobalOrder, Order, Place, batch_shape, micro_batches
from sparsekd.trainer.data.reading import PlacedRows, Readers
from sparsekd.trainer.data.skipping import RowsOrNothing
from sparsekd.trainer.data.sources import Records, Sources

sys.path.append(str(Path(__file__).parent))
from s3_server import S3Server

ROWS, SLOTS = 1000, 24  # neither the chunks nor the batches end with the epoch
PLANES = ("head_ids",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of few bytes, in shards that chunks do not divide."""
    path = tmp_path_factory.mktemp("placed") / "store"
    manifest = synthetic_manifest(sequence_length=4, vocabulary_size=9, k=1, n=1, rows_per_shard=200)
    write_synthetic_store(path, manifest, {"train": ROWS}, seed=0)
    return path


def chunked() -> Order:
    return chunked_order(rows=ROWS, seed=5, slots=SLOTS, streams=64, window=2)


def read_epochs(path: StorePath, order: Order, *, ranks: int, keep: bool, readers: int) -> Counter[int]:
    """Reads as many ranks would, each by itself, and checks each row against the one that was asked for."""
    shape = batch_shape(global_rows=SLOTS, micro_rows=SLOTS // ranks, world_size=ranks)
    seen: Counter[int] = Counter()
    for rank in range(ranks):
        store = open_store(path)
        placed = PlacedRows(of_one(store), keep=keep, readers=Readers(readers))
        for step in range(2 * ROWS // SLOTS):
            for part in micro_batches(step * SLOTS, shape, order, rank=rank):
                for place, message in zip(part, placed.messages(part), strict=True):
                    assert message is not None
                    assert bytes(message) == MESSAGES[place.row]
                    seen[place.row] += 1
    return seen


MESSAGES: list[bytes] = []


def of_one(store: LogitStore) -> Sources:
    return Sources.of_one(store, PLANES, Records(None))


@pytest.fixture(autouse=True)
def messages(made: Path) -> None:
    store = open_store(made)
    MESSAGES[:] = [bytes(store.read_message("train", row)) for row in range(ROWS)]


@pytest.mark.parametrize(("ranks", "readers"), [(1, 1), (4, 5)])
def test_requests_of_an_object_store(
    s3: S3Server, bucket: RemotePath, made: Path, ranks: int, readers: int
) -> None:
    """An eighth of one for a row at most in chunks, the tables of rows included; two in the global order."""
    place = bucket / "store"
    s3.fill({f"{place.key}/{name}": (made / name).read_bytes() for name in files_below(made)})
    cache = Path(os.environ[FOLDER_VARIABLE]) / "pieces"
    for order, keep, most in ((chunked(), False, 1 / 8), (GlobalOrder(ROWS, 5), True, 2.0)):
        s3.requests.clear()
        seen = read_epochs(place, order, ranks=ranks, keep=keep, readers=readers)
        assert len(s3.requests) <= most * seen.total(), (order, ranks)
        kept = {path.name for path in cache.iterdir() if ".arrow" in path.name}
        assert bool(kept) == keep, "what is read once takes no room on the disk"
        shutil.rmtree(cache)


@pytest.mark.parametrize("readers", [1, 5])
def test_what_is_held_is_a_window_of_each_stream(made: Path, readers: int) -> None:
    order = chunked_order(rows=ROWS, seed=5, slots=SLOTS, streams=4, window=3)
    placed = PlacedRows(of_one(open_store(made)), keep=False, readers=Readers(readers))
    most = 0
    for start in range(0, 2 * ROWS, 10):
        placed.messages(order.places(start, 10))
        most = max(most, sum(len(held) for held in placed._held.values()))
    assert 2 * 3 * CHUNK_ROWS < most <= order.chunks_held() * CHUNK_ROWS


@pytest.mark.parametrize(("access", "readers"), [("positional", 1), ("mapped", 3)])
def test_a_damaged_row_is_alone(made: Path, tmp_path: Path, access: str, readers: int) -> None:
    """Its neighbours, which are read with it, are as they were; it is refused by name, or left out."""
    path = tmp_path / "damaged"
    shutil.copytree(made, path)
    record = open_store(path).commit("train", 1)
    file = path / "shards/train/000/000001.arrow"
    data = bytearray(file.read_bytes())
    data[int(record.offsets[7]) + int(record.lengths[7]) // 2] ^= 1
    file.write_bytes(data)
    store, order = open_store(path, access=access), chunked()
    found = {}
    strict = RowsOrNothing(of_one(store), most=0, left_out=[], keep=False, readers=readers)
    lenient = RowsOrNothing(of_one(store), most=1, left_out=[], keep=False, readers=readers)
    for place in order.places(0, ROWS):
        if place.row == 207:
            with pytest.raises(DamagedStoreError, match=r"shard 000001, row 207"):
                strict.read([place], step=1)
            assert not lenient.read([place], step=1)[0].row.loss_mask.any()
        else:
            found[place.row] = strict.read([place], step=1)[0].row
            assert (lenient.read([place], step=1)[0].row.token_ids == found[place.row].token_ids).all()
    whole = open_store(made)
    for row, read in found.items():
        assert (read.token_ids == whole.read_row("train", row).token_ids).all()


def test_the_threads_that_read_end_with_the_run(made: Path) -> None:
    """A driver may train many times in one process."""

    before, sources = set(threading.enumerate()), of_one(open_store(made))
    with RowsOrNothing(sources, most=0, left_out=[], keep=False, readers=3) as rows:
        rows.read([Place(row, row, row + 1, 0, 0) for row in range(4)], step=1)
        assert any(thread.name.startswith("reader") for thread in set(threading.enumerate()) - before)
    assert not set(threading.enumerate()) - before


def test_rows_that_cannot_be_read_together(made: Path, tmp_path: Path) -> None:
    """A shard that is missing, one that is cut off, rows over a shard's end, rows that are not there."""
    path = tmp_path / "store"
    shutil.copytree(made, path)
    file = path / "shards/train/000/000002.arrow"
    cut = int(open_store(path).commit("train", 2).offsets[3]) + 5
    file.write_bytes(file.read_bytes()[:cut])
    (path / "shards/train/000/000003.arrow").unlink()
    store = open_store(path)
    together = store.read_messages("train", 392, 408)
    assert [message is None for message in together] == [False] * 8 + [False] * 3 + [True] * 5
    assert [bytes(message) for message in together if message is not None] == MESSAGES[392:403]
    assert store.read_messages("train", 600, 604) == [None] * 4
    with pytest.raises(DamagedStoreError, match="is missing"):
        RowsOrNothing(of_one(store), most=0, left_out=[], keep=False, readers=1).read(
            [Place(600, 600, 601, 0, 0)], step=1
        )
    assert store.read_messages("train", 5, 5) == []
    with pytest.raises(StoreError, match="has no rows 990 to 1001"):
        store.read_messages("train", 990, 1001)
