"""Asked to stop, a job saves where it stands, and the same command goes on as if it had never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from caught_signals import send_when_caught
from distributed_harness import TIMED_FIELDS, Workplace
from jobs import command, ended, start, start_anew, started, the_sentence, wait_for_lines

from sparsekd.trainer.export.export import consolidated_weights
from sparsekd.trainer.run.stop import STOPPED_CODE

pytestmark = pytest.mark.distributed

STEPS = 40
# Lines and checkpoints of their own steps: where the stop falls, there is neither.
LONG = (
    *(f"train.steps={STEPS}", "train.log_every=7", "train.checkpoint_every=1000"),
    *("train.evaluate_every=9", "train.evaluate_rows=4"),
)


def lines(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMED_FIELDS} for record in records]


@pytest.fixture(scope="module")
def quiet(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a job that nobody stopped."""
    root = tmp_path_factory.mktemp("quiet")
    codes, output = started(workplace.root / "store", root, *LONG)
    assert codes == [0, 0], output[-6000:]
    return root / "run"


def assert_equal(run: Path, quiet: Path) -> None:
    assert (run / "DONE.json").is_file() and not (run / "STOPPED.json").exists()
    assert lines(run) == lines(quiet)
    found, expected = (
        consolidated_weights(folder / "checkpoints" / f"step-{STEPS:08d}") for folder in (run, quiet)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("sent", "to", "reason", "requeue"),
    [
        (signal.SIGUSR2, [0, 1], "warning", True),
        (signal.SIGTERM, [1], "terminated", False),
        (signal.SIGINT, [0], "interrupted", False),
    ],
)
def test_a_signal_costs_no_step(
    workplace: Workplace,
    tmp_path: Path,
    quiet: Path,
    sent: signal.Signals,
    to: list[int],
    reason: str,
    requeue: bool,
) -> None:
    """Also where it reaches one rank alone."""
    jobs = start(workplace.root / "store", tmp_path, *LONG)
    wait_for_lines(tmp_path / "run", jobs)
    for rank in to:
        jobs[rank].send_signal(sent)
    jobs[to[0]].send_signal(sent)  # a repeat says nothing new
    codes, output = ended(jobs)
    assert codes == [STOPPED_CODE] * 2, output[-6000:]
    assert "asked to stop" in the_sentence(output)
    run = tmp_path / "run"
    stopped = json.loads((run / "STOPPED.json").read_text())
    assert stopped.pop("step") < STEPS
    assert stopped == {"reason": reason, "signal": sent.name, "requeue": requeue}
    (saved,) = (run / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert json.loads((run / "STOPPED.json").read_text())["step"] == step
    assert not (run / "FAILED.json").exists() and not (run / "OWNER.json").exists()
    codes, output = started(workplace.root / "store", tmp_path, *LONG)
    assert codes == [0, 0] and f"start: from {saved}, step {step}" in output, output[-6000:]
    assert_equal(run, quiet)


def test_a_job_that_is_stopped_before_its_ranks_have_met_leaves(workplace: Workplace, tmp_path: Path) -> None:
    """A rank that does not come would be waited for beyond the end of the job's time."""
    first, second = start(workplace.root / "store", tmp_path, *LONG)
    second.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(
        connection.status == psutil.CONN_LISTEN for connection in psutil.Process(first.pid).net_connections()
    ):
        time.sleep(0.02)
    first.send_signal(signal.SIGUSR2)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == STOPPED_CODE, output[-6000:]
    assert "stop before its ranks had met (warning, SIGUSR2); nothing was begun; the same command" in output
    assert not (tmp_path / "run").exists()


def test_a_job_that_is_stopped_while_it_starts_leaves_its_mark_and_begins_nothing(
    workplace: Workplace, tmp_path: Path
) -> None:
    """The signal comes to one rank while it loads libraries, long before there is a step to stop at."""
    jobs = start_anew(workplace.root / "store", tmp_path, *LONG)
    send_when_caught(jobs[1], signal.SIGUSR2)
    codes, output = ended(jobs)
    assert codes == [STOPPED_CODE] * 2, output[-6000:]
    # The folder of checkpoints is there or not, as the signal fell; a checkpoint is not.
    assert "student:" not in output and not any((tmp_path / "run" / "checkpoints").glob("*"))
    stopped = json.loads((tmp_path / "run" / "STOPPED.json").read_text())
    assert stopped == {"reason": "warning", "signal": "SIGUSR2", "requeue": True, "step": 0}


def test_a_start_that_is_stopped_while_it_reads_a_checkpoint_leaves_its_mark(
    workplace: Workplace, tmp_path: Path
) -> None:
    """At the step of that checkpoint, and no earlier mark is taken for its own."""
    words = ("train.steps=6", "train.checkpoint_every=2", "train.evaluate_rows=0")
    codes, output = started(workplace.root / "store", tmp_path, *words)
    assert codes == [0, 0], output[-6000:]
    jobs = start_anew(workplace.root / "store", tmp_path, *words, "train.steps=9", "train.allow=[schedule]")
    # The first rank alone would end the meeting, of which no mark is left.
    send_when_caught(jobs[1], signal.SIGUSR2)
    codes, output = ended(jobs)
    assert codes == [STOPPED_CODE] * 2, output[-6000:]
    stopped = json.loads((tmp_path / "run" / "STOPPED.json").read_text())
    assert stopped == {"reason": "warning", "signal": "SIGUSR2", "requeue": True, "step": 6}
    assert not (tmp_path / "run" / "DONE.json").exists()


def test_the_end_of_slurms_time_is_a_signal(workplace: Workplace, tmp_path: Path) -> None:
    """The first checkpoint's time is not known yet, and taken for a minute."""
    before = os.environ.get("SLURM_JOB_END_TIME")
    os.environ["SLURM_JOB_END_TIME"] = str(int(time.time()) + 158)
    try:
        jobs = start(workplace.root / "store", tmp_path, *LONG, "train.steps=100000")
    finally:
        os.environ.pop("SLURM_JOB_END_TIME")
        if before is not None:
            os.environ["SLURM_JOB_END_TIME"] = before
    codes, output = ended(jobs)
    assert codes == [STOPPED_CODE] * 2, output[-6000:]
    stopped = json.loads((tmp_path / "run" / "STOPPED.json").read_text())
    assert stopped["reason"] == "time limit" and stopped["signal"] is None and stopped["requeue"]


def test_a_second_interrupt_leaves_at_once(workplace: Workplace, tmp_path: Path) -> None:
    """Also while a rank waits in a collective for one that sleeps: no handler of Python's would run there."""
    jobs = start(workplace.root / "store", tmp_path, *LONG, "train.steps=100000")
    wait_for_lines(tmp_path / "run", jobs)
    jobs[1].send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    jobs[0].send_signal(signal.SIGINT)
    time.sleep(0.2)
    jobs[0].send_signal(signal.SIGINT)  # as a launcher repeats it
    time.sleep(1.0)
    assert jobs[0].poll() is None
    time.sleep(1.2)
    jobs[0].send_signal(signal.SIGINT)
    assert jobs[0].wait(20) == 130
    jobs[1].kill()
    assert "interrupted again: leaving at once" in ended(jobs)[1]


def test_ranks_whose_launcher_dies_save_and_leave(workplace: Workplace, tmp_path: Path, quiet: Path) -> None:
    """SIGUSR2 ends a torchrun that was not told of it, and leaves its ranks without a parent."""
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
    wait_for_lines(tmp_path / "run", [launcher])
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(signal.SIGUSR2)
    assert launcher.wait(20) == -signal.SIGUSR2
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() for rank in ranks)
    stopped = json.loads((tmp_path / "run" / "STOPPED.json").read_text())
    assert stopped["reason"] == "launcher died"
    codes, output = started(workplace.root / "store", tmp_path, *LONG)
    assert codes == [0, 0], output[-6000:]
    assert_equal(tmp_path / "run", quiet)


