"""The mark of a start that was broken off before there was a step to stop at."""

import json
import os
from pathlib import Path

import pytest

from sparsekd.trainer.config.schema import LaunchConfig
from sparsekd.trainer.run.owner import owned
from sparsekd.trainer.run.ranks import ranks
from sparsekd.trainer.run.stop import StopRequest
from sparsekd.trainer.state.record import COMMIT_NAME
from sparsekd.trainer.student.early_stop import stopped_early


@pytest.mark.parametrize(("saved", "steps", "marked"), [(None, 9, 0), (6, 9, 6), (6, 6, None)])
def test_a_run_that_is_done_keeps_its_mark(
    tmp_path: Path, saved: int | None, steps: int, marked: int | None
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if saved is not None:
        checkpoint = run / "checkpoints" / f"step-{saved:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / COMMIT_NAME).touch()
        (run / "DONE.json").write_text("{}")
    request = StopRequest("warning", "SIGUSR2")
    with (
        ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here,
        owned(run, os.environ, here) as claim,
    ):
        assert stopped_early(run, request, claim, here, steps=steps) == request
    assert (run / "DONE.json").exists() == (saved is not None and marked is None)
    if marked is None:
        assert not (run / "STOPPED.json").exists()
    else:
        stopped = json.loads((run / "STOPPED.json").read_text())
        assert stopped == {"reason": "warning", "signal": "SIGUSR2", "requeue": True, "step": marked}
