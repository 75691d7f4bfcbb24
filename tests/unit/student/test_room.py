"""Room for checkpoints: how large they will be, whether the disk takes one, and what is said of it."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from sparsekd.trainer.config.schema import TrainConfig
from sparsekd.trainer.run.errors import UserError
from sparsekd.trainer.state.room import CheckpointSize, checkpoint_size, most_kept, room_told

Usage = namedtuple("Usage", "total used free")


def told(folder: Path, *, free: int, monkeypatch: pytest.MonkeyPatch, there: int = 0, ranks: int = 1) -> str:
    def usage(place: Path) -> Usage:
        assert place.exists()
        return Usage(10**9, 0, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    train = TrainConfig(steps=1000, checkpoint_every=100, keep_checkpoints=2)
    size = CheckpointSize(1000.0, 1000.0, ranks)
    return room_told(folder / "not" / "yet", size, train, there=there, pinned=False)


def test_sizes_by_stage() -> None:
    def size(stage: int, dtype: str) -> tuple[float, float, float]:
        found = checkpoint_size(1000, stage=stage, dtype=dtype, ranks=4)
        return found.first, found.other, found.total

    assert size(0, "float32") == (12_000, 0, 12_000)
    assert size(1, "bfloat16") == (5_000, 3_000, 14_000)
    assert size(2, "float32") == (7_000, 3_000, 16_000)
    assert size(3, "bfloat16") == size(3, "float32") == (3_000, 3_000, 12_000)


def test_no_room_for_even_one_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"yet has no room for a checkpoint: one takes about 2\.00 kB"
    ) as info:
        told(tmp_path, free=1900, ranks=2, monkeypatch=monkeypatch)
    assert "1.90 kB are free" in str(info.value) and "run.root" in str(info.value)


def test_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = told(tmp_path, free=3000, monkeypatch=monkeypatch)
    assert line.startswith("checkpoints: about 1.00 kB each, 2 kept at most, 3.00 kB free on their disk")
    assert "warning" not in line and "takes 1.00 kB of host memory" in line
    assert "takes 1.00 kB a rank of host" in told(tmp_path, free=9000, ranks=2, monkeypatch=monkeypatch)
    # The third is whole before the first goes.
    assert "not room for 3 at once" in told(tmp_path, free=2999, monkeypatch=monkeypatch)
    assert "warning" not in told(tmp_path, free=2999, there=1, monkeypatch=monkeypatch)


def test_most_kept() -> None:
    def kept(**keys: int) -> int:
        return most_kept(TrainConfig(steps=1000, checkpoint_every=100, **keys))

    assert kept(keep_checkpoints=2) == 2
    assert kept(keep_checkpoints=99) == 10
    assert kept(keep_checkpoints=1, keep_best=2, keep_every=300) == 1 + 2 + 3
    assert kept(keep_checkpoints=1, keep_every=150) == 1 + 3
