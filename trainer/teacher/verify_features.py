"""`store verify --teacher` for hidden states: are they the teacher's, and does its head give the record?"""

import numpy as np
import torch
from numpy.typing import NDArray

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.row import Row, TeacherRecord, is_real, labels_at_records
from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.models.causal_lm import layers_of
from sparsekd.trainer.models.opened import OpenModel
from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.teacher.deviation import deviation_of
from sparsekd.trainer.teacher.records import head_statistics

# Of hidden states' size, by which they may deviate: bfloat16 on another machine moves them by a few per cent.
LARGEST_SHARE = 0.2


def add_features(sums: dict[str, NDArray[np.float64]], stored: Row, again: Row) -> None:
    """Adds a row to each plane's sums of squares of the difference and of the stored numbers."""
    for plane, total in sums.items():
        left, right = stored.optional[plane], again.optional[plane]
        if left.shape != right.shape:
            total += [np.inf, 1.0]
            continue
        total += [np.square(left.astype(np.float64) - right).sum(), np.square(left, dtype=np.float64).sum()]


def check_features(
    sums: dict[str, NDArray[np.float64]],
    headed: list[tuple[str, int, Row, TeacherRecord]],
    store: LogitStore,
    teacher_name: str,
) -> None:
    """Prints how far the planes deviate.

    Args:
        sums: See `add_features`.
        headed: (split, row number, stored row, the head's record of its stored hidden states).
        store: The store.
        teacher_name: For the message.

    Raises:
        DataError: By more than rounding on another machine.
    """
    for plane, (difference, size) in sums.items():
        share = float(np.sqrt(difference / max(size, 1e-30)))
        print(f"verify: {plane:14} deviates by {share:.2%} of its size (root mean square)", flush=True)
        if not share <= LARGEST_SHARE:
            raise DataError(
                f"{store.path} does not hold this teacher's hidden states: {plane} deviates by {share:.0%} "
                f"of its size, expected at most {LARGEST_SHARE:.0%}; give the teacher {teacher_name} as "
                "teacher.path, or capture again."
            )
    for name in ("log_rest", "true_logprob") if headed else ():
        found = deviation_of(name, headed, store.manifest)
        print(
            f"verify: the head on the stored hidden states gives {name} within {found.largest:.3g} nats "
            f"(mean {found.mean:.3g}) of the record: any temperature can be had from them",
            flush=True,
        )


def record_of_features(
    teacher: OpenModel, row: Row, manifest: Manifest, settings: TeacherConfig
) -> TeacherRecord | None:
    """The record that the teacher's head makes of a row's stored hidden states, without its decoder.

    None where the store does not keep what the head reads, whole.
    """
    depth = len(layers_of(teacher.decoder)) if manifest.features else 0
    last = next((spec for spec in manifest.features if spec.layer == depth), None)
    if last is None or last.projection != "none":
        return None
    assert row.recorded is not None
    states = row.optional[last.plane]
    if last.positions == "all":
        states = states[row.recorded[is_real(row)]]
    planes = head_statistics(
        teacher,
        torch.from_numpy(states).to(teacher.device, teacher.head.weight.dtype),
        manifest,
        labels=labels_at_records(row, manifest.target),
        uniforms=np.zeros((len(states), manifest.record.n)),
        chunk_positions=settings.chunk_positions,
        impl=settings.impl,
    )
    return TeacherRecord(**planes)
