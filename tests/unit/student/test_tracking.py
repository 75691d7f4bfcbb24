"""metrics.jsonl survives what a kill leaves, and Weights & Biases is a mirror that may break."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wandb_files import offline_history

from sparsekd.trainer.config.schema import TrackingConfig
from sparsekd.trainer.run import tracking
from sparsekd.trainer.run.errors import DataError, OwnerError, UserError
from sparsekd.trainer.run.mirror import SENT_NAME
from sparsekd.trainer.run.tracking import (
    METRICS_NAME,
    WANDB_ID_NAME,
    Tracker,
    cut_metrics,
    line,
    read_metrics,
    seconds_of_run,
    wandb_mode,
)


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "tokens": step * 100,
        "loss": 2.5,
        "kd": None,
        "ce": 2.5,
        "agreement": None,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "tokens_per_second": 1234.5,
        "data_wait_share": 0.031,
        **changes,
    }


def heldout(step: int) -> dict[str, Any]:
    return {"kind": "heldout", "step": step, "loss": 2.0, "kd": None, "ce": 2.0, "agreement": None}


def tracker(
    folder: Path,
    *,
    start_step: int = 0,
    seconds_before: float = 0.0,
    require_owner: Callable[[], None] = lambda: None,
    **tracking: Any,
) -> Tracker:
    return Tracker(
        folder,
        name="run",
        tracking=TrackingConfig(**{"wandb": "disabled", **tracking}),
        settings={"a": 1},
        steps=9,
        start_step=start_step,
        began=time.monotonic(),
        seconds_before=seconds_before,
        require_owner=require_owner,
    )


def test_lines_are_cut_back_to_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path) as track:
        for step in range(1, 6):
            track.log(record(step))
        track.log(heldout(4))
        track.sync()
    with (tmp_path / METRICS_NAME).open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 4]
    assert cut_metrics(tmp_path, step=4) == 2
    with tracker(tmp_path, start_step=4) as track:
        track.log(record(5, loss=1.5))
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path)][-2:] == [(4, 2.0), (5, 1.5)]
    assert cut_metrics(tmp_path, step=0) == 6 and read_metrics(tmp_path) == []
    assert cut_metrics(tmp_path / "nowhere", step=0) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 1/9  loss 2.5000  ce 2.5000  lr 1.00e-03") and "kd" not in printed[0]


def test_a_removed_or_replaced_file_takes_no_more_lines(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for write in (lambda track: track.log(record(2)), lambda track: track.sync()):
        folder.mkdir()
        with (
            pytest.raises(UserError, match=f"{folder} is not there: it was removed"),
            tracker(folder) as track,
        ):
            track.log(record(1))
            shutil.rmtree(folder)
            write(track)
        assert not folder.exists()
    folder.mkdir()
    with pytest.raises(UserError, match="replaced by another file"), tracker(folder) as track:
        track.log(record(1))
        os.replace(shutil.copy(folder / METRICS_NAME, tmp_path / "copy"), folder / METRICS_NAME)
        track.log(record(2))


def test_a_slow_disk_or_service_does_not_hold_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint waits for the lines that it counts on, and not for W&B."""
    owns, sends, given = threading.Event(), threading.Event(), stand_in(monkeypatch)

    def require() -> None:
        assert owns.wait(60)

    with tracker(tmp_path, wandb="online", require_owner=require) as track:
        monkeypatch.setattr(track._wandb._run, "log", lambda line: sends.wait(60) and given.append(line))
        for step in (1, 2, 3):
            track.log(record(step))
        assert read_metrics(tmp_path) == []
        threading.Timer(0.2, owns.set).start()
        track.sync()
        assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3] and not given
        sends.set()
    assert [entry["train/step"] for entry in given] == [1, 2, 3]


