"""Damaged rows that a run leaves out: none unless `train.skip_damaged_rows` says so, and never in silence.

A row that is left out keeps its place in the data order, with weight 0: nothing else moves, so that the run
stays the same function of (seed, position) for any number of ranks and resumes.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.row import Row
from sparsekd.trainer.run.errors import CheckpointError, DataError
from sparsekd.trainer.run.ranks import Ranks, leave_together


class RowsOrNothing:
    """Reads training rows; one that is damaged becomes a row without weight, up to a bound.

    `read` belongs to the reading thread, the rest to the training loop.

    Args:
        store: The store.
        planes: Of the records, which are decoded.
        most: Different rows that may be left out, over the whole run; 0 raises at the first.
        left_out: Those that the run has left out before.
    """

    def __init__(
        self, store: LogitStore, *, planes: Collection[str], most: int, left_out: Sequence[int]
    ) -> None:
        self._store = store
        self._planes = planes
        self._most = most
        self._known = set(left_out)
        self._found: dict[int, tuple[int, str]] = {}  # row -> step that needs it, what is wrong with it
        self._filler: Row | None = None
        self.left_out = sorted(left_out)
        """Rows left out in the steps up to the last `newly_left_out`, of all ranks."""

    def read(self, row: int, *, step: int) -> Row:
        """The row, or a row without weight.

        Args:
            row: Its number in the training split.
            step: The step that needs it, which may be ahead of the loop.

        Raises:
            DamagedStoreError: It is damaged, and no row may be left out.
            DataError: It is one too many.
        """
        if row in self._known:
            return self._weightless()
        try:
            return self._store.read_part("train", row, self._planes)
        except DamagedStoreError as error:
            if self._most == 0:
                raise
            self._found[row] = (step, str(error))
            self._known.add(row)
            if len(self._known) > self._most:
                raise self._too_many(str(error)) from error
            return self._weightless()

    def newly_left_out(self, step: int, here: Ranks) -> list[tuple[int, str]]:
        """(row, what is wrong with it) of rows that any rank left out up to `step` and did not tell before.

        A collective, where rows may be left out at all. All ranks come to know all rows, so that a later
        epoch treats each alike on whatever rank it falls.

        Raises:
            DataError: They are too many together (on the first rank; the others exit).
        """
        if self._most == 0:
            return []
        mine = {row: reason for row, (at, reason) in list(self._found.items()) if at <= step}
        everyones: list[Any] = [None] * here.world_size
        dist.all_gather_object(everyones, mine)
        found = {row: reason for part in everyones for row, reason in part.items()}
        new = [(row, found[row]) for row in sorted(found) if row not in self.left_out]
        self.left_out = sorted({*self.left_out, *found})
        self._known.update(self.left_out)
        if len(self.left_out) > self._most:
            leave_together(here, self._too_many(new[-1][1]))
        return new

    def _too_many(self, reason: str) -> DataError:
        return DataError(
            f"More than train.skip_damaged_rows={self._most} rows of {self._store.path} are damaged, the "
            f"last found so: {reason.rstrip('.')}; repair the store, or allow more."
        )

    def _weightless(self) -> Row:
        """Some sound row in which no position counts: what fills a forward pass must be no special case."""
        if self._filler is None:
            for row in range(self._store.rows("train")):
                try:
                    self._filler = self._store.read_part("train", row, self._planes)
                except DamagedStoreError:
                    continue
                break
            else:
                raise DataError(f"{self._store.path} has no sound row in its training split; repair it.")
        return replace(self._filler, loss_mask=np.zeros_like(self._filler.loss_mask))


def check_left_out(left_out: Sequence[int], *, most: int, checkpoint: Path) -> None:
    """Checks that a run may go on from a checkpoint whose run has left rows out.

    Raises:
        CheckpointError: It has left out more than is allowed now.
    """
    if len(left_out) > most:
        raise CheckpointError(
            f"{checkpoint} belongs to a run that has left out {len(left_out)} damaged rows, but "
            f"train.skip_damaged_rows={most}: allow at least {len(left_out)}, or begin anew under another "
            "run.name on a repaired store."
        )
