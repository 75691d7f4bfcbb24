"""Damaged rows that a run leaves out: none unless `train.skip_damaged_rows` says so, and never in silence.

A row that is left out keeps its place in the data order, with weight 0: nothing else moves, so that the run
stays the same function of (seed, position) for any number of ranks and resumes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.trainer.data.order import Place
from sparsekd.trainer.data.reading import SPLIT, PlacedRows, Readers
from sparsekd.trainer.data.sources import Message, SourceRow, Sources
from sparsekd.trainer.run.errors import CheckpointError, DataError
from sparsekd.trainer.run.ranks import Ranks, gather, leave_together


class RowsOrNothing:
    """Reads training rows; one that is damaged becomes a row without weight, up to a bound.

    `read` belongs to the reading thread, the rest to the training loop. The end of a `with` block ends the
    threads that read.

    Args:
        sources: The stores.
        most: Different rows that may be left out, over the whole run; 0 raises at the first.
        left_out: Those that the run has left out before.
        keep: Whether rows of a remote store are kept in the machine's cache.
        readers: Threads that read and decode.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        most: int,
        left_out: Sequence[int],
        keep: bool,
        readers: int,
    ) -> None:
        self._sources = sources
        self._readers = Readers(readers)
        self._placed = PlacedRows(sources, keep=keep, readers=self._readers)
        self._most = most
        self._known = set(left_out)
        self._found: dict[int, tuple[int, str]] = {}  # row -> step that needs it, what is wrong with it
        self._filler: SourceRow | None = None
        self.left_out = sorted(left_out)
        """Rows left out in the steps up to the last `newly_left_out`, of all ranks."""

    def __enter__(self) -> "RowsOrNothing":
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.close()

    def read(self, places: Sequence[Place], *, step: int) -> list[SourceRow]:
        """The rows, or rows without weight, in their order.

        Args:
            places: Where they stand in the training stream, one after another.
            step: The step that needs them, which may be ahead of the loop.

        Raises:
            DamagedStoreError: One is damaged, and no row may be left out.
            DataError: One is one too many.
        """
        messages = self._placed.messages(places)
        pairs = zip(places, messages, strict=True)
        return self._readers.map(lambda pair: self._row(*pair, step), pairs)

    def _row(self, place: Place, message: Message, step: int) -> SourceRow:
        row = place.row
        if row in self._known:
            return self._weightless()
        try:
            return self._sources.read(SPLIT, row, message=message)
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
        everyones = gather(here, lambda: mine)
        found = {row: reason for part in everyones for row, reason in part.items()}
        new = [(row, found[row]) for row in sorted(found) if row not in self.left_out]
        self.left_out = sorted({*self.left_out, *found})
        self._known.update(self.left_out)
        if len(self.left_out) > self._most:
            leave_together(here, self._too_many(new[-1][1]))
        return new

    def _too_many(self, reason: str) -> DataError:
        return DataError(
            f"More than train.skip_damaged_rows={self._most} rows of {self._sources} are damaged, the "
            f"last found so: {reason.rstrip('.')}; repair the store, or allow more."
        )

    def _weightless(self) -> SourceRow:
        """Some sound row in which no position counts: what fills a forward pass must be no special case."""
        if self._filler is None:
            for row in range(self._sources.rows(SPLIT)):
                try:
                    self._filler = self._sources.read(SPLIT, row)
                except DamagedStoreError:
                    continue
                break
            else:
                raise DataError(f"{self._sources} has no sound row in its training split; repair it.")
        filler, records = self._filler
        return SourceRow(replace(filler, loss_mask=np.zeros_like(filler.loss_mask)), records)


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
