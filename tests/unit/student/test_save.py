"""Saving behind the steps: what is written is what the engine held; a failure is told and leaves nothing."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import FilesOnly, commit, files_no_larger_than

from sparsekd.trainer.config.schema import LaunchConfig
from sparsekd.trainer.run.errors import OwnerError, UserError
from sparsekd.trainer.run.ranks import Ranks, ranks
from sparsekd.trainer.state import save as saving
from sparsekd.trainer.state.checkpoint import Kept, newest_verified, prune, published
from sparsekd.trainer.state.save import HostCopies, Saver


@pytest.fixture
def here() -> Iterator[Ranks]:
    with ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as joined:
        yield joined


class Engine(FilesOnly):
    """One tensor in each of two files, which the next step changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.arange(2000.0)

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            self.checkpoint_engine.save(
                {"values": self.weights, "again": [self.weights]}, f"{folder}/{tag}/{name}"
            )


def saver_of(
    folder: Path, here: Ranks, *, behind: bool = True, require_owner: Callable[[], None] = lambda: None
) -> Saver:
    return Saver(folder, here, behind=behind, require_owner=require_owner)


def nothing(path: Path, seconds: float) -> None:
    pass


def test_what_is_saved_is_what_stood_when_it_began(
    tmp_path: Path, here: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, write = threading.Event(), saving.torch_save

    def slowly(value: Any, path: Path) -> Any:
        assert goes_on.wait(30)
        return write(value, path)

    monkeypatch.setattr(saving, "torch_save", slowly)
    engine, told = Engine(), []
    saver = saver_of(tmp_path, here)
    saver.begin(engine, commit(2), lambda path, seconds: told.append(path))  # type: ignore[arg-type]
    engine.weights += 1  # the next step
    assert published(tmp_path) == [] and told == []
    goes_on.set()
    saver.finish()
    place = tmp_path / "step-00000002"
    assert newest_verified(tmp_path, here) == (place, []) and told == [place] and saver.seconds > 0
    loaded = torch.load(place / "engine" / "mp_rank_00_model_states.pt")
    assert torch.equal(loaded["values"], torch.arange(2000.0))
    assert loaded["values"].data_ptr() == loaded["again"][0].data_ptr()  # one tensor, as it was
    saver.begin(engine, commit(4), nothing)  # type: ignore[arg-type]
    saver.finish()
    again = torch.load(tmp_path / "step-00000004" / "engine" / "mp_rank_00_model_states.pt")
    assert torch.equal(again["values"], torch.arange(2000.0) + 1)


def test_memory_is_kept_from_save_to_save_and_follows_a_changed_tree() -> None:
    copies, tensor, other = HostCopies(), torch.ones(5), torch.zeros(3, dtype=torch.bfloat16)
    first = copies.of({"a": tensor, "b": (tensor, [other]), "c": {"d": 1}})
    assert first["a"] is first["b"][0] and torch.equal(first["b"][1][0], other) and first["c"] == {"d": 1}
    place = first["a"].data_ptr()
    tensor += 1
    second = copies.of({"a": tensor, "b": (tensor, [other])})
    assert second["a"].data_ptr() == place and torch.equal(second["a"], tensor)
    third = copies.of({"a": torch.arange(7), "b": (tensor, [torch.empty(0)])})
    assert torch.equal(third["a"], torch.arange(7)) and torch.equal(third["b"][0], tensor)
    # A part of a tensor is not the whole, though both begin at one place.
    parts = copies.of([tensor, tensor[:2], tensor.reshape(5, 1)])
    assert [part.shape for part in parts] == [(5,), (2,), (5, 1)]


def test_a_failure_behind_the_steps_is_told_at_the_next_save_and_leaves_nothing(
    tmp_path: Path, here: Ranks
) -> None:
    saver = saver_of(tmp_path, here)
    saver.begin(Engine(), commit(2), nothing)  # type: ignore[arg-type]
    saver.finish()
    with files_no_larger_than(2000):
        saver.begin(Engine(), commit(4), nothing)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="File too large"):
            saver.begin(Engine(), commit(6), nothing)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_who_lost_the_folder_publishes_nothing(tmp_path: Path, here: Ranks) -> None:
    def refuse() -> None:
        raise OwnerError("taken over")

    saver = saver_of(tmp_path, here, require_owner=refuse, behind=False)
    with pytest.raises(OwnerError, match="taken over"):
        saver.begin(Engine(), commit(2), nothing)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_never_comes_is_not_waited_for_when_the_run_fails(
    tmp_path: Path, here: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a dead rank: the first rank's thread ends, and half a checkpoint goes."""
    monkeypatch.setattr(saving, "_SECONDS_TO_END", 0.1)
    monkeypatch.setattr(saving, "_leave_list", lambda *_: None)
    saver = saver_of(tmp_path, here)
    saver.begin(Engine(), commit(2), nothing)  # type: ignore[arg-type]
    saver.abandon()
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_stay_by_number_interval_and_held_out_loss(tmp_path: Path, here: Ranks) -> None:
    losses = {2: 3.0, 4: 1.0, 6: None, 8: 2.0, 10: 2.5}

    def kept(keep: Kept) -> list[int]:
        folder = tmp_path / f"{keep.newest}-{keep.every}-{keep.best}"
        folder.mkdir()
        for step, loss in losses.items():
            saver = saver_of(folder, here, behind=False)
            saver.begin(FilesOnly(), commit(step, heldout_loss=loss), nothing)  # type: ignore[arg-type]
        assert prune(folder, step=10, after=8, keep=keep) == {}
        return [int(path.name.removeprefix("step-")) for path in published(folder)]

    assert kept(Kept(1)) == [10]
    assert kept(Kept(2)) == [8, 10]
    assert kept(Kept(1, every=4)) == [4, 8, 10]
    assert kept(Kept(1, best=2)) == [4, 8, 10]
    assert kept(Kept(1, every=6, best=1)) == [4, 6, 10]


def test_a_damaged_older_record_ends_no_training(tmp_path: Path, here: Ranks) -> None:
    """Older ones than that from which the run went on were never verified; this one's loss is not known."""
    for step in (2, 4, 6):
        saver = saver_of(tmp_path, here, behind=False)
        saver.begin(FilesOnly(), commit(step, heldout_loss=1.0 + step), nothing)  # type: ignore[arg-type]
    (tmp_path / "step-00000002" / "COMMIT.json").write_text("{")
    assert prune(tmp_path, step=6, after=4, keep=Kept(1, every=2)) == {}
    assert len(published(tmp_path)) == 3
    assert prune(tmp_path, step=6, after=4, keep=Kept(1, best=1)) == {}
    assert [path.name for path in published(tmp_path)] == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("behind", [False, True])
def test_a_tensor_is_written_and_not_the_memory_that_it_is_a_part_of(
    tmp_path: Path, here: Ranks, behind: bool
) -> None:
    """Weights in ZeRO 1 and 2 are parts of one large buffer."""
    engine = Engine()
    engine.weights = torch.arange(1e6)[:2000]
    saver = saver_of(tmp_path, here, behind=behind)
    saver.begin(engine, commit(2), nothing)  # type: ignore[arg-type]
    saver.finish()
    sizes = [path.stat().st_size for path in (tmp_path / "step-00000002" / "engine").iterdir()]
    assert len(sizes) == 2 and all(8000 < size < 16000 for size in sizes)
