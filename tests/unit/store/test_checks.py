"""Every rule of a row, broken once: refused with the position and the value, when written and when read."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from whole import whole_manifest, whole_row

from sparsekd.logit_store.checks import check_row
from sparsekd.logit_store.errors import InvalidRowError
from sparsekd.logit_store.row import Row, take_records

LENGTH = 12
MANIFEST = whole_manifest(sequence_length=LENGTH, vocabulary_size=50, k=3, n=4, tail_logprobs=True)


def _row() -> Row:
    """A valid row of two documents and padding: 0-4, 5-8, 9-11."""
    row = whole_row(MANIFEST, 3)
    assert row.teacher is not None
    mask = np.array([1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0], np.bool_)
    true = np.where(mask, row.teacher.true_logprob - 1, 0).astype(np.float32)
    teacher = dataclasses.replace(row.teacher, true_logprob=true)
    real = np.arange(LENGTH) < 9
    return dataclasses.replace(
        row,
        loss_mask=mask,
        segment_starts=np.array([0, 5, 9], np.int32),
        segment_documents=np.array([3, 4, -1], np.int64),
        teacher=take_records(teacher, real),
        recorded=real,
    )


def _check(row: Row) -> None:
    check_row(row, MANIFEST, split="train", where="store, split train, shard 000000, row 7")


def test_the_row_is_valid() -> None:
    _check(_row())


def _set(name: str, place: tuple[int, ...] | int, value: float) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        owner = row if hasattr(row, name) else row.teacher
        getattr(owner, name)[place] = value

    return change


def _duplicate_in_head(row: Row) -> None:
    assert row.teacher is not None
    row.teacher.head_ids[6, 2] = row.teacher.head_ids[6, 0]


def _drawn_from_head(row: Row) -> None:
    assert row.teacher is not None
    row.teacher.tail_ids[6] = [row.teacher.head_ids[6, 1], -1, -1, -1]
    row.teacher.tail_counts[6] = [4, 0, 0, 0]
    row.teacher.tail_logprobs[6] = [-9.0, -np.inf, -np.inf, -np.inf]


def _tie_out_of_order(row: Row) -> None:
    assert row.teacher is not None
    row.teacher.head_logprobs[6] = row.teacher.head_logprobs[6, 2]
    row.teacher.head_ids[6] = np.sort(row.teacher.head_ids[6])[::-1]


def _hole_in_tail(row: Row) -> None:
    assert row.teacher is not None
    row.teacher.tail_ids[6] = [-1, 1, 2, 3]


def _counts_without_rest(row: Row) -> None:
    assert row.teacher is not None
    row.teacher.log_rest[6] = -np.inf


def _mass(row: Row) -> None:
    assert row.teacher is not None
    row.teacher.log_rest[6, 0] = 0.0


def _impossible(value: float) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        assert row.teacher is not None
        row.teacher.head_logprobs[6] = value
        row.teacher.head_ids[6].sort()
        row.teacher.log_rest[6] = value

    return change


def _value_without_a_draw(row: Row) -> None:
    assert row.teacher is not None
    row.teacher.tail_ids[6] = [*sorted({1, 2, 3, 4, 5, 6} - set(row.teacher.head_ids[6].tolist()))[:3], -1]
    row.teacher.tail_counts[6] = [1, 1, 2, 0]
    row.teacher.tail_logprobs[6] = -1.0


def _negative_count(row: Row) -> None:
    assert row.teacher is not None
    row.teacher.tail_ids[6] = [1, 2, -1, -1]
    row.teacher.tail_counts[6] = [3, 2, -1, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("token_ids", 6, 50), ["position 6", "token_ids is 50", "49"]),
        (_set("token_ids", 6, -1), ["position 6", "token_ids is -1"]),
        (_set("loss_mask", 4, True), ["position 4", "last position of a document"]),
        (_set("loss_mask", 11, True), ["position 11", "padding"]),
        (_set("loss_mask", 9, True), ["position 9", "padding"]),
        (_set("segment_starts", 0, 1), ["starts at 1", "expected 0"]),
        (_set("segment_starts", 1, 9), ["segment 2 starts at 9", "at 9"]),
        (_set("segment_starts", 2, 12), ["starts at 12", "12 positions"]),
        (_set("segment_documents", 1, -2), ["segment 1", "-2"]),
        (_set("head_ids", (6, 1), 50), ["position 6", "head_ids[1] is 50"]),
        (_set("head_ids", (6, 1), -1), ["position 6", "head_ids[1] is -1"]),
        (_duplicate_in_head, ["position 6", "twice"]),
        (_drawn_from_head, ["position 6", "twice"]),
        (_tie_out_of_order, ["position 6", "head_ids[1]", "equal values"]),
        (_set("head_logprobs", (6, 0), 0.01), ["position 6", "head_logprobs[0] is 0.0", "0 or below"]),
        (_set("head_logprobs", (6, 2), -0.001), ["position 6", "head_logprobs[2] is -0.001", "descending"]),
        (_set("head_logprobs", (6, 0), np.nan), ["position 6", "head_logprobs[0] is nan"]),
        (_set("head_logprobs", (6, 2), np.nan), ["position 6", "head_logprobs[2] is nan"]),
        (_set("tail_ids", (6, 0), 50), ["position 6", "tail_ids[0] is 50"]),
        (_set("tail_ids", (6, 0), -2), ["position 6", "tail_ids[0] is -2"]),
        (_hole_in_tail, ["position 6", "tail_ids[1] is 1", "ascending"]),
        (_set("tail_counts", (6, 0), 9), ["position 6", "tail_counts[0] is 9", "from 0 to 4"]),
        (_set("tail_counts", (6, 0), 0), ["position 6", "tail_counts[0] is 0"]),
        (_negative_count, ["position 6", "tail_counts[2] is -1"]),
        (_counts_without_rest, ["position 6", "sum to 4", "expected 0", "rest is empty"]),
        (_set("log_rest", (6, 1), np.nan), ["position 6", "log_rest[1] is nan"]),
        (_set("log_rest", (6, 1), np.inf), ["position 6", "log_rest[1] is inf"]),
        (_mass, ["position 6", "probabilities of head and rest"]),
        (_impossible(-np.inf), ["position 6", "nothing is possible at temperature 1"]),
        (_impossible(-6e4), ["position 6", "nothing is possible at temperature 1"]),
        (_set("true_logprob", 6, 0.5), ["position 6", "true_logprob is 0.5"]),
        (_set("true_logprob", 6, np.nan), ["position 6", "true_logprob is nan"]),
        (_set("true_logprob", 8, -1.0), ["position 8", "true_logprob is -1.0", "no label"]),
        (_set("entropy", 6, -0.5), ["position 6", "entropy is -0.5"]),
        (_set("entropy", 6, 5.0), ["position 6", "entropy is 5.0"]),
        (_set("rest_entropy", 6, np.nan), ["position 6", "rest_entropy is nan"]),
        (_set("rest_entropy", 6, np.inf), ["position 6", "rest_entropy is inf"]),
        (_set("tail_logprobs", (6, 0), 0.5), ["position 6", "tail_logprobs[0] is 0.5", "0 or below"]),
        (_set("tail_logprobs", (6, 0), np.nan), ["position 6", "tail_logprobs[0] is nan"]),
        (_value_without_a_draw, ["position 6", "tail_logprobs[3] is -1.0", "-inf where there is no id"]),
    ],
)
def test_broken_rule_is_named(change: Callable[[Row], None], words: list[str]) -> None:
    row = _row()
    change(row)
    with pytest.raises(InvalidRowError) as caught:
        _check(row)
    message = str(caught.value)
    assert message.startswith("store, split train, shard 000000, row 7")
    assert all(word in message for word in words), message
    assert message.count(". ") == 0, "one sentence"


@pytest.mark.parametrize("name", ["token_ids", "loss_mask", "segment_documents"])
def test_wrong_type_or_shape_is_named(name: str) -> None:
    row = _row()
    with pytest.raises(InvalidRowError, match=f"{name} is float64"):
        _check(dataclasses.replace(row, **{name: getattr(row, name).astype(np.float64)}))
    with pytest.raises(InvalidRowError, match=name):
        _check(dataclasses.replace(row, **{name: getattr(row, name)[:-1]}))


def test_wrong_shape_in_the_record_is_named() -> None:
    row = _row()
    assert row.teacher is not None
    for name in (field.name for field in dataclasses.fields(row.teacher)):
        value = getattr(row.teacher, name)
        for broken in (value[:-1], value.astype(np.float64), value[..., None]):
            teacher = dataclasses.replace(row.teacher, **{name: broken})
            with pytest.raises(InvalidRowError, match=name):
                _check(dataclasses.replace(row, teacher=teacher))


def test_teacher_record_and_manifest_must_agree() -> None:
    row = _row()
    with pytest.raises(InvalidRowError, match="no teacher record"):
        _check(dataclasses.replace(row, teacher=None))
    tokens_only = whole_manifest(sequence_length=LENGTH, vocabulary_size=50, k=0, n=0)
    with pytest.raises(InvalidRowError, match="names no teacher"):
        check_row(row, tokens_only, split="train", where="row 7")


@pytest.mark.parametrize(("k", "n"), [(3, 0), (1, 0), (3, 4), (1, 4), (8, 0)])
def test_repeated_ids_are_found_wherever_they_stand(k: int, n: int) -> None:
    """Every pair of places of every position, in heads that are else plainly right and in heads with ties."""
    manifest = whole_manifest(sequence_length=LENGTH, vocabulary_size=50, k=k, n=n)
    for tied in (False, True):
        row = whole_row(manifest, 5)
        assert row.teacher is not None
        if tied:
            row.teacher.head_logprobs[:] = -12.0
            row.teacher.head_ids.sort(axis=1)
        check_row(row, manifest, split="train", where="row")
        for position in (0, 1, LENGTH - 1):
            for left in range(k):
                for right in range(left + 1, k):
                    kept = row.teacher.head_ids[position].copy()
                    row.teacher.head_ids[position, right] = kept[left]
                    with pytest.raises(InvalidRowError, match=f"position {position}: .*(twice|ascending)"):
                        check_row(row, manifest, split="train", where="row")
                    row.teacher.head_ids[position] = kept
        check_row(row, manifest, split="train", where="row")


def test_equal_ids_at_the_seam_of_two_positions_are_fine() -> None:
    """The quick look goes over all entries without seeing where positions begin."""
    manifest = whole_manifest(sequence_length=3, vocabulary_size=50, k=2, n=0)
    row = whole_row(manifest, 0)
    assert row.teacher is not None
    row.teacher.head_ids[:] = [[1, 7], [7, 9], [9, 1]]
    row.teacher.head_logprobs[:] = [[-6.0, -7.0], [-7.0, -8.0], [-6.0, -9.0]]
    row.teacher.log_rest[:] = -5.0
    check_row(row, manifest, split="train", where="row")


def test_mass_is_checked_without_a_head_too() -> None:
    manifest = whole_manifest(sequence_length=3, vocabulary_size=50, k=0, n=2)
    row = whole_row(manifest, 0)
    assert row.teacher is not None
    row.teacher.log_rest[1, 0] = 0.1
    with pytest.raises(InvalidRowError, match=r"position 1: the probabilities of head and rest sum to 1\.1"):
        check_row(row, manifest, split="train", where="row")


def test_rounding_is_tolerated() -> None:
    row = _row()
    assert row.teacher is not None
    row.teacher.head_logprobs[6] = [5e-7, -60.0, -61.0]
    row.teacher.log_rest[6] = -62.0
    row.teacher.true_logprob[6] = 5e-7
    row.teacher.entropy[6] = -1e-6
    _check(row)
