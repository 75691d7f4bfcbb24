"""Training on a real cluster: to its end, over the end of its time, and over the death of a node."""

import json
import time
from pathlib import Path
from signal import SIGTERM, SIGUSR2

import pytest
from distributed_harness import Workplace
from slurm_cluster import NODES, Cluster, thaw
from slurm_jobs import LENGTH, output, submit, train_words

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def quiet(cluster: Cluster, workplace: Workplace) -> list[dict[str, object]]:
    """The figures of a run that nothing happens to."""
    job = submit(cluster, "train.sbatch", workplace, words=train_words(workplace, "quiet"))
    cluster.wait(job, "COMPLETED")
    return workplace.metrics("quiet")


def wait_for_checkpoint(cluster: Cluster, job: int, folder: Path) -> None:
    """Until the run has its first checkpoint, and is in the middle of its steps."""
    deadline = time.monotonic() + 120
    while not any((folder / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline, output(cluster, job)[-4000:]
        time.sleep(0.05)


def starts(cluster: Cluster, job: int) -> int:
    """How often a job has begun."""
    return int(cluster.field(job, "Restarts")) + 1


@pytest.mark.ci
def test_two_nodes_train_to_the_end(quiet: list[dict[str, object]], workplace: Workplace) -> None:
    assert [line["step"] for line in quiet] == list(range(1, LENGTH["steps"] + 1))
    assert (workplace.folder("quiet") / "DONE.json").is_file()
    logs = sorted(path.name for path in (workplace.folder("quiet") / "logs").glob("rank_*.log"))
    assert logs == ["rank_0.log", "rank_1.log"]


def test_a_node_that_dies_costs_no_step(
    cluster: Cluster, workplace: Workplace, quiet: list[dict[str, object]]
) -> None:
    job = submit(cluster, "train.sbatch", workplace, words=train_words(workplace, "node"))
    wait_for_checkpoint(cluster, job, workplace.folder("node"))
    still = cluster.kill_node(NODES[1])
    assert still, "nothing ran on the node"
    cluster.wait(job, "PENDING")  # by Slurm itself, when the node has not answered for SlurmdTimeout
    for process in still:
        process.kill()
    cluster.start_node(NODES[1])
    cluster.wait(job, "COMPLETED")
    assert starts(cluster, job) == 2
    assert workplace.metrics("node") == quiet


def stopped(workplace: Workplace, name: str) -> dict[str, object]:
    return dict(json.loads((workplace.folder(name) / "STOPPED.json").read_text()))


def newest_step(folder: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.ci
def test_the_end_of_its_time_costs_a_run_nothing(
    cluster: Cluster, workplace: Workplace, quiet: list[dict[str, object]]
) -> None:
    words = train_words(workplace, "time", checkpoint_every=3)
    job = submit(cluster, "train.sbatch", workplace, "--time=60", "--signal=USR2@150", words=words)
    wait_for_checkpoint(cluster, job, workplace.folder("time"))
    ranks = cluster.freeze(job)
    # Two to three minutes are left, and Slurm looks every half minute whether 150 s are near.
    hours, minutes, _ = map(int, cluster.field(job, "RunTime").split(":"))
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 3}")
    thaw(ranks, when=SIGUSR2)
    cluster.wait(job, "PENDING")
    mark = stopped(workplace, "time")
    assert mark["requeue"] is True and mark["step"] == newest_step(workplace.folder("time"))
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    cluster.wait(job, "COMPLETED")
    assert starts(cluster, job) == 2
    assert workplace.metrics("time") == quiet
    assert not (workplace.folder("time") / "STOPPED.json").exists()


def test_a_warning_by_hand_is_saved_and_requeued(
    cluster: Cluster, workplace: Workplace, quiet: list[dict[str, object]]
) -> None:
    job = submit(cluster, "train.sbatch", workplace, words=train_words(workplace, "warned"))
    wait_for_checkpoint(cluster, job, workplace.folder("warned"))
    ranks = cluster.freeze(job)
    cluster.run("scancel", "--signal=USR2", str(job))
    thaw(ranks, when=SIGUSR2)
    cluster.wait(job, "COMPLETED")
    assert starts(cluster, job) == 2
    assert workplace.metrics("warned") == quiet


def test_who_stops_a_job_stops_it(
    cluster: Cluster, workplace: Workplace, quiet: list[dict[str, object]]
) -> None:
    folder = workplace.folder("cancelled")
    words = train_words(workplace, "cancelled")
    asked = submit(cluster, "train.sbatch", workplace, words=words)
    wait_for_checkpoint(cluster, asked, folder)
    ranks = cluster.freeze(asked)
    cluster.run("scancel", "--signal=TERM", str(asked))
    thaw(ranks, when=SIGTERM)
    cluster.wait(asked, "FAILED")
    assert cluster.field(asked, "ExitCode") == "75:0"
    mark = stopped(workplace, "cancelled")
    assert mark["requeue"] is False and mark["step"] == newest_step(folder)

    ended = submit(cluster, "train.sbatch", workplace, words=words)
    while (folder / "STOPPED.json").exists():
        cluster.wait(ended, "PENDING", "RUNNING")
        time.sleep(0.05)
    cluster.freeze(ended)
    cluster.run("scancel", str(ended))
    cluster.wait(ended, "CANCELLED")
    assert starts(cluster, asked) == starts(cluster, ended) == 1

    last = submit(cluster, "train.sbatch", workplace, words=words)
    cluster.wait(last, "COMPLETED")
    assert workplace.metrics("cancelled") == quiet
