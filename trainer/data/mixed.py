"""The order of several sources: each has an order of its own, and the stream takes from them by turns.

The turns are a table of one period, in which every source has as many as its weight says, spread evenly. A
position's source, and how many rows the source has given before, follow from the position alone, so that a
mixture, too, is a function of (seed, position) in constant time, and each source gives each of its rows once
in each of its own epochs.

    turns of (5, 3)   a b a b a a b a | a b a b a a b a | ...
    rows of a         0   1   2 3   4 | 5   6   7 8   9 | ...
    rows of b           0   1     2   |   3   4     5   | ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.trainer.config.schema import DataConfig
from sparsekd.trainer.data.chunked import ChunkedOrder, chunked_order
from sparsekd.trainer.data.order import GlobalOrder, Place, mixed_seed
from sparsekd.trainer.run.errors import ConfigError

PERIOD = 1 << 16
"""Turns of a period where any row may come after any other: weights are kept to 0.0015 % of the rows."""


@dataclass(frozen=True)
class SourceOfRows:
    """What the order must know of a store.

    Attributes:
        name: of the source.
        rows: of its training split.
        weight: in proportion to which rows are taken.
    """

    name: str
    rows: int
    weight: float


@dataclass(frozen=True)
class MixedOrder:
    """See the module; made by `order_of`. Rows are numbered through all sources, one after another.

    Attributes:
        names: of the sources.
        orders: each of the rows of one source.
        turns: of a period, for each source.
    """

    names: tuple[str, ...]
    orders: tuple[GlobalOrder | ChunkedOrder, ...]
    turns: tuple[int, ...]

    @cached_property
    def _table(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each turn of a period: whose it is, and how many that source has had before in the period."""
        source = np.repeat(np.arange(len(self.turns)), self.turns)
        number = np.concatenate([np.arange(count) for count in self.turns])
        # When it comes, as a share of the period; of equal times the first source's.
        time = (number + 0.5) / np.repeat(self.turns, self.turns)
        order = np.argsort(time, kind="stable")
        return source[order], number[order]

    def places(self, first: int, count: int) -> list[Place]:
        of_turn, before = self._table
        period, turn = np.divmod(np.arange(first, first + count), sum(self.turns))
        source = of_turn[turn]
        index = period * np.array(self.turns)[source] + before[turn]
        found: list[Place | None] = [None] * count
        row, stream = 0, 0
        for number, order in enumerate(self.orders):
            (mine,) = np.nonzero(source == number)
            if mine.size:  # one after another, as the rows of a source are taken without a gap
                theirs = order.places(int(index[mine[0]]), mine.size)
                for at, place in zip(mine.tolist(), theirs, strict=True):
                    numbers = (place.row + row, place.first + row, place.stop + row)
                    found[at] = Place(*numbers, place.stream + stream, place.window)
            row += order.rows
            stream += order.streams if isinstance(order, ChunkedOrder) else 1
        return [place for place in found if place is not None]

    def recorded(self) -> dict[str, Any]:
        each = zip(self.names, self.turns, self.orders, strict=True)
        return {"mixture": {name: {"turns": turns, **order.recorded()} for name, turns, order in each}}

    def reads_again(self, taken: int) -> bool:
        period = sum(self.turns)
        each = zip(self.turns, self.orders, strict=True)
        return any(order.reads_again(taken * turns // period) for turns, order in each)


def order_of(
    data: DataConfig, sources: Sequence[SourceOfRows], *, seed: int, slots: int
) -> GlobalOrder | ChunkedOrder | MixedOrder:
    """The order that a configuration asks for.

    Args:
        data: Its section.
        sources: One, or those of a mixture.
        seed: Of the data order.
        slots: Rows of a global batch.

    Raises:
        ConfigError: A source's weight is less than one turn of a period.
    """
    if len(sources) == 1:
        return _order_of_one(data, sources[0].rows, seed=seed, slots=slots, streams=data.streams)
    # By chunks, each batch has the same turns: so a stream's rows fall on one rank, or few.
    period = PERIOD if data.shuffle == "global" else slots
    turns = shares([source.weight for source in sources], period)
    orders = []
    for number, (source, count) in enumerate(zip(sources, turns, strict=True)):
        if count == 0:
            total = sum(each.weight for each in sources)
            raise ConfigError(
                f"data.mixture.{source.name} has the share {source.weight / total:.2g} of the rows, less "
                f"than one in {period}{' rows of a batch' if data.shuffle == 'chunked' else ''}; give it more"
                + (", larger batches, or data.shuffle=global." if data.shuffle == "chunked" else ", or none.")
            )
        own = _order_of_one(
            data,
            source.rows,
            seed=int(mixed_seed(seed, number + 1)),
            slots=count,
            streams=max(1, round(data.streams * count / period)),
        )
        orders.append(own)
    return MixedOrder(tuple(source.name for source in sources), tuple(orders), tuple(turns))


def _order_of_one(
    data: DataConfig, rows: int, *, seed: int, slots: int, streams: int
) -> GlobalOrder | ChunkedOrder:
    if data.shuffle == "global":
        return GlobalOrder(rows, seed)
    return chunked_order(rows=rows, seed=seed, slots=slots, streams=streams, window=data.window)


def shares(weights: Sequence[float], count: int) -> list[int]:
    """`count` dealt out in proportion to weights, by the largest remainders; among equals the first has more.

    Args:
        weights: Above 0.
        count: What is dealt out.
    """
    exact = [weight / sum(weights) * count for weight in weights]
    found = [int(value) for value in exact]
    by_remainder = sorted(range(len(found)), key=lambda number: found[number] - exact[number])
    for number in by_remainder[: count - sum(found)]:
        found[number] += 1
    return found
