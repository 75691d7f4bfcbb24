"""`sparsekd train`: the verb. The loop itself is in `loop`."""

import os
from collections.abc import Sequence

import torch

from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.run.ranks import ranks


def run(config: Config, overrides: Sequence[str] = ()) -> None:
    """Trains the student of a configuration, from the newest checkpoint of its run folder or from the start.

    Args:
        config: The composed configuration.
        overrides: What the user typed, kept in the run folder.

    Raises:
        UserError: Something that the user can put right; where possible before the run folder is touched.
    """
    if config.launch.device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Only now: DeepSpeed chooses its device while it is imported.
    from sparsekd.trainer.student.loop import train_on

    with ranks(config.launch, timeout_minutes=config.engine.timeout_minutes) as here:
        train_on(here, config, overrides)
