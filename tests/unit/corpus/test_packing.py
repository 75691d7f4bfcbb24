"""Packing: nothing lost, nothing moved, borders where documents end."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.logit_store.row import Row, document_of_position, position_ids, weights_of_positions
from sparsekd.trainer.corpus import packing

LENGTHS = st.lists(st.integers(1, 23), max_size=30)


def pack(documents: list[list[int]], length: int, batch: int) -> list[Row]:
    """Packs documents, handed over `batch` at a time, as prepare does."""
    stream, rows = packing.EMPTY, []
    for start in range(0, len(documents), batch):
        part = documents[start : start + batch]
        arrays = [np.asarray(ids, dtype=np.int32) for ids in part]
        stream = packing.append(stream, arrays, range(start, start + len(part)))
        full, stream = packing.take_rows(stream, length)
        rows += full
    return rows + packing.take_last_row(stream, length, padding_id=0)


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different, so that a moved token shows."""
    ends = np.cumsum([0, *lengths])
    return [list(range(1 + start, 1 + end)) for start, end in itertools.pairwise(ends)]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 16), st.integers(1, 7))
def test_every_token_stands_in_order_with_its_document(lengths: list[int], length: int, batch: int) -> None:
    documents = numbered(lengths)
    rows = pack(documents, length, batch)
    tokens = np.concatenate([row.token_ids for row in rows]) if rows else np.empty(0)
    owners = np.concatenate([document_of_position(row) for row in rows]) if rows else np.empty(0)
    kept = owners >= 0
    assert tokens[kept].tolist() == [token for ids in documents for token in ids]
    assert owners[kept].tolist() == [number for number, ids in enumerate(documents) for _ in ids]
    # Padding stands at the very end, and there is less of it than one row.
    assert not kept[int(kept.sum()) :].any()
    assert len(tokens) - kept.sum() < length
    assert all(row.teacher is None and len(row.token_ids) == length for row in rows)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 16))
def test_masks_and_positions_against_a_plain_loop(lengths: list[int], length: int) -> None:
    for row in pack(numbered(lengths), length, batch=4):
        owners = document_of_position(row).tolist()
        position, positions, mask = 0, [], []
        for index, owner in enumerate(owners):
            position = position + 1 if index and owners[index - 1] == owner else 0
            positions.append(position)
            mask.append(owner >= 0 and index + 1 < length and owners[index + 1] == owner)
        assert position_ids(row).tolist() == positions
        assert row.loss_mask.tolist() == mask
        assert row.segment_starts[0] == 0
        assert (np.diff(row.segment_starts) > 0).all()


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 16), st.integers(1, 7), st.integers(1, 7))
def test_rows_do_not_depend_on_batches(lengths: list[int], length: int, first: int, second: int) -> None:
    left, right = (pack(numbered(lengths), length, batch) for batch in (first, second))
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name in ("token_ids", "loss_mask", "segment_starts", "segment_documents"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_a_document_across_a_border_restarts_and_single_tokens_carry_no_loss() -> None:
    first, second, third = pack([[1, 2, 3, 4, 5], [6, 7, 8, 9], [10]], length=4, batch=10)
    assert first.token_ids.tolist() == [1, 2, 3, 4] and first.loss_mask.tolist() == [True] * 3 + [False]
    assert second.segment_documents.tolist() == [0, 1] and second.segment_starts.tolist() == [0, 1]
    assert position_ids(second).tolist() == [0, 0, 1, 2]  # token 5 alone, then document 1
    assert second.loss_mask.tolist() == [False, True, True, False]
    assert third.segment_documents.tolist() == [1, 2, -1]
    assert third.token_ids.tolist() == [9, 10, 0, 0] and not third.loss_mask.any()
    assert third.token_ids.dtype == np.int32 and third.segment_documents.dtype == np.int64


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 16), st.data())
def test_weights_stand_in_runs_and_0_clears_the_mask(lengths: list[int], length: int, data) -> None:
    weights = data.draw(
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(lengths), max_size=len(lengths))
    )
    documents = [np.asarray(ids, np.int32) for ids in numbered(lengths)]
    stream = packing.append(packing.EMPTY, documents, range(len(documents)), weights)
    rows, stream = packing.take_rows(stream, length, weighted=True)
    rows += packing.take_last_row(stream, length, padding_id=0, weighted=True)
    plain = pack(numbered(lengths), length, batch=99)
    for row, unweighted in zip(rows, plain, strict=True):
        owners = document_of_position(row)
        expected = np.array([weights[owner] if owner >= 0 else 1.0 for owner in owners], np.float32)
        assert np.array_equal(weights_of_positions(row), expected)
        assert np.array_equal(row.loss_mask, unweighted.loss_mask & (expected > 0))
        starts = row.optional["weight_starts"]
        assert len(starts) == (0 if (expected == 1).all() else 1 + int((np.diff(expected) != 0).sum()))
        assert np.array_equal(row.token_ids, unweighted.token_ids)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 16), st.integers(1, 7), st.booleans())
def test_not_packed_each_document_has_rows_of_its_own(
    lengths: list[int], length: int, batch: int, in_parts: bool
) -> None:
    documents = numbered(lengths)
    # A long document comes in parts, one after another.
    parts = [
        (number, ids[start : start + step])
        for number, ids in enumerate(documents)
        for step in [5 if in_parts else len(ids)]
        for start in range(0, len(ids), step)
    ]
    stream, rows = packing.EMPTY, []
    for start in range(0, len(parts), batch):
        chosen = parts[start : start + batch]
        arrays = [np.asarray(ids, np.int32) for _, ids in chosen]
        stream = packing.append(stream, arrays, [number for number, _ in chosen])
        full, stream = packing.take_rows(stream, length, padding_id=0)
        rows += full
        assert len(stream.token_ids) < length
    rows += packing.take_last_row(stream, length, padding_id=0)
    expected = [
        (number, ids[start : start + length])
        for number, ids in enumerate(documents)
        for start in range(0, len(ids), length)
    ]
    assert len(rows) == len(expected)
    for row, (number, ids) in zip(rows, expected, strict=True):
        filled = length - len(ids)
        assert row.token_ids.tolist() == ids + [0] * filled
        assert row.segment_documents.tolist() == [number] + [-1] * (filled > 0)
        assert row.loss_mask.tolist() == [True] * (len(ids) - 1) + [False] * (filled + 1)
