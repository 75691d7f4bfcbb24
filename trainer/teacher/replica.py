"""A replica of the teacher over several ranks: the first claims units, and all compute them together.

The others wait for a unit as long as it takes, by the store in which the ranks met: the time-out of a
collective is for ranks that died. That store lies in the first rank's memory, so that whoever waits notices
when it is gone; in the middle of a unit a broken collective says it.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from torch.distributed import PrefixStore

from sparsekd.logit_store.row import Row
from sparsekd.logit_store.typed_json import parse_json, typed
from sparsekd.trainer.run.ranks import Ranks
from sparsekd.trainer.run.stop import StopRequest, StopWatch
from sparsekd.trainer.run.waiting import are_there
from sparsekd.trainer.teacher.units import Shard, Unit
from sparsekd.trainer.teacher.work import Compute

_ASKED, _END, _FAILED = "asked", "end", "failed"
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_LEAVE = 5.0
"""For the others to read the last word, before the store ends with the first rank."""


class Leader:
    """The first rank's side.

    Args:
        here: The first rank.
        units: Of each shard, equal on all ranks.
        compute: Gives the rows of a unit, by collectives of all ranks.
        watch: What asks this process to stop; here also what asks another rank.
    """

    def __init__(
        self, here: Ranks, units: Mapping[Shard, Sequence[Unit]], compute: Compute, watch: StopWatch
    ) -> None:
        assert here.store is not None
        self._here, self._units, self._compute, self._watch = here, units, compute, watch
        self._store = PrefixStore("replica", here.store)
        self._numbers = itertools.count()

    def compute(self, unit: Unit) -> Sequence[Row]:
        """The rows of a unit, of which the others hear by this."""
        index = self._units[unit.split, unit.shard].index(unit)
        self._say(json.dumps([unit.split, unit.shard, index]))
        rows = self._compute(unit)
        if self._watch.request is None and self._store.check([_ASKED]):
            self._watch.request = _request(self._store.get(_ASKED))
        return rows

    def end(self, stopped: StopRequest | None) -> None:
        """Tells the others that no unit follows, and why where it was asked to stop."""
        self._say(json.dumps([_END, None if stopped is None else asdict(stopped)]))
        self._let_them_leave()

    def fail(self) -> None:
        """Tells the others to leave, since this rank cannot go on."""
        self._say(json.dumps([_FAILED]))
        self._let_them_leave()

    def _say(self, word: str) -> None:
        self._store.set(str(next(self._numbers)), word)

    def _let_them_leave(self) -> None:
        others = [f"left/{rank}" for rank in range(1, self._here.world_size)]
        are_there(self._store, others, _SECONDS_TO_LEAVE)


def follow(
    here: Ranks, units: Mapping[Shard, Sequence[Unit]], compute: Compute, watch: StopWatch
) -> StopRequest | None:
    """Another rank's side: computes what the first rank takes, until it says that no unit follows.

    Returns:
        Why the first rank was asked to stop; None where it was not.

    Raises:
        SystemExit: With 2, where the first rank cannot go on and says why.
        RuntimeError: The first rank is gone.
    """
    assert here.store is not None
    store = PrefixStore("replica", here.store)
    has_told = False
    for number in itertools.count():
        while not are_there(store, [str(number)], _SECONDS_BETWEEN_LOOKS):
            has_told = has_told or _told(store, watch)
        word = json.loads(store.get(str(number)))
        if len(word) < len(("split", "shard", "index")):
            store.set(f"left/{here.rank}", "")
            if word[0] == _FAILED:
                raise SystemExit(2)
            return None if word[1] is None else typed(StopRequest, word[1], "a request")
        split, shard, index = word
        compute(units[split, shard][index])
        has_told = has_told or _told(store, watch)
    raise AssertionError("numbers do not end")


def _told(store: PrefixStore, watch: StopWatch) -> bool:
    """Tells the first rank where this one is asked to stop."""
    if watch.request is None:
        return False
    store.set(_ASKED, json.dumps(asdict(watch.request)))
    return True


def _request(content: bytes) -> StopRequest:
    return typed(StopRequest, parse_json(content, "a request"), "a request")
