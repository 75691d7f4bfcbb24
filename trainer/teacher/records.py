"""From rows of tokens to the teacher's records of them.

Shapes: B rows of a micro-batch, L positions of a row, M of them until padding alone follows in all rows,
N = B * M, R recorded positions of all rows, H hidden, n draws.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsekd.kernels.teacher import teacher_statistics
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import empty_record
from sparsekd.logit_store.positions import content_uniforms, recorded_positions
from sparsekd.logit_store.projections import Projection
from sparsekd.logit_store.row import Row, TeacherRecord, labels_of_records
from sparsekd.trainer.data.inputs import model_inputs, real_length
from sparsekd.trainer.models.causal_lm import states_of_layers
from sparsekd.trainer.models.opened import OpenModel
from sparsekd.trainer.models.placement import head_part
from sparsekd.trainer.teacher.features import stored_features
from sparsekd.trainer.teacher.units import micro_batches


def recorded_rows(
    teacher: OpenModel,
    rows: Sequence[Row],
    manifest: Manifest,
    split: str,
    *,
    projections: Mapping[str, Projection],
    micro_batch_rows: int,
    sort_rows: int,
    chunk_positions: int | None,
    impl: str,
) -> Iterator[Row]:
    """Yields each row with the teacher's records at the positions that the manifest's rule asks for.

    Micro-batches and chunks are cut here, by the arguments alone: which rank runs the rows, and what ran
    before them, does not change a bit of the result. Where nothing is recorded, no logits are made, and a
    micro-batch of which nothing is kept does not pass the teacher at all.

    Args:
        teacher: Loaded and checked.
        rows: Of one unit of work, in order; a record in them is not looked at.
        manifest: Of the store that the rows are for.
        split: Of the rows.
        projections: Of its features, by plane.
        micro_batch_rows: Rows in one forward pass.
        sort_rows: Of how many neighbours those of a length pass it together.
        chunk_positions: Positions whose logits exist at one time.
        impl: Implementation of the head's statistics.
    """
    done: dict[int, Row] = {}
    following = 0
    for numbers in micro_batches([real_length(row) for row in rows], micro_batch_rows, sort_rows):
        batch = [rows[number] for number in numbers]
        recorded = [recorded_positions(row, manifest, split) for row in batch]
        done |= zip(
            numbers,
            _rows_of_batch(teacher, batch, recorded, manifest, projections, chunk_positions, impl),
            strict=True,
        )
        while following in done:
            yield done.pop(following)
            following += 1


def _rows_of_batch(
    teacher: OpenModel,
    batch: Sequence[Row],
    recorded: Sequence[NDArray[np.bool_]],
    manifest: Manifest,
    projections: Mapping[str, Projection],
    chunk_positions: int | None,
    impl: str,
) -> Iterator[Row]:
    """The B rows of a micro-batch with their records and features; `recorded` is bool [L] for each."""
    if not manifest.features and not np.concatenate(recorded).any():
        for row, places in zip(batch, recorded, strict=True):
            yield replace(row, teacher=empty_record(manifest), recorded=places)
        return
    with torch.inference_mode():
        token_ids, positions = model_inputs(batch, teacher.device)
        hidden, states = states_of_layers(
            teacher.decoder, token_ids, positions, [spec.layer for spec in manifest.features]
        )
        records = _records_of_batch(teacher, hidden, batch, recorded, manifest, chunk_positions, impl)
        features = stored_features(states, batch, recorded, manifest, projections)
    for row, places, record, kept in zip(batch, recorded, records, features, strict=True):
        yield replace(row, teacher=record, recorded=places, optional={**row.optional, **kept})


def _records_of_batch(
    teacher: OpenModel,
    hidden: torch.Tensor,
    rows: Sequence[Row],
    recorded: Sequence[NDArray[np.bool_]],
    manifest: Manifest,
    chunk_positions: int | None,
    impl: str,
) -> list[TeacherRecord]:
    """The records of B rows with hidden states (B, M, H); `recorded` is bool [L] for each.

    Nothing is recorded at the padding from M on.
    """
    passes = slice(hidden.shape[1])
    everywhere = np.concatenate([places[passes] for places in recorded])  # (N,)
    if not everywhere.any():
        return [empty_record(manifest) for _ in rows]
    hidden = hidden.flatten(0, 1)  # (N, H)
    if not everywhere.all():
        hidden = hidden[torch.from_numpy(np.flatnonzero(everywhere)).to(teacher.device)]  # (R, H)
    record = manifest.record
    uniforms = [content_uniforms(row.token_ids, seed=record.seed, count=record.n) for row in rows]
    labels = [labels_of_records(row, manifest.target) for row in rows]
    planes = head_statistics(
        teacher,
        hidden,
        manifest,
        labels=np.concatenate([row[passes] for row in labels])[everywhere],
        uniforms=np.concatenate([row[passes] for row in uniforms])[everywhere],
        chunk_positions=chunk_positions,
        impl=impl,
    )
    ends = np.cumsum([np.count_nonzero(places) for places in recorded])[:-1]
    parts = {name: np.split(plane, ends) for name, plane in planes.items()}
    return [
        TeacherRecord(**{name: part[index] for name, part in parts.items()}) for index in range(len(rows))
    ]


def head_statistics(
    teacher: OpenModel,
    hidden: torch.Tensor,  # (R, H)
    manifest: Manifest,
    *,
    labels: NDArray[np.int64],  # (R,)
    uniforms: NDArray[np.float64],  # (R, n)
    chunk_positions: int | None,
    impl: str,
) -> dict[str, NDArray[Any]]:
    """The record planes of R hidden states, as the manifest asks for them."""
    record = manifest.record
    part = head_part(teacher.head)
    statistics = teacher_statistics(
        hidden,
        part.weight,
        bias=part.bias,
        labels=torch.from_numpy(labels).to(teacher.device),
        head=teacher.transform,
        k=record.k,
        n=record.n,
        temperatures=record.temperatures,
        draw_temperature=record.draw_temperature,
        uniforms=torch.from_numpy(uniforms).to(teacher.device),
        chunk_positions=chunk_positions,
        impl=impl,
        shard=part.shard,
    )
    if not record.tail_logprobs:
        statistics = statistics._replace(tail_logprobs=statistics.tail_logprobs[:, :0])
    return {name: plane.cpu().numpy() for name, plane in statistics._asdict().items()}