def test_an_evaluation_that_was_cut_short_is_made_up_for(
    workplace: Workplace, tmp_path: Path, quiet: Path
) -> None:
    """As if the run had been stopped in the evaluation of its last step, or of one in the middle."""
    run = tmp_path / "run"
    shutil.copytree(quiet, run)
    (run / "DONE.json").unlink()
    written = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(written[-1])["kind"] == "heldout"
    (run / "metrics.jsonl").write_text("".join(written[:-1]))
    codes, output = started(workplace.root / "store", tmp_path, *LONG)
    assert codes == [0, 0], output[-6000:]
    assert_equal(run, quiet)


@pytest.mark.parametrize("steps", [STEPS, STEPS + 4])
def test_an_evaluation_that_a_stop_cuts_short_is_owed_again(
    workplace: Workplace, tmp_path: Path, quiet: Path, steps: int
) -> None:
    """After the last step, where the run is not done without it; and in the middle, before further steps."""
    run = tmp_path / "run"
    shutil.copytree(quiet, run)
    (run / "DONE.json").unlink()
    written = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(written[:-1]))
    more = (*LONG, "train.evaluate_rows=16", "train.evaluate_every=8", f"train.steps={steps}")
    more += ("train.allow=[schedule]",)
    jobs = start(workplace.root / "store", tmp_path, *more)
    pulse = run / "logs" / "rank_0.pulse"
    while not (pulse.is_file() and "convert" in pulse.read_text()) and jobs[0].poll() is None:
        time.sleep(0.002)
    for job in jobs:
        job.send_signal(signal.SIGUSR2)
    codes, output = ended(jobs)
    assert codes == [STOPPED_CODE] * 2, output[-6000:]
    assert json.loads((run / "STOPPED.json").read_text())["step"] == STEPS
    assert not (run / "DONE.json").exists()
    codes, output = started(workplace.root / "store", tmp_path, *more)
    assert codes == [0, 0] and (run / "DONE.json").is_file(), output[-6000:]
    heldout = [line["step"] for line in lines(run) if line["kind"] == "heldout"]
    assert heldout[-(1 + (steps > STEPS)) :] == [STEPS, steps][: 1 + (steps > STEPS)]


def test_a_second_job_in_the_folder_is_refused_and_the_first_goes_on(
    workplace: Workplace, tmp_path: Path
) -> None:
    store, run = workplace.root / "store", tmp_path / "run"
    jobs = start(store, tmp_path, "train.steps=100000", "train.checkpoint_every=5")
    wait_for_lines(run, jobs)
    settings = (run / "config.yaml").read_text()
    codes, output = started(store, tmp_path, "train.steps=100000", "train.checkpoint_every=2")
    said = the_sentence(output)
    assert codes == [2, 2] and f"{run} belongs to process {jobs[0].pid}" in said
    for job in jobs:
        job.send_signal(signal.SIGTERM)
    codes, output = ended(jobs)
    assert codes == [STOPPED_CODE] * 2, output[-6000:]
    assert (run / "config.yaml").read_text() == settings
    last = json.loads((run / "STOPPED.json").read_text())["step"]
    assert [line["step"] for line in lines(run)] == list(range(1, last + 1))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"step-{last - last % 5:08d}", f"step-{last:08d}"] or last % 5 == 0
