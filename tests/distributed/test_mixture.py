"""Training on two stores of other records: as plain training does, on any number of ranks, and on again."""

import json
import shutil

import pytest
from distributed_harness import STEPS, VOCABULARY, Workplace
from plain_training import relative_difference, student, train
from synthetic_stores import write_synthetic_store
from worker import configured

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.config.schema import Config, LaunchConfig
from sparsekd.trainer.data.mixed import SourceOfRows, order_of
from sparsekd.trainer.door.cli import main
from sparsekd.trainer.run.errors import CheckpointError
from sparsekd.trainer.run.ranks import ranks
from sparsekd.trainer.state.record import read_commit
from sparsekd.trainer.student.loop import train_on

pytestmark = pytest.mark.distributed

ROUNDING = 2e-5
WEIGHTS = {"common": 0.7, "rare": 0.3}
SLOTS = 8


@pytest.fixture(scope="module")
def mixed(workplace: Workplace) -> Workplace:
    """Runs on two ranks and on one, and one that went from two to one half-way."""
    manifest = synthetic_manifest(
        vocabulary_size=VOCABULARY, sequence_length=32, rows_per_shard=4, k=2, n=9, temperatures=(1.0, 3.0)
    )
    write_synthetic_store(workplace.root / "rare", manifest, {"train": 5, "heldout": 3}, seed=8)
    output = workplace.run([values(workplace, "mixed")], ranks=2)
    assert "source common: 70.00% of the rows" in output and "source rare: 30.00% of the rows" in output
    assert "store common k=4 n=6; store rare k=2 n=9" in output
    shutil.copytree(workplace.folder("mixed"), workplace.folder("mixed_on"))
    (workplace.folder("mixed_on") / "DONE.json").unlink()
    shutil.rmtree(workplace.folder("mixed_on") / "checkpoints" / f"step-{STEPS:08d}")
    chunked = values(workplace, "mixed_chunked")
    chunked["data"] |= {"shuffle": "chunked", "readers": 3}
    alone = [values(workplace, "mixed_on"), values(workplace, "mixed_alone"), chunked]
    workplace.run(alone, ranks=1)
    return workplace


def values(work: Workplace, name: str) -> dict:
    found = work.run_values(
        name,
        data={
            "mixture": {
                "common": {"path": str(work.root / "store"), "weight": WEIGHTS["common"]},
                "rare": {"path": str(work.root / "rare"), "weight": WEIGHTS["rare"]},
            }
        },
        train={"checkpoint_every": 2, "evaluate_rows": 8, "evaluate_every": 2},
    )
    del found["store"]
    return found


def batches(work: Workplace) -> list[list[Row]]:
    """The rows of each step, counted out along the two stores."""
    stores = [open_store(work.root / name) for name in ("store", "rare")]
    sizes = [store.rows("train") for store in stores]
    sources = [
        SourceOfRows(name, size, weight) for (name, weight), size in zip(WEIGHTS.items(), sizes, strict=True)
    ]
    order = order_of(configured(Config(), {}).data, sources, seed=0, slots=SLOTS)
    rows = [place.row for place in order.places(0, STEPS * SLOTS)]
    found = [
        stores[0].read_row("train", row) if row < sizes[0] else stores[1].read_row("train", row - sizes[0])
        for row in rows
    ]
    return [found[first : first + SLOTS] for first in range(0, len(found), SLOTS)]


def test_it_trains_as_plain_training_does(mixed: Workplace) -> None:
    """Against dense float64 over the same rows, each with its own record."""
    of_run = values(mixed, "mixed")
    model, expected = train(mixed.store, of_run, steps=STEPS, batches=batches(mixed))
    for ours, theirs in zip(mixed.metrics("mixed"), expected, strict=True):
        for name in ("loss", "kd", "ce", "agreement", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    start = student(of_run["student"]["config"], seed=0, vocabulary=VOCABULARY).state_dict()
    assert relative_difference(mixed.weights("mixed", STEPS), model.state_dict(), start) < ROUNDING


@pytest.mark.parametrize("name", ["mixed_alone", "mixed_on"])
def test_the_number_of_ranks_changes_nothing(mixed: Workplace, name: str) -> None:
    for kind in ("train", "heldout"):
        lines, expected = mixed.metrics(name, kind), mixed.metrics("mixed", kind)
        assert [line["step"] for line in lines] == [line["step"] for line in expected]
        for ours, theirs in zip(lines, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    config = mixed.run_values("")["student"]["config"]
    start = student(config, seed=0, vocabulary=VOCABULARY).state_dict()
    weights = mixed.weights(name, STEPS), mixed.weights("mixed", STEPS)
    assert relative_difference(*weights, start) < ROUNDING


def test_held_out_losses_are_told_for_each_source(mixed: Workplace) -> None:
    for line in mixed.metrics("mixed", "heldout"):
        losses = [line["sources"][name]["loss"] for name in ("common", "rare")]
        assert abs(losses[0] - losses[1]) > 0.01
        # By weight, and not by rows: five of the one's are read, and all three of the other's.
        assert line["loss"] == pytest.approx(0.7 * losses[0] + 0.3 * losses[1], rel=1e-9)
    assert [line["step"] for line in mixed.metrics("mixed", "heldout")] == [2, 4]


def test_the_mixture_is_recorded(mixed: Workplace) -> None:
    commit = read_commit(mixed.folder("mixed") / "checkpoints" / f"step-{STEPS:08d}")
    recorded = commit.settings["numbers"]["data"]["mixture"]
    assert recorded == {"common": {"turns": 45875}, "rare": {"turns": 19661}}
    chunked = read_commit(mixed.folder("mixed_chunked") / "checkpoints" / f"step-{STEPS:08d}")
    recorded = chunked.settings["numbers"]["data"]["mixture"]
    assert (recorded["common"]["turns"], recorded["rare"]["turns"]) == (6, 2)

    def refused(change: dict[str, object], told: str) -> None:
        other = values(mixed, "mixed")
        other["data"]["mixture"]["rare"] |= change
        with (
            ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here,
            pytest.raises(CheckpointError, match=told),
        ):
            train_on(here, configured(Config(), other), [])

    refused({"weight": 0.7}, r"data\.mixture\.rare\.turns 19661 -> 32768")
    refused({"path": str(mixed.root / "store")}, "trained on another store")


def test_bad_numbers_name_the_rows_of_each_store(mixed: Workplace) -> None:
    of_run = values(mixed, "mixed_diverging") | {"optimizer": {"learning_rate": 1e30}}
    mixed.run([of_run], ranks=1, expected=2)
    message = json.loads((mixed.folder("mixed_diverging") / "FAILED.json").read_text())["message"]
    assert f" of {mixed.root / 'store'} and rows [" in message or f" of {mixed.root / 'rare'} and" in message


def test_it_is_exported_and_its_card_names_both(mixed: Workplace, tmp_path: object) -> None:
    words = [f"run.root={mixed.root / 'runs'}", "run.name=mixed", "export.dtype=float32"]
    assert main(["export", *words]) == 0
    card = (mixed.folder("mixed") / "export" / "README.md").read_text()
    for name in WEIGHTS:
        assert f"| record ({name}) | k=" in card and f"| logit store ({name}) | `" in card
