"""Killed, started again, damaged, on another number of ranks: the run ends as if nothing had happened."""

import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_harness import LONG_STEPS, STEPS, VOCABULARY, Workplace, all_runs, long_run
from plain_training import relative_difference, student
from worker import configured

from sparsekd.trainer.config.schema import Config, LaunchConfig
from sparsekd.trainer.run.errors import CheckpointError
from sparsekd.trainer.run.ranks import ranks
from sparsekd.trainer.state.checkpoint import CONVERTED_SUFFIX
from sparsekd.trainer.state.conversion import CONVERSION_NAME, publish_conversion, read_conversion
from sparsekd.trainer.state.record import COMMIT_NAME, commit_bytes, read_commit
from sparsekd.trainer.state.universal import is_conversion_of
from sparsekd.trainer.student.loop import train_on

pytestmark = pytest.mark.distributed

# Another number of ranks sums in another order: float32 rounding over four steps. Loading a universal
# checkpoint as DeepSpeed 0.19 does it, with one weight decay and one step counter for all, gives 5e-3.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def ended(trained: Workplace) -> Workplace:
    """After a job that was killed and started again, and runs that went on with another number of ranks."""
    for like in ("tied", "stage_0", "stage_2"):
        stopped_short(trained, like, f"{like}_on_one_rank")
    values = [renamed(trained, like, f"{like}_on_one_rank") for like in ("tied", "stage_0", "stage_2")]
    trained.run([renamed(trained, "tied", "alone"), *values], ranks=1)
    kill_at_random(trained, "killed")
    leave_debris(trained.folder("killed"))
    stopped_short(trained, "alone", "on_two_ranks")
    output = trained.run([long_run(trained, "killed"), renamed(trained, "tied", "on_two_ranks")], ranks=2)
    (trained.root / "output_of_the_second_start.txt").write_text(output)
    return trained


def renamed(work: Workplace, like: str, name: str) -> dict[str, Any]:
    """The configuration of one of the shared runs under another name."""
    return {**all_runs(work)[like], "run": {"root": str(work.root / "runs"), "name": name}}


def stopped_short(work: Workplace, source: str, target: str) -> None:
    """Copies a finished run as if it had been killed after its checkpoint before the last."""
    shutil.copytree(work.folder(source), work.folder(target))
    (work.folder(target) / "DONE.json").unlink()
    shutil.rmtree(work.folder(target) / "checkpoints" / f"step-{STEPS:08d}")


def kill_at_random(work: Workplace, name: str) -> None:
    """Starts the long run on two ranks and kills it at a random moment after its first checkpoint."""
    job = work.start([long_run(work, name)], ranks=2)
    folder = work.folder(name) / "checkpoints"
    deadline = time.monotonic() + 120
    while not any(folder.glob("step-*")) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.uniform(0, 1.5))
    job.kill()
    assert any(folder.glob("step-*")), (work.root / "output.txt").read_text()[-4000:]


