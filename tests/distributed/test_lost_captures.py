"""Captures whose workers die, come late and compete: it is the store of one that nobody disturbed."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import server
from soak_capture import Capture, Captures, Pass, files_of
from soak_competing import compete

pytestmark = pytest.mark.distributed

SHAPE = Pass(5, 7, "tkq8")


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Captures:
    return Captures(tmp_path_factory.mktemp("captures") / "all", server())


def wait_until(happens: Callable[[], bool], run: Capture) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.002)


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_killed_rank_costs_its_unit_and_the_others_make_the_store(captures: Captures, killed: int) -> None:
    run = captures.run(f"killed-{killed}", SHAPE, 1)
    run.note()
    job = run.start(3)
    wait_until(lambda: job.pids[killed] in run.held(), run)
    job.send(signal.SIGKILL, killed)
    assert job.wait(60)
    assert job.codes == [-signal.SIGKILL if rank == killed else 0 for rank in range(3)], run.said()
    assert "sparsekd capture: " not in run.said() and "Traceback" not in run.said()
    assert run.said().count("is sealed: ") == 1
    assert files_of(run.folder) == captures.quiet(SHAPE)[0]


@pytest.mark.parametrize("killed", [0, 2])
def test_a_rank_that_is_killed_before_they_have_begun_is_named_once(captures: Captures, killed: int) -> None:
    run = captures.run(f"early-{killed}", SHAPE, 1)
    run.note()
    job = run.start(3)
    wait_until(lambda: "capture: teacher" in run.said(), run)
    job.send(signal.SIGKILL, killed)
    assert job.wait(60)
    assert job.codes == [-signal.SIGKILL if rank == killed else 2 for rank in range(3)], run.said()
    assert "Traceback" not in run.said()
    sentences = [line for line in run.said().splitlines() if line.startswith("sparsekd capture: ")]
    assert len(sentences) == 1, run.said()
    assert f"Rank {killed} (process {job.pids[killed]} on " in sentences[0]
    assert "died without a word" in sentences[0] and "captures what is missing" in sentences[0]


def test_jobs_that_share_a_store_and_are_killed_at_random_make_the_quiet_one(captures: Captures) -> None:
    seed = time.time_ns() % 1_000_000
    killed, wrong = compete(captures, SHAPE, "random", workers=3, kills=4, seed=seed)
    assert killed and wrong == []


def test_the_judge_sees_what_is_wrong(captures: Captures, tmp_path: Path) -> None:
    """Of a store; else a soak would find nothing whatever happens."""
    run = captures.run("judged", SHAPE, 1)
    assert run.start(1).wait(60)
    assert run.problems_of_run({1}) == []
    shard, left = run.folder / "shards/train/000/000001.arrow", run.folder / "shards/train/.tmp-1-a"
    content = bytearray(shard.read_bytes())
    left.write_bytes(b"")
    assert run.problems_of_run({1}) == ["shards/train/.tmp-1-a is left"]
    left.unlink()
    shard.rename(tmp_path / "shard")
    assert any(problem == "it lacks shards/train/000/000001.arrow" for problem in run.problems_of_run({1}))
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    wrong = run.problems_of_run({1})
    assert any("store verify ended with [2]" in problem for problem in wrong)
    assert wrong[-1] == "shards/train/000/000001.arrow is another than in a quiet pass"
