"""Labels of packed rows, and how deviations and durations are told."""

from dataclasses import replace

import numpy as np
import pytest

from sparsekd.logit_store.row import Row, TeacherRecord, next_tokens
from sparsekd.trainer.teacher.deviation import deviation_of
from sparsekd.trainer.teacher.summary import tail_mass
from sparsekd.trainer.teacher.weights import engine_settings


def row_of(
    starts: list[int],
    documents: list[int],
    length: int,
    teacher: TeacherRecord | None = None,
    recorded: list[bool] | None = None,
) -> Row:
    return Row(
        token_ids=np.arange(10, 10 + length, dtype=np.int32),
        loss_mask=np.zeros(length, dtype=bool),
        segment_starts=np.array(starts, dtype=np.int32),
        segment_documents=np.array(documents, dtype=np.int64),
        teacher=teacher,
        recorded=None if recorded is None else np.array(recorded),
    )


@pytest.mark.parametrize(
    ("starts", "documents", "expected"),
    [
        ([0], [4], [11, 12, 13, 14, -100]),
        ([0, 2], [4, 5], [11, -100, 13, 14, -100]),
        ([0, 1, 4], [4, 5, 6], [-100, 12, 13, -100, -100]),
        ([0, 3], [4, -1], [11, 12, -100, -100, -100]),
        ([0, 2], [4, 4], [11, -100, 13, 14, -100]),  # two pieces of one document are two segments
    ],
)
def test_labels_follow_segments_and_not_the_loss_mask(
    starts: list[int], documents: list[int], expected: list[int]
) -> None:
    found = next_tokens(row_of(starts, documents, 5))
    assert found.dtype == np.int64 and found.tolist() == expected


def record_of(log_rest: list[float]) -> TeacherRecord:
    length = len(log_rest)
    zeros = np.zeros(length, dtype=np.float32)
    return TeacherRecord(
        head_ids=np.zeros((length, 1), dtype=np.int32),
        head_logprobs=np.zeros((length, 1), dtype=np.float32),
        tail_ids=np.zeros((length, 0), dtype=np.int32),
        tail_counts=np.zeros((length, 0), dtype=np.int32),
        log_rest=np.array(log_rest, dtype=np.float32)[:, None],
        rest_entropy=zeros,
        true_logprob=zeros,
        entropy=zeros,
    )


def test_deviation_finds_the_worst_place_and_knows_infinities() -> None:
    infinite = -float("inf")
    pairs = [([-1.0, infinite, -2.0], [-1.0, infinite, -2.0]), ([-1.0, -1.5, -2.0], [-1.0, -1.25, -2.0])]
    stored = [
        (
            "train",
            number,
            row_of([0], [1], 5, record_of(left), [False, True, False, True, True]),
            record_of(right),
        )
        for number, (left, right) in zip((7, 9), pairs, strict=True)
    ]
    found = deviation_of("log_rest", stored)
    assert (found.largest, found.row, found.position) == (0.25, 9, 3), "the second record stands at 3"
    assert found.mean == pytest.approx(0.25 / 6)
    nothing = row_of([0], [1], 2, record_of([]), [False, False])
    assert deviation_of("log_rest", [*stored, ("train", 10, nothing, record_of([]))]) == found
    stored.append(("train", 11, row_of([0], [1], 1, record_of([infinite]), [True]), record_of([-3.0])))
    assert deviation_of("log_rest", stored).largest == float("inf")
    assert deviation_of("log_rest", stored).row == 11


def test_tail_mass_is_not_what_rounding_leaves() -> None:
    record = record_of([-20.0, -np.inf])
    # A head that rounds to mass 1, and a tail of 2e-9.
    record = replace(record, head_logprobs=np.zeros((2, 1), np.float32))
    np.testing.assert_allclose(tail_mass(record, (1.0,)), [np.exp(-20.0), 0.0], rtol=1e-6)
    heads = np.log(np.array([[0.5, 0.25], [0.9, 0.2]], np.float32))
    np.testing.assert_allclose(
        tail_mass(replace(record, head_logprobs=heads), (2.0,)), [0.25, 0.0], rtol=1e-6
    )


def test_the_settings_of_an_engine_are_read_back() -> None:
    assert engine_settings("transformers attention=sdpa threads=2") == {"attention": "sdpa", "threads": "2"}
    assert engine_settings("transformers") == {}