def leave_debris(folder: Path) -> None:
    """What a kill at a worse moment leaves: half a line, half a checkpoint, and damaged newer ones."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 11, "lo')
    checkpoints = folder / "checkpoints"
    (checkpoints / ".step-00000012.tmp-0123456789ab").mkdir()
    newest = sorted(checkpoints.glob("step-*"))[-1]
    # Another step's, whole as it is: believed, it would have steps taken twice.
    shutil.copytree(newest, checkpoints / "step-00000013")
    damaged = checkpoints / "step-00000011"
    shutil.copytree(newest, damaged)
    commit = read_commit(newest)
    rows = commit.rows_consumed // commit.step * 11
    record = commit_bytes(replace(commit, step=11, rows_consumed=rows), damaged)
    (damaged / COMMIT_NAME).write_bytes(record)
    part = sorted((damaged / "engine").iterdir())[-1]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)


def test_killed_and_started_again_is_bit_equal(ended: Workplace) -> None:
    assert ended.metrics("killed") == ended.metrics("straight")
    assert ended.metrics("killed", "heldout") == ended.metrics("straight", "heldout")
    found, expected = (ended.weights(name, LONG_STEPS) for name in ("killed", "straight"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_debris_is_reported_and_removed(ended: Workplace) -> None:
    output = (ended.root / "output_of_the_second_start.txt").read_text()
    said = [line for line in output.splitlines() if "passed over" in line]
    assert "step-00000013/COMMIT.json is the record of step" in said[0]
    assert "step-00000011/engine/" in said[1] and "checksum" in said[1]
    names = sorted(path.name for path in (ended.folder("killed") / "checkpoints").iterdir())
    # The damaged ones go, newer by their names as they are; the newest two that are sound stay.
    assert names == ["step-00000010", "step-00000012"]


@pytest.mark.parametrize(
    "name", ["tied_on_one_rank", "stage_0_on_one_rank", "stage_2_on_one_rank", "on_two_ranks"]
)
def test_another_number_of_ranks_goes_on(ended: Workplace, name: str) -> None:
    """2 -> 1 and 1 -> 2, weight decay and step counters of both groups included."""
    start = student(all_runs(ended)["tied"]["student"]["config"], seed=0, vocabulary=VOCABULARY).state_dict()
    expected = ended.weights("tied", STEPS)
    assert relative_difference(ended.weights(name, STEPS), expected, start) < ROUNDING
    assert [line["step"] for line in ended.metrics(name)] == [1, 2, 3, 4]
    commit = read_commit(ended.folder(name) / "checkpoints" / "step-00000004")
    assert commit.world_size == (2 if name == "on_two_ranks" else 1)


def test_a_conversion_that_is_not_whole_or_of_another_checkpoint_is_made_anew(
    ended: Workplace, tmp_path: Path
) -> None:
    """Believed for its name, or for a file that says it is complete, it would be trained on."""
    stopped_short(ended, "tied", "with_conversions")
    checkpoints = ended.folder("with_conversions") / "checkpoints"
    (source,) = checkpoints.iterdir()
    forged = checkpoints / f".{source.name}{CONVERTED_SUFFIX}"
    (forged / "engine").mkdir(parents=True)
    (forged / "COMPLETE").touch()
    output = ended.run([renamed(ended, "tied", "with_conversions")], ranks=1)
    assert f"converting {source} for another number of ranks" in output
    assert ended.metrics("with_conversions") == ended.metrics("tied_on_one_rank")
    assert not forged.exists()

    (working := tmp_path / "working" / "engine").mkdir(parents=True)
    (working / "weights.pt").write_bytes(b"weights")
    publish_conversion(working.parent, tmp_path / "converted", "a" * 64)
    found = read_conversion(tmp_path / "converted")
    assert found is not None and found.source == "a" * 64 and list(found.files) == ["engine/weights.pt"]
    with ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here:
        assert is_conversion_of(tmp_path / "converted", "a" * 64, here)
        assert not is_conversion_of(tmp_path / "converted", "b" * 64, here)
        (tmp_path / "converted" / "engine" / "weights.pt").write_bytes(b"wEights")
        assert not is_conversion_of(tmp_path / "converted", "a" * 64, here)
        for spoilt in (b"", b"{}", b"x" * 100):
            (tmp_path / "converted" / CONVERSION_NAME).write_bytes(spoilt)
            assert not is_conversion_of(tmp_path / "converted", "a" * 64, here)


def test_the_number_of_ranks_changes_nothing(ended: Workplace) -> None:
    start = student(all_runs(ended)["tied"]["student"]["config"], seed=0, vocabulary=VOCABULARY).state_dict()
    found, expected = ended.weights("alone", STEPS), ended.weights("tied", STEPS)
    assert relative_difference(found, expected, start) < ROUNDING
    for ours, theirs in zip(ended.metrics("alone"), ended.metrics("tied"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_bad_numbers_stop_the_run_with_step_and_rows(workplace: Workplace) -> None:
    values = workplace.run_values("diverging", optimizer={"learning_rate": 1e30})
    output = workplace.run([values], ranks=1, expected=2)
    assert "Step 2 gave a gradient that is not a finite number, though its losses are, on rows [" in output
    record = json.loads((workplace.folder("diverging") / "FAILED.json").read_text())
    assert record["rank"] == 0 and "Step 2" in record["message"] and "log_step" in record["traceback"]
    assert not list((workplace.folder("diverging") / "checkpoints").glob("step-*"))


def refused(work: Workplace, name: str, **changes: dict[str, object]) -> str:
    """The sentence with which a start on an existing run is refused; the run folder is left as it was."""
    values = renamed(work, "tied", name)
    for section, change in changes.items():
        values[section] = {**values.get(section, {}), **change}
    before = sorted((path, path.stat().st_mtime_ns) for path in work.folder(name).rglob("*"))
    with (
        ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here,
        pytest.raises(CheckpointError) as caught,
    ):
        train_on(here, configured(Config(), values), [])
    assert sorted((path, path.stat().st_mtime_ns) for path in work.folder(name).rglob("*")) == before
    return str(caught.value)


def test_what_does_not_fit_is_refused(ended: Workplace) -> None:
    def say(**changes: dict[str, object]) -> str:
        return refused(ended, "alone", **changes)

    other_store = say(
        store={"path": str(ended.root / "tokens")}, objective={"kd_weight": 0.0, "ce_weight": 1.0}
    )
    assert "another store" in other_store and ended.store.digest[:12] in other_store
    assert "seed 0 -> 1" in say(train={"seed": 1})
    assert "objective.kd_weight 0.75 -> 0.5" in say(objective={"kd_weight": 0.5, "ce_weight": 0.25})
    assert "another learning rate" in say(train={"steps": 2 * STEPS})
    assert "already holds a run" in say(train={"resume": "never"})
    assert "is not a checkpoint" in say(train={"resume": str(ended.root)})
    older = ended.folder("alone") / "checkpoints" / "step-00000002"
    assert "is older than" in say(train={"resume": str(older)})


def test_a_checkpoint_whose_evaluation_was_made_up_for_is_kept_as_the_best(workplace: Workplace) -> None:
    """It was stopped before its evaluation, so that its record has no loss; later ones are worse."""

    def values(steps: int, rate: float) -> dict[str, Any]:
        train = {"steps": steps, "evaluate_every": 4, "evaluate_rows": 3, "checkpoint_every": 2}
        kept = {"keep_checkpoints": 1, "keep_best": 1, "allow": ["schedule"]}
        return workplace.run_values(
            "best", train=train | kept, optimizer={"learning_rate": rate}, schedule={"kind": "constant"}
        )

    workplace.run([values(4, 1e-2)], ranks=1)
    folder = workplace.folder("best")
    place = folder / "checkpoints" / "step-00000004"
    (place / COMMIT_NAME).write_bytes(commit_bytes(replace(read_commit(place), heldout_loss=None), place))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "heldout"
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    (folder / "DONE.json").unlink()
    workplace.run([values(8, 1.0)], ranks=1)
    losses = {line["step"]: line["loss"] for line in workplace.metrics("best", "heldout")}
    assert losses[4] < losses[8]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000008"]


def test_the_mark_of_a_finished_run_is_made_up_for(ended: Workplace) -> None:
    """Killed between the last checkpoint and the mark."""
    folder = ended.folder("alone")
    wanted = (folder / "DONE.json").read_text()
    (folder / "DONE.json").rename(folder / "FAILED.json")
    with ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here:
        train_on(here, configured(Config(), renamed(ended, "tied", "alone")), [])
    assert (folder / "DONE.json").read_text() == wanted and not (folder / "FAILED.json").exists()


def test_the_student_s_folder_may_move_and_its_content_may_not_change(workplace: Workplace) -> None:
    """Weights come from the checkpoint after a stop, but a run that began elsewhere is another run."""
    first, second = workplace.root / "student_a", workplace.root / "elsewhere" / "student_b"
    shutil.copytree(workplace.root / "pretrained", first)

    def values(place: Path, steps: int) -> dict[str, Any]:
        return workplace.run_values(
            "moved",
            student={"path": str(place), "config": {}},
            schedule={"kind": "constant"},
            train={"steps": steps, "checkpoint_every": 2},
        )

    workplace.run([values(first, 2)], ranks=1)
    second.parent.mkdir()
    first.rename(second)
    output = workplace.run([values(second, 4)], ranks=1)
    assert "The student lies elsewhere, and is the same: student.path" in output and str(second) in output
    assert "start: from" in output and "step-00000002, step 2" in output

    weights = second / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with (
        ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here,
        pytest.raises(CheckpointError, match=rf"other weights than student\.path={second} holds now"),
    ):
        train_on(here, configured(Config(), values(second, 6)), [])
