"""Ranks that die, in a command without a run folder to record it in: one survivor says who, the others leave.

An error of a broken connection names the survivor, and may come late: a rank may work alone for minutes. So a
thread of each looks who dies, and survivors stay for a while, so that none is taken for the one that died.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from sparsekd.trainer.run.errors import RankLostError
from sparsekd.trainer.run.process import life_of
from sparsekd.trainer.run.pulse import DIED
from sparsekd.trainer.run.ranks import Ranks

_OF_CONNECTIONS = ("gloo", "NCCL", "Connection", "imed out", "peer")

_SECONDS_BETWEEN_LOOKS = 0.25
_SECONDS_OF_A_DEATH = 5.0
"""A process that is killed closes its connections a moment before it counts as dead."""

_SECONDS_UNTIL_SEEN = 3.0
"""A survivor stays for so long after it saw a death; by then the others have seen it, too."""


def is_of_connections(error: Exception) -> bool:
    """Whether an error says no more than that ranks could not speak with one another."""
    return any(word in str(error) for word in _OF_CONNECTIONS)


@contextmanager
def lost_ranks_named(here: Ranks, goes_on: str) -> Iterator[None]:
    """Tells of a broken connection which rank is gone, once on each machine.

    Args:
        here: This rank.
        goes_on: What the same command does, in a sentence's end.

    Raises:
        RankLostError: A rank died, and this one is the first of those that are left on its machine.
        SystemExit: With 2, where another says it.
        Exception: Whatever else was raised inside.
    """
    if here.world_size == 1:
        yield
        return
    with _Deaths(here) as deaths:
        try:
            yield
        except RuntimeError as error:
            if not is_of_connections(error):
                raise
            _tell(here, deaths.first(), goes_on, error)


class _Deaths:
    """The ranks of this machine that died first, as a thread saw it."""

    def __init__(self, here: Ranks) -> None:
        self._here = here
        self._dead: list[int] = []
        self._is_over, self._ends = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deaths", daemon=True)

    def __enter__(self) -> "_Deaths":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def first(self) -> list[int]:
        """Waits a moment for a death to show; returns when the others had time to see it, too."""
        self._is_over.wait(_SECONDS_OF_A_DEATH + _SECONDS_UNTIL_SEEN)
        return self._dead

    def _watch(self) -> None:
        while not self._ends.wait(_SECONDS_BETWEEN_LOOKS):
            ranks, processes = self._here.on_this_machine, self._here.processes
            if dead := [rank for rank in ranks if life_of(processes[rank]) == "dead"]:
                self._dead = dead
                self._ends.wait(_SECONDS_UNTIL_SEEN)
                self._is_over.set()
                return


def _tell(here: Ranks, dead: list[int], goes_on: str, error: RuntimeError) -> NoReturn:
    """Says it, or leaves it to the first that is left on this machine."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    if here.rank != min(rank for rank in here.on_this_machine if rank not in dead):
        if not dead:  # then it may be this rank's own error
            print(f"rank {here.rank}: {first}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    if dead:
        more = f", and {len(dead) - 1} more," if len(dead) > 1 else ""
        raise RankLostError(
            f"Rank {dead[0]} ({here.processes[dead[0]]}){more} {DIED}; the other ranks cannot go on without "
            f"it. The same command {goes_on}."
        ) from error
    hosts = ", ".join(sorted({process.host for process in here.processes}))
    raise RankLostError(
        f"Rank {here.rank} ({here.processes[here.rank]}) cannot speak with the others any more ({first}), "
        "though no rank of its machine is dead: look at what those of other machines say, and at the network "
        f"between {hosts}. The same command {goes_on}."
    ) from error
