"""From rows of tokens to the teacher's records of them.

Shapes: B rows of a micro-batch, L positions of a row, N = B * L, H hidden, n draws.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sparsekd.kernels.teacher import teacher_statistics
from sparsekd.kernels.teacher_record import TeacherStatistics
from sparsekd.logit_store.manifest import RecordSpec
from sparsekd.logit_store.row import (
    PADDING_DOCUMENT,
    Row,
    TeacherRecord,
    document_of_position,
    position_ids,
)
from sparsekd.trainer.causal_lm import hidden_states
from sparsekd.trainer.teacher.draws import row_uniforms
from sparsekd.trainer.teacher.model import Teacher

# The label of a position after which nothing follows.
NO_LABEL = -100


def next_tokens(row: Row) -> NDArray[np.int64]:
    """int64 [L], the token that follows each position in its document; -100 where none does.

    The loss mask plays no part: a prompt's tokens are not trained on, yet their successors are known.
    """
    documents = document_of_position(row)
    continues = (documents[1:] != PADDING_DOCUMENT) & (np.diff(position_ids(row)) > 0)
    following = np.where(continues, row.token_ids[1:].astype(np.int64), NO_LABEL)
    return np.append(following, NO_LABEL)


def records_of_rows(
    teacher: Teacher,
    rows: Sequence[Row],
    record: RecordSpec,
    *,
    micro_batch_rows: int,
    chunk_positions: int | None,
    impl: str,
) -> Iterator[TeacherRecord]:
    """Yields the teacher's record of each row.

    Micro-batches and chunks are cut here, by the arguments alone: which rank runs the rows, and what ran
    before them, does not change a bit of the result.

    Args:
        teacher: Loaded and checked.
        rows: Of one unit of work, in order.
        record: What is kept of each position.
        micro_batch_rows: Rows in one forward pass.
        chunk_positions: Positions whose logits exist at one time.
        impl: Implementation of the head's statistics.
    """
    for start in range(0, len(rows), micro_batch_rows):
        batch = rows[start : start + micro_batch_rows]
        yield from _records_of_batch(teacher, batch, record, chunk_positions, impl)


@torch.inference_mode()
def _records_of_batch(
    teacher: Teacher, rows: Sequence[Row], record: RecordSpec, chunk_positions: int | None, impl: str
) -> list[TeacherRecord]:
    """The records of B rows that go through the decoder together."""

    def stacked(arrays: Sequence[NDArray[np.generic]]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays)).to(teacher.device)

    token_ids = stacked([row.token_ids.astype(np.int64) for row in rows])
    positions = stacked([position_ids(row).astype(np.int64) for row in rows])
    labels = stacked([next_tokens(row) for row in rows])
    uniforms = stacked([row_uniforms(row.token_ids, seed=record.seed, n=record.n) for row in rows])
    hidden = hidden_states(teacher.decoder, token_ids, positions)  # (B, L, H)
    statistics = teacher_statistics(
        hidden.flatten(0, 1),
        teacher.head.weight,
        bias=teacher.head.bias,
        labels=labels.flatten(),
        head=teacher.transform,
        k=record.k,
        n=record.n,
        temperatures=record.temperatures,
        draw_temperature=record.draw_temperature,
        uniforms=uniforms.flatten(0, 1),
        chunk_positions=chunk_positions,
        impl=impl,
    )
    if not record.tail_logprobs:
        statistics = statistics._replace(tail_logprobs=statistics.tail_logprobs[:, :0])
    batch, length = token_ids.shape
    planes = TeacherStatistics(*(plane.unflatten(0, (batch, length)).cpu().numpy() for plane in statistics))
    return [
        TeacherRecord(**{name: plane[index] for name, plane in planes._asdict().items()})
        for index in range(batch)
    ]
