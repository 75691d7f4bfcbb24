"""What asks a process to stop is noted once, and told apart by who asked."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from sparsekd.trainer.run import stop
from sparsekd.trainer.run.stop import StopRequest, StopWatch, watched


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_the_first_request_counts_and_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    with watched({}) as watch:
        assert watch.request is None
        os.kill(os.getpid(), signal.SIGUSR2)
        until(lambda: watch.request is not None)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert watch.request == StopRequest("warning", "SIGUSR2") and watch.request.requeue
    assert {number: signal.getsignal(number) for number in before} == before
    assert not any(thread.name == "stop" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("number", "reason", "requeue"),
    [
        (signal.SIGUSR1, "warning", True),
        (signal.SIGTERM, "terminated", False),
        (signal.SIGHUP, "terminated", False),
        (signal.SIGINT, "interrupted", False),
    ],
)
def test_who_asked(number: signal.Signals, reason: str, requeue: bool) -> None:
    watch = StopWatch()
    watch.note_signal(number)
    assert watch.request == StopRequest(reason, number.name) and watch.request.requeue is requeue


def test_slurm_s_term_at_the_end_of_the_time_is_the_time_s() -> None:
    late = StopWatch(end_time=time.time() + 20)
    late.note_signal(signal.SIGTERM)
    assert late.request == StopRequest("time limit", "SIGTERM") and late.request.requeue
    early = StopWatch(end_time=time.time() + 3600)
    early.note_signal(signal.SIGTERM)
    assert early.request == StopRequest("terminated", "SIGTERM")


def test_the_end_time_leaves_room_for_a_save_as_it_was_measured() -> None:
    watch = StopWatch(end_time=time.time() + 1000)
    watch.look()
    assert watch.request is None
    watch.save_takes(400)
    watch.look()
    assert watch.request is None
    watch.save_takes(500)
    watch.look()
    assert watch.request == StopRequest("time limit", None)


def test_in_another_thread_the_end_time_counts_and_signals_stay_what_they_were() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with watched({"SLURM_JOB_END_TIME": str(int(time.time()) + 10)}) as watch:
            assert signal.getsignal(signal.SIGTERM) == before
            until(lambda: watch.request is not None)
            found.append(watch.request)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [StopRequest("time limit", None)]


def test_what_is_ignored_from_outside_stays_ignored() -> None:
    """As SIGHUP under nohup."""
    program = """
import os, signal, time
from sparsekd.trainer.run.stop import watched
with watched({}) as watch:
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.3)
    print(watch.request)
"""
    done = subprocess.run(["nohup", sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "None", done


def test_the_end_time_is_asked_for_where_no_variable_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def answer(command: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "1900000000\n", "")

    monkeypatch.setattr(subprocess, "run", answer)
    assert stop._end_time({}) is None and not asked
    assert stop._end_time({"SLURM_JOB_END_TIME": "17", "SLURM_JOB_ID": "5"}) == 17.0 and not asked
    assert stop._end_time({"SLURM_JOB_ID": "5", "SLURM_PROCID": "3"}) is None and not asked
    assert stop._end_time({"SLURM_JOB_ID": "5", "SLURM_PROCID": "0"}) == 1.9e9 and asked[0][3] == "5"
