"""Work on many items by several processes of this machine: results come in the items' order.

Processes are started afresh and not forked: the threads of a library that reads remote stores do not live in
a forked child, which then waits for them for ever.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from sparsekd.logit_store.errors import StoreError

Item = TypeVar("Item")
Result = TypeVar("Result")

LARGEST_JOBS = 1024

ITEMS_AHEAD = 4
"""Items for each process that wait or are done before their turn: their results are in memory."""

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_BREAK = 2.0
"""In which the pool finds out by itself that one of its processes is dead: it is told at once."""

_pickled = b""  # of a worker process: what it does, and once it was needed, as a function
_work: Callable[[Any], Any] | None = None


class WorkerKilledError(StoreError):
    """A process that works for this one was killed."""


def require_jobs(jobs: int) -> None:
    """Raises StoreError for a number of processes that is not from 1 to `LARGEST_JOBS`."""
    if not 1 <= jobs <= LARGEST_JOBS:
        raise StoreError(f"jobs is {jobs}, expected 1 to {LARGEST_JOBS} processes.")


class Processes(Generic[Item, Result]):
    """Processes that do one kind of work; use it in a `with` block, at whose end they end.

    Args:
        work: a picklable function (of a module, a method of a picklable object, a `partial` of these).
        jobs: how many. Scripts need the usual `if __name__ == "__main__":`.
        what: is done, for the message when one dies.
        option: by which users set their number, for that message.

    Raises:
        StoreError: jobs is not from 1 to `LARGEST_JOBS`.
    """

    def __init__(
        self, work: Callable[[Item], Result], jobs: int, *, what: str, option: str = "--jobs"
    ) -> None:
        require_jobs(jobs)
        self._killed = (
            f"A process of {what} was killed, as happens where memory runs out: run the same command again "
            f"with fewer {option} than {jobs}; it goes on with what is there."
        )
        # Only this process holds the other end, so that it is closed however this process ends.
        self._alive, self._held = multiprocessing.Pipe(duplex=False)
        self._begun: set[Future[Result]] = set()
        self._pool = ProcessPoolExecutor(
            jobs,
            multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(pickle.dumps(work), self._alive),
        )
        self._is_over = threading.Event()
        threading.Thread(target=self._break_where_stuck, daemon=True).start()

    def __enter__(self) -> "Processes[Item, Result]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # What others have begun is finished, a whole shard is not made again; unless this is interrupted.
            if kind is None or issubclass(kind, Exception):
                begun = [future for future in list(self._begun) if not future.cancel()]
                wait(begun)
        finally:
            self._held.close()
            self._pool.shutdown(cancel_futures=True)
            self._is_over.set()
            self._alive.close()

    def _break_where_stuck(self) -> None:
        """Ends the waits in which a pool is caught when its process is killed while something is sent.

        All processes of a pool send by one pipe and receive by another, and this process holds their other
        ends, too: who has half of a result waits for the second half, who sends an item for a reader.
        """
        while not self._is_over.wait(_SECONDS_BETWEEN_LOOKS):
            processes = list((self._pool._processes or {}).values())
            if not processes or not connection.wait([one.sentinel for one in processes], timeout=0):
                continue
            if not self._is_over.wait(_SECONDS_TO_BREAK):
                for process in processes:
                    with suppress(ValueError):  # it was closed meanwhile
                        process.kill()
                pool: Any = self._pool
                with suppress(AttributeError, OSError):
                    pool._result_queue._writer.close()
                # Python 3.11.2 sends items on to processes that are dead (its issue 94777).
                with suppress(AttributeError, OSError):
                    pool._call_queue._reader.close()
            return

    def begin(self, item: Item) -> "Future[Result]":
        """Has an item worked on, after those that were begun before.

        Raises:
            WorkerKilledError: a process was killed.
        """
        try:
            future: Future[Result] = self._pool.submit(_do, item)
        except BrokenProcessPool:
            raise WorkerKilledError(self._killed) from None
        self._begun.add(future)
        future.add_done_callback(self._begun.discard)
        return future

    def result(self, future: "Future[Result]") -> Result:
        """Waits for what became of an item.

        Raises:
            WorkerKilledError: a process was killed.
            Exception: what the work raised.
        """
        try:
            return future.result()
        except BrokenProcessPool:
            raise WorkerKilledError(self._killed) from None


def results_of(
    work: Callable[[Item], Result], items: Iterable[Item], jobs: int, *, what: str
) -> Iterator[Result]:
    """Yields `work(item)` for each item, in their order.

    Args:
        work: as for `Processes`.
        items: picklable; taken a few at a time.
        jobs: processes; 1 works in this one.
        what: is done, for the message when a process dies.

    Raises:
        StoreError: jobs is not from 1 to `LARGEST_JOBS`, or a process was killed.
        Exception: what `work` raised; nothing is begun after it.
    """
    require_jobs(jobs)
    if jobs == 1:
        yield from map(work, items)
        return
    with Processes(work, jobs, what=what) as processes:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(processes.begin(item))
            if len(waiting) == jobs * ITEMS_AHEAD:
                yield processes.result(waiting.popleft())
        while waiting:
            yield processes.result(waiting.popleft())


def _begin(work: bytes, alive: Connection) -> None:
    """Begins a worker process, which ends when the process that started it does."""
    global _pickled
    _pickled = work
    # Of a terminal or of Slurm, which reach all processes of a command: the first one decides.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        alive.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _do(item: Any) -> Any:
    global _work
    if _work is None:
        _work = pickle.loads(_pickled)  # here, so that what goes wrong is told as a result
    return _work(item)
