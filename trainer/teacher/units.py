"""Units of work: ranges of rows of one shard, and the order in which each of several workers takes them."""

from collections.abc import Sequence
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
    """Rows of a unit: `unit_rows`, and then as many more as make micro-batches whole.

    So every micro-batch has the rows that it has without units, and a store's bytes do not depend on
    `unit_rows`.
    """
    micro = settings.micro_batch_rows
    return -(-settings.unit_rows // micro) * micro


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
