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
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from sparsekd.logit_store.errors import StoreError

Item = TypeVar("Item")
Result = TypeVar("Result")

LARGEST_JOBS = 1024

ITEMS_AHEAD = 4
"""Items for each process that wait or are done before their turn: their results are in memory."""

_pickled = b""  # of a worker process: what it does, and once it was needed, as a function
_work: Callable[[Any], Any] | None = None


def require_jobs(jobs: int) -> None:
    """Raises StoreError for a number of processes that is not from 1 to `LARGEST_JOBS`."""
    if not 1 <= jobs <= LARGEST_JOBS:
        raise StoreError(f"jobs is {jobs}, expected 1 to {LARGEST_JOBS} processes.")


def results_of(
    work: Callable[[Item], Result], items: Iterable[Item], jobs: int, *, what: str
) -> Iterator[Result]:
    """Yields `work(item)` for each item, in their order.

    Args:
        work: a picklable function (of a module, a method of a picklable object, a `partial` of these).
        items: picklable; taken a few at a time.
        jobs: processes; 1 works in this one. Scripts that ask for more need the usual
            `if __name__ == "__main__":`.
        what: is done, for the message when a process dies.

    Raises:
        StoreError: jobs is not from 1 to `LARGEST_JOBS`, or a process was killed.
        Exception: what `work` raised; nothing is begun after it.
    """
    require_jobs(jobs)
    if jobs == 1:
        yield from map(work, items)
        return
    # Only this process holds the other end, so that it is closed however this process ends.
    alive, held = multiprocessing.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        jobs,
        multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(pickle.dumps(work), alive),
    )
    try:
        yield from _in_order(pool, iter(items), jobs * ITEMS_AHEAD)
        pool.shutdown()
    except BrokenProcessPool:
        raise StoreError(
            f"A process of {what} was killed, as happens where memory runs out: run the same command again "
            f"with fewer --jobs than {jobs}; it goes on with what is there."
        ) from None
    except Exception:  # of the work: what others have begun is finished, a whole shard is not made again
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        alive.close()


def _in_order(pool: ProcessPoolExecutor, items: Iterator[Item], ahead: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(_do, item))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _begin(work: bytes, alive: Connection) -> None:
    """Begins a worker process, which ends when the process that started it does."""
    global _pickled
    _pickled = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the first process decides

    def watch() -> None:
        alive.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _do(item: Any) -> Any:
    global _work
    if _work is None:
        _work = pickle.loads(_pickled)  # here, so that what goes wrong is told as a result
    return _work(item)