def test_a_service_that_takes_nothing_is_left_and_gets_the_lines_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More lines than may wait, and an end before it answers: neither holds the run."""
    monkeypatch.setattr(tracking, "_MOST_WAITING", 5)
    monkeypatch.setattr(tracking, "_SECONDS_FOR_MIRROR", 0.2)
    never, given = threading.Event(), stand_in(monkeypatch)
    with tracker(tmp_path, wandb="online") as track:
        monkeypatch.setattr(track._wandb._run, "log", lambda line: never.wait(60))
        for step in range(1, 30):
            track.log(record(step))
            track.sync()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == list(range(1, 30)) and not given
    assert capsys.readouterr().out.count("Weights & Biases failed (TimeoutError: 5 lines wait for it)") == 1
    with tracker(tmp_path, wandb="online"):
        pass
    never.set()
    assert [entry["train/step"] for entry in given] == list(range(2, 30)), "but the one that it was given"


def test_a_line_that_cannot_be_written_is_told_at_the_next_one_or_before_a_checkpoint(tmp_path: Path) -> None:
    def lost() -> None:
        if (tmp_path / METRICS_NAME).stat().st_size:
            raise OwnerError("another job's")

    for tells in (lambda track: track.sync(), lambda track: track.log(record(3))):
        with pytest.raises(OwnerError, match="another job's"), tracker(tmp_path, require_owner=lost) as track:
            track.log(record(1))
            track.log(record(2))
            track._lines._waiting.join()
            tells(track)
            pytest.fail("nothing was said")
    with pytest.raises(OwnerError, match="another job's"), tracker(tmp_path, require_owner=lost) as track:
        track.log(record(2))  # at the latest at the end
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_every_line_says_the_seconds_of_this_start_and_of_the_run(tmp_path: Path) -> None:
    assert seconds_of_run(tmp_path) == 0.0
    with tracker(tmp_path) as track:
        track.log(record(1))
    (tmp_path / METRICS_NAME).write_text(
        "".join(json.dumps({"kind": "train", "step": 0, "run_seconds": 1e4}) + "\n" for _ in range(4000))
    )
    with tracker(tmp_path, seconds_before=seconds_of_run(tmp_path)) as track:
        track.log(record(2))
        track.log(heldout(2))
    with (tmp_path / METRICS_NAME).open("a") as file:
        file.write('{"step": 3, "run_seconds": 2')
    lines = read_metrics(tmp_path)[-2:]
    assert all(0 <= entry["seconds"] < 9e3 for entry in lines)
    assert all(entry["run_seconds"] == pytest.approx(1e4 + entry["seconds"]) for entry in lines)
    assert seconds_of_run(tmp_path) == lines[-1]["run_seconds"]


def test_a_line_for_people() -> None:
    text = line(record(3, kd=1.25, agreement=0.5), steps=9, seconds_left=3725.0)
    assert text == (
        "step 3/9  loss 2.5000  kd 1.2500  ce 2.5000  agreement 0.5000  lr 1.00e-03  grad 0.500  "
        "1,234 tokens/s  wait 3%  left 62 min"
    )


def test_what_auto_means() -> None:
    auto = TrackingConfig(wandb="auto")
    assert wandb_mode(auto, {}, has_key=False) == "offline"
    assert wandb_mode(auto, {}, has_key=True) == "online"
    assert wandb_mode(auto, {"WANDB_MODE": "offline"}, has_key=True) == "offline"
    assert wandb_mode(TrackingConfig(wandb="disabled"), {"WANDB_MODE": "online"}, has_key=True) == "disabled"


def test_wandb_offline_keeps_one_id(tmp_path: Path) -> None:
    """A real offline run, twice: the second start goes on under the same id."""
    with tracker(tmp_path, wandb="offline") as track:
        track.log(record(1))
    first = (tmp_path / WANDB_ID_NAME).read_text()
    with tracker(tmp_path, wandb="offline", start_step=1) as track:
        track.log(record(2))
    assert (tmp_path / WANDB_ID_NAME).read_text() == first
    folders = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    # Two starts within a second: W&B numbers the second folder.
    assert len(folders) == 2 and all(first.strip() in name for name in folders)


# One start of a run; with "kill" it ends as with its node: no `finish`, no handler.
START = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_tracking import heldout, record, tracker
folder, first, last = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with tracker(folder, wandb="auto", start_step=first - 1) as track:
    for step in range(first, last + 1):
        track.log(record(step))
        if step == 4:
            track.log(heldout(step))
    if sys.argv[5:] == ["kill"]:
        time.sleep(2)  # W&B takes lines later than they are given
        os.kill(os.getpid(), 9)
"""


