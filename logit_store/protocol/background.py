"""Files are written by a thread while the next are being made; a failure reaches the one who makes them."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType

Write = Callable[[], None]


class BackgroundWriter:
    """Does what writes a shard, or a part of one, in the order in which it is put; use it in a `with` block.

    At most `depth` writes wait while one is done, so that memory holds what `depth + 2` of them write, with
    the one being made. After a failure nothing more is written. Leaving the block by an exception drops what
    waits: a file is whole or not there, so the same command makes it later.

    Args:
        depth: writes that may wait.
    """

    def __init__(self, *, depth: int = 1) -> None:
        self._waiting: queue.Queue[Write | None] = queue.Queue(maxsize=depth)
        self._failure: BaseException | None = None
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._write, name="shard-writer", daemon=True)
        self._thread.start()

    def put(self, write: Write) -> None:
        """Hands a write over; waits while too many wait already.

        Raises:
            Exception: whatever stopped an earlier one.
        """
        self._raise_failure()
        self._waiting.put(write)
        self._raise_failure()

    def flush(self) -> None:
        """Waits until everything is written that was put.

        Raises:
            Exception: whatever stopped one of the writes.
        """
        self._waiting.join()
        self._raise_failure()

    def close(self) -> None:
        """Does as `flush`, and ends the thread."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        self._raise_failure()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._dropped.set()
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _write(self) -> None:
        # Goes on taking after a failure, so that nobody waits for room.
        while (write := self._waiting.get()) is not None:
            try:
                if self._failure is None and not self._dropped.is_set():
                    write()
            except BaseException as failure:  # it belongs to the one who puts, whatever it is
                self._failure = failure
            del write  # with what it holds: the next one may be long in coming
            self._waiting.task_done()
