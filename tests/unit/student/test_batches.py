"""Rows become tensors that mean the same, and are read ahead in their own order."""

import itertools
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from source_rows import with_records

from sparsekd.kernels.loss import sparse_kd_loss
from sparsekd.kernels.objective import HeadTransform, Objective, needed_planes
from sparsekd.kernels.targets import NOTHING
from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.manifest import CodecSpec, Manifest
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import NO_ID, Row, take_records, weights_of_positions
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
from sparsekd.trainer.data.batches import (
    IGNORED_LABEL,
    ReadAhead,
    check_values,
    head_positions,
    micro_batch,
    rest_formula_of,
    sparse_targets,
)
from sparsekd.trainer.run.errors import DataError

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
        batch = micro_batch(with_records([row], None))
        starts = set(row.segment_starts.tolist())
        assert batch.positions.tolist() == np.flatnonzero(row.loss_mask).tolist()
        for position, label in zip(batch.positions.tolist(), batch.labels.tolist(), strict=True):
            assert label == row.token_ids[position + 1]
            assert position + 1 not in starts
        assert bool((batch.ce_weights == 1).all()) and bool((batch.kd_weights == 0).all())
        assert batch.weight_sum.item() == row.loss_mask.sum() and batch.weight_sum.dtype == torch.float32
        positions = batch.position_ids[0].tolist()
        assert [index for index, value in enumerate(positions) if value == 0] == sorted(starts)


def padded(row: Row, real: int, length: int) -> Row:
    """The row with its first positions alone, and padding behind them."""
    assert row.recorded is not None and row.teacher is not None
    documents = row.segment_documents[row.segment_starts < real]
    starts = row.segment_starts[row.segment_starts < real]
    inside, followed = np.arange(length) < real, np.arange(length) < real - 1
    there = np.zeros(length, np.bool_)
    there[: len(row.recorded)] = row.recorded
    mask = np.zeros(length, np.bool_)
    mask[: len(row.loss_mask)] = row.loss_mask
    return replace(
        row,
        token_ids=np.where(inside, np.resize(row.token_ids, length), 0).astype(np.int32),
        loss_mask=mask & followed,
        segment_starts=np.append(starts, np.int32(real)),
        segment_documents=np.append(documents, np.int64(-1)),
        teacher=take_records(row.teacher, followed[: len(row.recorded)][row.recorded]),
        recorded=there & followed,
    )


@pytest.mark.parametrize(("real", "passes"), [([7, 12, 1], 64), ([64, 3, 5], 64), ([65, 2, 2], 128)])
def test_padding_at_the_end_of_all_rows_does_not_pass_the_model(real: list[int], passes: int) -> None:
    """Each position that reaches the head keeps its token, label, weight and record."""
    manifest = synthetic_manifest(vocabulary_size=50, sequence_length=128, k=3, n=5)
    some = [
        padded(row, size, 200) for row, size in zip(synthetic_rows(manifest, 3, seed=1), real, strict=True)
    ]
    rest = rest_formula_of(objective(), manifest)
    batch = micro_batch(with_records(some, rest))
    assert batch.token_ids.shape == batch.position_ids.shape == batch.routed.shape == (3, passes)
    assert batch.routed.sum(1).tolist() == [
        size if row.loss_mask.any() else 0 for row, size in zip(some, real, strict=True)
    ]
    assert batch.targets is not None
    numbers, columns = np.divmod(batch.positions.numpy(), passes)
    expected = [(number, place) for number, row in enumerate(some) for place in np.flatnonzero(row.loss_mask)]
    assert list(zip(numbers.tolist(), columns.tolist(), strict=True)) == expected
    for index, (number, place) in enumerate(expected):
        row = some[number]
        assert batch.token_ids[number, place] == row.token_ids[place]
        assert batch.labels[index] == row.token_ids[place + 1]
        assert row.teacher is not None and row.recorded is not None
        record = int(row.recorded[:place].sum())
        if row.recorded[place]:
            assert batch.targets.ids[index, :3].tolist() == row.teacher.head_ids[record].tolist()
    assert batch.weight_sum.item() == sum(row.loss_mask.sum() for row in some)


