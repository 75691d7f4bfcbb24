"""Which rows a rank reads, and how they become its micro-batches."""

import itertools
from collections.abc import Iterator, Sequence

from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.data.batches import MicroBatch, micro_batch, pinned
from sparsekd.trainer.data.order import micro_batches
from sparsekd.trainer.data.skipping import RowsOrNothing
from sparsekd.trainer.data.sources import SourceRow
from sparsekd.trainer.run.ranks import Ranks
from sparsekd.trainer.state.record import Commit
from sparsekd.trainer.student.setup import Plan

# Positions that reach the row kernels come in multiples of this: shapes repeat, and the products' edges are
# aligned, for at most 63 positions more. The other implementations gain nothing by it.
POSITIONS_MULTIPLE = 64


def steps_ahead(
    plan: Plan, config: Config, begin: Commit, rows: RowsOrNothing, here: Ranks
) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches, step by step."""
    for number in range(config.train.steps - begin.step):
        consumed = begin.rows_consumed + number * plan.shape.global_rows
        parts = micro_batches(consumed, plan.shape, plan.order, rank=here.rank)
        places = [place for part in parts for place in part]
        found = iter(rows.read(places, step=begin.step + number + 1))
        yield [_batch_of(list(itertools.islice(found, len(part))), plan, here) for part in parts]


def heldout_batch(plan: Plan, here: Ranks, rows: Sequence[int], counting: int) -> MicroBatch:
    """A micro-batch of held-out rows, of which so many count."""
    found = [plan.sources.read("heldout", row) for row in rows]
    return _batch_of(found, plan, here, counting, heldout=True)


def _batch_of(
    rows: Sequence[SourceRow], plan: Plan, here: Ranks, counting: int | None = None, *, heldout: bool = False
) -> MicroBatch:
    target = plan.store.manifest.target
    multiple = POSITIONS_MULTIPLE if plan.loss.impl == "triton" else 1
    batch = micro_batch(rows, target=target, weighted=not heldout, counting=counting, multiple=multiple)
    return pinned(batch) if here.device.type == "cuda" else batch
