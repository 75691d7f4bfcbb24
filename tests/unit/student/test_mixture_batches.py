"""Rows of several stores in one batch: each position keeps what its own store says."""

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_stores import write_synthetic_store
from torch import Tensor

from sparsekd.kernels.loss import sparse_kd_loss
from sparsekd.kernels.objective import HeadTransform, Objective, needed_planes
from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.trainer.data.batches import check_values, micro_batch, rest_formula_of
from sparsekd.trainer.data.order import Place
from sparsekd.trainer.data.skipping import RowsOrNothing
from sparsekd.trainer.data.sources import Records, Source, SourceRow, Sources

VOCABULARY, LENGTH, HIDDEN = 50, 12, 8
KINDS = ((3, 5), (1, 0), (6, 2), (0, 9))  # k and n
GRIDS = ((1.0, 2.0, 4.0), (1.0, 3.0), (1.0, 2.0), (1.0, 2.5, 4.0))


def objective(mode: str, temperature: float) -> Objective:
    return Objective(
        kd_weight=0.75,
        ce_weight=0.25,
        divergence="forward_kl",
        mixture=0.1,
        target_mode=mode,
        temperature=temperature,
        label_smoothing=0.0,
        z_loss=0.0,
    )


def rows_of(number: int, wanted: Objective, share: float = 1.0) -> list[SourceRow]:
    k, n = KINDS[number]
    manifest = synthetic_manifest(
        vocabulary_size=VOCABULARY, sequence_length=LENGTH, k=k, n=n, temperatures=GRIDS[number]
    )
    records = Records(rest_formula_of(wanted, manifest), share, f"source {number}")
    return [SourceRow(row, records) for row in synthetic_rows(manifest, 3, seed=number)]


def losses(found: list[SourceRow], wanted: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and gradients in hidden states of the batch and the weight, in float64 by the dense formulas."""
    batch = micro_batch(found)
    check_values(batch, vocabulary_size=VOCABULARY, objective=wanted)
    assert batch.targets is not None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    # Of each token, so that a row has the same in any batch.
    table = torch.randn(VOCABULARY, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    hidden = table[batch.token_ids, torch.arange(LENGTH)].reshape(-1, HIDDEN)[batch.positions]
    hidden.requires_grad_()
    output = sparse_kd_loss(
        hidden,
        weight,
        bias=None,
        targets=batch.targets,
        labels=batch.labels,
        ce_weights=batch.ce_weights,
        kd_weights=batch.kd_weights,
        objective=wanted,
        head=HeadTransform(vocabulary_size=VOCABULARY, scale=1.0, softcap=None),
        impl="reference",
    )
    output.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return output.loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(
    ("mode", "temperature", "kinds"), [("sampled", 1.0, (0, 2, 3)), ("tail_bucket", 2.0, (0, 1, 2))]
)
def test_a_mixed_batch_is_the_sum_of_its_rows(mode: str, temperature: float, kinds: tuple[int, ...]) -> None:
    wanted = objective(mode, temperature)
    mixed = [
        row
        for each in range(3)
        for row in [rows_of(number, wanted, 0.5 + number / 8)[each] for number in kinds]
    ]
    loss, of_hidden, of_weight = losses(mixed, wanted)
    alone = [losses([row], wanted) for row in mixed]
    expected = torch.stack([each[0] for each in alone]).sum()
    assert abs(loss - expected) <= 1e-12 * abs(expected)
    assert torch.allclose(of_hidden, torch.cat([each[1] for each in alone]), rtol=1e-12, atol=0)
    total = torch.stack([each[2] for each in alone]).sum(0)
    assert (of_weight - total).norm() <= 1e-12 * total.norm()


def test_the_teacher_of_a_row_is_its_own() -> None:
    """Ids, counts and log R at each position are those of the row's own record, whatever stands beside it."""
    wanted = objective("tail_bucket", 2.0)
    first, second = rows_of(0, wanted), rows_of(2, wanted)
    targets = micro_batch([first[0], second[0], first[1]]).targets
    assert targets is not None and targets.head_size == 6 and targets.tail_counts.shape[1] == 5
    at = 0
    for row, records in (first[0], second[0], first[1]):
        assert row.teacher is not None and row.recorded is not None
        k, n = row.teacher.head_ids.shape[1], row.teacher.tail_ids.shape[1]
        for number in np.flatnonzero(row.loss_mask[row.recorded]):
            assert targets.ids[at, :k].tolist() == row.teacher.head_ids[number].tolist()
            assert (targets.ids[at, k:6] == -1).all()
            assert targets.tail_counts[at, :n].tolist() == row.teacher.tail_counts[number].tolist()
            assert not targets.tail_counts[at, n:].any()
            assert targets.log_rest[at] == torch.from_numpy(row.teacher.log_rest)[number, 1]
            at += 1
        assert records.rest is not None and records.rest.column == 1
    assert at == len(targets.ids)


def test_rows_without_a_record_stand_beside_others() -> None:
    """In a row that counts nowhere, and at positions that were not sampled."""
    wanted = objective("sampled", 1.0)
    (row, records), *_ = rows_of(0, wanted)
    silent = Row(**{**vars(row), "loss_mask": np.zeros_like(row.loss_mask)})
    other = rows_of(2, wanted)[1]
    loss, *_ = losses([SourceRow(silent, records), other], wanted)
    alone, *_ = losses([other], wanted)
    assert loss == alone


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    for number, (k, n) in enumerate(KINDS[:3]):
        manifest = synthetic_manifest(
            vocabulary_size=VOCABULARY, sequence_length=LENGTH, k=k, n=n, rows_per_shard=4
        )
        write_synthetic_store(
            root / str(number), manifest, {"train": 5 + number, "heldout": number}, seed=number
        )
    return root


def sources_of(root: Path, weights: tuple[float, ...] = (6.0, 1.0, 3.0)) -> Sources:
    wanted = objective("tail_bucket", 1.0)
    members = []
    for number, weight in enumerate(weights):
        store = open_store(root / str(number))
        record = store.manifest.record
        planes = needed_planes(wanted, k=record.k, n=record.n, on_grid=True)
        records = Records(rest_formula_of(wanted, store.manifest), 0.5, f"s{number}")
        members.append(Source(f"s{number}", store, weight, planes, records))
    return Sources(members)


def test_one_space_of_rows(stores: Path) -> None:
    sources = sources_of(stores)
    assert sources.rows("train") == 5 + 6 + 7 and sources.rows("heldout") == 0 + 1 + 2
    numbers = [(number, row) for number in range(3) for row in range(5 + number)]
    for row, (number, own) in enumerate(numbers):
        found = sources.read("train", row)
        expected = open_store(stores / str(number)).read_row("train", own)
        assert (found.row.token_ids == expected.token_ids).all()
        assert found.records.source == f"s{number}" and found.records.share == 0.5
        (message,) = sources.read_messages("train", row, row + 1)
        assert message is not None
        assert bytes(message) == bytes(open_store(stores / str(number)).read_message("train", own))
    assert sources.by_source([17, 0, 5, 3]) == {"s2": [6], "s0": [0, 3], "s1": [0]}
    assert sources.told([17, 0]) == f"rows [6] of {stores / '2'} and rows [0] of {stores / '0'}"
    heldout = sources.read("heldout", 1)
    assert heldout.records.share == 1.0, "held-out rows are recorded everywhere"
    assert (heldout.row.token_ids == open_store(stores / "2").read_row("heldout", 0).token_ids).all()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (0, {}),
        (1, {"s1": [0], "s2": [1]}),
        (2, {"s1": [0], "s2": [1]}),
        (3, {"s1": [0], "s2": [1, 2]}),
        (64, {"s1": [0], "s2": [1, 2]}),
    ],
)
def test_held_out_rows_by_weight(stores: Path, wanted: int, expected: dict[str, list[int]]) -> None:
    """s0 has none; of the others s2 weighs three times what s1 does."""
    assert {source.name: rows for source, rows in sources_of(stores).heldout(wanted)} == expected


