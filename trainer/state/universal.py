"""Going on with another number of ranks, through DeepSpeed's universal checkpoint.

A ZeRO checkpoint holds one part for each rank. For another number of ranks the parts are merged parameter by
parameter (by DeepSpeed's own converter, on the first rank) and cut anew while loading.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import deepspeed

from sparsekd.trainer.run.errors import CheckpointError
from sparsekd.trainer.run.ranks import Ranks, agree, leave_together
from sparsekd.trainer.state.checkpoint import CONVERTED_SUFFIX, load
from sparsekd.trainer.state.record import ENGINE_FOLDER

# Each worker holds one rank's part of the optimizer state in memory.
_LARGEST_WORKERS = 8
_CONVERTER = "deepspeed.checkpoint.ds_to_universal"


def load_for_other_ranks(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, here: Ranks) -> None:
    """Brings a checkpoint of another world size into the engine.

    Raises:
        CheckpointError: The conversion failed.
    """
    # A name that `prune` takes for a leftover: it goes when the next checkpoint is published.
    converted = checkpoint.with_name(f".{checkpoint.name}{CONVERTED_SUFFIX}")
    problem = _convert(checkpoint, converted) if here.is_first and not _is_complete(converted) else None
    problem = agree(problem)
    if problem is not None:
        leave_together(
            here,
            CheckpointError(
                f"{checkpoint} cannot be converted for {here.world_size} ranks ({problem}); start with the "
                "number of ranks that it was saved with."
            ),
        )
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        load(engine, converted)
    finally:
        # Left on, DeepSpeed would write later checkpoints without the other ranks' parts (its issue 7546).
        engine._config.load_universal_checkpoint = False
    _mend(engine, decays)


def _mend(engine: deepspeed.DeepSpeedEngine, decays: list[float]) -> None:
    """Puts right what DeepSpeed 0.19 gets wrong while loading a universal checkpoint under ZeRO-3.

    It gives every group the first group's weight decay, and all groups one and the same step counter, which
    would then count each step once for every group.
    """
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in engine.optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def _convert(checkpoint: Path, converted: Path) -> str | None:
    """Runs the converter; returns what went wrong in one line, or None."""
    print(f"converting {checkpoint} for another number of ranks", flush=True)
    # A process of its own: it needs no device, and its memory is returned when it ends.
    workers = min(len(os.sched_getaffinity(0)), _LARGEST_WORKERS)
    command = [
        *(sys.executable, "-m", _CONVERTER),
        *(
            "--input_folder",
            str(checkpoint / ENGINE_FOLDER),
            "--output_folder",
            str(converted / ENGINE_FOLDER),
        ),
        *("--num_extract_workers", str(workers), "--num_merge_workers", str(workers)),
        "--inject_missing_state",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    logging.getLogger(__name__).info("%s\n%s", done.stdout, done.stderr)
    if done.returncode == 0:
        (converted / _COMPLETE_NAME).touch()
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the converter ended with {done.returncode}"


_COMPLETE_NAME = "COMPLETE"


def _is_complete(converted: Path) -> bool:
    return (converted / _COMPLETE_NAME).is_file()
