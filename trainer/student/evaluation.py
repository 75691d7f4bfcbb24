"""Losses on held-out rows, by the same forward as in training."""

from collections.abc import Callable, Iterator, Sequence

import deepspeed
import torch
from torch import Tensor

from sparsekd.trainer.data.batches import MicroBatch, ReadAhead, on_device
from sparsekd.trainer.run.ranks import Ranks
from sparsekd.trainer.student.sums import all_reduced, no_sums, sums_of


def heldout_sums(
    engine: deepspeed.DeepSpeedEngine,
    rows: Sequence[int],
    read: Callable[[Sequence[int], int], MicroBatch],
    *,
    micro_rows: int,
    here: Ranks,
) -> Tensor:
    """Sums over held-out rows and all ranks (see `sums`), float64 (7,), on every rank.

    Every rank runs as many forward passes as the others, since under ZeRO-3 each is a collective; the last
    ones may hold rows that count for nothing.

    Args:
        engine: The engine; left in training mode.
        rows: Numbers of the held-out rows.
        read: Makes a micro-batch of rows, of which only as many count as its second argument says.
        micro_rows: Rows in one forward pass.
        here: This rank.
    """
    sums = no_sums(here.device)
    engine.eval()
    with torch.no_grad(), ReadAhead(_batches(rows, read, micro_rows=micro_rows, here=here), depth=2) as ahead:
        for _ in range(_passes(rows, micro_rows=micro_rows, here=here)):
            batch = on_device(ahead.next(), here.device)
            sums += sums_of(engine(batch), batch)
    engine.train()
    return all_reduced(sums)


def _passes(rows: Sequence[int], *, micro_rows: int, here: Ranks) -> int:
    return -(-len(rows) // (micro_rows * here.world_size))


def _batches(
    rows: Sequence[int],
    read: Callable[[Sequence[int], int], MicroBatch],
    *,
    micro_rows: int,
    here: Ranks,
) -> Iterator[MicroBatch]:
    for number in range(_passes(rows, micro_rows=micro_rows, here=here)):
        first = (number * here.world_size + here.rank) * micro_rows
        mine = list(rows[first : first + micro_rows])
        filler = [rows[0]] * (micro_rows - len(mine))
        yield read(mine + filler, len(mine))
