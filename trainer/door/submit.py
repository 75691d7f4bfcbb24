"""`launch=slurm`: a verb becomes a batch script in a folder of its own, which sbatch takes."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsekd.launch.batch import batch_script, job_name, submit
from sparsekd.launch.env import torch_variables
from sparsekd.trainer.config.schema import Config, require, run_folder
from sparsekd.trainer.run.errors import ConfigError, TypedError, UserError, writing
from sparsekd.trainer.run.files import write_whole

VERBS = ("capture", "train")


@dataclass(frozen=True)
class Job:
    """What is to be submitted: the folder of its script and logs, and the script."""

    verb: str
    folder: Path
    script: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.verb}.sbatch"


def job_of(config: Config, verb: str, words: Sequence[str]) -> Job:
    """The batch job of a verb.

    Args:
        config: The composed configuration, of which `launch.slurm` is read.
        verb: `capture` or `train`.
        words: What was typed behind the verb, without `--dry-run`.

    Raises:
        ConfigError: Another verb, a setting that the verb has no use for, or one that no script can hold.
    """
    slurm = config.launch.slurm
    if verb not in VERBS:
        raise ConfigError(
            f"launch.scheduler=slurm submits {' and '.join(VERBS)}, not {verb}; leave launch=slurm away, or "
            f"call `sparsekd {verb}` in a batch script of yours."
        )
    if slurm.array > 1 and verb != "capture":
        raise ConfigError(
            f"launch.slurm.array={slurm.array} is for capture, whose jobs share a store; {verb} runs on "
            "launch.slurm.nodes."
        )
    folder, name = _place(config, verb)
    if "\\" in str(folder.absolute()):
        raise ConfigError(
            f"launch=slurm: {folder} has a backslash in it, which Slurm takes out of the names of its logs; "
            "choose another run.root or run.name."
        )
    number = "%A_%a" if slurm.array > 1 else "%j"
    log = str(folder.absolute() / "logs").replace("%", "%%")
    options = {
        "job-name": job_name(name),
        "chdir": str(Path.cwd()),
        "output": f"{log}/slurm-{number}.log",
        "nodes": str(slurm.nodes),
        "ntasks-per-node": str(slurm.tasks_per_node),
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "signal": f"USR2@{slurm.signal_seconds}",
        "array": f"0-{slurm.array - 1}" if slurm.array > 1 else None,
    }
    given = {option: str(value) for option, value in options.items() if value is not None}
    try:
        script = batch_script(verb, given, slurm.extra, words, programs=str(Path(sys.executable).parent))
    except ValueError as error:
        raise ConfigError(f"launch=slurm: {error}.") from error
    return Job(verb, folder, script)


def _place(config: Config, verb: str) -> tuple[Path, str]:
    """Folder and name of a job: the run's; capture has none, and gets one by the store's name."""
    if verb == "train":
        return Path(run_folder(config)), f"sparsekd-train-{config.run.name}"
    store = require(config.store.path, "store.path", "to know where the logit store goes")
    name = f"capture-{store.rstrip('/').rpartition('/')[2]}"
    return Path(config.run.root, name), f"sparsekd-{name}"


def submit_job(job: Job) -> str:
    """Writes the script into the job's folder and submits it; returns the job's number.

    Raises:
        UserError: It cannot be written, or sbatch refuses it.
    """
    with writing(job.path):
        (job.folder / "logs").mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its log
        write_whole(job.path, job.script)
    try:
        return submit(str(job.path))
    except ValueError as error:
        raise UserError(f"launch=slurm: {error}.") from error


def require_alone(why: str) -> None:
    """Refuses to go on as one of several ranks, each of which would do the same.

    Raises:
        TypedError: There are others.
    """
    ranks = torch_variables(os.environ).get("WORLD_SIZE", os.environ.get("WORLD_SIZE"))
    if ranks != "1":
        raise TypedError(f"{why}, but this is one of {ranks} ranks; call it without torchrun or srun.")


def run_submitted(config: Config, verb: str, words: Sequence[str], *, dry_run: bool) -> None:
    """Shows the script of a verb, and submits it unless this is a dry run.

    Raises:
        UserError: No job can be made of the settings, or it cannot be submitted.
    """
    require_alone("launch=slurm submits one job")
    job = job_of(config, verb, words)
    print(job.script, flush=True)
    if dry_run:
        print(f"{verb}: a dry run; without --dry-run this is written to {job.path} and submitted")
        return
    number = submit_job(job)
    logs = shlex.quote(f"{job.folder}/logs")
    print(f"{verb}: {job.path} is submitted as job {number}")
    print(f"follow it: squeue -j {number}; tail -F {logs}/slurm-{number}*.log")
    if verb == "train":
        print(f"stop it, saved: scancel --signal=TERM {number}   at once: scancel {number}", flush=True)
