"""What the ranks of one replica tell one another, without a model: units, the end, and who asks to stop."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from torch.distributed import HashStore

from sparsekd.logit_store.row import Row
from sparsekd.trainer.run.ranks import Ranks
from sparsekd.trainer.run.stop import StopRequest, StopWatch
from sparsekd.trainer.teacher.replica import Leader, follow
from sparsekd.trainer.teacher.units import Unit, units_of_shard

UNITS = {("train", number): units_of_shard(("train", number), 5, 2) for number in range(2)}
OF_ALL = [unit for units in UNITS.values() for unit in units]


@dataclass
class Replica:
    """A leader here and a follower in a thread, with what each has computed."""

    leader_watch: StopWatch = field(default_factory=StopWatch)
    follower_watch: StopWatch = field(default_factory=StopWatch)

    def __post_init__(self) -> None:
        store = HashStore()
        cpu = torch.device("cpu")
        first, second = (Ranks(rank, rank, 2, cpu, store=store) for rank in range(2))
        self.led: list[Unit] = []
        self.followed: list[Unit] = []
        self.leader = Leader(first, UNITS, self._lead, self.leader_watch)
        with ThreadPoolExecutor(1) as pool:
            self.follower: Future[StopRequest | None] = pool.submit(
                follow, second, UNITS, self._follow, self.follower_watch
            )
            self.work()

    def work(self) -> None:
        for unit in reversed(OF_ALL):
            self.leader.compute(unit)
        self.leader.end(None)

    def _lead(self, unit: Unit) -> Sequence[Row]:
        self.led.append(unit)
        return []

    def _follow(self, unit: Unit) -> Sequence[Row]:
        self.followed.append(unit)
        return []


def test_all_compute_what_the_first_takes_in_its_order() -> None:
    replica = Replica()
    assert replica.follower.result() is None
    assert replica.led == replica.followed == OF_ALL[::-1]


def test_the_first_tells_why_it_was_stopped() -> None:
    class Stopped(Replica):
        def work(self) -> None:
            self.leader.compute(OF_ALL[0])
            self.leader.end(StopRequest("warning", "SIGUSR2"))

    assert Stopped().follower.result() == StopRequest("warning", "SIGUSR2")


def test_others_leave_where_the_first_cannot_go_on() -> None:
    class Failed(Replica):
        def work(self) -> None:
            self.leader.fail()

    with pytest.raises(SystemExit) as left:
        Failed().follower.result()
    assert left.value.code == 2


def test_a_request_to_another_rank_reaches_the_first() -> None:
    class Asked(Replica):
        def work(self) -> None:
            self.follower_watch.request = StopRequest("terminated", "SIGTERM")
            while self.leader_watch.request is None:
                self.leader.compute(OF_ALL[0])
            self.leader.end(self.leader_watch.request)

    replica = Asked()
    assert replica.leader_watch.request == StopRequest("terminated", "SIGTERM")
    assert replica.follower.result() == StopRequest("terminated", "SIGTERM")
