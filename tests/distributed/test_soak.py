"""A short soak; `make soak` is the long one."""

import itertools
import json
import shutil
import signal
from pathlib import Path

import pytest
from soak import WORLDS, soak_until, soaking
from soak_capture import Pass
from soak_counts import totals_of
from soak_jobs import Blow, Job
from soak_training import Shape, problems_of_end

pytestmark = pytest.mark.distributed

KILLS, SIGNALS = 12, 3
# Stage 0 reads a checkpoint of any number of ranks as it is; the others have theirs converted, which is slow.
RUNS = (
    (Shape(stage=0, shuffle="global", log_every=4, behind=True), WORLDS),
    (Pass(k=5, n=7, codec="tkq8"), WORLDS),
    (Shape(stage=2, shuffle="chunked", log_every=1, behind=True), (2,)),
)


def test_killed_and_stopped_at_random_it_is_the_run_that_nobody_disturbed(tmp_path: Path) -> None:
    results, seed = tmp_path / "soak" / "starts.jsonl", int(tmp_path.stat().st_ctime_ns % 1_000_000)
    bad = soak_until(
        results,
        kills=KILLS,
        signals=SIGNALS,
        seed=seed,
        runs=itertools.cycle(RUNS),
        kills_of_a_run=KILLS // len(RUNS),
        signals_of_a_run=SIGNALS // len(RUNS),
    )
    assert bad == 0, results.read_text()
    totals = totals_of(results)
    assert totals.kills >= KILLS and totals.signals >= SIGNALS
    assert totals.phases.total() >= KILLS + SIGNALS and totals.runs["train"] and totals.runs["capture"]


def test_a_run_that_was_killed_before_its_mark_is_tidied(tmp_path: Path) -> None:
    """Between the last checkpoint and DONE.json: what that checkpoint made superfluous goes all the same."""
    shape = RUNS[0][0]
    with soaking(tmp_path / "soak" / "starts.jsonl", 0) as soak:
        run, _ = soak.trainings.quiet(shape, 1)
        checkpoints = run / "checkpoints"
        before = sorted(path.name for path in checkpoints.iterdir())
        done = (run / "DONE.json").read_bytes()
        (run / "DONE.json").unlink()
        shutil.copytree(checkpoints / before[0], checkpoints / "step-00000001")
        (checkpoints / ".step-00000002.tmp-discarded-0123456789ab").mkdir()
        (checkpoints / ".step-00000002.tmp-universal").mkdir()
        job = soak.trainings.start(run.name, shape, 1)
        assert job.wait(100) and job.codes == [0], job.output.read_text()[-6000:]
        assert sorted(path.name for path in checkpoints.iterdir()) == before
        assert (run / "DONE.json").read_bytes() == done


class _Over(Job):
    """A job that has ended, without processes."""

    def __init__(self, codes: list[int]) -> None:
        self._ended, self.world, self.pids = codes, len(codes), [101, 102]

    @property
    def codes(self) -> list[int | None]:
        return list(self._ended)


def test_the_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    """Of exit codes and marks; else a soak would find nothing whatever happens."""
    (tmp_path / "logs").mkdir()
    checkpoint = tmp_path / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)

    def leave(name: str, **content: object) -> None:
        for old in ("DONE", "FAILED", "STOPPED"):
            (tmp_path / f"{old}.json").unlink(missing_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def judged(codes: list[int], number: signal.Signals | None, rank: int | None = None) -> list[str]:
        blow = Blow(number, rank, "pulse", 0.0, fell=number is not None)
        return problems_of_end(tmp_path, _Over(codes), blow)

    def stand(step: int) -> None:
        for rank in (0, 1):
            place = tmp_path / "logs" / f"rank_{rank}.pulse"
            place.write_text(json.dumps({"step": step, "phase": "left"}))

    stand(5)
    assert judged([-9, -9], signal.SIGKILL) == []
    assert judged([-9, 2], signal.SIGKILL) and judged([0, 0], None)
    leave("FAILED", rank=1, pid=102, message="Rank 1 died")
    assert judged([2, -9], signal.SIGKILL, 1) == [] and judged([-9, -9], signal.SIGKILL)
    assert judged([1, -9], signal.SIGKILL, 1) and judged([-9, 2], signal.SIGKILL, 0)
    leave("STOPPED", step=5, reason="terminated", signal="SIGTERM", requeue=False)
    assert judged([75, 75], signal.SIGTERM, 0) == []
    assert judged([75, 2], signal.SIGTERM) and judged([75, 75], signal.SIGUSR2)
    stand(6)
    assert judged([75, 75], signal.SIGTERM), "a step was taken and not saved"
    stand(5)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 6}\n')
    (tmp_path / "starts.jsonl").write_text('{"step": 3}\n')
    assert judged([75, 75], signal.SIGTERM), "a line of a step that is not saved"
    (tmp_path / "starts.jsonl").write_text('{"step": 5}\n')
    assert judged([75, 75], signal.SIGTERM) == [], "of an earlier start, since this one took no step"
    checkpoint.rename(checkpoint.with_name("step-00000004"))
    assert judged([75, 75], signal.SIGTERM), "the checkpoint is of another step"
    leave("DONE", step=30)
    assert judged([0, 0], None) == [] and judged([0, 2], signal.SIGTERM)
