"""Damaged rows that may be left out: weight 0, on any ranks, over a resume, in the checkpoint's record."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from distributed_harness import TRAIN_ROWS, Workplace, masked_store

from sparsekd.logit_store.errors import DamagedStoreError
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import Row
from sparsekd.trainer.data.order import BatchShape, GlobalOrder, Place, step_rows
from sparsekd.trainer.data.skipping import RowsOrNothing, check_left_out
from sparsekd.trainer.data.sources import Records, Sources
from sparsekd.trainer.run.errors import CheckpointError, DataError
from sparsekd.trainer.state.record import read_commit

pytestmark = pytest.mark.distributed

DAMAGED = [5, 11]
STEPS = 6  # of 8 rows: more than two epochs of 22 rows, so that each comes twice
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def stores(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`damaged`: the common store with a byte changed in two rows; `masked`: the same rows without a loss."""
    root = tmp_path_factory.mktemp("skipping")
    shutil.copytree(workplace.root / "store", root / "damaged")
    for row in DAMAGED:
        shard, index = divmod(row, 8)
        place = root / "damaged/shards/train" / f"{shard // 1000:03d}" / f"{shard:06d}.arrow"
        entry = json.loads(place.with_suffix(".json").read_text())
        data = bytearray(place.read_bytes())
        data[entry["offsets"][index] + entry["lengths"][index] // 2] ^= 1
        place.write_bytes(data)
    masked_store(root / "masked", DAMAGED, tokenizer=workplace.root / "store-tokenizer")
    return root


def values(work: Workplace, stores: Path, name: str, store: str, *, steps: int, most: int) -> dict[str, Any]:
    return work.run_values(
        name,
        store={"path": str(stores / store)},
        schedule={"kind": "constant"},  # so that a run can be prolonged
        train={"steps": steps, "log_every": 2, "checkpoint_every": 2, "skip_damaged_rows": most},
    )


def test_rows_left_out_have_no_weight_on_any_ranks_and_over_a_resume(
    workplace: Workplace, stores: Path
) -> None:
    def run(name: str, store: str = "damaged", *, steps: int = STEPS, most: int = 2) -> dict[str, Any]:
        return values(workplace, stores, name, store, steps=steps, most=most)

    output = workplace.run(
        [run("skipping"), run("in_two", steps=2), run("in_two"), run("masked", "masked", most=0)], ranks=2
    )
    workplace.run([run("skipping_alone"), run("too_many", most=1)], ranks=1, expected=2)
    said = (workplace.root / "output.txt").read_text()
    assert "More than train.skip_damaged_rows=1 rows" in said and "repair the store, or allow more" in said

    # As if the rows were there without a loss: the same numbers and weights, bit for bit.
    assert workplace.metrics("skipping") == workplace.metrics("masked")
    straight = workplace.weights("skipping", STEPS)
    for name in ("in_two", "masked"):
        other = workplace.weights(name, STEPS)
        assert all((straight[key] == other[key]).all() for key in straight), name
    assert workplace.metrics("in_two") == workplace.metrics("skipping")
    alone = workplace.weights("skipping_alone", STEPS)
    for key in straight:
        assert (alone[key] - straight[key]).norm() < ROUNDING * straight[key].norm(), key

    # Each is told once, though it comes in two epochs and on both ranks, and the record has them in order.
    shape = BatchShape(global_rows=8, micro_rows=2, world_size=2)
    order = GlobalOrder(TRAIN_ROWS, 0)
    first_steps = {
        row: min(step for step in range(STEPS) if row in step_rows(step * 8, shape, order)) for row in DAMAGED
    }
    for name in ("skipping", "skipping_alone", "in_two"):
        told = workplace.metrics(name, "skipped")
        assert sorted(line["row"] for line in told) == DAMAGED
        for line in told:
            assert f"split train, shard 00000{line['row'] // 8}, row {line['row']}" in line["reason"]
        checkpoints = workplace.folder(name) / "checkpoints"
        for step in (4, STEPS):
            expected = tuple(row for row in DAMAGED if first_steps[row] < step)
            assert read_commit(checkpoints / f"step-{step:08d}").skipped_rows == expected
    assert output.count("left out damaged row 5") == 2  # in `skipping`, and once in both parts of `in_two`


def reading(store: LogitStore, *, most: int, left_out: list[int]) -> RowsOrNothing:
    sources = Sources.of_one(store, ("head_ids",), Records(None))
    return RowsOrNothing(sources, most=most, left_out=left_out, keep=True, readers=1)


def read(rows: RowsOrNothing, row: int, *, step: int) -> Row:
    (found,) = rows.read([Place(row, row, row + 1, stream=0, window=row)], step=step)
    return found.row


def test_the_bound_is_kept_by_each_reader(stores: Path) -> None:
    store = open_store(stores / "damaged")
    with pytest.raises(DamagedStoreError, match="row 5"):
        read(reading(store, most=0, left_out=[]), 5, step=1)
    rows = reading(store, most=1, left_out=[])
    assert not read(rows, 5, step=1).loss_mask.any() and not read(rows, 5, step=2).loss_mask.any()
    assert read(rows, 4, step=1).loss_mask.any()
    with pytest.raises(DataError, match=r"More than train\.skip_damaged_rows=1 .* row 11"):
        read(rows, 11, step=3)
    # What a run left out stays left out after a repair: the numbers are those of the run without a stop.
    rows = reading(store, most=2, left_out=[4])
    assert not read(rows, 4, step=9).loss_mask.any()
    check_left_out([4, 5], most=2, checkpoint=stores)
    with pytest.raises(
        CheckpointError, match=r"left out 2 damaged rows, but train\.skip_damaged_rows=1: allow"
    ):
        check_left_out([4, 5], most=1, checkpoint=stores)
