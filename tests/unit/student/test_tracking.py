"""metrics.jsonl survives what a kill leaves, and Weights & Biases is a mirror that may break."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsekd.trainer.config.schema import TrackingConfig
from sparsekd.trainer.run.errors import UserError
from sparsekd.trainer.run.tracking import (
    METRICS_NAME,
    WANDB_ID_NAME,
    Tracker,
    cut_metrics,
    duration,
    line,
    read_metrics,
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


def tracker(folder: Path, *, start_step: int = 0, **tracking: Any) -> Tracker:
    options = TrackingConfig(**{"wandb": "disabled", **tracking})
    return Tracker(folder, name="run", tracking=options, settings={"a": 1}, steps=9, start_step=start_step)


def test_lines_are_cut_back_to_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path) as track:
        for step in range(1, 6):
            track.log(record(step))
        track.log({"kind": "heldout", "step": 4, "loss": 2.0, "kd": None, "ce": 2.0, "agreement": None})
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


def test_a_line_for_people() -> None:
    text = line(record(3, kd=1.25, agreement=0.5), steps=9, seconds_left=3725.0)
    assert text == (
        "step 3/9  loss 2.5000  kd 1.2500  ce 2.5000  agreement 0.5000  lr 1.00e-03  grad 0.500  "
        "1,234 tokens/s  wait 3%  left 1h02m"
    )
    assert [duration(value) for value in (9.4, 61, 3725, 180_000)] == ["9s", "1m01s", "1h02m", "2d02h"]


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
    assert folders and all(name.endswith(first.strip()) for name in folders)


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
