"""From rows of tokens to the teacher's records of them.

Shapes: B rows of a micro-batch, L positions of a row, N = B * L, R recorded positions of all rows, H hidden,
n draws.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from sparsekd.kernels.teacher import teacher_statistics
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import empty_record
from sparsekd.logit_store.positions import content_uniforms, recorded_positions
from sparsekd.logit_store.row import Row, TeacherRecord, labels_of_records, position_ids
from sparsekd.trainer.causal_lm import hidden_states
from sparsekd.trainer.teacher.model import Teacher


def recorded_rows(
    teacher: Teacher,
    rows: Sequence[Row],
    manifest: Manifest,
    split: str,
    *,
    micro_batch_rows: int,
    chunk_positions: int | None,
    impl: str,
) -> Iterator[Row]:
    """Yields each row with the teacher's records at the positions that the manifest's rule asks for.

    Micro-batches and chunks are cut here, by the arguments alone: which rank runs the rows, and what ran
    before them, does not change a bit of the result. Where nothing is recorded, no logits are made, and a
    micro-batch without any record does not pass the teacher at all.

    Args:
        teacher: Loaded and checked.
        rows: Of one unit of work, in order; a record in them is not looked at.
        manifest: Of the store that the rows are for.
        split: Of the rows.
        micro_batch_rows: Rows in one forward pass.
        chunk_positions: Positions whose logits exist at one time.
        impl: Implementation of the head's statistics.
    """
    for start in range(0, len(rows), micro_batch_rows):
        batch = rows[start : start + micro_batch_rows]
        recorded = [recorded_positions(row, manifest, split) for row in batch]
        records = _records_of_batch(teacher, batch, recorded, manifest, chunk_positions, impl)
        for row, places, record in zip(batch, recorded, records, strict=True):
            yield replace(row, teacher=record, recorded=places)


@torch.inference_mode()
def _records_of_batch(
    teacher: Teacher,
    rows: Sequence[Row],
    recorded: Sequence[NDArray[np.bool_]],
    manifest: Manifest,
    chunk_positions: int | None,
    impl: str,
) -> list[TeacherRecord]:
    """The records of B rows that go through the decoder together; `recorded` is bool [L] for each."""
    record = manifest.record
    everywhere = np.concatenate(recorded)  # (N,)

    def stacked(arrays: Sequence[NDArray[np.generic]]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays)).to(teacher.device)

    def gathered(arrays: Sequence[NDArray[np.generic]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)[everywhere]).to(teacher.device)

    if not everywhere.any():
        return [empty_record(manifest) for _ in rows]
    token_ids = stacked([row.token_ids.astype(np.int64) for row in rows])
    positions = stacked([position_ids(row).astype(np.int64) for row in rows])
    hidden = hidden_states(teacher.decoder, token_ids, positions).flatten(0, 1)  # (N, H)
    if not everywhere.all():
        hidden = hidden[torch.from_numpy(np.flatnonzero(everywhere)).to(teacher.device)]  # (R, H)
    statistics = teacher_statistics(
        hidden,
        teacher.head.weight,
        bias=teacher.head.bias,
        labels=gathered([labels_of_records(row, manifest.target) for row in rows]),
        head=teacher.transform,
        k=record.k,
        n=record.n,
        temperatures=record.temperatures,
        draw_temperature=record.draw_temperature,
        uniforms=gathered(
            [content_uniforms(row.token_ids, seed=record.seed, count=record.n) for row in rows]
        ),
        chunk_positions=chunk_positions,
        impl=impl,
    )
    if not record.tail_logprobs:
        statistics = statistics._replace(tail_logprobs=statistics.tail_logprobs[:, :0])
    ends = np.cumsum([np.count_nonzero(places) for places in recorded])[:-1]
    planes = {name: np.split(plane.cpu().numpy(), ends) for name, plane in statistics._asdict().items()}
    return [
        TeacherRecord(**{name: parts[index] for name, parts in planes.items()}) for index in range(len(rows))
    ]
