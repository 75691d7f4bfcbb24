"""The chunked order: rows that lie together in the store are read together, by one request.

Each epoch lays all chunks of neighbouring rows in a line, in a permuted order, and cuts it into streams, one
for each share of the batch's slots: so a stream's rows fall on one rank, for every number of ranks that
divides the streams. A stream takes its rows window by window, permuted within each. A cut may lie inside of
a chunk, and the store's last chunk may be short: the line has each row once whatever the sizes.

    line      | chunk 7 | chunk 2 | chunk 9 | chunk 0 | chunk 5 | chunk 1 | chunk 3 | ...
    streams   |<---------- stream 0 ---------->|<---------- stream 1 ---------->|
    windows   |<---- permuted --->|<---------->|<--->|<---- permuted ---->|<--->|

Like the global order it is a function of (seed, position) in constant time and memory. It depends on the
batch's size, as the slots are its; not on ranks or micro-batches.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.trainer.data.order import Place, mixed_seed, permuted, word

_Integers = NDArray[np.int64]

CHUNK_ROWS = 16
"""About 10 MB of 4,096 positions each: enough that a request's latency is not what one waits for."""


@dataclass(frozen=True)
class ChunkedOrder:
    """See the module; made by `chunked_order`.

    Attributes:
        rows: of the store's training split.
        seed: of the data order.
        slots: rows of a global batch.
        streams: at most `slots`.
        window: chunks in which a stream's rows are permuted.
    """

    rows: int
    seed: int
    slots: int
    streams: int
    window: int

    def places(self, first: int, count: int) -> list[Place]:
        positions = np.arange(first, first + count)
        epoch = positions // self.rows
        begin = epoch * self.rows
        stream = positions % self.slots * self.streams // self.slots
        # The stream's part of the line, and how far it is in it.
        start, stop = self._cut(stream, begin), self._cut(stream + 1, begin)
        at = start + self._dealt(stream, positions) - self._dealt(stream, begin)
        # Windows of different streams begin at different times, so that not all are read in one step.
        width, shift = CHUNK_ROWS * self.window, CHUNK_ROWS * (stream % self.window)
        edge = (at + shift) // width * width - shift
        low, high = np.maximum(edge, start), np.minimum(edge + width, stop)
        seed, epoch_word = word(self.seed), epoch.astype(np.uint64)
        key = mixed_seed(seed, epoch_word, low.astype(np.uint64), word(1))
        sizes = (high - low).astype(np.uint64)
        at = low + permuted((at - low).astype(np.uint64), size=sizes, key=key).astype(np.int64)
        number, inside = at // CHUNK_ROWS, at % CHUNK_ROWS
        whole = self.rows // CHUNK_ROWS
        # A short chunk, which is the store's last, is the line's last, too.
        chunk, is_whole = number.copy(), number < whole
        chunk[is_whole] = permuted(
            number[is_whole].astype(np.uint64), size=whole, key=mixed_seed(seed, epoch_word[is_whole])
        )
        moved = (chunk - number) * CHUNK_ROWS
        piece = np.maximum(number * CHUNK_ROWS, low) + moved
        end = np.minimum((number + 1) * CHUNK_ROWS, high) + moved
        columns = (chunk * CHUNK_ROWS + inside, piece, end, stream, begin + low)
        return list(itertools.starmap(Place, zip(*(column.tolist() for column in columns), strict=True)))

    def _before(self, stream: _Integers, position: _Integers) -> _Integers:
        """How many rows the streams ahead of this one have had before a position, over all epochs."""
        first_slot = -(-stream * self.slots // self.streams)
        return position // self.slots * first_slot + np.minimum(position % self.slots, first_slot)

    def _dealt(self, stream: _Integers, position: _Integers) -> _Integers:
        return self._before(stream + 1, position) - self._before(stream, position)

    def _cut(self, stream: _Integers, begin: _Integers) -> _Integers:
        """Where a stream begins in the line of the epoch that begins at a position."""
        return self._before(stream, begin + self.rows) - self._before(stream, begin)

    def chunks_held(self) -> int:
        """Chunks whose stored bytes all ranks together hold, at most."""
        return self.streams * self.window

    def recorded(self) -> dict[str, Any]:
        return {
            "shuffle": "chunked",
            "chunk_rows": CHUNK_ROWS,
            "streams": self.streams,
            "window": self.window,
        }

    def reads_again(self, taken: int) -> bool:
        return False  # chunks are for stores that do not fit in a cache


def chunked_order(*, rows: int, seed: int, slots: int, streams: int, window: int) -> ChunkedOrder:
    """The order with as many streams as are wanted, but no more than chunks or slots of a batch."""
    chunks = -(-rows // CHUNK_ROWS)
    return ChunkedOrder(rows, seed, slots, min(streams, slots, chunks), window)
