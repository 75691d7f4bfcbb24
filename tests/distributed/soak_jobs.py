"""Jobs for the soak: forked, killed or asked to stop at a random moment."""

import json
import os
import random
import signal
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import Server, places

SECONDS_TO_END = 100.0
"""What a job has to end, after it was killed or asked, before it counts as one that hangs."""
GENTLE = {
    signal.SIGTERM: "terminated",
    signal.SIGUSR2: "warning",
    signal.SIGINT: "interrupted",
}


class Job:
    """One start of a command on some ranks of this machine.

    Args:
        server: Forks the ranks.
        words: What the command line holds.
        world: Number of ranks.
        output: The file to which all ranks write.
    """

    def __init__(self, server: Server, words: list[str], world: int, output: Path) -> None:
        self._server, self.world, self.output = server, world, output
        self.began = time.monotonic()
        self.pids = server.start(
            [{"words": words, "environment": each, "output": str(output)} for each in places(world)]
        )
        self._codes: dict[int, int] = {}

    @property
    def codes(self) -> list[int | None]:
        """Exit codes of the ranks, None while one runs; less than 0 is the signal that ended it."""
        self._server.look()
        return [self._code_of(pid) for pid in self.pids]

    def _code_of(self, pid: int) -> int | None:
        """The exit code of a rank, as far as the server was asked, for this job or another one."""
        if pid not in self._codes and pid in self._server.ended:
            self._codes[pid] = self._server.ended[pid]
        return self._codes.get(pid)

    def is_over(self) -> bool:
        return None not in self.codes

    def send(self, number: signal.Signals, rank: int | None) -> None:
        """A signal to one rank, or to all; one that has ended has no number that another process could have,
        until it was asked for its code."""
        # All die at one moment, as with their node: on busy cores the last would tell of the first's death.
        first = [signal.SIGSTOP] if rank is None and number == signal.SIGKILL else []
        for each_number in [*first, number]:
            for each in range(self.world) if rank is None else [rank]:
                if self._code_of(self.pids[each]) is None:
                    os.kill(self.pids[each], each_number)

    def wait(self, seconds: float) -> bool:
        """Waits for all ranks to end; whether they did."""
        deadline = time.monotonic() + seconds
        while not self.is_over():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def give_up(self) -> None:
        """Has every rank that is left write its stack to the output, and ends it."""
        self.send(signal.SIGRTMIN, None)
        time.sleep(2)
        self.send(signal.SIGKILL, None)
        self.wait(10)


Stand = dict[str, Any]
"""The phase in which a rank or a job is, and its step: a mark of where a blow fell."""


@dataclass
class Blow:
    """What befalls one start of a job."""

    signal: signal.Signals | None
    """None: nothing does."""
    rank: int | None
    """None: all ranks at once."""
    since: str
    """From when `after` counts: `start`, `pulse` (when every rank listens to signals) or `steps` (when the
    work itself has begun)."""
    after: float
    """Seconds."""
    fell: bool = False
    """Whether a rank was there to feel it."""
    stands: list[Stand | None] = field(default_factory=list)
    """Where the ranks stood at that moment."""

    @property
    def is_gentle(self) -> bool:
        return self.signal in GENTLE

    @property
    def name(self) -> str:
        return self.signal.name if self.signal is not None else "none"


class Run(ABC):
    """A command that is started again and again until it is done, whatever befalls it.

    Args:
        folder: Into which the command writes.
        output: The file to which all ranks of all starts write.
        usual: Number of ranks of the undisturbed one beside it, where its starts have several.
    """

    verb: str

    def __init__(self, folder: Path, output: Path, usual: int) -> None:
        self.folder, self.output, self.usual = folder, output, usual
        self._said_before = 0

    @abstractmethod
    def quiet_seconds(self) -> tuple[float, float]:
        """The seconds that the undisturbed one takes until its work begins, and from there on."""

    @abstractmethod
    def start(self, world: int) -> Job:
        """Starts it on so many ranks."""

    @abstractmethod
    def is_reached(self, since: str, world: int) -> bool:
        """Whether the start has come as far as `Blow.since` says."""

    @abstractmethod
    def stands(self, world: int) -> list[Stand | None]:
        """Where the ranks stand, or the job where they cannot be told apart."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether nothing is left to do."""

    @abstractmethod
    def problems_of_start(self, job: Job, blow: Blow) -> list[str]:
        """What is wrong after a start that is over; settles whether the blow was felt."""

    @abstractmethod
    def problems_of_run(self, widths: set[int]) -> list[str]:
        """What is other than in an undisturbed run; the starts had these numbers of ranks."""

    def note(self) -> None:
        """Remembers what there is before a start."""
        self._said_before = self.output.stat().st_size if self.output.exists() else 0

    def said(self) -> str:
        """What the ranks of the newest start have written."""
        if not self.output.exists():
            return ""
        return self.output.read_bytes()[self._said_before :].decode(errors="replace")


def drawn_blow(chance: random.Random, world: int, *, kill: bool, seconds: tuple[float, float]) -> Blow:
    """A blow at a random moment.

    Args:
        chance: Draws it.
        world: Number of ranks.
        kill: Whether it is SIGKILL; else one of the gentle signals.
        seconds: That an undisturbed run takes until its work begins, and from there to its end.
    """
    one = chance.randrange(world) if chance.random() < 0.4 else None
    since = chance.choices(("start", "pulse", "steps"), weights=(1, 2, 4))[0]
    # Before ranks show that they are there, nobody knows who is gone, or listens to gentle signals.
    if since == "start" and (one is not None or not kill):
        since = "pulse"
    number = signal.SIGKILL if kill else chance.choice(list(GENTLE))
    return Blow(number, one, since, chance.uniform(0, seconds[since == "steps"]))


def strike(job: Job, blow: Blow, run: Run) -> bool:
    """Waits for the moment of a blow, gives it, and waits for the job's end; whether it came."""
    counts_from: float | None = None
    deadline = job.began + SECONDS_TO_END
    while blow.signal is not None and time.monotonic() < deadline and not job.is_over():
        now = time.monotonic()
        if counts_from is None and run.is_reached(blow.since, job.world):
            counts_from = now
        if counts_from is not None and now >= counts_from + blow.after:
            job.send(blow.signal, blow.rank)
            blow.stands = run.stands(job.world)
            blow.fell = True
            break
        time.sleep(0.005)
    return job.wait(SECONDS_TO_END)


def seconds_of(job: Job, run: Run) -> tuple[float, float]:
    """Waits for an undisturbed job's end; its seconds until the work began, and from there on."""
    first = 0.0
    while not job.is_over():
        if not first and run.is_reached("steps", job.world):
            first = time.monotonic()
        time.sleep(0.02)
    assert set(job.codes) == {0}, job.output.read_text()[-6000:]
    ended = time.monotonic()
    first = first or ended
    return first - job.began, ended - first


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; one that was cut short by a kill is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
