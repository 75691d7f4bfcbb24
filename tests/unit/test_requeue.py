"""Which jobs go back into Slurm's queue."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparsekd.launch.requeue import main, why_not

STOPPED = {"reason": "time limit", "step": 40, "requeue": True}


def test_a_job_whose_time_was_up_goes_back() -> None:
    assert why_not(STOPPED, 75, is_new=True) is None
    # srun tells the highest code, and one of a rank that it had to kill is higher.
    assert why_not(STOPPED, 137, is_new=True) is None
    assert why_not(STOPPED, 75, is_new=True, last_step=39) is None


@pytest.mark.parametrize(
    ("changes", "code", "is_new", "why"),
    [
        ({}, 0, True, "it is done"),
        ({"requeue": False, "reason": "terminated"}, 75, True, r"asked to stop \(terminated\)"),
        ({"requeue": 1}, 75, True, "asked to stop"),
        ({"step": None}, 75, True, "was not asked to stop"),
        ({}, 1, False, "that of an earlier start"),
    ],
)
def test_any_other_end_is_an_end(changes: dict[str, Any], code: int, is_new: bool, why: str) -> None:
    reason = why_not({**STOPPED, **changes}, code, is_new=is_new)
    assert reason is not None
    assert re.search(why, reason)


@pytest.mark.parametrize("stopped", [None, [], "requeue", 7, {}])
def test_what_is_no_record_asks_for_nothing(stopped: Any) -> None:
    assert why_not(stopped, 75, is_new=True) is not None


def test_a_job_that_was_stopped_before_it_had_begun_is_told_so() -> None:
    """It leaves no mark: its ranks had not met, or it owned no run folder yet."""
    for stopped, is_new in ((None, True), (STOPPED, False)):
        assert "asked to stop before it had begun" in str(why_not(stopped, 75, is_new=is_new))
    assert "is that of an earlier start" in str(why_not(STOPPED, 2, is_new=False))


def test_a_job_that_makes_no_step_is_not_requeued_for_ever() -> None:
    assert "made no step" in str(why_not(STOPPED, 75, is_new=True, last_step=40))


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that writes down how it was called."""
    called = tmp_path / "called"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$*" >> {called}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return called


def start(folder: Path, step: int | None, capsys: pytest.CaptureFixture[str]) -> str:
    """One start of a job, which leaves a mark or none; returns what the script says."""
    assert main(["before", str(folder)]) == 0
    mark = capsys.readouterr().out.strip()
    if step is not None:
        working = folder / "new"
        working.write_text(json.dumps(STOPPED | {"step": step}))
        working.replace(folder / "STOPPED.json")
    assert main(["after", str(folder), "75", mark]) == 75
    return capsys.readouterr().out


def test_the_frame_of_the_batch_script(
    scontrol: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert "the time was up at step 40" in start(folder, 40, capsys)
    assert "the time was up at step 60" in start(folder, 60, capsys)
    assert "asked to stop before it had begun" in start(folder, None, capsys)
    assert "made no step since the last time, at step 60" in start(folder, 60, capsys)
    assert scontrol.read_text() == "requeue 17\nrequeue 17\n"
    assert [json.loads(line)["step"] for line in (folder / "requeues.jsonl").read_text().splitlines()] == [
        40,
        60,
    ]


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "[" * 100_000, "{}"])
def test_a_folder_without_a_sound_mark(scontrol: Path, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "STOPPED.json").write_text(text)
    assert main(["after", str(tmp_path), "1", "none"]) == 1
    assert not scontrol.exists()


@pytest.mark.parametrize("noise", [b"\xff\n", b"[" * 100_000, b'{"step": 1}\n' * 200_000])
def test_a_damaged_list_of_requeues_is_none(
    scontrol: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], noise: bytes
) -> None:
    (tmp_path / "requeues.jsonl").write_bytes(noise)
    assert "the time was up at step 40" in start(tmp_path, 40, capsys)
    assert scontrol.read_text() == "requeue 17\n"


def test_a_requeue_that_cannot_be_noted_is_none(
    scontrol: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It could go on for ever without a step; and a traceback would tell nobody."""
    (tmp_path / "requeues.jsonl").mkdir()
    assert "the job is not requeued: requeues.jsonl cannot be written" in start(tmp_path, 40, capsys)
    assert not scontrol.exists()
