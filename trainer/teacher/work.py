"""A worker of a capture: takes units that nobody has done or holds, until the store is sealed.

Workers never speak with one another. Each claims a unit by a lease in the store's folder `work`, looks right
before it computes whether it was done meanwhile, and hands the rows to a thread that writes them, joins the
shard where they were its last, and gives the lease back. Equal rows are equal bytes whoever writes them, and
files are whole or not there: a lease only saves work, and one that is lost costs no more than a unit that is
done twice.

A worker is one replica of the teacher: one process, or the first of several (see `replica`). On an object
store units are whole shards, claimed by objects where the service honours conditional uploads. Where no lease
can be made, each worker takes those of its share, gives the others time to end theirs, and then takes what
they have left.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.places.files import exists, explained, files_below, names_in
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.background import BackgroundWriter
from sparsekd.logit_store.protocol.layout import (
    INDEX_NAME,
    WORK_NAME,
    part_file,
    work_folder,
    work_name,
)
from sparsekd.logit_store.protocol.parts import (
    clear_work,
    is_committed,
    join_parts,
    missing_parts,
    write_part,
)
from sparsekd.logit_store.protocol.writer import committed_shards, seal, write_shard
from sparsekd.logit_store.row import Row
from sparsekd.trainer.run.console import Interval, readable_seconds
from sparsekd.trainer.run.lease import SECONDS_BETWEEN_BEATS, HeldError, Holder, Lease, now_at, take
from sparsekd.trainer.run.object_lease import ObjectLease, can_be_leased, now_at_service, take_object
from sparsekd.trainer.run.stop import StopRequest, StopWatch
from sparsekd.trainer.teacher.units import Shard, Turn, Unit

Compute = Callable[[Unit], Sequence[Row]]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 2.0
"""Seconds between looks for a unit that is free again, where others hold all that is left."""

_SECONDS_TO_NOTICE = 0.25
"""That a request to stop waits in such a pause."""

_SHARE_OF_COUNTING = 50
"""Looking how much all workers have done takes at most this part of the time."""


class Leases:
    """The leases that this worker holds, in the work folder of a store.

    Args:
        path: Of the store.
        environment: Of this process, for Slurm's job.
    """

    def __init__(self, path: StorePath, environment: Mapping[str, str]) -> None:
        self._folder = path / WORK_NAME if leases_are_possible(path) else None
        self._environment = environment
        self._clock: tuple[float, int] | None = None
        self._held: set[Lease | ObjectLease] = set()
        self._lock = Lock()

    @property
    def are_possible(self) -> bool:
        """Whether others see what this worker takes."""
        return self._folder is not None

    def take(self, name: str, *, judge: bool) -> Callable[[], None] | None:
        """Takes a lease; returns what gives it back, or None where another worker holds it.

        Args:
            name: Of what is claimed, in the work folder.
            judge: Whether a holder is looked at, which may be dead.

        Raises:
            StoreError: No lease can be written or read there.
        """
        if self._folder is None:
            return _nothing
        place = self._folder / f"{name}.lease"
        if not judge and exists(place):
            return None
        holder = Holder.of_this_process(self._environment)
        with explained(place):
            try:
                lease = _taken(place, holder, self._now)
            except HeldError:
                return None
        with self._lock:
            self._held.add(lease)
        return partial(self._release, lease)

    def _now(self) -> int:
        """The time by the file system's clock, for which many leases need few questions."""
        assert self._folder is not None
        here = time.monotonic()
        if self._clock is None or here - self._clock[0] > SECONDS_BETWEEN_BEATS:
            self._clock = here, _now_at(self._folder)
        asked, answer = self._clock
        return answer + int((here - asked) * 1e9)

    def _release(self, lease: Lease | ObjectLease) -> None:
        lease.release()
        with self._lock:
            self._held.discard(lease)

    def release_all(self) -> None:
        """Gives back what is held still, as of units that a failure has left undone."""
        for lease in list(self._held):
            self._release(lease)


def leases_are_possible(path: StorePath) -> bool:
    """Whether the workers of a store can claim units there.

    Raises:
        StoreError: The object store cannot be asked.
    """
    if isinstance(path, Path):
        return True
    with explained(path):
        return can_be_leased(path)


def _now_at(folder: StorePath) -> int:
    return now_at(folder, "lease") if isinstance(folder, Path) else now_at_service(folder)


def _taken(place: StorePath, holder: Holder, now: Callable[[], int]) -> Lease | ObjectLease:
    """`take`, in a folder that is made, and made again where another worker has just removed it."""
    if not isinstance(place, Path):
        return take_object(place, holder, now)
    for _ in range(4):
        with suppress(
            FileNotFoundError, FileExistsError
        ):  # the latter: it went while mkdir looked what it is
            place.parent.mkdir(parents=True, exist_ok=True)
            return take(place, holder, now)
    return take(place, holder, now)


def _nothing() -> None:
    """Gives back what was not taken."""


