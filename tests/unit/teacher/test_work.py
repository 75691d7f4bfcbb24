"""Workers of one store, in processes of their own: whatever befalls them, it is the store of a quiet one."""

import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places.paths import RemotePath, StorePath
from sparsekd.logit_store.places.remote_files import RemoteFiles
from sparsekd.logit_store.protocol.layout import INDEX_NAME, part_file
from sparsekd.logit_store.protocol.parts import is_committed
from sparsekd.logit_store.protocol.writer import create_store
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
from sparsekd.logit_store.tools.verify import verify_store
from sparsekd.trainer.run import console
from sparsekd.trainer.run.lease import STALE_SECONDS, Holder
from sparsekd.trainer.run.stop import StopWatch
from sparsekd.trainer.teacher.units import Unit, turns_of, units_of_shard
from sparsekd.trainer.teacher.work import Worker

MANIFEST = synthetic_manifest(rows_per_shard=8)
ROWS = {("train", 0): 8, ("train", 1): 8, ("train", 2): 5, ("heldout", 0): 2}
TEXT = {(split, shard): synthetic_rows(MANIFEST, rows, shard, split) for (split, shard), rows in ROWS.items()}
UNITS = {shard: units_of_shard(shard, rows, 2) for shard, rows in ROWS.items()}
"""4, 4, 3, and one that is a whole shard."""
COUNT = sum(map(len, UNITS.values()))
WHOLE = {shard: units_of_shard(shard, rows, 8) for shard, rows in ROWS.items()}


def rows_of(unit: Unit) -> list[Row]:
    return TEXT[unit.split, unit.shard][unit.rows.start : unit.rows.stop]


def tree(path: Path) -> dict[str, bytes]:
    return {
        item.relative_to(path).as_posix(): item.read_bytes() for item in path.rglob("*") if item.is_file()
    }


def leases(path: Path) -> list[Path]:
    # Not by a glob, which fails where a worker removes a folder meanwhile.
    found = [Path(inner, name) for inner, _, names in os.walk(path / "work") for name in names]
    return sorted(place for place in found if place.suffix == ".lease")


