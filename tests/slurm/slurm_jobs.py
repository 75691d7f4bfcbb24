"""Tiny jobs for the cluster, through the same door and the same batch scripts as anybody's."""

import re
from pathlib import Path

from distributed_harness import Workplace, overrides_of
from slurm_cluster import Cluster, submitted

LAUNCH = Path(__file__).parents[2] / "launch" / "slurm"

# Sixteen micro-batches a step on each rank, so that a job lasts long enough to be met in its middle.
LENGTH = {
    "steps": 60,
    "global_batch_rows": 32,
    "micro_batch_rows": 1,
    "log_every": 1,
    "checkpoint_every": 4,
    "keep_checkpoints": 2,
}


def train_words(work: Workplace, name: str, **train: int) -> list[str]:
    """The overrides of a tiny run: dropout, so that a wrong seed shows, and every ZeRO-3 threshold at 0."""
    config = work.run_values("")["student"]["config"] | {"attention_dropout": 0.1}
    values = work.run_values(name, train=LENGTH | train, student={"config": config})
    return overrides_of(values)


def submit(
    cluster: Cluster, script: str, work: Workplace, *options: str, words: list[str], nodes: int = 2
) -> int:
    """Submits a template of launch/slurm with one task on each node, and returns the job's number."""
    printed = cluster.run(
        *("sbatch", f"--nodes={nodes}", "--ntasks-per-node=1", f"--chdir={work.root}", *options),
        *(str(LAUNCH / script), *words),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    return submitted(printed)


def output(cluster: Cluster, job: int | str) -> str:
    """What a job has printed so far."""
    path = Path(cluster.field(job, "StdOut"))
    return path.read_text() if path.exists() else ""


def through_the_door(cluster: Cluster, work: Path, verb: str, *words: str) -> str:
    """Calls `sparsekd VERB launch=slurm ...` in a folder, and returns the number of the job it submitted."""
    printed = cluster.run(
        *("env", f"--chdir={work}", "sparsekd", verb, "launch=slurm", "launch.device=cpu", *words),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    found = re.search(r"is submitted as job ([0-9]+)\n", printed)
    assert found is not None, printed
    return found[1]
