"""Work that several processes, or machines, share: the same bytes as one makes, and nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from slow_work import work
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places.files import TEMPORARY_PREFIX, files_below, publish_bytes
from sparsekd.logit_store.places.paths import RemotePath, StorePath
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.logit_store.tools.combine import merge_stores, subset_store
from sparsekd.logit_store.tools.export import export_store
from sparsekd.logit_store.tools.processes import ITEMS_AHEAD, results_of
from sparsekd.logit_store.tools.reencode import reencode_store
from sparsekd.logit_store.tools.stats import store_stats
from sparsekd.logit_store.tools.verify import verify_store

pytestmark = pytest.mark.timeout(300)


def _tree(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in files_below(path)}


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Path, Path]:
    """Two stores of different corpora."""
    for name, seed in (("a", 0), ("b", 50)):
        manifest = synthetic_manifest(dataset={"name": name})
        write_synthetic_store(tmp_path / name, manifest, {"train": 13, "heldout": 4}, seed=seed)
    return tmp_path / "a", tmp_path / "b"


def _tools(one: StorePath, other: StorePath) -> dict[str, Callable[[Path, int], object]]:
    return {
        "merge": lambda new, jobs: merge_stores([one, other], new, jobs=jobs),
        "rows": lambda new, jobs: subset_store(one, new, split="train", rows=[2, 5, 6, 7, 12], jobs=jobs),
        "documents": lambda new, jobs: subset_store(one, new, documents=range(3, 20), jobs=jobs),
        "fraction": lambda new, jobs: subset_store(one, new, fraction=0.6, seed=1, jobs=jobs),
        "reencode": lambda new, jobs: reencode_store(one, new, codec="plain", k=4, jobs=jobs),
        "export": lambda new, jobs: export_store(one, new, text=True, jobs=jobs),
    }


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_come_in_order_and_items_are_taken_a_few_at_a_time(tmp_path: Path, jobs: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23, 24, 25]:
            taken.append(item)
            yield item

    results = results_of(partial(work, tmp_path), items(), jobs, what="a test")
    assert next(results) == 0 and len(taken) <= jobs * ITEMS_AHEAD
    assert list(results) == [item * item for item in taken[1:]]
    workers = {path.name.partition("-")[2] for path in tmp_path.iterdir()}
    assert len(workers) <= jobs and (str(os.getpid()) in workers) == (jobs == 1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_is_the_work_s_own_and_nothing_is_begun_after_it(tmp_path: Path, jobs: int) -> None:
    with pytest.raises(StoreError, match=r"^item 13 is wrong\.$"):
        list(results_of(partial(work, tmp_path), iter([13, *range(100, 200)]), jobs, what="a test"))
    assert len(list(tmp_path.iterdir())) <= jobs * ITEMS_AHEAD


def test_a_killed_process_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^A process of a test was killed.*fewer --jobs than 2"):
        list(results_of(partial(work, tmp_path), iter([1, 17, 2, 3]), 2, what="a test"))


@pytest.mark.parametrize("jobs", [0, -1, 1025])
def test_a_number_of_processes_that_cannot_be(tmp_path: Path, jobs: int) -> None:
    with pytest.raises(StoreError, match=f"jobs is {jobs}, expected 1 to 1024"):
        list(results_of(partial(work, tmp_path), iter([1]), jobs, what="a test"))


@pytest.mark.parametrize("tool", sorted(_tools(Path(), Path())))
def test_nothing_is_begun_with_such_a_number(tool: str, stores: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="jobs is 0"):
        _tools(*stores)[tool](tmp_path / "new", 0)
    assert not (tmp_path / "new").exists()


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(tmp_path: Path, by: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "from functools import partial\n"
        "from pathlib import Path\n"
        "from sparsekd.logit_store.tools.processes import results_of\n"
        "from slow_work import work\n"
        "if __name__ == '__main__':\n"
        f"    list(results_of(partial(work, Path({str(tmp_path)!r})), iter([19, 19, 19]), 2, what='it'))\n"
    )
    started = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while len(workers := [int(path.name[3:]) for path in tmp_path.glob("19-*")]) < 2:
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.05)
        started.send_signal(by)
        started.communicate(timeout=60)
        while any(map(_is_alive, workers)):
            assert time.monotonic() < deadline + 60, "they live on"
            time.sleep(0.05)
    finally:
        started.kill()


@pytest.mark.parametrize("tool", sorted(_tools(Path(), Path())))
def test_two_processes_make_what_one_makes(tool: str, stores: tuple[Path, Path], tmp_path: Path) -> None:
    for jobs in (1, 2):
        _tools(*stores)[tool](tmp_path / f"new{jobs}", jobs)
    assert _tree(tmp_path / "new2") == _tree(tmp_path / "new1") != {}


def test_two_processes_find_what_one_finds(stores: tuple[Path, Path]) -> None:
    path, _ = stores
    assert verify_store(path, jobs=2) == verify_store(path)
    assert store_stats(path, jobs=2).text() == store_stats(path).text()
    for number, byte in ((1, 900), (3, 1500)):
        place = path / f"shards/train/000/{number:06d}.arrow"
        data = bytearray(place.read_bytes())
        data[byte] ^= 1
        place.write_bytes(data)
    told: list[tuple[str, int, int]] = []
    found = verify_store(path, jobs=2, progress=lambda *words: told.append(words))
    assert found.damaged == (("train", 1), ("train", 3)) and found == verify_store(path)
    assert told == [("shards", done, 7) for done in range(1, 8)]
    with pytest.raises(StoreError, match=r"shard 00000[13], row"):
        store_stats(path, jobs=2)


@pytest.mark.parametrize("tool", ["merge", "documents", "export"])
def test_processes_read_an_object_store_that_this_one_has_used(
    tool: str, bucket: RemotePath, stores: tuple[Path, Path], tmp_path: Path
) -> None:
    remote = [bucket / name for name in "ab"]
    for path, place in zip(stores, remote, strict=True):
        for name in files_below(path):
            publish_bytes(place / name, (path / name).read_bytes())
    _tools(*stores)[tool](tmp_path / "local", 1)
    _tools(*remote)[tool](tmp_path / "remote", 2)
    assert _tree(tmp_path / "remote") == _tree(tmp_path / "local")
    assert verify_store(remote[0], jobs=2).ok


def test_a_store_that_is_sealed_anew_meanwhile_is_not_mixed(stores: tuple[Path, Path]) -> None:
    one = open_store(stores[0])
    open_again, arguments = one.__reduce__()
    assert open_again(*arguments).digest == one.digest
    with pytest.raises(StoreError, match="was sealed anew while it was read"):
        open_again(*arguments[:-1], open_store(stores[1]).digest)


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_of_two_processes_that_was_killed_goes_on(
    by: signal.Signals, stores: tuple[Path, Path], tmp_path: Path
) -> None:
    manifest = synthetic_manifest(sequence_length=256, rows_per_shard=2)
    write_synthetic_store(tmp_path / "large", manifest, {"train": 80}, seed=1)
    reencode_store(tmp_path / "large", tmp_path / "whole", codec="exact")
    new = tmp_path / "new"
    words = ["store", "reencode", str(tmp_path / "large"), str(new), "--codec", "exact", "--jobs", "2"]
    command = [sys.executable, "-m", "sparsekd.trainer.door.cli", *words]
    for least in (1, 12, 24):
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while len(list(new.rglob("*.json"))) < least + 2 and started.poll() is None:
            time.sleep(0.002)
        started.send_signal(by)
        started.communicate(timeout=60)
    assert not (new / "INDEX.json").exists(), "killed in time"
    time.sleep(1)  # the processes it had started end by themselves
    subprocess.run(command, check=True, capture_output=True)
    assert _tree(new) == _tree(tmp_path / "whole")
    assert not [name for name in files_below(new) if TEMPORARY_PREFIX in name]


def test_machines_that_run_one_command_share_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = synthetic_manifest(rows_per_shard=1)
    write_synthetic_store(tmp_path / "large", manifest, {"train": 60}, seed=1)
    expected = reencode_store(tmp_path / "large", tmp_path / "whole", codec="exact")
    read: list[int] = []
    # Another machine is at it whenever this one has written a shard.
    other = partial(reencode_store, tmp_path / "large", tmp_path / "new", codec="exact")

    class Enough(Exception):
        pass

    def a_few(what: str, done: int, total: int) -> None:
        read.append(done)
        if len(read) % 5 == 0:
            raise Enough

    def meanwhile(what: str, done: int, total: int) -> None:
        if done in (10, 20, 30):
            with pytest.raises(Enough):
                other(progress=a_few)

    rows: Counter[int] = Counter()
    read_row = LogitStore.read_row

    def counted(store: LogitStore, split: str, index: int) -> Row:
        rows[index] += store.path == tmp_path / "large"
        return read_row(store, split, index)

    monkeypatch.setattr(LogitStore, "read_row", counted)
    assert other(progress=meanwhile) == expected
    assert rows == dict.fromkeys(range(60), 1), "no shard is made by both"
    assert _tree(tmp_path / "new") == _tree(tmp_path / "whole")
    assert np.unique(read).size > 5