def new_store(path: Path) -> Path:
    size = MANIFEST.tokenizer.vocabulary_size
    create_store(path, MANIFEST, write_synthetic_tokenizer(path.with_name(f"{path.name}-tokenizer"), size))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return new_store(tmp_path / "store")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a store that one worker made in whole shards, with nobody beside it."""
    path = new_store(tmp_path_factory.mktemp("quiet") / "store")
    worker = worker_of(path, units=WHOLE)
    assert worker.work() is None and worker.seal() is True
    assert verify_store(path).ok
    return tree(path)


def worker_of(
    path: StorePath,
    compute: Callable[[Unit], Sequence[Row]] = rows_of,
    *,
    share: int = 0,
    shares: int = 1,
    watch: StopWatch | None = None,
    units: dict[tuple[str, int], list[Unit]] = UNITS,
    is_first: bool = False,
) -> Worker:
    turns = turns_of(list(units), share, shares)
    watch = watch or StopWatch()
    return Worker(path, MANIFEST, units, turns, compute, watch, environment={}, is_first=is_first)


def begin(
    path: Path,
    name: str,
    *,
    share: int = 0,
    shares: int = 1,
    seconds: float = 0.0,
    holds: Callable[[], bool] = lambda: False,
) -> BaseProcess:
    """A worker in a process of its own, which notes the units that it computes, when it begins them.

    Args:
        path: Of the store.
        name: Of the worker.
        share: Of the worker.
        shares: How many there are.
        seconds: That each unit takes.
        holds: Whether it stays in the unit that it has begun.
    """

    def compute(unit: Unit) -> Sequence[Row]:
        with path.with_name(f"{name}.txt").open("a") as file:
            file.write(f"{unit.split} {unit.shard} {unit.rows.start}\n")
        time.sleep(seconds)
        while holds():
            time.sleep(0.005)
        return rows_of(unit)

    def work() -> None:
        worker = worker_of(path, compute, share=share, shares=shares)
        assert worker.work() is None and worker.seal() is not None

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def computed(path: Path, name: str) -> list[str]:
    place = path.with_name(f"{name}.txt")
    return place.read_text().splitlines() if place.exists() else []


def wait_until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ended(*workers: BaseProcess) -> list[int | None]:
    for worker in workers:
        worker.join(60)
    return [worker.exitcode for worker in workers]


@pytest.mark.parametrize("shares", [2, 3])
def test_workers_that_compete_make_the_quiet_store_and_do_no_unit_twice(
    store: Path, quiet: dict[str, bytes], shares: int
) -> None:
    # All of them begin at the same end, so that they meet at every unit.
    workers = [begin(store, f"worker{number}", seconds=0.02) for number in range(shares)]
    assert ended(*workers) == [0] * shares
    assert tree(store) == quiet
    done = [line for number in range(shares) for line in computed(store, f"worker{number}")]
    assert len(done) == len(set(done)) == COUNT


def test_units_of_another_size_make_the_same_store(store: Path, quiet: dict[str, bytes]) -> None:
    """As where a killed capture is started again with another teacher.unit_rows."""
    watch = StopWatch()

    def two_units(unit: Unit) -> Sequence[Row]:
        if unit.rows.start == 2:
            watch.note_signal(signal.SIGTERM)
        return rows_of(unit)

    assert worker_of(store, two_units, watch=watch).work() is not None
    assert len(list(store.glob("work/train/000000/*.part"))) == 2
    worker = worker_of(store, units={shard: units_of_shard(shard, rows, 3) for shard, rows in ROWS.items()})
    assert worker.work() is None and worker.seal() is True
    assert tree(store) == quiet


def test_a_worker_that_comes_late_takes_part(store: Path, quiet: dict[str, bytes]) -> None:
    def holds() -> bool:
        """The first stays in its third unit, as a slow machine does, until the late one is at its last."""
        return len(computed(store, "first")) == 3 and len(computed(store, "late")) < COUNT - 3

    first = begin(store, "first", holds=holds)
    wait_until(lambda: len(computed(store, "first")) == 3)
    late = begin(store, "late", share=1, shares=2)
    assert ended(first, late) == [0, 0]
    assert tree(store) == quiet
    done = {name: computed(store, name) for name in ("first", "late")}
    assert {name: len(units) for name, units in done.items()} == {"first": 3, "late": COUNT - 3}
    assert len(set(done["first"] + done["late"])) == COUNT


def test_a_killed_worker_costs_the_unit_that_it_had_begun(store: Path, quiet: dict[str, bytes]) -> None:
    killed = begin(store, "killed", share=1, shares=2, seconds=600)
    wait_until(lambda: len(computed(store, "killed")) == 1)
    assert killed.pid is not None
    held = leases(store)
    assert [json.loads(place.read_text())["process"]["pid"] for place in held] == [killed.pid]
    other = begin(store, "other", share=0, shares=2)
    wait_until(lambda: len(computed(store, "other")) == COUNT - 1)
    time.sleep(0.2)
    assert other.is_alive() and leases(store) == held, "it waits for the one that is alive"
    os.kill(killed.pid, signal.SIGKILL)
    assert ended(other) == [0]
    assert computed(store, "other")[-1] == computed(store, "killed")[0]
    assert sorted(computed(store, "other")) == sorted(set(computed(store, "other")))
    killed.join()
    assert tree(store) == quiet


def forge(path: Path, name: str, *, silent: float, **process: object) -> Path:
    """A lease of another process; `silent` seconds old by the file system's clock."""
    place = path / "work" / f"{name}.lease"
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("xb"):
        pass
    holder = Holder.of_this_process({})
    content = {
        "process": vars(holder.process) | {"machine": "another boot", "host": "far"} | process,
        "job": vars(holder.job),
        "token": "theirs",
    }
    place.write_text(json.dumps(content))
    now = place.stat().st_mtime
    os.utime(place, (now - silent, now - silent))
    return place


