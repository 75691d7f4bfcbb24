"""Ranks that do not find one another end within their own time, with a sentence that names who is missing."""

import itertools
import os
import signal
import socket
import subprocess
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from sparsekd.trainer.run import rendezvous
from sparsekd.trainer.run.errors import Stopped, UserError
from sparsekd.trainer.run.process import Process, this_process
from sparsekd.trainer.run.rendezvous import Place, meet, require_reachable
from sparsekd.trainer.run.stop import StopWatch


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    # Ranks are threads here, of one process, and meet once.
    monkeypatch.setattr(rendezvous, "_meetings", itertools.repeat(0))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def place(rank: int, world_size: int, port: int, *, host: str = "127.0.0.1", local: int = 0) -> Place:
    return Place(rank, world_size, local or world_size, host, port)


def started(pool: ThreadPoolExecutor, ranks: list[int], world_size: int, minutes: float) -> list[Future[Any]]:
    port = free_port()
    return [pool.submit(meet, place(rank, world_size, port), minutes=minutes) for rank in ranks]


def test_all_ranks_learn_who_is_who() -> None:
    with ThreadPoolExecutor(3) as pool:
        met = [future.result() for future in started(pool, [0, 1, 2], 3, 0.5)]
    for store, processes in met:
        assert processes == [this_process()] * 3
        store.set("key", "value")


def test_who_does_not_come_is_named_by_the_first_rank_alone() -> None:
    with ThreadPoolExecutor(3) as pool:
        first, second, fourth = started(pool, [0, 1, 3], 6, 0.03)
        with pytest.raises(
            UserError, match=r"Ranks 2, 4, 5 of 6 did not come to 127\.0\.0\.1:\d+ within 2 s"
        ):
            first.result()
        for other in (second, fourth):
            with pytest.raises(SystemExit) as left:
                other.result()
            assert left.value.code == 2


def test_a_request_to_stop_ends_the_wait_of_all() -> None:
    """At once, and not when the time for the meeting is over, which may be behind the end of the job's."""
    watch, port = StopWatch(), free_port()
    watch.note_signal(signal.SIGUSR2)
    said = r"asked to stop before its ranks had met \(warning, SIGUSR2\); nothing was begun"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, place(0, 3, port), minutes=5, watch=watch)
        second = pool.submit(meet, place(1, 3, port), minutes=5)
        for future in (first, second):
            with pytest.raises(Stopped, match=said):
                future.result(60)


def test_a_launcher_that_dies_in_the_meeting_is_said(
    monkeypatch: pytest.MonkeyPatch, served_store: tuple["subprocess.Popen[str]", int]
) -> None:
    """torchrun serves the store in which its ranks meet; the third does not come."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    launcher, port = served_store
    threading.Timer(1.5, launcher.kill).start()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(meet, place(rank, 3, port), minutes=0.5) for rank in range(2)]
        for future in futures:
            with pytest.raises(UserError, match=r"met torchrun at 127\.0\.0\.1:\d+ and lost it"):
                future.result(60)


def test_a_request_of_another_rank_is_for_later() -> None:
    watch, port = StopWatch(), free_port()
    watch.note_signal(signal.SIGUSR2)
    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(meet, place(0, 2, port), minutes=0.5),
            pool.submit(meet, place(1, 2, port), minutes=0.5, watch=watch),
        ]
        assert all(future.result(60)[1] == [this_process()] * 2 for future in futures)


def test_who_finds_no_first_rank_and_is_asked_to_stop_leaves_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "_SECONDS_ON_THIS_MACHINE", 0.5)
    watch = StopWatch()
    watch.note_signal(signal.SIGTERM)
    with pytest.raises(Stopped, match="terminated, SIGTERM"):
        meet(place(1, 2, free_port()), minutes=5, watch=watch)


def test_a_first_rank_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_SECONDS_ON_THIS_MACHINE", 0.5)
    with pytest.raises(
        UserError, match=r"Rank 1 on .* waited for rank 0 at 127\.0\.0\.1:\d+ and did not reach"
    ):
        meet(place(1, 2, free_port()), minutes=5)


def test_a_name_that_leads_back_to_this_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's /etc/hosts has it for a machine's own name; it is not waited for as long as for others."""
    monkeypatch.setattr(rendezvous, "_SECONDS_ON_THIS_MACHINE", 0.5)
    said = "which is a loopback address: this machine's /etc/hosts sends the name localhost back to itself"
    with pytest.raises(UserError, match=said):
        meet(place(1, 2, free_port(), host="localhost", local=1), minutes=5)


def test_a_name_that_is_none_is_said_at_once() -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR=no-such-host\.invalid names no machine as seen from"):
        meet(place(1, 2, free_port(), host="no-such-host.invalid"), minutes=5)


def test_a_port_that_another_program_has_is_said() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = int(other.getsockname()[1])
        with pytest.raises(
            UserError, match=rf"Rank 0 cannot listen at 127\.0\.0\.1:{port} .*another program"
        ):
            meet(place(0, 2, port), minutes=0.05)


def test_one_process_alone_needs_no_port() -> None:
    """Of many that start at one moment, each by itself, none takes another's."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        _, processes = meet(place(0, 1, int(other.getsockname()[1])), minutes=1)
    assert [process.pid for process in processes] == [os.getpid()]


def test_variables_that_no_launcher_sets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_PORT are numbers"):
        Place.of_environment()
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="RANK is set, but MASTER_ADDR is not"):
        Place.of_environment()


def test_a_machine_that_others_cannot_reach_by_its_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    here, far = this_process(), Process("far", "another boot", 1, 1)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    require_reachable([here, here])
    with pytest.raises(UserError, match=r"is 127\.0\.1\.1 here, .* set GLOO_SOCKET_IFNAME"):
        require_reachable([here, far])
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "192.0.2.7")
    require_reachable([here, far])
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "eth0")
    require_reachable([here, far])