def test_targets_are_head_then_draws_at_the_chosen_temperature() -> None:
    some = rows(2)
    batch = micro_batch(with_records(some, rest_formula_of(objective(temperature=2.0), MANIFEST)))
    assert batch.token_ids.shape == (2, 12) and batch.targets is not None
    ids, head_logprobs, counts, log_rest, entropy = batch.targets
    mask = np.concatenate([row.loss_mask for row in some])
    assert ids.shape == (mask.sum(), 8) and ids.dtype == torch.int64 and mask[12:].sum() > 4
    assert batch.positions.tolist() == np.flatnonzero(mask).tolist()
    assert torch.equal(batch.kd_weights, torch.ones(len(ids)))
    teacher, before = some[1].teacher, int(mask[:12].sum())
    assert teacher is not None
    for number, _ in records_of(some[1]):
        there = before + number
        assert ids[there, :3].tolist() == teacher.head_ids[number].tolist()
        assert ids[there, 3:].tolist() == teacher.tail_ids[number].tolist()
        assert counts[there].tolist() == teacher.tail_counts[number].tolist()
        assert np.array_equal(head_logprobs[there].numpy(), teacher.head_logprobs[number])
        assert log_rest[there].item() == teacher.log_rest[number, 1]
        assert entropy[there].item() == teacher.entropy[number]


def test_targets_between_the_grid_s_temperatures() -> None:
    """log R of each position is what the formula makes of its stored values and the rest's entropy."""
    some, rest = rows(2), rest_formula_of(objective(temperature=3.0), MANIFEST)
    assert rest is not None and rest.column is None
    targets = micro_batch(with_records(some, rest)).targets
    assert targets is not None
    before = int(some[0].loss_mask.sum())
    for number, _ in records_of(some[1]):
        teacher = some[1].teacher
        assert teacher is not None
        stored, found = teacher.log_rest[number], targets.log_rest[before + number].item()
        expected = rest.constant + rest.entropy * teacher.rest_entropy[number] + stored @ rest.columns
        assert found == pytest.approx(expected, rel=1e-6)
        # R grows with the temperature.
        assert stored[1] < found < stored[2]


def test_no_record_is_read_without_distillation() -> None:
    assert rest_formula_of(objective(kd_weight=0.0, ce_weight=1.0, temperature=9.0), MANIFEST) is None


def test_values_are_checked_where_asked() -> None:
    batch = micro_batch(with_records(rows(2), rest_formula_of(objective(), MANIFEST)))
    check_values(batch, vocabulary_size=50, objective=objective())
    with pytest.raises(DataError, match=r"token_ids at row \d, position \d+ is \d+, expected .*store verify"):
        check_values(batch, vocabulary_size=int(batch.token_ids.max()), objective=objective())
    with pytest.raises(DataError, match=r"positions at 1 is 24, expected a number from 0 to 23"):
        wrong = replace(batch, positions=batch.positions.index_fill(0, torch.tensor([1]), 24))
        check_values(wrong, vocabulary_size=50, objective=objective())
    assert batch.targets is not None
    batch.targets.log_rest[3] = float("nan")
    with pytest.raises(DataError, match=r"head, targets.log_rest at position 3 is nan.*store verify"):
        check_values(batch, vocabulary_size=50, objective=objective())


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
    batch = micro_batch(with_records(some, rest_formula_of(objective(), manifest)))
    assert batch.targets is not None
    assert bool(torch.isneginf(batch.targets.head_logprobs).any())
    assert bool((batch.targets.ids < 0).any()) == (mass is not None)
    check_values(batch, vocabulary_size=50, objective=objective())
    # Still not everything passes.
    batch.targets.head_logprobs[3, 0] = float("nan")
    with pytest.raises(DataError, match=r"targets.head_logprobs at position 3, column 0 is nan"):
        check_values(batch, vocabulary_size=50, objective=objective())


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
    batch = micro_batch(with_records(some, rest_formula_of(chosen, manifest)))
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(72, 8, generator=generator, dtype=torch.float64)[batch.positions]
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
            ce_weights=batch.ce_weights,
            kd_weights=batch.kd_weights,
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


