"""Rows become tensors that mean the same, and are read ahead in their own order."""

import itertools
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsekd.kernels.loss import sparse_kd_loss
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.manifest import CodecSpec, Manifest
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import NO_ID, Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
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


def records_of(row: Row) -> list[tuple[int, int]]:
    """(number, position) of each record."""
    assert row.recorded is not None and 0 < row.recorded.sum() < 12
    return list(enumerate(np.flatnonzero(row.recorded).tolist()))


def objective(**changes: Any) -> Objective:
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
    for number, position in records_of(some[1]):
        teacher, there = some[1].teacher, 12 + position
        assert teacher is not None
        assert ids[there, :3].tolist() == teacher.head_ids[number].tolist()
        assert ids[there, 3:].tolist() == teacher.tail_ids[number].tolist()
        assert counts[there].tolist() == teacher.tail_counts[number].tolist()
        assert np.array_equal(head_logprobs[there].numpy(), teacher.head_logprobs[number])
        assert log_rest[there].item() == teacher.log_rest[number, 1]
        assert entropy[there].item() == teacher.entropy[number]


def test_where_no_record_stands_nothing_is_said() -> None:
    some = rows(4)
    batch = micro_batch(some, rest=rest_formula_of(objective(), MANIFEST))
    assert batch.targets is not None
    silent = np.concatenate([~row.loss_mask for row in some])
    assert 0 < silent.sum() < silent.size
    assert bool((batch.targets.ids[silent] == NO_ID).all()) and not batch.targets.tail_counts[silent].any()
    assert bool(torch.isneginf(batch.targets.head_logprobs[silent]).all())
    assert not batch.weights[silent].any() and batch.weights[~silent].all()


def test_targets_between_the_grid_s_temperatures() -> None:
    """log R of each position is what the formula makes of its stored values and the rest's entropy."""
    some, rest = rows(2), rest_formula_of(objective(temperature=3.0), MANIFEST)
    assert rest is not None and rest.column is None
    targets = micro_batch(some, rest=rest).targets
    assert targets is not None
    for number, position in records_of(some[1]):
        teacher = some[1].teacher
        assert teacher is not None
        stored, found = teacher.log_rest[number], targets.log_rest[12 + position].item()
        expected = rest.constant + rest.entropy * teacher.rest_entropy[number] + stored @ rest.columns
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


def compact_rows(path: Path, mass: float | None) -> tuple[Manifest, list[Row]]:
    """Rows with impossible entries, read back from a store of `compact`."""
    manifest = synthetic_manifest(
        vocabulary_size=50,
        sequence_length=12,
        k=6,
        n=0,
        codec=CodecSpec("compact", compact_parameters(np.arange(50), mass=mass, table_ids=9)),
    )
    written = synthetic_rows(manifest, 6, seed=1)
    for row in written:
        assert row.teacher is not None
        for first, mask in ((0, -np.inf), (1, -1e9)):
            row.teacher.head_logprobs[first::3, 3:] = mask
            row.teacher.head_ids[first::3, 3:].sort(axis=1)
    create_store(path / "store", manifest, write_synthetic_tokenizer(path / "tokenizer", 50))
    for shard in range(2):
        write_shard(path / "store", manifest, "train", shard, written[3 * shard : 3 * shard + 3])
    seal(path / "store", {"train": 2, "heldout": 0})
    store = open_store(path / "store")
    return manifest, [store.read_row("train", index) for index in range(6)]


@pytest.mark.parametrize("mass", [None, 0.5, 0.9])
def test_short_heads_and_impossible_entries_pass_the_check(tmp_path: Path, mass: float | None) -> None:
    manifest, some = compact_rows(tmp_path, mass)
    batch = micro_batch(some, rest=rest_formula_of(objective(), manifest))
    assert batch.targets is not None
    assert bool(torch.isneginf(batch.targets.head_logprobs).any())
    there = torch.from_numpy(np.concatenate([row.loss_mask for row in some]))
    assert bool((batch.targets.ids[there] < 0).any()) == (mass is not None)
    check_values(batch, vocabulary_size=50, temperature=1.0)
    # Still not everything passes.
    counted = int(batch.weights.nonzero()[3])
    batch.targets.head_logprobs[counted, 0] = float("nan")
    with pytest.raises(DataError, match=rf"targets.head_logprobs at position {counted}, column 0 is nan"):
        check_values(batch, vocabulary_size=50, temperature=1.0)


@pytest.mark.parametrize("mass", [None, 0.5, 0.9])
@pytest.mark.parametrize(
    ("target_mode", "divergence"),
    [
        ("truncated", "forward_kl"),
        *itertools.product(
            ["tail_bucket", "renormalized"],
            ["forward_kl", "reverse_kl", "total_variation", "jensen_shannon", "skewed_reverse_kl"],
        ),
    ],
)
def test_losses_of_short_heads_are_those_of_the_dense_reference(
    tmp_path: Path, mass: float | None, target_mode: str, divergence: str
) -> None:
    """What a ragged store gives back trains: finite loss and gradients, equal by relative norm."""
    manifest, some = compact_rows(tmp_path, mass)
    chosen = objective(target_mode=target_mode, divergence=divergence, ce_weight=0.5, temperature=2.0)
    batch = micro_batch(some, rest=rest_formula_of(chosen, manifest))
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(72, 8, generator=generator, dtype=torch.float64)
    matrix = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    found = {}
    for impl in ("reference", "torch"):
        hidden, weight = values.clone().requires_grad_(), matrix.clone().requires_grad_()
        output = sparse_kd_loss(
            hidden,
            weight,
            bias=None,
            targets=batch.targets,
            labels=batch.labels,
            weights=batch.weights,
            objective=chosen,
            head=HeadTransform(vocabulary_size=50, scale=1.0, softcap=None),
            impl=impl,
            debug=True,
        )
        output.loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        found[impl] = [output.loss.detach()[None], output.kd, output.ce, hidden.grad, weight.grad]
    for left, right in zip(found["reference"], found["torch"], strict=True):
        assert bool(torch.isfinite(left).all()) and bool(torch.isfinite(right).all())
        assert float((left - right).norm()) <= 1e-5 * float(left.norm())
        assert float(left.norm()) > 0


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
