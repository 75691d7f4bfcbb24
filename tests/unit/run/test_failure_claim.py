"""A failure is recorded once, by a job that owns the folder; a record of another start ends nobody."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsekd.trainer.run import failure
from sparsekd.trainer.run import pulse as pulse_module
from sparsekd.trainer.run.errors import OwnerError, UserError
from sparsekd.trainer.run.failure import FAILED_NAME, FailureWatch, failures_recorded
from sparsekd.trainer.run.folder import write_done, write_stopped
from sparsekd.trainer.run.owner import OWNER_NAME, Claim, owned
from sparsekd.trainer.run.process import this_process
from sparsekd.trainer.run.pulse import Pulse
from sparsekd.trainer.run.ranks import Ranks
from sparsekd.trainer.run.stop import StopRequest

HERE = Ranks(0, 0, 1, torch.device("cpu"), (this_process(),))


@pytest.fixture
def pulse(tmp_path: Path) -> Iterator[Pulse]:
    (tmp_path / "logs").mkdir()
    with Pulse(tmp_path / "logs", 0, HERE.processes) as pulse:
        yield pulse


def recorded(folder: Path) -> dict[str, object]:
    found = json.loads((folder / FAILED_NAME).read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("content", "ends"),
    [
        ('{"start": "ours", "rank": 1}', True),
        ('{"start": "late", "rank": 1}', False),
        ('{"rank": 1}', False),
        ("[" * 9999, False),
        ("", False),
    ],
)
def test_only_the_record_of_this_start_ends_it(
    tmp_path: Path, pulse: Pulse, monkeypatch: pytest.MonkeyPatch, content: str, ends: bool
) -> None:
    monkeypatch.setattr(failure, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(failure, "_SECONDS_AFTER_ANOTHERS", 0.0)
    left = threading.Event()
    monkeypatch.setattr(FailureWatch, "_leave", lambda *_: left.set())
    with owned(tmp_path, {}, HERE, "ours") as claim, FailureWatch(tmp_path, HERE, pulse, claim):
        (tmp_path / FAILED_NAME).write_text(content)
        assert left.wait(10 if ends else 0.3) == ends


def test_a_late_record_of_another_start_is_not_taken_for_the_own(tmp_path: Path, pulse: Pulse) -> None:
    with owned(tmp_path, {}, HERE, "ours") as claim:
        (tmp_path / FAILED_NAME).write_text('{"start": "late"}')
        with pytest.raises(UserError, match="sour milk"), failures_recorded(tmp_path, HERE, pulse, claim):
            raise UserError("sour milk")
        assert (recorded(tmp_path)["message"], recorded(tmp_path)["start"]) == ("sour milk", "ours")


def test_who_lost_the_folder_leaves_no_mark_in_it(tmp_path: Path, pulse: Pulse) -> None:
    """Also the ranks that never owned it, and whose first rank may be gone."""
    late = Claim(tmp_path / OWNER_NAME, "late")
    with owned(tmp_path, {}, HERE, "ours"):
        with pytest.raises(UserError, match="sour milk"), failures_recorded(tmp_path, HERE, pulse, late):
            raise UserError("sour milk")
        with pytest.raises(OwnerError, match="taken over by process"):
            write_done(tmp_path, {}, late)
        with pytest.raises(OwnerError, match="taken over by process"):
            write_stopped(tmp_path, 1, StopRequest("warning", None), late)
        assert {path.name for path in tmp_path.iterdir()} == {OWNER_NAME, "logs"}


def test_the_watch_reads_no_files_of_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks each second, on each rank: with a thousand ranks that would be a million opened files."""
    me = this_process()
    elsewhere = [replace(me, machine="another", pid=number) for number in range(50)]
    dead = replace(me, started=me.started + 1)
    read: list[int] = []
    monkeypatch.setattr(pulse_module, "_stand", lambda _, rank: (read.append(rank), (None, 0))[1])
    with Pulse(tmp_path, 0, [me, dead, *elsewhere]) as pulse:
        assert [lost.rank for lost in pulse.dead_here()] == [1]
    assert read == [1]
