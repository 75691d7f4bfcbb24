"""Rows become tensors that mean the same, and are read ahead in their own order."""

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sparsekd.kernels.objective import Objective
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.trainer.errors import DataError
from sparsekd.trainer.student.batches import (
    IGNORED_LABEL,
    ReadAhead,
    check_values,
    counting_rows,
    micro_batch,
    rest_formula_of,
)

MANIFEST = synthetic_manifest(vocabulary_size=50, sequence_length=12, k=3, n=5)


def rows(count: int = 6) -> list[Row]:
    return synthetic_rows(MANIFEST, count, seed=1)


def objective(**changes: float) -> Objective:
    fields: dict[str, Any] = {
        "kd_weight": 1.0,
        "ce_weight": 0.0,
        "divergence": "forward_kl",
        "mixture": 0.1,
        "target_mode": "tail_bucket",
        "temperature": 1.0,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
    }
    return Objective(**{**fields, **changes})


def test_labels_are_the_next_tokens_of_the_same_document() -> None:
    for row in rows(30):
        batch = micro_batch([row], rest=None)
        starts = set(row.segment_starts.tolist())
        for position, label in enumerate(batch.labels.tolist()):
            if row.loss_mask[position]:
                assert label == row.token_ids[position + 1]
                assert position + 1 not in starts
                assert batch.weights[position] == 1
            else:
                assert label == IGNORED_LABEL and batch.weights[position] == 0
        positions = batch.position_ids[0].tolist()
        assert [index for index, value in enumerate(positions) if value == 0] == sorted(starts)


def test_targets_are_head_then_draws_at_the_chosen_temperature() -> None:
    some = rows(2)
    batch = micro_batch(some, rest=rest_formula_of(objective(temperature=2.0), MANIFEST))
    assert batch.token_ids.shape == (2, 12) and batch.targets is not None
    ids, head_logprobs, counts, log_rest, entropy = batch.targets
    assert ids.shape == (24, 8) and ids.dtype == torch.int64
    teacher = some[1].teacher
    assert teacher is not None
    for position in range(12):
        there = 12 + position
        assert ids[there, :3].tolist() == teacher.head_ids[position].tolist()
        assert ids[there, 3:].tolist() == teacher.tail_ids[position].tolist()
        assert counts[there].tolist() == teacher.tail_counts[position].tolist()
        assert np.array_equal(head_logprobs[there].numpy(), teacher.head_logprobs[position])
        assert log_rest[there].item() == teacher.log_rest[position, 1]
        assert entropy[there].item() == teacher.entropy[position]


def test_targets_between_the_grid_s_temperatures() -> None:
    """log R of each position is what the formula makes of its stored values and the rest's entropy."""
    some, rest = rows(2), rest_formula_of(objective(temperature=3.0), MANIFEST)
    assert rest is not None and rest.column is None
    targets = micro_batch(some, rest=rest).targets
    assert targets is not None
    teacher = some[1].teacher
    assert teacher is not None
    for position in range(12):
        stored, found = teacher.log_rest[position], targets.log_rest[12 + position].item()
        expected = rest.constant + rest.entropy * teacher.rest_entropy[position] + stored @ rest.columns
        assert found == pytest.approx(expected, rel=1e-6)
        # R grows with the temperature.
        assert stored[1] < found < stored[2]


def test_no_record_is_read_without_distillation() -> None:
    assert rest_formula_of(objective(kd_weight=0.0, ce_weight=1.0, temperature=9.0), MANIFEST) is None


def test_values_are_checked_where_asked() -> None:
    batch = micro_batch(rows(2), rest=rest_formula_of(objective(), MANIFEST))
    check_values(batch, vocabulary_size=50, temperature=1.0)
    with pytest.raises(DataError, match=r"token_ids at row \d, position \d+ is \d+, expected .*store verify"):
        check_values(batch, vocabulary_size=int(batch.token_ids.max()), temperature=1.0)
    assert batch.targets is not None
    counted = int(batch.weights.nonzero()[3])
    batch.targets.log_rest[counted] = float("nan")
    with pytest.raises(DataError, match=rf"targets.log_rest at position {counted} is nan.*store verify"):
        check_values(batch, vocabulary_size=50, temperature=1.0)


def test_rows_that_fill_a_pass_do_not_count() -> None:
    batch = micro_batch(rows(3), rest=None)
    only = counting_rows(batch, 1)
    assert torch.equal(only.weights[:12], batch.weights[:12]) and only.weights[12:].sum() == 0
    assert batch.weights[12:].sum() > 0


def test_reading_ahead_keeps_the_order_whatever_the_timing() -> None:
    chance = random.Random(3)

    def slow() -> Iterator[int]:
        for number in range(60):
            time.sleep(chance.random() * 0.002)
            yield number

    with ReadAhead(slow(), depth=3) as ahead:
        found = []
        for _ in range(60):
            time.sleep(chance.random() * 0.002)
            found.append(ahead.next())
        with pytest.raises(StopIteration):
            ahead.next()
    assert found == list(range(60))


def test_reading_ahead_is_bounded_and_stops() -> None:
    taken = []

    def endless() -> Iterator[int]:
        while True:
            taken.append(len(taken))
            yield taken[-1]

    before = threading.active_count()
    with ReadAhead(endless(), depth=2) as ahead:
        assert ahead.next() == 0
        time.sleep(0.3)
        # One was given out, two lie ready, one waits in the thread's hand.
        assert len(taken) == 4
    assert threading.active_count() == before


def test_a_failure_in_the_thread_is_raised_in_its_place() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("row 7 is damaged")

    with ReadAhead(broken(), depth=4) as ahead:
        assert ahead.next() == 1
        with pytest.raises(OSError, match="row 7 is damaged"):
            ahead.next()
