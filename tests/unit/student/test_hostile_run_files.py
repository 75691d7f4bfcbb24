"""What lies in a run folder may be anything: it is a sentence, and nothing outside is touched."""

import json
import os
from pathlib import Path

import pytest
from test_tracking import record, stand_in, tracker

from sparsekd.trainer.config.schema import Config, LaunchConfig
from sparsekd.trainer.run.errors import UserError
from sparsekd.trainer.run.folder import STARTS_NAME, adopt
from sparsekd.trainer.run.mirror import SENT_NAME
from sparsekd.trainer.run.owner import owned
from sparsekd.trainer.run.ranks import ranks
from sparsekd.trainer.run.tracking import read_metrics


@pytest.mark.parametrize(
    "content",
    [
        *("", "x", "[]", "7", "null", '"train"', '[["train", 3]]', "[" * 512, '{"train": 1' + "0" * 600),
        *('{"train": NaN}', '{"train": Infinity}', '{"train": "3"}', '{"train": true}', '{"train": -1}'),
        *(
            '{"train": null}',
            '{"train": {}}',
            '{"train": 1e3}',
            '{"train": 99999999999999999999}',
            "\x00" * 4096,
        ),
    ],
)
def test_a_record_of_what_was_sent_that_is_none_is_said_and_the_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    """Believed, it would have W&B get steps twice, or none at all, without a word."""
    given, place = stand_in(monkeypatch), tmp_path / SENT_NAME
    place.write_text(content)
    with tracker(tmp_path, wandb="online") as track:
        track.log(record(1))
    said = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert len(said) == 1 and f"{place} is damaged; remove it" in said[0] and given == []
    assert place.read_text() == content and [entry["step"] for entry in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "dangling link"])
def test_a_record_of_what_was_sent_that_is_no_file_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    given, run = stand_in(monkeypatch), tmp_path / "run"
    run.mkdir()
    (precious := tmp_path / "precious").write_text("{}")
    no_file(run / SENT_NAME, kind, precious)
    with tracker(run, wandb="online") as track:
        track.log(record(1))
    said = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert len(said) == 1 and given == [] and [entry["step"] for entry in read_metrics(run)] == [1]
    assert precious.read_text() == "{}" and not (tmp_path / "nothing").exists()


def no_file(place: Path, kind: str, precious: Path) -> None:
    """Puts something else where a file belongs."""
    if kind == "folder":
        place.mkdir()
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(precious if kind == "link" else precious.with_name("nothing"))


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "dangling link"])
def test_a_list_of_starts_that_is_no_file_is_one_sentence(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (precious := tmp_path / "precious").write_text("precious\n")
    no_file(run / STARTS_NAME, kind, precious)
    with (
        ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here,
        owned(run, {}, here) as claim,
        pytest.raises(UserError, match=f"{run / STARTS_NAME} cannot be written") as caught,
    ):
        adopt(run, Config(), [], here, {"step": 0}, claim)
    assert "\n" not in str(caught.value)
    assert precious.read_text() == "precious\n" and not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\x00\n", b"[]\nNaN\n", b"[" * 100_000, b"x" * (1 << 24)]
)
def test_a_list_of_starts_of_any_content_gets_its_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STARTS_NAME).write_bytes(content)
    with ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here, owned(tmp_path, {}, here) as claim:
        adopt(tmp_path, Config(), ["a=b"], here, {"step": 7}, claim)
    found = (tmp_path / STARTS_NAME).read_bytes()
    line = found.splitlines()[-1]
    assert found.startswith(content) and json.loads(line)["step"] == 7 and found.endswith(line + b"\n")
