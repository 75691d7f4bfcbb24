"""A start that a request to stop breaks off, while a student's or a checkpoint's files are read."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sparsekd.trainer.run.folder import CHECKPOINTS_NAME, write_stopped
from sparsekd.trainer.run.owner import Claim
from sparsekd.trainer.run.ranks import Ranks, on_first
from sparsekd.trainer.run.stop import StopRequest
from sparsekd.trainer.run.waiting import StopAsked
from sparsekd.trainer.state.checkpoint import published, step_of

Result = TypeVar("Result")


def unless_asked(action: Callable[[], Result]) -> Result | StopRequest:
    """What a part of the start gives; or the request to stop that broke it off, on every rank alike."""
    try:
        return action()
    except StopAsked as stopped:
        return stopped.request


def stopped_early(
    folder: Path, request: StopRequest, claim: Claim, here: Ranks, *, steps: int
) -> StopRequest:
    """Leaves the mark of such a start: all is as it was before, at the step of the newest checkpoint.

    A run that stands at its last of `steps` keeps the marks that it has.

    Raises:
        UserError: It cannot be written, or the folder is another job's by now.
    """

    def mark() -> None:
        saved = published(folder / CHECKPOINTS_NAME)
        step = step_of(saved[-1]) if saved else 0
        if step < steps:
            write_stopped(folder, step, request, claim)

    on_first(here, mark)
    return request
