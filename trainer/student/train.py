"""`sparsekd train`: the verb. The loop itself is in `loop`."""

import os
from collections.abc import Sequence

from sparsekd.trainer.config.schema import Config, run_folder
from sparsekd.trainer.run.errors import Stopped
from sparsekd.trainer.run.stop import StopRequest, StopWatch, watched


def run(config: Config, overrides: Sequence[str] = ()) -> None:
    """Trains the student of a configuration, from the newest checkpoint of its run folder or from the start.

    Args:
        config: The composed configuration.
        overrides: What the user typed, kept in the run folder.

    Raises:
        UserError: Something that the user can put right; where possible before the run folder is touched.
        Stopped: It was asked to stop, and has saved.
    """
    # Around everything: a signal may come while the libraries are loaded, or the ranks wait for one another.
    with watched(os.environ) as watch:
        stopped = _trained(config, overrides, watch)
    if stopped is not None:
        raise Stopped(f"{run_folder(config)} was asked to stop ({stopped}) and is saved")


def _trained(config: Config, overrides: Sequence[str], watch: StopWatch) -> StopRequest | None:
    """Joins the job and trains; returns why it stopped, None where the run is done."""
    import torch

    from sparsekd.trainer.run.ranks import ranks

    if config.launch.device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Only now: DeepSpeed chooses its device while it is imported.
    from sparsekd.trainer.student.engine import forget_groups
    from sparsekd.trainer.student.loop import train_on

    try:
        with ranks(config.launch, timeout_minutes=config.engine.timeout_minutes, watch=watch) as here:
            return train_on(here, config, overrides, watch)
    finally:
        forget_groups()
