"""A failure is recorded once and whole, says what to do, and a stall shows every thread's stack."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekd.trainer.run import failure
from sparsekd.trainer.run.errors import OwnerError, RankLostError, UserError
from sparsekd.trainer.run.failure import (
    FAILED_NAME,
    FailureWatch,
    failures_recorded,
    make_room,
    remove_room,
    told_first,
)
from sparsekd.trainer.run.owner import OWNER_NAME, Claim
from sparsekd.trainer.run.process import this_process
from sparsekd.trainer.run.pulse import Pulse
from sparsekd.trainer.run.ranks import Ranks

ME = this_process()


def ranks_of(rank: int, world_size: int) -> Ranks:
    return Ranks(rank, rank, world_size, torch.device("cpu"), (ME,) * world_size)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    return folder


def record_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / FAILED_NAME).read_text()))


def fail(run: Path, error: Exception, rank: int = 0, world_size: int = 1) -> None:
    here = ranks_of(rank, world_size)
    with Pulse(run / "logs", rank, here.processes) as pulse:
        pulse.at(7, "step")
        with failures_recorded(run, here, pulse, Claim(run / OWNER_NAME, "ours")):
            raise error


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.01)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that looks all the time, and takes any wait for a long one."""
    monkeypatch.setattr(failure, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(failure, "_STALL_SECONDS", 0.05)
    monkeypatch.setattr(failure, "_SECONDS_OF_A_START", 0.05)


@pytest.fixture
def a_waiting_thread() -> Iterator[None]:
    goes_on = threading.Event()

    def waits_beside_the_main_thread() -> None:
        goes_on.wait()

    thread = threading.Thread(target=waits_beside_the_main_thread)
    thread.start()
    yield
    goes_on.set()
    thread.join()


@pytest.mark.usefixtures("soon", "a_waiting_thread")
def test_a_stall_writes_all_stacks_once_and_names_who_is_behind(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stacks = run / "logs" / "rank_0.stacks"

    def stalls() -> list[str]:
        lines = stacks.read_text().splitlines() if stacks.is_file() else []
        return [line for line in lines if " s in step " in line]

    here = ranks_of(0, 2)
    with Pulse(run / "logs", 0, here.processes) as pulse, Pulse(run / "logs", 1, here.processes) as other:
        other.at(6, "read")
        pulse.at(7, "step")
        with FailureWatch(run, here, pulse, Claim(run / OWNER_NAME, "ours")):
            until(lambda: len(stalls()) == 1)
            time.sleep(0.3)  # many looks later it is the same stall
            assert len(stalls()) == 1
            pulse.at(7, "save")
            until(lambda: len(stalls()) == 2)
    text = stacks.read_text()
    assert stalls()[0].endswith("s in step 7, step") and stalls()[1].endswith("s in step 7, save")
    for function in ("waits_beside_the_main_thread", "until", "_watch"):
        assert text.count(f" in {function}\n") >= 2, text
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert f"rank 1 ({ME}, last seen in step 6, read) is furthest behind" in warnings[0]
    assert str(run / "logs") in warnings[0] and " in step 7, step; rank 1" in warnings[0]


@pytest.mark.usefixtures("soon")
def test_the_other_ranks_write_their_stacks_and_say_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ranks_of(1, 2)
    stacks = run / "logs" / "rank_1.stacks"
    with (
        Pulse(run / "logs", 1, here.processes) as pulse,
        FailureWatch(run, here, pulse, Claim(run / OWNER_NAME, "ours")),
    ):
        until(lambda: stacks.is_file() and " in _watch\n" in stacks.read_text())
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("soon")
def test_what_is_long_is_known_from_the_steps(run: Path) -> None:
    here = ranks_of(0, 1)
    with Pulse(run / "logs", 0, here.processes) as pulse:
        with FailureWatch(run, here, pulse, Claim(run / OWNER_NAME, "ours")) as watch:
            for seconds in (1000.0, 1000.0, 0.0):
                watch.step_took(seconds)
            pulse.at(4, "step")
            time.sleep(0.3)
        # Steps of this length make no stall of it; the start, of which nothing is known, may.
        stacks = run / "logs" / "rank_0.stacks"
        assert not stacks.is_file() or "step 4" not in stacks.read_text()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError("Unable to allocate 8.00 EiB"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "numpy", "python"],
)
def test_memory_that_ran_out_is_one_sentence_with_the_keys_that_help(run: Path, error: Exception) -> None:
    with pytest.raises(UserError) as told:
        fail(run, error, world_size=2)
    said = str(told.value)
    assert "\n" not in said and said.startswith(
        f"Memory ran out ({str(error).partition(chr(10))[0]}). Lower "
    )
    for key in ("train.micro_batch_rows", "objective.memory_gib", "student.activation_checkpointing=true"):
        assert key in said
    record = record_of(run)
    assert record["message"] == said and record["error"] == type(error).__name__ and record["step"] == 7
    assert record["rank"] == 0 and record["pid"] == os.getpid()
    assert type(error).__name__ in record["traceback"]


def test_real_allocations_that_are_refused_are_understood(run: Path) -> None:
    for number, allocate in enumerate((lambda: torch.empty(1 << 60), lambda: bytearray(1 << 62))):
        folder = run / str(number)
        (folder / "logs").mkdir(parents=True)
        with pytest.raises(UserError, match="Memory ran out"):
            here = ranks_of(0, 1)
            with (
                Pulse(folder / "logs", 0, here.processes) as pulse,
                failures_recorded(folder, here, pulse, Claim(folder / OWNER_NAME, "ours")),
            ):
                allocate()


def test_another_error_goes_up_as_it_is_with_its_record(run: Path) -> None:
    error = ZeroDivisionError("by nothing")
    with pytest.raises(ZeroDivisionError) as told:
        fail(run, error)
    assert told.value is error
    record = record_of(run)
    assert record["message"] == "by nothing" and 'File "' in record["traceback"]


def test_a_folder_that_is_another_jobs_gets_no_record(run: Path) -> None:
    with pytest.raises(OwnerError):
        fail(run, OwnerError("it belongs to another job"))
    assert [path.name for path in run.iterdir()] == ["logs"]


def test_a_broken_connection_blames_the_rank_that_died(run: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here = replace(ranks_of(0, 2), processes=(ME, replace(ME, pid=child.pid)))
    with (
        pytest.raises(RankLostError, match=f"^Rank 1 .process {child.pid} on .*died without a word"),
        Pulse(run / "logs", 0, here.processes) as pulse,
        failures_recorded(run, here, pulse, Claim(run / OWNER_NAME, "ours")),
    ):
        raise RuntimeError("Connection closed by peer")
    record = record_of(run)
    assert (record["rank"], record["pid"], record["noticed_by"]) == (1, child.pid, 0)
    assert "Connection closed by peer" in record["noticed_as"]


def test_one_of_several_ranks_writes_the_record_and_the_others_leave(run: Path) -> None:
    count = 8
    for round_ in range(20):
        (run / FAILED_NAME).unlink(missing_ok=True)
        make_room(run)
        meet = threading.Barrier(count)
        ends: list[BaseException] = []

        def one(rank: int, meet: threading.Barrier = meet, ends: list[BaseException] = ends) -> None:
            here = ranks_of(rank, count)
            with Pulse(run / "logs", rank, here.processes) as pulse:
                watch = FailureWatch(run, here, pulse, Claim(run / OWNER_NAME, "ours"))
                meet.wait()
                try:
                    ends.append(watch.report(ValueError(f"of rank {rank}")))
                except SystemExit as left:
                    ends.append(left)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = [end for end in ends if isinstance(end, ValueError)]
        assert len(ends) == count and len(told) == 1, round_
        assert [end.code for end in ends if isinstance(end, SystemExit)] == [2] * (count - 1)
        assert record_of(run)["message"] == str(told[0]) == f"of rank {record_of(run)['rank']}"
        assert sorted(path.name for path in run.iterdir()) == [FAILED_NAME, "logs"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("letter", ["x", "\u4e16", "\x1b"])
def test_the_record_is_whole_on_a_full_disk_whatever_was_said(small_disk: Path, letter: str) -> None:
    (small_disk / "logs").mkdir()
    here = ranks_of(0, 2)
    message = "so it ended: " + 20_000 * letter
    with (
        pytest.raises(ValueError, match="so it ended"),
        Pulse(small_disk / "logs", 0, here.processes) as pulse,
    ):
        make_room(small_disk)
        with (small_disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="space"):
            while True:
                filler.write(bytes(4096))
        with failures_recorded(small_disk, here, pulse, Claim(small_disk / OWNER_NAME, "ours")):
            raise ValueError(message)
    record = record_of(small_disk)
    assert record["error"] == "ValueError" and len(record["message"]) > 1000
    assert record["message"].endswith(letter) and record["step"] == 0


def test_the_room_goes_again_where_nothing_fails(run: Path) -> None:
    make_room(run)
    remove_room(run)
    remove_room(run)
    assert [path.name for path in run.iterdir()] == ["logs"]


def test_a_failure_is_recorded_before_a_checkpoint_in_flight_is_waited_for(run: Path) -> None:
    """And once, though it passes two that record."""
    seen = []

    def let_go() -> None:
        seen.append((run / FAILED_NAME).exists())

    here = ranks_of(0, 1)
    claim = Claim(run / OWNER_NAME, "ours")
    for error in (UserError("sour milk"), MemoryError("no more")):
        (run / FAILED_NAME).unlink(missing_ok=True)
        with (
            pytest.raises(UserError, match=r"sour milk|Memory ran out"),
            Pulse(run / "logs", 0, here.processes) as pulse,
            failures_recorded(run, here, pulse, claim) as watch,
            told_first(watch, let_go),
        ):
            raise error
    assert seen == [True, True] and record_of(run)["error"] == "MemoryError"
