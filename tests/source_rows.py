"""Rows as the readers of a store give them, for tests of what is made of them."""

from collections.abc import Sequence

from sparsekd.kernels.temperature import RestFormula
from sparsekd.logit_store.row import Row
from sparsekd.trainer.data.sources import Records, SourceRow


def with_records(rows: Sequence[Row], rest: RestFormula | None, share: float = 1.0) -> list[SourceRow]:
    """Rows of one store."""
    return [SourceRow(row, Records(rest, share)) for row in rows]