class Worker:
    """One worker of a store.

    Args:
        path: Of the store, made by `create_store`.
        manifest: Of that store.
        units: Of each shard.
        turns: The order in which this worker comes to the shards.
        compute: Gives the rows of a unit.
        watch: What asks this process to stop.
        environment: Of this process.
        is_first: Whether it is the first one of its job, which tells how far the work is.
    """

    def __init__(
        self,
        path: StorePath,
        manifest: Manifest,
        units: Mapping[Shard, Sequence[Unit]],
        turns: Sequence[Turn],
        compute: Compute,
        watch: StopWatch,
        *,
        environment: Mapping[str, str],
        is_first: bool,
    ) -> None:
        self._path, self._manifest, self._units = path, manifest, units
        self._compute, self._watch = compute, watch
        self._is_first = is_first
        self._open = list(turns)  # those that are not known to be committed
        self._leases = Leases(path, environment)
        self._progress = Progress(path, manifest, units, speaks=is_first)
        self._longest_unit = 0.0  # seconds
        self._others_had_time = self._leases.are_possible

    def work(self) -> StopRequest | None:
        """Does units until every shard is committed, or until it is asked to stop.

        Returns:
            Why it was stopped; None where nothing is left to do.

        Raises:
            StoreError: A unit cannot be written; nothing of it is there.
            Exception: Whatever `compute` raises.
        """
        try:
            with BackgroundWriter() as writer:
                stopped = self._work(writer)
            if stopped is None:
                self._progress.tell_end()
            return stopped
        finally:
            self._leases.release_all()

    def _work(self, writer: BackgroundWriter) -> StopRequest | None:
        pause = _SHORTEST_PAUSE
        judges = False  # a dead worker's unit may wait: at first there are others
        while self._open:
            was_found = False
            for unit, release in self._free_units(writer, judge=judges):
                was_found = True
                began = time.monotonic()
                rows = self._compute(unit)
                self._longest_unit = max(self._longest_unit, time.monotonic() - began)
                writer.put(partial(self._publish, unit, rows, release))
                self._progress.add(len(rows))
                if self._watch.request is not None:
                    return self._watch.request
            if self._watch.request is not None:
                return self._watch.request
            writer.flush()
            if judges and not was_found:
                self._rest(pause)
            pause = _SHORTEST_PAUSE if was_found else min(2 * pause, _LONGEST_PAUSE)
            judges = True
        return None

    def _free_units(
        self, writer: BackgroundWriter, *, judge: bool
    ) -> Iterator[tuple[Unit, Callable[[], None]]]:
        """Once around: the units that are free, each claimed, with what gives the claim back."""
        is_left: list[Turn] = []
        for number, turn in enumerate(self._open):
            if turn.backwards and not self._others_had_time:
                self._others_had_time = True
                self._give_others_time(2 * self._longest_unit)
            units = self._units[turn.shard]
            for unit in reversed(units) if turn.backwards else units:
                if self._watch.request is not None:
                    self._open = is_left + self._open[number:]
                    return
                if is_committed(self._path, *turn.shard):
                    break
                release = self._claimed(unit, judge=judge)
                if release is not None:
                    yield unit, release
            else:
                is_left.append(turn)
                if (
                    judge and not units[0].is_whole
                ):  # whoever wrote its last part may have died before it joined
                    writer.put(partial(self._join_if_whole, turn.shard, judge=True))
        self._open = [turn for turn in is_left if not is_committed(self._path, *turn.shard)]

    def _claimed(self, unit: Unit, *, judge: bool) -> Callable[[], None] | None:
        """What gives a claim back, where there is something to do and nobody else does it."""
        if self._is_written(unit):
            return None
        name = f"{unit.split}/{unit.shard:06d}/{work_name(unit.rows)}"
        release = self._leases.take(name, judge=judge)
        if release is not None and (
            self._is_written(unit) or is_committed(self._path, unit.split, unit.shard)
        ):
            release()  # done between the look and the claim
            return None
        return release

    def _is_written(self, unit: Unit) -> bool:
        """Whether a unit's part is there; a whole shard is looked for by its commit record."""
        return not unit.is_whole and exists(part_file(self._path, unit.split, unit.shard, unit.rows))

    def _publish(self, unit: Unit, rows: Sequence[Row], release: Callable[[], None]) -> None:
        """Writes a unit, and the shard where it was the last one; in the writer's thread."""
        try:
            if unit.is_whole:
                write_shard(self._path, self._manifest, unit.split, unit.shard, rows)
            else:
                assert isinstance(self._path, Path)  # elsewhere every unit is a whole shard
                write_part(self._path, self._manifest, unit.split, unit.shard, unit.rows, rows)
        finally:
            release()
        if unit.is_whole:
            self._clear(unit)
        else:
            self._join_if_whole((unit.split, unit.shard), judge=False)

    def _clear(self, unit: Unit) -> None:
        if isinstance(self._path, Path):
            clear_work(work_folder(self._path, unit.split, unit.shard))

    def _join_if_whole(self, shard: Shard, *, judge: bool) -> None:
        """Joins the parts of a shard where all of them are there, unless another worker does."""
        assert isinstance(self._path, Path)
        parts = [unit.rows for unit in self._units[shard]]
        if missing_parts(self._path, *shard, parts) or is_committed(self._path, *shard):
            return
        release = self._leases.take(f"{shard[0]}/{shard[1]:06d}/join", judge=judge)
        if release is None:
            return
        try:
            if (problem := join_parts(self._path, self._manifest, *shard, parts)) is not None:
                print(f"capture: {problem}", flush=True)
        finally:
            release()

    def seal(self) -> bool | None:
        """Seals the store, where all is committed, or waits until another worker has.

        Returns:
            Whether it was this worker; None where it was asked to stop before.

        Raises:
            StoreError: What is there cannot be sealed.
        """
        plan = dict.fromkeys(self._manifest.splits, 0)
        for split, _ in self._units:
            plan[split] += 1
        if not (self._is_first or self._leases.are_possible):
            return False  # the first of its job does it, and nobody could see that another does
        pause = _SHORTEST_PAUSE
        try:
            while not exists(self._path / INDEX_NAME):
                if (release := self._leases.take("seal", judge=True)) is not None:
                    try:
                        if exists(self._path / INDEX_NAME):
                            break
                        seal(self._path, plan)
                        return True
                    finally:
                        release()
                if self._watch.request is not None:
                    return None
                self._rest(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            return False
        finally:
            if exists(self._path / INDEX_NAME):
                self._clear_all()

    def _clear_all(self) -> None:
        """Removes the folder of work: of a sealed store, where there is nothing left to claim."""
        if isinstance(self._path, Path):
            clear_work(self._path / WORK_NAME)
        elif self._leases.are_possible:
            for name in files_below(self._path / WORK_NAME):
                self._path.files.remove(self._path / WORK_NAME / name)

    def _give_others_time(self, seconds: float) -> None:
        """Waits until all shards are committed, but not longer than others need for what they have begun."""
        end = time.monotonic() + seconds
        while self._watch.request is None and (left := end - time.monotonic()) > 0:
            committed = {split: committed_shards(self._path, split) for split in self._manifest.splits}
            if all(shard in committed[split] for split, shard in self._units):
                return
            self._rest(min(left, _LONGEST_PAUSE))

    def _rest(self, seconds: float) -> None:
        """Waits, unless it is asked to stop."""
        end = time.monotonic() + seconds
        while self._watch.request is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _SECONDS_TO_NOTICE))


