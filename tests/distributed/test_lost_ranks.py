"""A rank that is killed or hangs is named by those that are left: not the survivor's broken connection."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed_harness import Workplace
from jobs import command, ended, start, started, the_sentence, wait_for_lines

pytestmark = pytest.mark.distributed

LONG = ("train.steps=100000", "train.checkpoint_every=3", "train.keep_checkpoints=1")


def failed(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "run" / "FAILED.json").read_text()))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_and_the_same_command_goes_on(
    workplace: Workplace, tmp_path: Path, killed: int
) -> None:
    jobs = start(workplace.root / "store", tmp_path, *LONG)
    wait_for_lines(tmp_path / "run", jobs, count=7)
    jobs[killed].kill()
    codes, output = ended(jobs)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 2, output[-6000:]
    said = the_sentence(output)
    assert f"Rank {killed} (process {jobs[killed].pid} on " in said and "died without a word" in said
    record = failed(tmp_path)
    assert record["rank"] == killed and record["pid"] == jobs[killed].pid
    assert record["noticed_by"] == 1 - killed and record["step"] >= 7
    codes, output = started(workplace.root / "store", tmp_path, *LONG, "train.steps=12", "schedule=constant")
    assert codes == [2, 2] and "another learning rate" in the_sentence(output)  # it is a run that goes on
    assert not (tmp_path / "run" / "OWNER.json").exists()


def test_a_rank_that_is_stopped_is_named(workplace: Workplace, tmp_path: Path) -> None:
    jobs = start(workplace.root / "store", tmp_path, *LONG, "engine.timeout_minutes=0.2")
    wait_for_lines(tmp_path / "run", jobs, count=4)
    jobs[1].send_signal(signal.SIGSTOP)
    assert jobs[0].wait(100) == 2
    jobs[1].kill()
    said = the_sentence(ended(jobs)[1])
    assert f"Rank 1 (process {jobs[1].pid} on " in said and "is stopped" in said
    assert failed(tmp_path)["rank"] == 1


def test_under_torchrun_the_killed_rank_is_named_too(workplace: Workplace, tmp_path: Path) -> None:
    """Which ends the survivor as soon as it sees the death."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
    launcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("--no-python", *command(workplace.root / "store", tmp_path, *LONG)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    )
    wait_for_lines(tmp_path / "run", [launcher], count=4)
    ranks = {
        int(process.environ()["RANK"]): process
        for process in psutil.Process(launcher.pid).children(recursive=True)
    }
    ranks[1].kill()
    assert launcher.wait(60) == 1
    record = failed(tmp_path)
    assert record["rank"] == 1 and record["pid"] == ranks[1].pid


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (
            ["objective=kd_ce", "objective.z_loss=1e38"],
            "a loss that is not a finite number, on rank 0, micro-batch 1 of 2, rows [",
        ),
        (
            ["optimizer.learning_rate=1e30"],
            "a gradient that is not a finite number, though its losses are, on rows [",
        ),
    ],
)
def test_numbers_that_are_none_are_named_with_rank_and_micro_batch(
    workplace: Workplace, tmp_path: Path, words: list[str], found: str
) -> None:
    codes, output = started(workplace.root / "store", tmp_path, *words)
    assert codes == [2, 2] and found in the_sentence(output)
    record = failed(tmp_path)
    assert record["error"] == "UserError" and found in record["message"]
