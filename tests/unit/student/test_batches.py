"""Rows become tensors that mean the same, and are read ahead in their own order."""

import random
import threading
import time
from collections.abc import Iterator

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
    grid_index,
    micro_batch,
)

MANIFEST = synthetic_manifest(vocabulary_size=50, sequence_length=12, k=3, n=5)


def rows(count: int = 6) -> list[Row]:
    return synthetic_rows(MANIFEST, count, seed=1)


def test_labels_are_the_next_tokens_of_the_same_document() -> None:
    for row in rows(30):
        batch = micro_batch([row], temperature_column=None)
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
    batch = micro_batch(some, temperature_column=1)
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


def test_temperature_column() -> None:
    objective = Objective(
        kd_weight=1.0,
        ce_weight=0.0,
        divergence="forward_kl",
        target_mode="tail_bucket",
        temperature=2.0,
        label_smoothing=0.0,
        z_loss=0.0,
    )
    assert grid_index(objective, MANIFEST.record) == 1
    without = Objective(**{**objective.__dict__, "kd_weight": 0.0, "ce_weight": 1.0, "temperature": 3.0})
    assert grid_index(without, MANIFEST.record) is None


def test_values_are_checked_where_asked() -> None:
    batch = micro_batch(rows(2), temperature_column=0)
    check_values(batch, 50)
    with pytest.raises(DataError, match="token_ids at"):
        check_values(batch, int(batch.token_ids.max()))
    assert batch.targets is not None
    batch.targets.log_rest[3] = float("nan")
    with pytest.raises(DataError, match=r"log_rest at \[3\]"):
        check_values(batch, 50)


def test_rows_that_fill_a_pass_do_not_count() -> None:
    batch = micro_batch(rows(3), temperature_column=None)
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