def test_digests_tell_sources_apart(stores: Path) -> None:
    alone = open_store(stores / "0")
    only = Sources.of_one(alone, (), Records(None))
    assert only.digest == alone.digest and not only.is_mixture
    both = sources_of(stores, (1.0, 1.0))
    assert both.is_mixture and both.digest not in (alone.digest, sources_of(stores).digest)


def test_a_damaged_row_of_one_source_is_left_out(stores: Path, tmp_path: Path) -> None:
    """It is counted by its number among all; what fills its place is a sound row without weight."""
    shutil.copytree(stores, tmp_path / "copy")
    commit = open_store(tmp_path / "copy/1").commit("train", 0)
    file = tmp_path / "copy/1/shards/train/000/000000.arrow"
    data = bytearray(file.read_bytes())
    data[int(commit.offsets[2]) + int(commit.lengths[2]) // 2] ^= 1
    file.write_bytes(data)
    sources = sources_of(tmp_path / "copy")
    strict, lenient = (
        RowsOrNothing(sources, most=most, left_out=[], keep=False, readers=1) for most in (0, 1)
    )
    place = Place(7, 7, 8, 0, 0)
    with pytest.raises(DamagedStoreError, match=r"copy/1.*row 2"):
        strict.read([place], step=1)
    (filled,) = lenient.read([place], step=1)
    assert not filled.row.loss_mask.any()
    others = lenient.read([Place(row, row, row + 1, 1, row) for row in (0, 6, 12)], step=1)
    batch = micro_batch([*others, filled])
    assert batch.targets is not None
    assert batch.routed.any(1).tolist() == [*(bool(each.row.loss_mask.any()) for each in others), False]


def test_every_pair_of_kinds() -> None:
    """Padding of heads and draws by any other kind changes no loss."""
    for left, right in product((0, 2, 3), repeat=2):
        wanted = objective("sampled", 1.0)
        pair = [rows_of(left, wanted)[0], rows_of(right, wanted)[1]]
        together, *_ = losses(pair, wanted)
        apart = sum(losses([one], wanted)[0] for one in pair)
        assert abs(together - apart) <= 1e-12 * abs(apart)
