"""Training in the chunked order: the same run for every number of ranks, also where the number changes."""

import json
import shutil

import pytest
from distributed_harness import STEPS, TRAIN_ROWS, VOCABULARY, Workplace
from plain_training import relative_difference, student
from worker import configured

from sparsekd.trainer.config.schema import Config, LaunchConfig
from sparsekd.trainer.data.chunked import chunked_order
from sparsekd.trainer.data.order import batch_shape, step_rows
from sparsekd.trainer.run.errors import CheckpointError
from sparsekd.trainer.run.ranks import ranks
from sparsekd.trainer.state.record import read_commit
from sparsekd.trainer.student.loop import train_on

pytestmark = pytest.mark.distributed

ROUNDING = 2e-5
DATA = {"shuffle": "chunked", "streams": 64, "window": 1}
SLOTS = 8


@pytest.fixture(scope="module")
def ended(workplace: Workplace) -> Workplace:
    """A run on two ranks and one on one, each stopped half-way and gone on with on the other number."""

    def values(name: str, **train: object) -> dict:
        times = {"checkpoint_every": 2, **train}
        return workplace.run_values(name, data=DATA, train=times)

    def stopped_short(source: str, target: str) -> None:
        shutil.copytree(workplace.folder(source), workplace.folder(target))
        (workplace.folder(target) / "DONE.json").unlink()
        shutil.rmtree(workplace.folder(target) / "checkpoints" / f"step-{STEPS:08d}")

    output = workplace.run([values("chunked")], ranks=2)
    assert "data order: chunked, 2 streams with windows of 1 x 16 rows" in output
    stopped_short("chunked", "chunked_to_one")
    alone = values("chunked_alone", micro_batch_rows=4)
    alone["data"]["readers"] = 3  # changes no number, and is not recorded
    workplace.run([alone, values("chunked_to_one")], ranks=1)
    stopped_short("chunked_alone", "chunked_to_two")
    workplace.run([values("chunked_to_two", micro_batch_rows=1)], ranks=2)
    return workplace


@pytest.mark.parametrize("name", ["chunked_alone", "chunked_to_one", "chunked_to_two"])
def test_the_number_of_ranks_changes_nothing(ended: Workplace, name: str) -> None:
    """Four steps of 8 rows: more than the 22 of an epoch, of which one chunk is short."""
    lines, expected = ended.metrics(name), ended.metrics("chunked")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for ours, theirs in zip(lines, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    config = ended.run_values("")["student"]["config"]
    start = student(config, seed=0, vocabulary=VOCABULARY).state_dict()
    weights = ended.weights(name, STEPS), ended.weights("chunked", STEPS)
    assert relative_difference(*weights, start) < ROUNDING


def test_the_order_is_another_and_recorded(ended: Workplace, workplace: Workplace) -> None:
    commit = read_commit(ended.folder("chunked") / "checkpoints" / f"step-{STEPS:08d}")
    assert commit.rows_consumed == STEPS * SLOTS
    recorded = {"shuffle": "chunked", "chunk_rows": 16, "streams": 2, "window": 1}
    assert commit.settings["numbers"]["data"] == recorded
    values = workplace.run_values("chunked_alone", data={**DATA, "streams": 1}, train={"micro_batch_rows": 4})
    with (
        ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here,
        pytest.raises(CheckpointError, match=r"data\.streams 2 -> 1"),
    ):
        train_on(here, configured(Config(), values), [])
    del values["data"]
    with (
        ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here,
        pytest.raises(CheckpointError, match=r"data\.shuffle chunked -> None"),
    ):
        train_on(here, configured(Config(), values), [])


def test_bad_numbers_name_the_rows_of_this_order(workplace: Workplace) -> None:
    values = workplace.run_values("chunked_diverging", data=DATA, optimizer={"learning_rate": 1e30})
    workplace.run([values], ranks=1, expected=2)
    message = json.loads((workplace.folder("chunked_diverging") / "FAILED.json").read_text())["message"]
    order = chunked_order(rows=TRAIN_ROWS, seed=0, slots=SLOTS, streams=64, window=1)
    shape = batch_shape(global_rows=SLOTS, micro_rows=2, world_size=1)
    rows = step_rows(8, shape, order)
    assert f"a gradient that is not a finite number, though its losses are, on rows {rows} of" in message
