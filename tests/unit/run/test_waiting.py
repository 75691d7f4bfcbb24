"""Ranks wait for one another's files without a limit, and not for the dead; all go on or leave alike."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from signal import SIGUSR2
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from sparsekd.trainer.run import waiting
from sparsekd.trainer.run.errors import RankLostError, Stopped, UserError
from sparsekd.trainer.run.process import Process, this_process
from sparsekd.trainer.run.ranks import Ranks, broadcast_object
from sparsekd.trainer.run.stop import StopRequest, StopWatch
from sparsekd.trainer.run.waiting import StopAsked, patiently


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_SECONDS_BETWEEN_BEATS", 0.1)


def three(others: Process | None = None, *, timeout_seconds: float = 1e-9) -> list[Ranks]:
    """Three ranks that have met; each is a thread here. Who has come is waited for beyond their time-out."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = (this_process(), others or this_process(), this_process())
    made = []
    for rank in range(3):
        own = store if rank == 0 else TCPStore("127.0.0.1", store.port, is_master=False)
        own.set_timeout(timedelta(seconds=60))
        made.append(
            Ranks(
                *(rank, rank, 3, torch.device("cpu"), processes),
                store=PrefixStore("job", own),
                timeout_seconds=timeout_seconds if others is not None else 60.0,
            )
        )
    return made


def all_of(*actions: Callable[[], Any]) -> list[Future[Any]]:
    with ThreadPoolExecutor(len(actions)) as pool:
        return [pool.submit(action) for action in actions]


def test_all_wait_for_the_slowest_and_hear_only_of_their_own_work() -> None:
    ranks, goes_on, seen = three(), threading.Event(), []

    def slow() -> str:
        assert goes_on.wait(60)
        return "slow"

    def quick(rank: int) -> Any:
        result = patiently(ranks[rank], lambda: seen.append(rank) or rank)
        assert goes_on.is_set()
        return result()

    def refuse() -> None:
        seen.append(2)
        raise UserError("mine")

    timer = threading.Timer(2.5, goes_on.set)
    timer.start()
    found = all_of(
        lambda: patiently(ranks[0], slow)(), lambda: quick(1), lambda: patiently(ranks[2], refuse)()
    )
    assert found[0].result() == "slow" and found[1].result() == 1 and sorted(seen) == [1, 2]
    with pytest.raises(UserError, match=r"^mine$"):
        found[2].result()
    # Again, with the same ranks.
    for _ in range(4):
        assert [each.result() for each in all_of(*(patiently_seven(rank) for rank in ranks))] == [7] * 3
    store = ranks[0].store
    assert store is not None
    left = [store.check([f"wait/{number}/done/1", f"wait/{number}/verdict"]) for number in range(5)]
    assert left == [False] * 3 + [True] * 2  # a run of weeks has many


def patiently_seven(here: Ranks) -> Callable[[], int]:
    return lambda: patiently(here, lambda: 7)()


@pytest.mark.parametrize("asked", [0, 2])
def test_a_request_to_stop_ends_the_wait_of_all(asked: int) -> None:
    """Also where the rank that works is asked, whose work goes on in a thread until the process ends."""
    ranks, watches, ends = three(), [StopWatch() for _ in range(3)], threading.Event()

    def begun() -> None:
        watches[asked].note_signal(SIGUSR2)
        ends.wait(60)

    works: list[Callable[[], Any]] = [begun if rank == asked else ends.wait for rank in range(3)]
    found = all_of(
        *(lambda rank=rank: patiently(ranks[rank], works[rank], watches[rank]) for rank in range(3))  # type: ignore[misc]
    )
    ends.set()
    for future in found:
        with pytest.raises(StopAsked, match=r"asked to stop \(warning, SIGUSR2\)") as caught:
            future.result()
        assert caught.value.request == StopRequest("warning", "SIGUSR2")


def test_a_dead_rank_is_named_once() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    dead = Process(this_process().host, this_process().machine, child.pid, 1)
    ranks = three(dead, timeout_seconds=60)
    found = all_of(lambda: patiently(ranks[0], int), lambda: patiently(ranks[2], int))
    with pytest.raises(
        RankLostError, match=rf"Rank 1 \(process {child.pid} on .*died without a word"
    ) as caught:
        found[0].result()
    assert caught.value.rank == 1
    with pytest.raises(SystemExit) as left:
        found[1].result()
    assert left.value.code == 2


def test_a_silent_rank_elsewhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that never came; who waits is not taken for silent, however short the time-out is."""
    elsewhere = Process("node2", "another machine", 7, 1)
    ranks = three(elsewhere, timeout_seconds=2.0)
    found = all_of(lambda: patiently(ranks[0], int), lambda: patiently(ranks[2], int))
    with pytest.raises(RankLostError, match=r"Rank 1 \(process 7 on node2\) gives no sign of life since"):
        found[0].result()


def test_a_first_rank_that_is_gone_is_named_once(served_store: tuple["subprocess.Popen[str]", int]) -> None:
    """With it goes the store, by which the others wait."""
    first, port = served_store
    processes = (Process("node1", "another machine", 5, 1), this_process(), this_process())
    ranks = [
        Ranks(
            *(rank, rank, 3, torch.device("cpu"), processes),
            store=TCPStore("127.0.0.1", port, is_master=False),
            timeout_seconds=60,
        )
        for rank in (1, 2)
    ]
    threading.Timer(1.5, first.kill).start()
    told, silent = all_of(*(partial(patiently, here, int) for here in ranks))
    with pytest.raises(RankLostError, match=r"Rank 0 \(process 5 on node1\) cannot be reached any more"):
        told.result()
    with pytest.raises(SystemExit) as left:
        silent.result()
    assert left.value.code == 2


def test_a_request_that_the_others_have_not_heard_is_no_agreement(
    served_store: tuple["subprocess.Popen[str]", int],
) -> None:
    """The first rank is dead: a collective behind it would wait for it."""
    first, port = served_store
    store = TCPStore("127.0.0.1", port, is_master=False)
    processes = (Process("node1", "another machine", 5, 1), this_process())
    here = Ranks(1, 1, 2, torch.device("cpu"), processes, store=store, timeout_seconds=60)
    first.kill()
    first.wait()
    watch = StopWatch()
    watch.note_signal(SIGUSR2)
    with pytest.raises(Stopped, match="asked to stop") as caught:
        patiently(here, int, watch)
    assert not isinstance(caught.value, StopAsked)


def test_the_work_holds_no_collective() -> None:
    (here, *_) = three()
    alone = Ranks(0, 0, 1, here.device, here.processes[:1], store=here.store)
    with pytest.raises(RuntimeError, match="A collective inside of an action"):
        patiently(alone, lambda: broadcast_object(1))()
    assert patiently(Ranks(0, 0, 1, here.device), lambda: 3)() == 3
