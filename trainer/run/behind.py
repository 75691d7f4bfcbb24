"""Work that is done behind the caller's back: in a thread, in order, a bounded number of things behind."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Behind(Generic[Item]):
    """Does the same with one thing after another, in a thread.

    After a failure nothing more is done: it is raised by every later `put` and `flush`.

    Args:
        work: What is done with each.
        most: So many may wait; `put` then waits, too.
        name: Of the thread.
    """

    def __init__(self, work: Callable[[Item], None], *, most: int, name: str) -> None:
        self._work = work
        self._waiting: queue.Queue[Item | None] = queue.Queue(most)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Gives it one more; raises what an earlier one raised."""
        self._raise_failure()
        self._waiting.put(item)

    def offer(self, item: Item) -> bool:
        """Gives it one more without a wait; whether there was room for it."""
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            return False
        return True

    def flush(self) -> None:
        """Waits until everything is done; raises what one of them raised."""
        self._waiting.join()
        self._raise_failure()

    def close(self, seconds: float | None = None) -> bool:
        """Ends the thread when everything is done; what has failed is for `flush` to say.

        Args:
            seconds: Waits so long at most; a thread that is at work beyond them ends with the process.

        Returns:
            Whether it ended.
        """
        try:
            self._waiting.put(None, timeout=seconds)
        except queue.Full:
            return False
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                if self._failure is None:
                    self._work(item)
            except BaseException as error:  # whatever it is, it belongs to the caller
                self._failure = error
            self._waiting.task_done()
        self._waiting.task_done()
