"""The held-out positions that are judged: where they are, and what the stored teacher says about them.

Numpy only. Shapes: R rows, L tokens of a row, N counted positions of all rows, in row order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.row import Row, document_of_position, position_ids, records_at
from sparsekd.trainer.run.errors import DataError

SPLIT = "heldout"


@dataclass(frozen=True)
class StoredTeacher:
    """What the records say of the teacher at the counted positions.

    Attributes:
        loss: float32 [N], nats.
        entropy: float32 [N], nats, at the store's draw temperature.
        confidence: float32 [N], probability of its most likely token; None for k = 0.
        hit: bool [N], that token is the true one; None for k = 0.
    """

    loss: NDArray[np.float32]
    entropy: NDArray[np.float32]
    confidence: NDArray[np.float32] | None
    hit: NDArray[np.bool_] | None


@dataclass(frozen=True)
class HeldOut:
    """The counted positions, one entry each.

    Attributes:
        rows: held-out rows read.
        tokens: positions of these rows, padding and prompts included.
        row: int64 [N].
        position: int64 [N], in its row; the record at it speaks of the next token.
        document: int64 [N].
        context: int64 [N], tokens of its document that a model sees: the position in the segment, plus 1.
        true_ids: int64 [N], the next token.
        teacher: None in a token store, and where the records are draws alone.
    """

    rows: int
    tokens: int
    row: NDArray[np.int64]
    position: NDArray[np.int64]
    document: NDArray[np.int64]
    context: NDArray[np.int64]
    true_ids: NDArray[np.int64]
    teacher: StoredTeacher | None


def row_batches(store: LogitStore, rows: int, batch: int) -> Iterator[list[Row]]:
    """Yields the first `rows` held-out rows, `batch` at a time."""
    for start in range(0, rows, batch):
        yield [store.read_row(SPLIT, index) for index in range(start, min(start + batch, rows))]


def read_held_out(store: LogitStore, rows_limit: int | None) -> HeldOut:
    """Reads the first held-out rows once and lists their counted positions.

    Raises:
        DataError: The store has no held-out rows, or none of their positions is counted.
    """
    available = store.rows(SPLIT)
    rows = available if rows_limit is None else min(rows_limit, available)
    if rows == 0:
        raise DataError(
            f"{store.path} has no held-out rows: prepare it with corpus.heldout_fraction above 0 and enough "
            "documents."
        )
    columns: dict[str, list[NDArray]] = {}

    def add(**values: NDArray) -> None:
        for name, value in values.items():
            columns.setdefault(name, []).append(value)

    record = store.manifest.record
    for index, (row,) in enumerate(row_batches(store, rows, 1)):
        where = np.flatnonzero(row.loss_mask)
        add(
            row=np.full(len(where), index),
            position=where,
            document=document_of_position(row)[where],
            context=position_ids(row)[where].astype(np.int64) + 1,
            true_ids=row.token_ids[where + 1].astype(np.int64),
        )
        if row.teacher is not None and record.rest != "counts":  # draws alone: nothing of the teacher's loss
            said = records_at(row, row.loss_mask)  # outside of train every counted position has a record
            add(loss=-said.true_logprob, entropy=said.entropy)
            if record.k > 0:
                add(
                    confidence=np.exp(said.head_logprobs[:, 0]),
                    hit=said.head_ids[:, 0] == row.token_ids[where + 1],
                )
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    if len(whole["row"]) == 0:
        raise DataError(f"{store.path} has {rows} held-out rows, but none of their positions is counted.")
    teacher = None
    if "loss" in whole:
        confidence, hit = (whole[name] if record.k > 0 else None for name in ("confidence", "hit"))
        teacher = StoredTeacher(whole["loss"], whole["entropy"], confidence, hit)
    return HeldOut(
        rows=rows,
        tokens=rows * store.manifest.sequence_length,
        row=whole["row"],
        position=whole["position"],
        document=whole["document"],
        context=whole["context"],
        true_ids=whole["true_ids"],
        teacher=teacher,
    )
