"""`launch=slurm`: what the door writes is a job, and an array of captures makes one store."""

import time
from pathlib import Path

import pytest
from capture_world import files_of, make_teacher, make_tokens
from distributed_harness import Workplace
from slurm_cluster import Cluster
from slurm_jobs import output, through_the_door, train_words

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

# What shells, sbatch and Slurm's file names would each read in their own way.
NAME = """it's $HOME "q" %j `x` #1"""


def test_the_door_submits_once_and_loses_no_letter(cluster: Cluster, workplace: Workplace) -> None:
    words = train_words(workplace, NAME, steps=3)
    job = through_the_door(cluster, workplace.root, "train", *words, "launch.slurm.nodes=2")
    cluster.wait(job, "COMPLETED")
    folder = workplace.root / "runs" / NAME
    assert (folder / "DONE.json").is_file()
    assert Path(folder / "logs" / f"slurm-{job}.log").is_file()
    assert (folder / "logs" / "rank_1.log").is_file()
    # The script can be submitted again as it is, and the job itself has submitted nothing.
    last = cluster.run("sbatch", "--parsable", str(folder / "train.sbatch")).strip()
    assert int(last) == int(job) + 1
    cluster.wait(last, "COMPLETED")


def test_an_array_of_captures_makes_one_store_though_a_task_is_killed(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "tokens").mkdir()
    tokens = make_tokens(tmp_path / "tokens")
    teacher = make_teacher(tmp_path / "teacher", "llama", tokenizer=tokens / "tokenizer")
    words = [f"store.tokens={tokens}", f"teacher.path={teacher}", "teacher.dtype=float32", "store.k=5"]
    quiet = through_the_door(cluster, tmp_path, "capture", *words, "store.path=quiet")
    cluster.wait(quiet, "COMPLETED")

    array = through_the_door(
        cluster, tmp_path, "capture", *words, "store.path=shared", "launch.slurm.array=3"
    )
    tasks = [f"{array}_{number}" for number in range(3)]
    deadline = time.monotonic() + 120
    while not (tmp_path / "shared" / "MANIFEST.json").exists():
        assert time.monotonic() < deadline, [output(cluster, task) for task in tasks]
        time.sleep(0.02)
    for process in cluster.ranks_of(SLURM_ARRAY_TASK_ID="1"):
        process.kill()
    cluster.wait(tasks[1], "FAILED")
    for task in (tasks[0], tasks[2]):
        cluster.wait(task, "COMPLETED")
        said = output(cluster, task)
        assert "shared is sealed" in said or "another worker has sealed it" in said
    whole = files_of(tmp_path / "quiet")
    shared = {name: data for name, data in files_of(tmp_path / "shared").items() if ".tmp-" not in name}
    assert shared == whole