class Progress:
    """How far all workers are together, and how fast this one is.

    Args:
        path: Of the store.
        manifest: Of the store.
        units: Of each shard.
        speaks: Whether it prints.
    """

    def __init__(
        self, path: StorePath, manifest: Manifest, units: Mapping[Shard, Sequence[Unit]], *, speaks: bool
    ) -> None:
        self._path, self._manifest, self._units, self._speaks = path, manifest, units, speaks
        self._total = sum(map(len, units.values()))
        self._before = 0
        self._rows = 0
        self._interval = Interval()
        self._rests_until = 0.0
        if speaks:
            self._before = self._done()
            if self._before:
                print(f"capture: {self._before} of {self._total} units are finished already", flush=True)
        self._began = time.monotonic()

    def add(self, rows: int) -> None:
        """Counts rows of this worker, and says how far the work is where it is time for it."""
        self._rows += rows
        if self._speaks and time.monotonic() >= self._rests_until and self._interval.is_over():
            began = time.monotonic()
            done = self._done()
            ended = time.monotonic()
            self._rests_until = ended + _SHARE_OF_COUNTING * (ended - began)
            speed = (done - self._before) / (ended - self._began)
            left = f"{readable_seconds((self._total - done) / speed)} left" if speed else "time left unknown"
            self._tell(done, left)

    def tell_end(self) -> None:
        """Says that all is done, where this worker did something of it."""
        if self._speaks and self._rows:
            self._tell(self._total, "0 s left")

    def _tell(self, done: int, left: str) -> None:
        speed = self._rows * self._manifest.sequence_length / (time.monotonic() - self._began)
        print(f"capture: {done}/{self._total} units, {speed:,.0f} tokens/s here, {left}", flush=True)

    def _done(self) -> int:
        """Units that are written, of all workers."""
        committed = {split: committed_shards(self._path, split) for split in self._manifest.splits}
        done = sum(len(units) for (split, shard), units in self._units.items() if shard in committed[split])
        for split in self._manifest.splits if isinstance(self._path, Path) else ():
            for name in names_in(self._path / WORK_NAME / split):
                if name.isdecimal() and int(name) not in committed[split]:
                    there = set(names_in(self._path / WORK_NAME / split / name))
                    units = self._units.get((split, int(name)), ())
                    done += sum(f"{work_name(unit.rows)}.part" in there for unit in units)
        return done
