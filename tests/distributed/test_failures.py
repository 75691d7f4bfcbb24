"""What fails on one rank or on the disk ends the whole job in one sentence, and the same command goes on."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed_harness import Workplace
from jobs import RANKS, ROWS, STEPS, ended, start, started, the_sentence

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.trainer.data.order import BatchShape, GlobalOrder, micro_batches

pytestmark = pytest.mark.distributed


@pytest.fixture
def damaged(workplace: Workplace, tmp_path: Path) -> Path:
    """A copy of the store, one byte changed in a row that the second rank alone reads, in its third step."""
    store = tmp_path / "store"
    shutil.copytree(workplace.root / "store", store)
    order = GlobalOrder(open_store(store).rows("train"), seed=0)
    shape = BatchShape(global_rows=ROWS, micro_rows=2, world_size=RANKS)
    read = [
        {place.row for part in micro_batches(ROWS * step, shape, order, rank=rank) for place in part}
        for step in range(STEPS)
        for rank in range(RANKS)
    ]
    third = read[2 * RANKS + 1]
    row = min(third.difference({0}, *read[: 2 * RANKS + 1]))  # row 0 is read by the probe at the start
    flip_a_byte(store, "train", row)
    return store


def flip_a_byte(store: Path, split: str, row: int) -> None:
    shard, index = divmod(row, 8)
    place = store / "shards" / split / f"{shard // 1000:03d}" / f"{shard:06d}.arrow"
    entry = json.loads(place.with_suffix(".json").read_text())
    offset, length = entry["offsets"][index], entry["lengths"][index]
    data = bytearray(place.read_bytes())
    data[offset + length * 3 // 4] ^= 1
    place.write_bytes(data)


def test_a_damaged_row_that_one_rank_reads_later_ends_all(damaged: Path, tmp_path: Path) -> None:
    codes, output = started(damaged, tmp_path / "runs")
    said = the_sentence(output)
    assert codes == [2, 2] and "train: rank 1: " in said and str(damaged) in said
    assert "step 2/4" in output and "step 3/4" not in output
    record = json.loads((tmp_path / "runs" / "run" / "FAILED.json").read_text())
    assert record["rank"] == 1 and record["error"] == "DamagedStoreError"


def test_a_damaged_held_out_row_is_found_before_the_first_step(workplace: Workplace, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(workplace.root / "store", store)
    flip_a_byte(store, "heldout", open_store(store).rows("heldout") - 1)
    codes, output = started(store, tmp_path / "runs", "train.evaluate_rows=1000")
    said = the_sentence(output)
    assert codes == [2, 2] and "heldout" in said and "step 1/4" not in output
    assert not (tmp_path / "runs" / "run").exists()


def test_a_student_that_cannot_be_exported_is_refused_before_the_first_step(
    workplace: Workplace, tmp_path: Path
) -> None:
    """transformers gives a qwen2 model its own tokenizer class, which `evaluate` would refuse in the end."""
    codes, output = started(workplace.root / "store", tmp_path / "runs", "student.config.model_type=qwen2")
    said = the_sentence(output)
    assert codes == [2, 2] and "model type qwen2 cannot be exported" in said and "llama or qwen3" in said
    assert not (tmp_path / "runs" / "run").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint of the tiny student and not for two."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=420k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_sentence_and_room_lets_the_same_command_finish(
    workplace: Workplace, small_disk: Path
) -> None:
    def again() -> tuple[list[int], str]:
        return started(workplace.root / "store", small_disk, "train.checkpoint_every=2")

    checkpoints = small_disk / "run" / "checkpoints"
    codes, output = again()
    said = the_sentence(output)
    assert codes == [2, 2] and f"{checkpoints} cannot be written" in said and "bytes are free" in said
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    record = json.loads((small_disk / "run" / "FAILED.json").read_text())  # room was kept for it
    assert record["rank"] == 0 and "cannot be written" in record["message"]
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    codes, output = again()
    assert codes == [0, 0], output[-6000:]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    assert (small_disk / "run" / "DONE.json").is_file() and not (small_disk / "run" / "FAILED.json").exists()


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_the_first_step(
    workplace: Workplace, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,size=150k", str(small_disk)], check=True)
    codes, output = started(workplace.root / "store", small_disk)
    said = the_sentence(output)
    assert codes == [2, 2] and "checkpoints has no room for a checkpoint: one takes about 1" in said
    assert "step 1/4" not in output and (small_disk / "run" / "FAILED.json").is_file()


@pytest.mark.parametrize("writes", ["train.log_every=1", "train.checkpoint_every=20"])
def test_a_run_folder_that_is_removed_under_a_job_ends_it_with_a_sentence(
    workplace: Workplace, tmp_path: Path, writes: str
) -> None:
    """At the next line of metrics, or at the next checkpoint; not with code 0 and nothing to show for it."""
    run = tmp_path / "runs" / "run"
    more = ("train.steps=3000", "train.log_every=1000000", "train.checkpoint_every=1000000", writes)
    jobs = start(workplace.root / "store", run.parent, *more)
    deadline = time.monotonic() + 100
    metrics = run / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.02)
    shutil.rmtree(run)
    codes, output = ended(jobs)
    said = the_sentence(output)
    assert codes == [2, 2] and f"{run} is not there: it was removed while this command ran" in said
    assert not run.exists()


def test_a_checkpoint_that_cannot_be_removed_is_told_once_and_training_goes_on(
    workplace: Workplace, tmp_path: Path
) -> None:
    def again(steps: int) -> tuple[list[int], str]:
        more = ("train.checkpoint_every=2", "train.keep_checkpoints=1", "schedule.kind=constant")
        return started(workplace.root / "store", tmp_path, f"train.steps={steps}", *more)

    checkpoints = tmp_path / "run" / "checkpoints"
    codes, output = again(2)
    assert codes == [0, 0], output[-6000:]
    # What is mounted inside of a folder keeps it, also from root.
    place = checkpoints / "step-00000002" / "engine" / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True).returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        codes, output = again(8)
    finally:
        (mounted,) = checkpoints.glob("*step-00000002*/engine/mounted")
        subprocess.run(["umount", str(mounted)], check=True)
    assert codes == [0, 0], output[-6000:]
    kept = mounted.parents[1]
    assert output.count(f"warning: {kept} cannot be removed (Device or resource busy)") == 1, output[-6000:]
    assert sorted(path.name for path in checkpoints.iterdir()) == [kept.name, "step-00000008"]
