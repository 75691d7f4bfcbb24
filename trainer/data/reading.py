"""Rows are read by their places in the training stream: what lies together by one read, held for a window.

Held from one call to the next are the stored bytes of at most one window of each stream that falls on this
rank.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sparsekd.trainer.data.order import Place
from sparsekd.trainer.data.sources import Message, Sources

SPLIT = "train"

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Readers:
    """Threads that do the same for many things at once, and give what they made in the things' order; `close`
    ends them.

    Args:
        count: How many; 1 makes none, and the caller does everything.
    """

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="reader") if count > 1 else None

    def map(self, make: Callable[[_Item], _Made], items: Iterable[_Item]) -> list[_Made]:
        """What is made of each; raises what the first of them that failed raised."""
        return list(map(make, items) if self._pool is None else self._pool.map(make, items))

    def close(self) -> None:
        """Waits for what was begun; nothing more can be made."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class PlacedRows:
    """Reads training rows. Its methods are called by one thread.

    Args:
        sources: The stores.
        keep: Whether rows of a remote store are kept in the machine's cache, which is worth it where the run
            reads them again.
        readers: Who reads.
    """

    def __init__(self, sources: Sources, *, keep: bool, readers: Readers) -> None:
        self._sources = sources
        self._keep = keep
        self._readers = readers
        self._held: dict[tuple[int, int], dict[int, Message]] = {}  # of (stream, window), by row

    def messages(self, places: Sequence[Place]) -> list[Message]:
        """The stored bytes of rows, each once in its window; None where they cannot be read whole.

        Args:
            places: One after another, as the order has them.
        """
        pieces: dict[tuple[int, int, int], Place] = {}
        for place in places:
            held = self._held.setdefault((place.stream, place.window), {})
            if place.row not in held:
                pieces.setdefault((place.stream, place.window, place.first), place)
        for place, found in zip(
            pieces.values(), self._readers.map(self._piece, pieces.values()), strict=True
        ):
            rows = range(place.first, place.stop)
            self._held[place.stream, place.window].update(zip(rows, found, strict=True))
        wanted = [self._held[place.stream, place.window].pop(place.row) for place in places]
        # Rows of a passed window that fell on other ranks are not asked for any more.
        newest = {place.stream: place.window for place in places}
        for stream, window in list(self._held):
            if newest.get(stream, window) != window:
                del self._held[stream, window]
        return wanted

    def _piece(self, place: Place) -> list[Message]:
        return self._sources.read_messages(SPLIT, place.first, place.stop, keep=self._keep)
