"""Leases on an object store: who works there is seen by others, and who is dead is followed."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from s3_server import S3Server

from sparsekd.logit_store.places.files import files_below
from sparsekd.logit_store.places.paths import RemotePath, store_path
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
from sparsekd.trainer.run import lease, object_lease
from sparsekd.trainer.run.lease import HeldError, Holder
from sparsekd.trainer.run.object_lease import ObjectLease, can_be_leased, now_at_service, take_object
from sparsekd.trainer.run.process import this_process
from sparsekd.trainer.run.stop import StopWatch
from sparsekd.trainer.teacher.units import Unit, turns_of, units_of_shard
from sparsekd.trainer.teacher.work import Worker

MANIFEST = synthetic_manifest(rows_per_shard=2)
SHARDS = 5
UNITS = {("train", shard): units_of_shard(("train", shard), 2, 2) for shard in range(SHARDS)}


def holder(**process: object) -> Holder:
    found = Holder.of_this_process({})
    return replace(found, process=replace(found.process, **process))  # type: ignore[arg-type]


def take(place: RemotePath, who: Holder) -> ObjectLease:
    return take_object(place, who, lambda: now_at_service(place))


def test_it_is_one_holders_until_it_is_given_back(bucket: RemotePath) -> None:
    place = bucket / "work" / "a.lease"
    assert can_be_leased(bucket)
    mine = take(place, holder())
    with pytest.raises(HeldError, match=f"process {os.getpid()} on "):
        take(place, holder())
    mine.release()
    take(place, holder()).release()
    assert files_below(bucket) == []


def test_a_dead_process_is_followed_at_once_and_one_elsewhere_when_it_is_old(
    bucket: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = bucket / "a.lease"
    job = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
    place.files.create(place, holder(pid=int(job.stdout)).written())
    take(place, holder())  # never given back, as of a machine that is gone
    far = holder(machine="another boot", host="far")
    place.files.remove(place)
    place.files.create(place, far.written())
    with pytest.raises(HeldError, match="on far"):
        take(place, holder())
    monkeypatch.setattr(lease, "STALE_SECONDS", -3.0)  # the service tells whole seconds
    mine = take(place, holder())
    mine.release()
    assert files_below(bucket) == []


def test_of_many_that_follow_one_gets_it(bucket: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """All judge the same dead holder at one moment."""
    place = bucket / "a.lease"
    place.files.create(place, holder(started=this_process().started - 1).written())
    begin, taken, refused = threading.Barrier(6), [], []
    judged = threading.Barrier(6)

    def wait_after(*arguments: object) -> None:
        before(*arguments)  # type: ignore[arg-type]
        judged.wait(30)

    before = object_lease.require_dead
    first = threading.local()

    def once(*arguments: object) -> None:
        if getattr(first, "done", False):
            before(*arguments)  # type: ignore[arg-type]
        else:
            first.done = True
            wait_after(*arguments)

    monkeypatch.setattr(object_lease, "require_dead", once)

    def start() -> None:
        begin.wait()
        try:
            taken.append(take(place, holder()))
        except HeldError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 5)
    taken[0].release()


def test_it_is_kept_young_and_whoever_lost_it_takes_nothing_away(
    bucket: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_lease, "SECONDS_BETWEEN_BEATS", 0.05)
    place = bucket / "a.lease"
    mine = take(place, holder())
    first = place.files.read_tagged(place, 4096)[2]
    deadline = time.monotonic() + 30
    while place.files.read_tagged(place, 4096)[2] == first and time.monotonic() < deadline:
        time.sleep(0.05)
    assert place.files.read_tagged(place, 4096)[2] > first
    other = holder()
    place.files.remove(place)
    place.files.create(place, other.written())
    time.sleep(0.3)
    mine.release()
    assert place.files.read_tagged(place, 4096)[0] == other.written()


def test_a_service_without_conditions_has_no_leases(bucket: RemotePath, careless: None) -> None:
    bucket.files._is_exclusive = None  # asked anew
    try:
        assert not can_be_leased(bucket)
    finally:
        bucket.files._is_exclusive = None


def test_two_jobs_started_by_hand_share_a_store(bucket: RemotePath, tmp_path: Path) -> None:
    """Neither knows of the other, and each shard is computed once."""
    tokenizer = write_synthetic_tokenizer(tmp_path / "tokenizer", MANIFEST.tokenizer.vocabulary_size)
    create_store(bucket, MANIFEST, tokenizer)
    done, both = Counter[int](), threading.Barrier(2)
    lock, sealed = threading.Lock(), []

    def work() -> None:
        begun = False

        def compute(unit: Unit) -> Sequence[Row]:
            nonlocal begun
            with lock:
                done[unit.shard] += 1
            if not begun:
                begun = True
                both.wait(60)  # each holds one when the other does
            return synthetic_rows(MANIFEST, 2, unit.shard)

        turns = turns_of(list(UNITS), 0, 1)  # what a job alone takes
        worker = Worker(bucket, MANIFEST, UNITS, turns, compute, StopWatch(), environment={}, is_first=True)
        assert worker.work() is None
        sealed.append(worker.seal())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == dict.fromkeys(range(SHARDS), 1) and sorted(sealed) == [False, True]
    assert not [name for name in files_below(bucket) if "work" in name]
    assert open_store(bucket).rows("train") == 2 * SHARDS


def test_where_conditions_are_switched_off_there_are_no_leases(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a service that does not know them: a store is written, and each worker does its share."""
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    place = store_path(f"s3://bucket/{tmp_path.name}")
    assert isinstance(place, RemotePath) and not can_be_leased(place)
    tokenizer = write_synthetic_tokenizer(tmp_path / "tokenizer", MANIFEST.tokenizer.vocabulary_size)
    create_store(place, MANIFEST, tokenizer)
    worker = Worker(
        place,
        MANIFEST,
        UNITS,
        turns_of(list(UNITS), 0, 1),
        lambda unit: synthetic_rows(MANIFEST, 2, unit.shard),
        StopWatch(),
        environment={},
        is_first=True,
    )
    assert worker.work() is None and worker.seal()
    assert open_store(place).rows("train") == 2 * SHARDS
