"""Room for checkpoints: what they take before there is one, and whether the disk takes the next. No torch."""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sparsekd.trainer.config.schema import TrainConfig
from sparsekd.trainer.run.console import size_text
from sparsekd.trainer.run.errors import UserError


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint's tensors; around them stand some ten kilobytes a file.

    Attributes:
        first: What the first rank writes; as much host memory its copy takes (`HostCopies`).
        other: What each other rank writes, and its copy takes.
        ranks: How many there are.
    """

    first: float
    other: float
    ranks: int

    @property
    def total(self) -> float:
        """Of all ranks' files."""
        return self.first + (self.ranks - 1) * self.other

    @property
    def memory_text(self) -> str:
        """The host memory of the copies, rank by rank."""
        if self.ranks == 1:
            return size_text(self.first)
        if self.first == self.other:
            return f"{size_text(self.first)} a rank"
        return f"{size_text(self.first)} on the first rank and {size_text(self.other)} on each other"


def checkpoint_size(parameters: int, *, stage: int, dtype: str, ranks: int) -> CheckpointSize:
    """What DeepSpeed 0.19 writes, without padding.

    Each rank writes its part of the float32 weights and of AdamW's two moments: 12 bytes a parameter. In
    stages 1 and 2 the first rank adds the weights of forward and backward; in stage 3 nobody does, as they
    follow from the float32 ones; in stage 0 they are the float32 ones, and the first rank writes everything.

    Args:
        parameters: That are trained, tied ones once.
        stage: Of ZeRO, 0 to 3.
        dtype: Of forward and backward, "bfloat16" or "float32".
        ranks: That train.
    """
    states = 12.0 * parameters
    if stage == 0:
        return CheckpointSize(states, 0.0, ranks)
    weights = (2.0 if dtype == "bfloat16" else 4.0) * parameters if stage < 3 else 0.0
    return CheckpointSize(weights + states / ranks, states / ranks, ranks)


def most_kept(train: TrainConfig) -> int:
    """Checkpoints that may stay at a run's end."""
    saved = math.ceil(train.steps / train.checkpoint_every)
    for_good = train.steps // math.lcm(train.keep_every, train.checkpoint_every) if train.keep_every else 0
    return min(saved, train.keep_checkpoints + train.keep_best + for_good)


def room_told(folder: Path, size: CheckpointSize, train: TrainConfig, *, there: int, pinned: bool) -> str:
    """One line about the room for checkpoints, before the first step.

    Args:
        folder: The run's `checkpoints` folder, or where it will be.
        size: Of one checkpoint.
        train: Which of them are kept.
        there: Checkpoints that are there already.
        pinned: Whether the host memory of the copy is page-locked.

    Raises:
        UserError: The disk has no room for even one more. A quota cannot be seen from here.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    free, each, kept = shutil.disk_usage(existing).free, size.total, most_kept(train)
    if free < each:
        raise UserError(
            f"{folder} has no room for a checkpoint: one takes about {size_text(each)}, and on its disk "
            f"{size_text(free)} are free; remove old runs or checkpoints there, or choose another run.root, "
            "then run the same command again."
        )
    line = (
        f"checkpoints: about {size_text(each)} each, {kept} kept at most, {size_text(free)} free on their "
        "disk (quotas are not seen)"
    )
    # The next one is whole before an older one goes.
    if free < (kept + 1 - there) * each:
        line += f"; warning: not room for {kept + 1} at once, which this run may need"
    kind = "pinned host memory" if pinned else "host memory"
    return f"{line}; the copy from which they are written takes {size.memory_text} of {kind}"
