"""Shards are written by a thread while the next are being made; a failure reaches the one who makes them."""

import queue
import threading
from collections.abc import Sequence
from types import TracebackType

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.writer import write_shard
from sparsekd.logit_store.row import Row

Unit = tuple[str, int, Sequence[Row]]


class BackgroundWriter:
    """Writes shards in the order in which they are put; use it in a `with` block.

    At most `depth` shards wait while one is written, so that memory holds `depth + 2` with the one being
    made. After a failure nothing more is written. Leaving the block by an exception drops what waits: a shard
    is whole or not there, so the same command makes it later.

    Args:
        path: of a store made by `create_store`.
        manifest: of that store.
        depth: shards that may wait.
    """

    def __init__(self, path: StorePath, manifest: Manifest, *, depth: int = 1) -> None:
        self._path = path
        self._manifest = manifest
        self._waiting: queue.Queue[Unit | None] = queue.Queue(maxsize=depth)
        self._failure: BaseException | None = None
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._write, name="shard-writer", daemon=True)
        self._thread.start()

    def put(self, split: str, shard: int, rows: Sequence[Row]) -> None:
        """Hands a shard over; waits while too many wait already.

        Raises:
            Exception: whatever stopped an earlier shard from being written.
        """
        self._raise_failure()
        self._waiting.put((split, shard, rows))
        self._raise_failure()

    def close(self) -> None:
        """Waits until all shards are written.

        Raises:
            Exception: whatever stopped one of them.
        """
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
        while (unit := self._waiting.get()) is not None:
            if self._failure is not None or self._dropped.is_set():
                continue
            try:
                write_shard(self._path, self._manifest, *unit)
            except BaseException as failure:  # it belongs to the one who puts, whatever it is
                self._failure = failure
