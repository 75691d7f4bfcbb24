"""Units of work: ranges of rows of one shard, and the order in which each of several workers takes them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.config.schema import TeacherConfig

Shard = tuple[str, int]  # split, number


@dataclass(frozen=True)
class Unit:
    """Some rows of a shard that one worker computes at a time.

    Args:
        split: Of the shard.
        shard: Its number.
        rows: Numbers of the rows in the shard, from 0.
        is_whole: Whether these are all of them.
    """

    split: str
    shard: int
    rows: range
    is_whole: bool


@dataclass(frozen=True)
class Turn:
    """A shard when a worker comes to it; a helper takes its units from the end, and meets its worker once."""

    shard: Shard
    backwards: bool


def rows_of_unit(settings: TeacherConfig) -> int:
    """Rows of a unit: `unit_rows`, and then as many more as make what is sorted together whole.

    So every micro-batch has the rows that it has without units, and a store's bytes do not depend on
    `unit_rows`.
    """
    return _whole(settings.unit_rows, rows_sorted(settings.micro_batch_rows, settings.sort_rows))


def rows_sorted(micro_batch_rows: int, sort_rows: int) -> int:
    """Rows of which micro-batches are made: `sort_rows`, and then as many more as make the last one whole."""
    return _whole(max(sort_rows, 1), micro_batch_rows)


def micro_batches(lengths: Sequence[int], micro_batch_rows: int, sort_rows: int) -> Iterator[tuple[int, ...]]:
    """Yields the rows of each micro-batch, by their numbers.

    Rows of a length are put together, since all rows of a micro-batch are as long as the longest; the longest
    come first, so that memory that is enough for the first micro-batch is enough.

    Args:
        lengths: Of the rows of a shard, or of whole units of it: positions until padding alone follows.
        micro_batch_rows: Rows in one forward pass.
        sort_rows: Of how many neighbours the longest are looked for; 0 leaves the rows in their order.
    """
    together = rows_sorted(micro_batch_rows, sort_rows)
    for start in range(0, len(lengths), together):
        rows: Sequence[int] = range(start, min(start + together, len(lengths)))
        if sort_rows:
            rows = sorted(rows, key=lambda row: -lengths[row])  # stable: equal rows stay in their order
        for first in range(0, len(rows), micro_batch_rows):
            yield tuple(rows[first : first + micro_batch_rows])


def _whole(rows: int, of: int) -> int:
    return -(-rows // of) * of


def units_of_shard(shard: Shard, rows: int, unit_rows: int) -> list[Unit]:
    """The units of a shard of so many rows; the last may be shorter."""
    starts = range(0, rows, unit_rows)
    return [
        Unit(*shard, range(start, min(start + unit_rows, rows)), is_whole=len(starts) == 1)
        for start in starts
    ]


def units_of_tokens(tokens: LogitStore, unit_rows: int) -> dict[Shard, list[Unit]]:
    """The units of each shard, in the order of the store."""
    return {
        (split, shard): units_of_shard((split, shard), len(tokens.shard_rows(split, shard)), unit_rows)
        for split in tokens.manifest.splits
        for shard in range(tokens.shards(split))
    }


def turns_of(shards: Sequence[Shard], share: int, shares: int) -> list[Turn]:
    """The order in which one of several workers takes the shards: its own share, then the others', backwards.

    So workers that run at one time meet at the last units only, also where one of them has died.

    Args:
        shards: All of them.
        share: Number of the worker, from 0.
        shares: How many there are.
    """
    of_each = [shards[start::shares] for start in range(shares)]
    others = (shard for later in range(1, shares) for shard in reversed(of_each[(share + later) % shares]))
    return [Turn(shard, False) for shard in of_each[share]] + [Turn(shard, True) for shard in others]