def rows_of_target(target: str, count: int) -> tuple[Manifest, list[Row]]:
    """Rows of which, where labels are stored, the first counted position has none."""
    outcomes = ("a", "b", "c", "d", "e") if target == "class" else None
    manifest = synthetic_manifest(
        vocabulary_size=50, sequence_length=40, k=3, n=0, target=target, outcomes=outcomes
    )
    some = synthetic_rows(manifest, count, seed=2)
    if target != "next_token":
        some[0].optional["labels"][0] = NO_ID
    return manifest, some


@pytest.mark.parametrize("target", ["next_token", "masked_token", "class"])
def test_rows_that_fill_a_pass_do_not_count(target: str) -> None:
    """The others give what they give alone, positions without a label included, but for the forward pass."""
    manifest, some = rows_of_target(target, 3)
    rest = rest_formula_of(objective(), manifest)
    whole = micro_batch(with_records(some, rest), target=target)
    for count in (0, 1, 2, 3):
        only = micro_batch(with_records(some, rest), target=target, counting=count)
        assert torch.equal(only.token_ids, whole.token_ids)
        assert only.weight_sum == sum(int(row.loss_mask.sum()) for row in some[:count])
        assert only.weight_sum.dtype == torch.float32
        if count == 0:
            assert len(only.positions) == 0 < len(whole.positions)
            continue
        expected = micro_batch(with_records(some[:count], rest), target=target)
        assert only.targets is not None and expected.targets is not None
        for one, other in zip(only.targets, expected.targets, strict=True):
            assert torch.equal(one, other)
        for name in ("positions", "labels", "ce_weights", "kd_weights", "weight_sum"):
            assert torch.equal(getattr(only, name), getattr(expected, name)), name


def test_which_positions_reach_the_head() -> None:
    """Those with a weight; each with the place of its record where it has one that counts."""
    labels = np.array([[5, 6, IGNORED_LABEL, 8], [1, 2, 3, IGNORED_LABEL]])
    ce_weights = np.array([[1, 0, 2, 0.5], [0, 3, 0, 0]], np.float32)
    kd_weights = np.array([[4, 0, 0, 0], [0, 0, 12, 7]], np.float32)
    recorded = np.array([[True, True, False, False], [True, False, True, True]])
    found = head_positions(labels, ce_weights, kd_weights, recorded)
    assert found.positions.tolist() == [0, 3, 5, 6, 7]
    assert found.labels.tolist() == [5, 8, 2, 3, IGNORED_LABEL]
    # A position without a label has no cross-entropy, but counts in the denominator of what it learns.
    assert found.ce_weights.tolist() == [1, 0.5, 3, 0, 0] and found.weight_sum == 6.5
    assert found.kd_weights.tolist() == [4, 0, 0, 12, 7]
    # Records stand one after another: two of the first row, then three of the second.
    assert found.records.tolist() == [0, -1, -1, 3, 4]
    everywhere = head_positions(labels, ce_weights, kd_weights, None)
    assert everywhere.records.tolist() == [0, -1, -1, 6, 7]
    dtypes = [value.dtype for value in found]
    assert dtypes == [np.int64, np.int64, np.float32, np.float32, np.int64, np.float32]
    with pytest.raises(ValueError, match=r"kd_weights at row 1, position 1 is 9.0, expected 0, because"):
        head_positions(labels, ce_weights, kd_weights + np.float32([[0] * 4, [0, 9, 0, 0]]), recorded)
    nothing = head_positions(labels, 0 * ce_weights, 0 * kd_weights, recorded)
    assert nothing.positions.size == nothing.records.size == 0 and nothing.weight_sum == 0


