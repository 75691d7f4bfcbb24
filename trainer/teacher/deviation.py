"""How far a plane of stored records is from what a teacher says now."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import Row, TeacherRecord


@dataclass(frozen=True)
class Deviation:
    """How far one plane of the stored rows is from the teacher's, in nats.

    Attributes:
        plane: Name of the plane.
        largest: Largest absolute difference; inf where only one side is finite.
        mean: Mean absolute difference.
        split: Where the largest is: split,
        row: row,
        position: and position.
    """

    plane: str
    largest: float
    mean: float
    split: str
    row: int
    position: int


def deviation_of(
    plane: str, stored: list[tuple[str, int, Row, TeacherRecord]], manifest: Manifest | None = None
) -> Deviation:
    """The deviation of one plane over (split, row number, stored row, the teacher's record of now).

    Head entries are compared by rank, so that two that swap their places count by their values. A deviation
    too small to see may move a rounded value by a whole step of the codec, which is twice its error: the
    largest deviation is what remains above that. The mean needs no such care, for such moves are as rare as
    the deviation is small. Without a manifest nothing was rounded.
    """
    worst = (-1.0, "", 0, 0)
    total, count = 0.0, 0
    for split, index, row, again in stored:
        assert row.teacher is not None  # run
        difference = _difference(getattr(row.teacher, plane), getattr(again, plane))
        if difference.size == 0:
            continue
        step = 0 if manifest is None else 2 * codec_of(manifest).errors(row.teacher, manifest)[plane]
        beyond = np.maximum(np.where(np.isinf(difference), np.inf, difference - step), 0)
        by_position = beyond.reshape(len(beyond), -1).max(axis=1)
        assert row.recorded is not None
        place = int(by_position.argmax())
        if by_position[place] > worst[0]:
            position = int(np.flatnonzero(row.recorded)[place])
            worst = (float(by_position[place]), split, index, position)
        total += float(difference.sum())
        count += difference.size
    mean = total / count if count else 0.0
    return Deviation(plane, max(worst[0], 0.0), mean, worst[1], worst[2], worst[3])


def _difference(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """|left - right|, 0 where both are the same infinity; inf where NaN would come out otherwise."""
    equal = left == right
    with np.errstate(invalid="ignore"):
        difference = np.abs(left.astype(np.float64) - right.astype(np.float64))
    return np.where(equal, 0.0, np.where(np.isnan(difference), np.inf, difference))
