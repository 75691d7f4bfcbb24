"""What fails on one rank or on the disk ends the whole job in one sentence, and the same command goes on."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed_harness import VOCABULARY, Workplace

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.trainer.data.order import BatchShape, micro_batches

pytestmark = pytest.mark.distributed

ROWS, STEPS, RANKS = 8, 4, 2
STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def started(store: Path, root: Path, *more: str) -> tuple[list[int], str]:
    """Trains on two ranks by the command line; returns the exit codes and everything that was printed."""
    return ended(start(store, root, *more))


def start(store: Path, root: Path, *more: str) -> "list[subprocess.Popen[str]]":
    """Starts a training on two ranks.

    No launcher: one would kill the other rank before it can show that it ends by itself.
    """
    words = [
        *(sys.executable, "-m", "sparsekd.trainer.door.cli", "train"),
        *(f"store.path={store}", f"run.root={root}", "run.name=run", "launch=cpu", "tracking=disabled"),
        *("engine.dtype=float32", "engine.zero_stage=3", "objective=kd", "schedule.warmup_steps=1"),
        *(f"train.steps={STEPS}", f"train.global_batch_rows={ROWS}", "train.micro_batch_rows=2"),
        *("train.log_every=1", "train.evaluate_rows=0", "train.prefetch_steps=1"),
        *(f"+student.config.{key}={value}" for key, value in STUDENT.items()),
        *more,
    ]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
    return [
        subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(RANKS)
    ]


def ended(jobs: "list[subprocess.Popen[str]]") -> tuple[list[int], str]:
    """Waits for all ranks of a job; returns the exit codes and everything that was printed."""
    try:
        output = "".join(job.communicate(timeout=120)[0] for job in jobs)
    finally:
        for job in jobs:
            job.kill()
    return [job.returncode for job in jobs], output


def the_sentence(output: str) -> str:
    """What was said of the failure, once and without a traceback."""
    assert "Traceback" not in output, output[-6000:]
    said = [line for line in output.splitlines() if line.startswith("sparsekd train: ")]
    assert len(said) == 1, output[-6000:]
    return said[0]


@pytest.fixture
def damaged(workplace: Workplace, tmp_path: Path) -> Path:
    """A copy of the store, one byte changed in a row that the second rank alone reads, in its third step."""
    store = tmp_path / "store"
    shutil.copytree(workplace.root / "store", store)
    rows = open_store(store).rows("train")
    shape = BatchShape(global_rows=ROWS, micro_rows=2, world_size=RANKS)
    read = [
        {row for part in micro_batches(ROWS * step, shape, rank=rank, rows=rows, seed=0) for row in part}
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
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    codes, output = again()
    assert codes == [0, 0], output[-6000:]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    assert (small_disk / "run" / "DONE.json").is_file() and not (small_disk / "run" / "FAILED.json").exists()


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