def test_targets_without_a_record_hold_nothing() -> None:
    some = rows(2)
    rest = rest_formula_of(objective(temperature=3.0), MANIFEST)
    assert rest is not None
    count = sum(int(row.loss_mask.sum()) for row in some)
    whole = sparse_targets(some, rest, np.arange(count))
    found = sparse_targets(some, rest, np.array([3, -1, count - 2, -1]))
    for name, value in found._asdict().items():
        expected = getattr(whole, name)
        assert torch.equal(value[[0, 2]], expected[[3, count - 2]]) and value.dtype == expected.dtype, name
        assert bool((value[[1, 3]] == NOTHING[name]).all()), name
    assert all(len(value) == 0 for value in sparse_targets(some, rest, np.array([], np.int64)))


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


def test_weights_shares_and_labels_of_a_batch() -> None:
    """Documents' weights in both, the inverse share where a record stands; held-out rows weigh 1 each."""
    manifest = synthetic_manifest(
        vocabulary_size=50, sequence_length=40, k=3, n=5, planes=("weights",), positions="sampled", share=0.4
    )
    rest = rest_formula_of(objective(), manifest)
    some = synthetic_rows(manifest, 5, seed=2)
    batch = micro_batch(with_records(some, rest, share=0.4))
    mask = np.concatenate([row.loss_mask for row in some])
    recorded = np.concatenate([row.recorded for row in some])
    weights = np.concatenate([weights_of_positions(row) for row in some])
    assert len(set(weights[mask])) > 1 and 0 < recorded.sum() < mask.sum()
    assert batch.positions.tolist() == np.flatnonzero(mask).tolist()
    np.testing.assert_array_equal(batch.ce_weights, weights[mask])
    np.testing.assert_allclose(batch.kd_weights, (weights * recorded / 0.4)[mask], rtol=1e-6)
    assert batch.weight_sum.item() == pytest.approx(weights[mask].sum())
    plain = micro_batch(with_records(some, rest), weighted=False)
    assert torch.equal(plain.ce_weights, torch.ones(int(mask.sum())))
    assert plain.weight_sum.item() == mask.sum()


@pytest.mark.parametrize("target", ["masked_token", "class"])
def test_labels_of_other_targets(target: str) -> None:
    manifest, some = rows_of_target(target, 4)
    batch = micro_batch(with_records(some, rest_formula_of(objective(), manifest)), target=target)
    stored = np.concatenate([row.optional["labels"] for row in some]).tolist()
    assert batch.labels.tolist() == [IGNORED_LABEL, *stored[1:]]
    assert batch.ce_weights.tolist() == [0, *[1] * (len(stored) - 1)]
    assert batch.kd_weights.tolist() == [1] * len(stored) and batch.weight_sum.item() == len(stored)


def test_planes_that_the_loss_does_not_read_are_not_decoded(tmp_path: Path) -> None:
    tokenizer = write_synthetic_tokenizer(tmp_path / "tokenizer", 50)
    create_store(tmp_path / "store", MANIFEST, tokenizer)
    write_shard(tmp_path / "store", MANIFEST, "train", 0, rows(3))
    seal(tmp_path / "store", {"train": 1, "heldout": 0})
    store = open_store(tmp_path / "store")
    for changes in ({}, {"target_mode": "sampled"}, {"temperature": 3.0}, {"kd_weight": 0.0}):
        chosen = objective(**{"ce_weight": 1.0, **changes})
        rest = rest_formula_of(chosen, MANIFEST)
        on_grid = rest is None or rest.column is not None
        names = needed_planes(chosen, k=3, n=5, on_grid=on_grid)
        part = micro_batch(with_records([store.read_part("train", index, names) for index in range(3)], rest))
        whole = micro_batch(with_records([store.read_row("train", index) for index in range(3)], rest))
        assert torch.equal(part.labels, whole.labels) and torch.equal(part.kd_weights, whole.kd_weights)
        if part.targets is None or whole.targets is None:
            assert part.targets is whole.targets is None and not names
            continue
        columns = part.targets.ids.shape[1]
        assert columns == (8 if chosen.target_mode == "sampled" else 3)
        assert torch.equal(part.targets.ids, whole.targets.ids[:, :columns])
        assert torch.equal(part.targets.log_rest, whole.targets.log_rest)
        assert torch.equal(part.targets.head_logprobs, whole.targets.head_logprobs)