def start(folder: Path, *words: str) -> int:
    here = Path(__file__)
    # Not under the service of W&B that serves other tests of this process, and would outlive a kill.
    kept = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    command = [sys.executable, "-c", START, str(here.parent), str(folder), *words]
    paths = os.pathsep.join([str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, timeout=120, env=kept | {"WANDB_MODE": "offline", "PYTHONPATH": paths})
    return done.returncode


def sent_steps(folder: Path, kind: str) -> list[int]:
    lines = offline_history(folder)
    return [entry[f"{kind}/step"] for entry in lines if f"{kind}/step" in entry]


def test_wandb_gets_each_step_once_after_a_crash(tmp_path: Path) -> None:
    """A run killed behind its checkpoint takes steps again: metrics.jsonl is cut back, W&B goes on.

    What W&B's process had not yet written when it was killed, it gets again: here all of the first start.
    """
    assert start(tmp_path, "1", "5", "kill") == -signal.SIGKILL
    assert json.loads((tmp_path / SENT_NAME).read_text()) == {}
    for step, last in ((2, 5), (3, 6), (6, 7)):
        cut_metrics(tmp_path, step=step)
        assert start(tmp_path, str(step + 1), str(last)) == 0
    assert sent_steps(tmp_path, "train") == [1, 2, 3, 4, 5, 6, 7]
    assert sent_steps(tmp_path, "heldout") == [4]
    kept = [(entry["kind"], entry["step"]) for entry in read_metrics(tmp_path)]
    assert [step for kind, step in kept if kind == "train"] == [1, 2, 3, 4, 5, 6, 7]
    # Also when the files were sent by `wandb sync` and removed.
    shutil.rmtree(tmp_path / "wandb")
    cut_metrics(tmp_path, step=5)
    assert start(tmp_path, "6", "8") == 0
    assert sent_steps(tmp_path, "train") == [8]


def test_a_crash_of_a_long_offline_run_repeats_nothing(tmp_path: Path) -> None:
    """W&B writes when it likes, by blocks of 32 KiB: after the kill its file ends within a line."""
    assert start(tmp_path, "1", "400", "kill") == -signal.SIGKILL
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    path.write_bytes(path.read_bytes()[:40_000])
    first = sent_steps(tmp_path, "train")
    assert first == list(range(1, len(first) + 1)) and 20 < len(first) < 400
    cut_metrics(tmp_path, step=len(first) - 10)
    assert start(tmp_path, str(len(first) - 9), "400") == 0
    assert sent_steps(tmp_path, "train") == list(range(1, 401))


def test_online_nothing_is_sent_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the place where W&B takes lines; a run begun before there was a record of them, too."""
    given = stand_in(monkeypatch)
    for begin, end in ((1, 5), (3, 5), (4, 6)):
        cut_metrics(tmp_path, step=begin - 1)
        with tracker(tmp_path, wandb="online") as track:
            for step in range(begin, end + 1):
                track.log(record(step))
    assert [entry["train/step"] for entry in given] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / SENT_NAME).read_text()) == {"train": 6}
    (tmp_path / SENT_NAME).unlink()
    with tracker(tmp_path, wandb="online") as track:
        track.log(record(7))
    assert [entry["train/step"] for entry in given] == [1, 2, 3, 4, 5, 6, 7]


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces W&B by what it was given."""
    import wandb

    given: list[dict[str, Any]] = []
    nothing = {"define_metric": lambda *_, **__: None, "finish": lambda **_: None}
    monkeypatch.setattr(wandb, "init", lambda **_: SimpleNamespace(log=given.append, **nothing))
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    return given


def test_wandb_gets_all_lines_of_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows may be left out in one step, each of them a line."""
    given = stand_in(monkeypatch)
    for _ in range(2):
        with tracker(tmp_path, wandb="online") as track:
            for row in (7, 8):
                track.log({"kind": "skipped", "step": 3, "tokens": 9, "row": row, "reason": "damaged"})
    assert [entry["skipped/row"] for entry in given] == [7, 8]


def test_wandb_that_fails_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def broken(**_: Any) -> None:
        raise RuntimeError("the service is down")

    monkeypatch.setattr(wandb, "init", broken)
    with tracker(tmp_path, wandb="offline") as track:
        track.log(record(1))
    assert "the service is down" in capsys.readouterr().out
    assert json.loads((tmp_path / METRICS_NAME).read_text())["step"] == 1


@pytest.mark.parametrize(
    "line", [b"x", b"[]", b"{}", b'{"kind": "train", "step": "1"}', b"[" * 50_000, b'{"kind": "\xff"}']
)
def test_a_line_that_is_none_of_metrics_is_named(tmp_path: Path, line: bytes) -> None:
    place = tmp_path / METRICS_NAME
    place.write_bytes(b'{"kind": "train", "step": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"The last line of .*metrics\.jsonl is no line of metrics"):
        seconds_of_run(tmp_path)
    with place.open("ab") as file:
        file.write(b'{"kind": "train", "step": 2}\n')
    for read in (read_metrics, partial(cut_metrics, step=1)):
        with pytest.raises(DataError, match=r"metrics\.jsonl, line 2, is no line of metrics"):
            read(tmp_path)
