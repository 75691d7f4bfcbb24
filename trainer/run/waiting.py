"""Long work of a rank's own before a collective, whose time-out is meant for ranks that died.

Gigabytes that are hashed, converted or made durable take as long as the disk does. Meanwhile the ranks speak
by the store in which they met, and not by files: a network file system shows a file late, and never that its
writer has died.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistError, PrefixStore, Store

from sparsekd.logit_store.typed_json import parse_json, typed
from sparsekd.trainer.run.errors import RankLostError, Stopped
from sparsekd.trainer.run.process import life_of
from sparsekd.trainer.run.ranks import Ranks, without_collectives
from sparsekd.trainer.run.stop import StopRequest, StopWatch

Result = TypeVar("Result")

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_BEATS = 5.0
_SECONDS_TO_BE_HEARD = 3.0
"""For the others to read a verdict from the first rank's memory, which ends with it."""
_SECONDS_OF_SILENCE = 120.0
"""Of a rank that has begun its work: many beats, as the work may hold the interpreter for a while."""

_ASKED, _VERDICT = "asked", "verdict"
_GO_ON, _LOST = "go on", "lost"


class StopAsked(Stopped):
    """The job was asked to stop during work that can be left as it is."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__(f"It was asked to stop ({request}) before this was done; nothing is half-written")
        self.request = request


def patiently(
    here: Ranks, action: Callable[[], Result], watch: StopWatch | None = None
) -> Callable[[], Result]:
    """Runs `action` and waits without a limit until all ranks have done theirs; every rank calls it.

    `together(here, patiently(here, action))` is as `together(here, action)`, but for the time that it may
    take; so with `gather` and `on_first`. The action runs in a thread, where torch has other settings than
    here: it reads and writes files, and computes nothing with torch.

    Args:
        here: This rank.
        action: What it does, without collectives.
        watch: What asks this rank to stop, where `action` can be left as it is at any point.

    Returns:
        What gives the result of `action`, or raises what that has raised.

    Raises:
        RankLostError: A rank died or gives no sign of life.
        StopAsked: One was asked to stop, which all find out alike. The thread ends with the process.
        SystemExit: With 2, where another rank tells of the lost one.
    """
    outcome: list[tuple[Result | None, BaseException | None]] = []
    is_over = threading.Event()

    def work() -> None:
        try:
            with without_collectives():
                outcome.append((action(), None))
        except BaseException as error:  # whatever it is, the rank's main thread raises it
            outcome.append((None, error))
        is_over.set()

    if here.store is None:  # a rank that has met nobody
        work()
    else:
        threading.Thread(target=work, name="patiently", daemon=True).start()
        _wait(here, here.store, is_over, watch)

    def result() -> Result:
        made, failure = outcome[0]
        if failure is not None:
            raise failure
        return made  # type: ignore[return-value]  # None only where the action's is

    return result


def _tidy(here: Ranks, store: Store) -> None:
    """Removes what this rank left in a wait that all are out of, as all have come into the one after it."""
    for name in (f"done/{here.rank}", f"beat/{here.rank}", *((_VERDICT,) if here.is_first else ())):
        store.delete_key(name)


def _wait(here: Ranks, store: Store, is_over: threading.Event, watch: StopWatch | None) -> None:
    """Until the first rank says that all have done their work, or why nobody waits any longer."""
    number = next(here.waits)
    of_all, store = store, PrefixStore(f"wait/{number}", store)
    signs = _Signs(here, store)
    try:
        _tidy(here, PrefixStore(f"wait/{number - 2}", of_all))
        while (verdict := _verdict(here, store, is_over, watch)) is None:
            if (lost := signs.lost()) is not None:
                _leave(here, store, lost)
    except (DistError, RuntimeError) as error:
        if watch is not None and watch.request is not None:
            # Not StopAsked: the others did not agree on it, and no collective may follow.
            raise Stopped(f"{StopAsked(watch.request)}") from error
        signs.leave_it_to_another()
        raise signs.of_broken_store(error) from error
    if verdict == _LOST:
        raise SystemExit(2)
    if verdict != _GO_ON:
        raise StopAsked(typed(StopRequest, parse_json(verdict.encode(), "a request"), "a request"))


def _verdict(here: Ranks, store: Store, is_over: threading.Event, watch: StopWatch | None) -> str | None:
    """What the first rank says, after a look of a second at most; None for nothing yet."""
    own = f"done/{here.rank}"
    if is_over.wait(_SECONDS_BETWEEN_LOOKS) and not store.check([own]):
        store.set(own, "")
    if watch is not None and watch.request is not None:
        store.set(_ASKED, json.dumps(asdict(watch.request)))
    if not here.is_first:
        seconds = _SECONDS_BETWEEN_LOOKS if is_over.is_set() else 0.0
        return store.get(_VERDICT).decode() if are_there(store, [_VERDICT], seconds) else None
    everyones = [f"done/{rank}" for rank in range(here.world_size)]
    if store.check([_ASKED]):
        verdict = store.get(_ASKED).decode()
    elif is_over.is_set() and are_there(store, everyones, _SECONDS_BETWEEN_LOOKS):
        verdict = _GO_ON
    else:
        return None
    store.set(_VERDICT, verdict)
    if verdict != _GO_ON:
        time.sleep(_SECONDS_TO_BE_HEARD)
    return verdict


def are_there(store: Store, names: list[str], seconds: float) -> bool:
    """Whether a store has all of these, now or within some seconds."""
    if store.check(names):
        return True
    if seconds:
        try:
            store.wait(names, timedelta(seconds=seconds))
        except (DistError, RuntimeError):
            return store.check(names)  # raises where it was the connection
        return True
    return False


def _leave(here: Ranks, store: Store, lost: RankLostError) -> None:
    """One rank tells of a lost one: the first, or of those that wait for it the quickest."""
    if here.is_first:
        store.set(_VERDICT, _LOST)
        time.sleep(_SECONDS_TO_BE_HEARD)
    elif store.add("told", 1) > 1:
        raise SystemExit(2)
    raise lost


class _Signs:
    """Signs of life: each rank's for the first one, and that one's for all."""

    def __init__(self, here: Ranks, store: Store) -> None:
        self._here, self._store = here, store
        now = time.monotonic()
        others = range(1, here.world_size) if here.is_first else range(1)
        self._seen = {rank: (0, now) for rank in others}  # beats of a rank, and when the last one came
        self._next = now + _SECONDS_BETWEEN_BEATS

    def lost(self) -> RankLostError | None:
        """A rank that is dead or silent, if it is time for a look."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + _SECONDS_BETWEEN_BEATS
        self._store.add(f"beat/{self._here.rank}", 1)
        for rank, (count, since) in self._seen.items():
            if self._is_dead(rank):
                return self._sentence(
                    rank, "died without a word, as by SIGKILL, a crash, or for want of memory"
                )
            beats = self._store.add(f"beat/{rank}", 0)
            # Who has not come yet takes part in no wait, and has the time of a collective.
            limit = _SECONDS_OF_SILENCE if beats else self._here.timeout_seconds
            if beats != count:
                self._seen[rank] = (beats, now)
            elif now - since > limit:
                return self._sentence(rank, f"gives no sign of life since {now - since:.0f} s")
        return None

    def leave_it_to_another(self) -> None:
        """Of those whose store is gone one on each machine says so, who stays until the others have left.

        Raises:
            SystemExit: With 2, on the others.
        """
        if not self._here.processes:
            return
        living = [rank for rank in self._here.on_this_machine if rank != 0 and not self._is_dead(rank)]
        if self._here.rank != min(living, default=self._here.rank):
            raise SystemExit(2)
        time.sleep(_SECONDS_TO_BE_HEARD)

    def of_broken_store(self, error: Exception) -> RankLostError:
        """The sentence for a store that cannot be reached any more: it is in the first rank's memory."""
        if self._is_dead(0):
            return self._sentence(0, "died without a word, as by SIGKILL, a crash, or for want of memory")
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return self._sentence(0, f"cannot be reached any more ({first})")

    def _is_dead(self, rank: int) -> bool:
        processes = self._here.processes
        return rank != self._here.rank and bool(processes) and life_of(processes[rank]) == "dead"

    def _sentence(self, rank: int, how: str) -> RankLostError:
        processes = self._here.processes
        who = f"Rank {rank}" + (f" ({processes[rank]})" if processes else "")
        return RankLostError(
            f"{who} {how}, while the others waited for its files; the same command goes on from what is "
            "there.",
            rank,
        )
