"""Durations for people, and files that are whole or not there."""

import os
from pathlib import Path

import pytest

from sparsekd.trainer.run.console import readable_seconds
from sparsekd.trainer.run.files import write_whole


def test_durations_are_readable() -> None:
    seconds = (4.4, 89, 90, 1500, 11_100, 172_700, 187_200)
    assert [readable_seconds(value) for value in seconds] == [
        *("4 s", "89 s", "2 min", "25 min", "3 h 05 min", "47 h 58 min", "2 d 04 h"),
    ]


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "file"
    write_whole(place, "old")

    def full(_: int) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_whole(place, "new")
    assert place.read_text() == "old" and list(tmp_path.iterdir()) == [place]
    monkeypatch.undo()
    write_whole(place, "new")
    assert place.read_text() == "new"