def test_leases_of_a_silent_host_are_taken_over_and_those_of_a_living_one_are_not(
    store: Path, quiet: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's own clock tells nothing
    names = ["train/000000/000002-000003", "train/000001/join", "heldout/000000/000000-000001", "seal"]
    for name in names:
        forge(store, name, silent=STALE_SECONDS + 20)
    living = forge(store, "train/000002/000000-000001", silent=STALE_SECONDS - 60)
    worker = begin(store, "worker")
    wait_until(lambda: len(computed(store, "worker")) == COUNT - 1)
    wait_until(lambda: leases(store) == [store / "work" / "seal.lease", living])
    time.sleep(0.3)
    assert worker.is_alive() and not is_committed(store, "train", 2)
    now = living.stat().st_mtime
    os.utime(living, (now - 100, now - 100))
    assert ended(worker) == [0]
    assert tree(store) == quiet


def test_a_lease_that_was_lost_costs_a_unit_done_twice_and_no_more(
    store: Path, quiet: dict[str, bytes]
) -> None:
    """A worker sleeps for so long that another takes its unit, its shard and the store to their ends."""
    taken_over = []

    def asleep(unit: Unit) -> Sequence[Row]:
        if not taken_over:
            taken_over.append(unit)
            for place in leases(store):
                content = json.loads(place.read_text())
                content["process"]["machine"] = "another boot"
                place.write_text(json.dumps(content))
                os.utime(place, (0, 0))
            other = worker_of(store)
            assert other.work() is None and other.seal() is True
            assert tree(store) == quiet
        return rows_of(unit)

    worker = worker_of(store, asleep)
    assert worker.work() is None and worker.seal() is False
    assert len(taken_over) == 1 and tree(store) == quiet


def test_a_damaged_part_is_made_again(
    store: Path, quiet: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    watch = StopWatch()

    def three_units(unit: Unit) -> Sequence[Row]:
        if unit.rows.start == 4:
            watch.note_signal(signal.SIGTERM)
        return rows_of(unit)

    assert worker_of(store, three_units, watch=watch).work() is not None
    place = part_file(store, "train", 0, range(2, 4))
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 4
    place.write_bytes(content)
    done = []

    def noted(unit: Unit) -> Sequence[Row]:
        done.append((unit.split, unit.shard, unit.rows))
        return rows_of(unit)

    worker = worker_of(store, noted)
    assert worker.work() is None and worker.seal() is True
    assert tree(store) == quiet
    assert ("train", 0, range(2, 4)) in done and ("train", 0, range(0, 2)) not in done
    printed = capsys.readouterr().out
    assert f"capture: {place} is not as it was written (" in printed and "its rows are made again" in printed


def test_whoever_is_asked_to_stop_ends_its_unit_and_holds_nothing(
    store: Path, quiet: dict[str, bytes]
) -> None:
    for number in range(COUNT - 1):
        watch = StopWatch()

        def one(unit: Unit, watch: StopWatch = watch) -> Sequence[Row]:
            watch.note_signal(signal.SIGTERM)
            return rows_of(unit)

        stopped = worker_of(store, one, watch=watch).work()
        assert stopped is not None and stopped.signal == "SIGTERM"
        assert leases(store) == [] and not (store / INDEX_NAME).exists()
        parts = len(list(store.glob("work/**/*.part")))
        shards = sum(len(UNITS[shard]) for shard in UNITS if is_committed(store, *shard))
        assert parts + shards == number + 1
    worker = worker_of(store)
    assert worker.work() is None and worker.seal() is True
    assert tree(store) == quiet


def test_whoever_is_asked_to_stop_while_it_starts_begins_nothing(store: Path) -> None:
    watch = StopWatch()
    watch.note_signal(signal.SIGUSR2)
    before = tree(store)

    def never(unit: Unit) -> Sequence[Row]:
        raise AssertionError(unit)

    assert worker_of(store, never, watch=watch).work() == watch.request
    assert tree(store) == before


def test_whoever_waits_for_others_can_be_stopped(store: Path) -> None:
    living = forge(store, "train/000000/000002-000003", silent=0)
    watch = StopWatch()
    left = COUNT - 1

    def counted(unit: Unit) -> Sequence[Row]:
        nonlocal left
        left -= 1
        if not left:
            threading.Timer(0.3, watch.note_signal, [signal.SIGTERM]).start()
        return rows_of(unit)

    assert worker_of(store, counted, watch=watch).work() is not None
    assert left == 0 and leases(store) == [living]


def test_a_worker_that_fails_holds_nothing_and_others_go_on(store: Path, quiet: dict[str, bytes]) -> None:
    def fails(unit: Unit) -> Sequence[Row]:
        if unit.rows.start == 4:
            raise ValueError("of the teacher")
        return rows_of(unit)

    with pytest.raises(ValueError, match="of the teacher"):
        worker_of(store, fails).work()
    assert leases(store) == []
    worker = worker_of(store)
    assert worker.work() is None and worker.seal() is True
    assert tree(store) == quiet


def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing_half_made(
    store: Path, quiet: dict[str, bytes]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (100, 600):  # for a lease not even, and for no part
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            with pytest.raises(StoreError, match=r"Could not use .*(lease|part|arrow)"):
                worker_of(store).work()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not [item for item in store.glob("work/**/*") if item.is_file()]
        assert not list(store.glob("shards/**/*.arrow"))
    worker = worker_of(store)
    assert worker.work() is None and worker.seal() is True
    assert tree(store) == quiet


def remote(path: Path) -> RemotePath:
    """The same folder as a place where nothing can be claimed."""
    return RemotePath(RemoteFiles(LocalFileSystem()), "test://", str(path))


def test_where_nothing_can_be_claimed_each_does_its_share(store: Path, quiet: dict[str, bytes]) -> None:
    begun = threading.Barrier(2)  # each has a unit when the other takes its first
    done: list[list[Unit]] = [[], []]

    def work(share: int) -> None:
        def compute(unit: Unit) -> Sequence[Row]:
            done[share].append(unit)
            if len(done[share]) <= 2:
                begun.wait(60)
            return rows_of(unit)

        worker = worker_of(remote(store), compute, share=share, shares=2, units=WHOLE, is_first=share == 0)
        assert worker.work() is None
        assert worker.seal() is (share == 0)

    threads = [threading.Thread(target=work, args=(share,)) for share in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tree(store) == quiet and not (store / "work").exists()
    units = [unit for each in WHOLE.values() for unit in each]
    assert done[0][:2] == units[::2] and done[1][:2] == units[1::2]


def test_where_nothing_can_be_claimed_a_dead_workers_share_is_done(
    store: Path, quiet: dict[str, bytes]
) -> None:
    worker = worker_of(remote(store), share=1, shares=3, units=WHOLE, is_first=True)
    assert worker.work() is None and worker.seal() is True
    assert tree(store) == quiet


def test_the_first_tells_of_all_and_the_others_say_nothing(
    store: Path, quiet: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    watch = StopWatch()

    def five_units(unit: Unit) -> Sequence[Row]:
        if (unit.split, unit.shard) == ("train", 1):
            watch.note_signal(signal.SIGTERM)
        return rows_of(unit)

    assert worker_of(store, five_units, watch=watch).work() is not None
    assert capsys.readouterr().out == ""
    worker = worker_of(store, is_first=True)
    assert worker.work() is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"capture: 5 of {COUNT} units are finished already"
    counts = [int(line.removeprefix("capture: ").partition("/")[0]) for line in lines[1:]]
    assert counts == sorted(counts) and counts[-1] == COUNT
    assert lines[-1].startswith(f"capture: {COUNT}/{COUNT} units, ") and lines[-1].endswith(" left")
    assert worker.seal() is True and tree(store) == quiet
