"""Checkpoints as files: what counts as published, whole, or left over; and which runs may go on from one."""

import errno
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import save

from sparsekd.trainer.config.checks import objective_of
from sparsekd.trainer.config.schema import Config, LaunchConfig, ScheduleConfig
from sparsekd.trainer.run.errors import CheckpointError, UserError
from sparsekd.trainer.run.ranks import Ranks, ranks
from sparsekd.trainer.state import save as saving_module
from sparsekd.trainer.state.checkpoint import Kept, clear_leftovers, newest_verified, prune, published
from sparsekd.trainer.state.record import Commit, read_commit
from sparsekd.trainer.state.resume import check_fits, choose_start, first_other_rate, settings_of
from sparsekd.trainer.state.save import torch_save
from sparsekd.trainer.student.sums import no_sums

WEIGHTS, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
NUMBERS: dict[str, Any] = {
    "train": {"seed": 0, "global_batch_rows": 8},
    "engine": {"dtype": "float32", "zero_stage": 1, "deepspeed": {}},
}


class FileWriter:
    """Stands for DeepSpeed's writer, whose `save` the trainer puts its own in the place of."""

    save: Callable[[Any, str], None]


class FilesOnly:
    """Stands for the engine: writes the two files that DeepSpeed would on one rank in stage 1."""

    def __init__(self) -> None:
        self.checkpoint_engine = FileWriter()

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        assert not save_latest
        (Path(folder) / tag).mkdir(parents=True, exist_ok=True)
        for name, values in ((WEIGHTS, 2000), (OPTIMIZER, 6000)):
            self.checkpoint_engine.save({"values": torch.ones(values)}, f"{folder}/{tag}/{name}")


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As on a disk that is full at this byte, but for the reason."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old_handler)


@pytest.fixture
def here() -> Iterator[Ranks]:
    with ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as joined:
        yield joined


def checkpoints_in(run: Path) -> Path:
    """The folder that `adopt` makes."""
    folder = run / "checkpoints"
    folder.mkdir()
    return folder


def course(**changes: Any) -> dict[str, Any]:
    schedule = ScheduleConfig(**{"kind": "constant", "warmup_steps": 2, **changes.pop("schedule", {})})
    return {"schedule": schedule.__dict__, "steps": 10, "learning_rate": 0.1, **changes}


def commit(step: int, **changes: Any) -> Commit:
    plain = Commit(
        step=step,
        rows_consumed=8 * step,
        tokens=80 * step,
        sums=((0.1, 1 / 3, 0.0, 0.0, 5.0, 5.0, 4.0, 0.0, 0.0),),
        world_size=1,
        threads_per_rank=1,
        store_digest="a" * 64,
        settings={"numbers": NUMBERS, "bits": {}, "course": course()},
        config_digest="b" * 64,
        versions={"torch": "2"},
        files={},
    )
    return replace(plain, **changes)


def test_a_checkpoint_appears_whole_and_reads_back(tmp_path: Path, here: Ranks) -> None:
    wanted = commit(2)
    place = save(FilesOnly(), tmp_path, wanted, here)
    assert place == tmp_path / "step-00000002" and published(tmp_path) == [place]
    found = read_commit(place)
    assert replace(found, files={}) == wanted  # floats too, to the last bit
    weights = place / "engine" / WEIGHTS
    assert found.files[f"engine/{WEIGHTS}"].bytes == weights.stat().st_size > 8000
    assert torch.equal(torch.load(weights)["values"], torch.ones(2000))
    assert newest_verified(tmp_path, here) == (place, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_damage_is_named_and_passed_over(tmp_path: Path, here: Ranks) -> None:
    for step in (2, 4, 6, 8):
        save(FilesOnly(), tmp_path, commit(step), here)
    with (tmp_path / "step-00000008" / "engine" / WEIGHTS).open("r+b") as file:
        file.seek(3)
        file.write(b"X")
    (tmp_path / "step-00000006" / "engine" / OPTIMIZER).unlink()
    (tmp_path / "step-00000004" / "COMMIT.json").write_text('{"step": 4')
    (tmp_path / "step-00000009").mkdir()  # no record: never published
    found, problems = newest_verified(tmp_path, here)
    assert found == tmp_path / "step-00000002"
    assert ["checksum" in problems[0], "missing" in problems[1], "not valid JSON" in problems[2]] == [
        True
    ] * 3


def test_old_ones_go_only_after_a_new_one(tmp_path: Path, here: Ranks) -> None:
    for step in (2, 4, 6):
        save(FilesOnly(), tmp_path, commit(step), here)
    (tmp_path / ".step-00000008.tmp-abc" / "engine").mkdir(parents=True)
    prune(tmp_path, step=6, after=4, keep=Kept(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


def test_damaged_newer_ones_do_not_crowd_out_sound_ones(tmp_path: Path, here: Ranks) -> None:
    """Gone on from 4 past a damaged 5 and 9; then 6 is written."""
    for step in (2, 4, 5, 9, 6):
        save(FilesOnly(), tmp_path, commit(step), here)
    prune(tmp_path, step=6, after=4, keep=Kept(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


def test_what_cannot_be_removed_is_returned_and_tried_again(
    tmp_path: Path, here: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4, 6):
        save(FilesOnly(), tmp_path, commit(step), here)

    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as stuck:
        stuck.setattr("os.rename", busy)
        kept = {tmp_path / f"step-0000000{step}": "Device or resource busy" for step in (2, 4)}
        assert prune(tmp_path, step=6, after=4, keep=Kept(1)) == kept
        with pytest.raises(
            UserError, match=r"step-00000006 is in the way .*Device or resource busy.*by hand"
        ):
            save(FilesOnly(), tmp_path, commit(6), here)
    with monkeypatch.context() as stuck:
        stuck.setattr("shutil.rmtree", busy)
        left = prune(tmp_path, step=6, after=4, keep=Kept(1))
        assert [path.name[:14] for path in sorted(left)] == [".step-00000002", ".step-00000004"]
        assert prune(tmp_path, step=6, after=4, keep=Kept(1)) == left
    assert published(tmp_path) == [tmp_path / "step-00000006"]
    assert prune(tmp_path, step=6, after=4, keep=Kept(1)) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_a_checkpoint_of_the_same_step_gives_way(tmp_path: Path, here: Ranks) -> None:
    place = save(FilesOnly(), tmp_path, commit(2), here)
    (place / "engine" / WEIGHTS).write_bytes(b"")
    save(FilesOnly(), tmp_path, commit(2), here)
    assert newest_verified(tmp_path, here) == (place, [])
    assert prune(tmp_path, step=2, after=0, keep=Kept(1)) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_removed_run_folder_is_not_made_anew(tmp_path: Path, here: Ranks) -> None:
    gone = tmp_path / "run"
    with pytest.raises(UserError, match=f"{gone} is not there: it was removed"):
        save(FilesOnly(), gone / "checkpoints", commit(2), here)
    assert not gone.exists()


def test_a_start_clears_leftovers_but_for_a_conversion(tmp_path: Path, here: Ranks) -> None:
    save(FilesOnly(), tmp_path, commit(2), here)
    for name in (".step-00000004.tmp-abc", ".step-00000002.tmp-universal"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".step-00000002.tmp-universal",
        "step-00000002",
    ]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path, here: Ranks) -> None:
    save(FilesOnly(), tmp_path, commit(2), here)
    said = r"cannot be written.*File too large.*goes on from the newest"
    with files_no_larger_than(8000), pytest.raises(UserError, match=said):
        save(FilesOnly(), tmp_path, commit(4), here)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    save(FilesOnly(), tmp_path, commit(4), here)
    assert newest_verified(tmp_path, here)[0] == tmp_path / "step-00000004"


@pytest.mark.parametrize("tensors", [1, 40])
def test_whenever_a_disk_is_full_the_failure_says_so(tmp_path: Path, tensors: int) -> None:
    """Also in the last bytes of a file, and where a file of many small tensors is one write."""
    value = {f"weights {part}": torch.randn(4000 // tensors) for part in range(tensors)}
    whole, place = tmp_path / "whole.pt", tmp_path / "part.pt"
    torch_save(value, whole)
    size = whole.stat().st_size
    for limit in (*range(0, size, 512), size - 1):
        with files_no_larger_than(limit), pytest.raises(OSError) as failed:
            torch_save(value, place)
        assert failed.value.errno == errno.EFBIG, limit
    with files_no_larger_than(size):
        torch_save(value, place)
    loaded = torch.load(place)
    assert loaded.keys() == value.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in value.items())


def test_a_place_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        torch_save({}, tmp_path / "gone" / "weights.pt")
    with pytest.raises(IsADirectoryError):
        torch_save({}, tmp_path)


def test_what_is_no_fault_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    class Unwilling:
        def __reduce__(self) -> tuple[Any, ...]:
            raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="the device is lost"):
        torch_save({"weights": torch.ones(9), "more": Unwilling()}, tmp_path / "weights.pt")


def test_a_kill_while_saving_leaves_the_older_one(
    tmp_path: Path, here: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off at each of the labelled points, the folder still offers the step before."""
    older = save(FilesOnly(), tmp_path, commit(2), here)
    for point in ("torch_save", "_leave_list", "_write_durably", "_sync_folder"):
        with monkeypatch.context() as broken:

            def die(*_: object) -> None:
                raise KeyboardInterrupt

            broken.setattr(saving_module, point, die)
            with pytest.raises(KeyboardInterrupt):
                save(FilesOnly(), tmp_path, commit(4), here)
        assert newest_verified(tmp_path, here) == (older, [])
    prune(tmp_path, step=2, after=2, keep=Kept(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_all_damaged_is_no_fresh_start(tmp_path: Path, here: Ranks) -> None:
    place = save(FilesOnly(), checkpoints_in(tmp_path), commit(2), here)
    (place / "engine" / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"None of the 1 checkpoints .* is whole"):
        choose_start(tmp_path, Config(), commit(0), here)


def test_metrics_without_a_checkpoint_start_again(tmp_path: Path, here: Ranks) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    assert choose_start(tmp_path, Config(), commit(0), here).step == 0
    never = Config()
    never.train.resume = "never"
    with pytest.raises(CheckpointError, match="already holds a run"):
        choose_start(tmp_path, never, commit(0), here)
    assert choose_start(tmp_path / "new", never, commit(0), here).step == 0


def test_what_changed_but_not_the_numbers_is_said(tmp_path: Path, here: Ranks) -> None:
    save(FilesOnly(), checkpoints_in(tmp_path), commit(2), here)
    start = choose_start(tmp_path, Config(), commit(0, threads_per_rank=4, versions={"torch": "3"}), here)
    assert start.step == 2 and "threads_per_rank 1 -> 4; torch 2 -> 3" in start.remarks[0]
    assert choose_start(tmp_path, Config(), commit(0), here).remarks == []


def test_what_would_change_the_numbers_is_refused() -> None:
    place = Path("step-00000005")
    check_fits(commit(5), commit(0), place)
    with pytest.raises(CheckpointError, match="another store"):
        check_fits(commit(5), commit(0, store_digest="c" * 64), place)
    seeded = {**NUMBERS, "train": {**NUMBERS["train"], "seed": 1}}
    other = {"numbers": seeded, "bits": {}, "course": course()}
    with pytest.raises(CheckpointError, match=r"train\.seed 0 -> 1"):
        check_fits(commit(5), commit(0, settings=other), place)
    shorter = {"numbers": NUMBERS, "bits": {}, "course": course(steps=4)}
    with pytest.raises(CheckpointError, match=r"beyond train\.steps=4"):
        check_fits(commit(5), commit(0, settings=shorter), place)


def test_a_checkpoint_of_another_version_is_refused_in_words(tmp_path: Path, here: Ranks) -> None:
    """From before the sums of weights were two more, and those of the balance were there: 5 in place of 9."""
    older = commit(2, sums=((0.1, 1 / 3, 0.0, 0.0, 5.0),))
    place = save(FilesOnly(), checkpoints_in(tmp_path), older, here)
    now = commit(0, sums=(tuple(no_sums(here.device).tolist()),))
    named = Config()
    named.train.resume = str(place)
    for config in (Config(), named):
        with pytest.raises(CheckpointError, match=r"step-00000002 was .* carries 5 .* version has 9; go on"):
            choose_start(tmp_path, config, now, here)


def test_the_schedule_may_change_ahead_only() -> None:
    """Prolonging is legal where the rates of the steps taken stay what they were."""
    assert first_other_rate(course(), course(steps=100), 10) is None
    wsd = {"kind": "wsd", "decay_fraction": 0.2}
    assert first_other_rate(course(schedule=wsd), course(schedule=wsd, steps=100), 8) is None
    assert first_other_rate(course(schedule=wsd), course(schedule=wsd, steps=100), 9) == 9
    # A constant run may end in a decay.
    assert first_other_rate(course(), course(schedule=wsd, steps=20), 10) is None
    cosine = {"kind": "cosine"}
    assert first_other_rate(course(schedule=cosine), course(schedule=cosine, steps=11), 10) == 3
    assert first_other_rate(course(), course(learning_rate=0.2), 10) == 1


def test_a_store_that_grew_changes_the_turns_of_its_mixture() -> None:
    """Which follow from how many rows the stores have; with equal rows they are a setting like any other."""
    place = Path("step-00000005")

    def mixed(turns: int, digest: str, **changes: Any) -> Commit:
        data = {"mixture": {"a": {"turns": turns, "streams": 4, **changes}, "b": {"turns": 9}}}
        numbers = {**NUMBERS, "data": data}
        settings = {"numbers": numbers, "bits": {}, "course": course()}
        return commit(5, settings=settings, store_digest=digest * 64)

    then = mixed(7, "a")
    allowed = check_fits(then, mixed(8, "c", streams=5), place, allow=["store"])
    assert "data.mixture.a.streams 4 -> 5; data.mixture.a.turns 7 -> 8" in allowed["store"]
    with pytest.raises(CheckpointError, match=r"data\.mixture\.a\.turns 7 -> 8"):
        check_fits(then, mixed(8, "a"), place, allow=["store"])
    with pytest.raises(CheckpointError, match=r"data\.mixture\.a\.window None -> 3"):
        check_fits(then, mixed(8, "c", window=3), place, allow=["store"])


def test_what_may_change_is_what_is_allowed(tmp_path: Path, here: Ranks) -> None:
    """Each kind by itself; the refusal names the key that would let it pass."""
    place = Path("step-00000005")
    with_objective = {**NUMBERS, "objective": {"kd_weight": 1.0}}
    of_objective = {**NUMBERS, "objective": {"kd_weight": 0.5}}
    begun = commit(5, settings={"numbers": with_objective, "bits": {}, "course": course()})
    changes = {
        "schedule": {"settings": {**begun.settings, "course": course(learning_rate=0.2)}},
        "objective": {"settings": {**begun.settings, "numbers": of_objective}},
        "store": {"settings": begun.settings, "store_digest": "c" * 64},
    }
    told = {"schedule": "learning_rate 0.1 -> 0.2", "objective": "objective.kd_weight 1.0 -> 0.5"}
    told["store"] = f"store digest {begun.store_digest[:12]} -> {'c' * 12}"
    for kind, change in changes.items():
        now = commit(0, **change)
        others = [other for other in changes if other != kind]
        with pytest.raises(CheckpointError, match=rf"train\.allow=\[{kind}\]"):
            check_fits(begun, now, place, allow=others)
        assert check_fits(begun, now, place, allow=list(changes)) == {kind: told[kind]}
        assert check_fits(begun, commit(0, settings=begun.settings), place, allow=list(changes)) == {}
    other_kind = commit(0, **changes["store"], store_kind="longer rows")
    with pytest.raises(CheckpointError, match=r"of another kind .* must be the same"):
        check_fits(begun, other_kind, place, allow=["store"])
    seed = {**begun.settings, "numbers": {**of_objective, "train": {**NUMBERS["train"], "seed": 1}}}
    with pytest.raises(CheckpointError, match=r"train\.seed 0 -> 1"):
        check_fits(begun, commit(0, settings=seed), place, allow=list(changes))

    # Sums of two objectives have no mean, and rows of another store other numbers.
    save(FilesOnly(), checkpoints_in(tmp_path), replace(begun, skipped_rows=(3,)), here)
    config = Config()
    config.train.allow = list(changes)
    config.train.skip_damaged_rows = 1
    for kind in changes:
        now = commit(0, **changes[kind], sums=((0.0,) * len(begun.sums[0]),))
        start = choose_start(tmp_path, config, now, here)
        assert start.commit is not None and start.allowed == (told[kind],)
        assert (start.commit.sums == now.sums) == (kind == "objective")
        assert start.commit.skipped_rows == (() if kind == "store" else (3,))
        assert told[kind] in start.remarks[0]


def test_a_mixture_that_is_not_read_may_change() -> None:
    def settings(**changes: Any) -> dict[str, Any]:
        objective = replace(objective_of(Config().objective), **changes)
        return settings_of(Config(), objective, impl="torch", student_content=None, order={})

    place = Path("step-00000005")
    check_fits(commit(5, settings=settings()), commit(0, settings=settings(mixture=0.5)), place)
    # As a checkpoint from before there was a mixture has it.
    assert "mixture" not in settings()["numbers"]["objective"]
    skewed = settings(divergence="skewed_forward_kl")
    other = settings(divergence="skewed_forward_kl", mixture=0.2)
    with pytest.raises(CheckpointError, match=r"objective\.mixture 0\.1 -> 0\.2"):
        check_fits(commit(5, settings=skewed), commit(0, settings=other), place)


def test_further_keys_of_deepspeed_change_the_numbers_and_buckets_only_bits() -> None:
    def settings(**engine: Any) -> dict[str, Any]:
        config = Config()
        for key, value in engine.items():
            setattr(config.engine, key, value)
        return settings_of(
            config, objective_of(config.objective), impl="torch", student_content=None, order={}
        )

    plain = settings()
    place = Path("step-00000005")
    with pytest.raises(CheckpointError, match=r"engine\.deepspeed\.x None -> 1"):
        check_fits(commit(5, settings=plain), commit(0, settings=settings(deepspeed={"x": 1})), place)
    other = settings(offload="cpu", reduce_bucket_size=7, prefetch_bucket_size=8)
    check_fits(commit(5, settings=plain), commit(0, settings=other), place)
    assert plain["bits"]["engine"] != other["bits"]["engine"]


def test_settings_that_json_has_no_words_for_come_back_as_they_are(tmp_path: Path, here: Ranks) -> None:
    """Some models' configurations hold infinity, and numbers for keys."""
    config = Config()
    config.student.config = {"time_step_limit": [0.0, float("inf")], "id2label": {0: "no"}, "large": 2**70}
    settings = settings_of(
        config, objective_of(config.objective), impl="torch", student_content=None, order={}
    )
    settings["numbers"]["engine"] |= NUMBERS["engine"]
    rows = settings["numbers"]["train"]["global_batch_rows"]
    place = save(FilesOnly(), tmp_path, commit(2, settings=settings, rows_consumed=2 * rows), here)
    assert read_commit(place).settings == settings
    check_fits(read_commit(place), commit(0, settings=settings), place)


def test_a_student_is_known_by_its_content() -> None:
    def settings(path: str | None, content: str | None, **student: Any) -> dict[str, Any]:
        config = Config()
        config.student.path, config.student.config = path, student
        return settings_of(
            config, objective_of(config.objective), impl="torch", student_content=content, order={}
        )

    place = Path("step-00000005")
    was = commit(5, settings=settings("models/a", "a" * 64))
    check_fits(was, commit(0, settings=settings("/elsewhere/b", "a" * 64)), place)
    with pytest.raises(CheckpointError, match=r"than student\.path=models/a holds now \(content aaaa.*bbbb"):
        check_fits(was, commit(0, settings=settings("models/a", "b" * 64)), place)
    with pytest.raises(CheckpointError, match=r"student\.config\.model_type None -> llama; student\.cont"):
        check_fits(was, commit(0, settings=settings(None, None, model_type="llama")), place)
    # Of a version that recorded the path alone: nobody knows what it held.
    older = settings("models/a", None)
    older["numbers"]["student"] = {"path": "models/a", "revision": None, "config": {}}
    with pytest.raises(CheckpointError, match=r"older version .* what student\.path=models/a held"):
        check_fits(commit(5, settings=older), commit(0, settings=settings("models/a", "a" * 64)), place)
    of_config = settings(None, None)
    of_config["numbers"]["student"] = {"path": None, "revision": None, "config": {}}
    check_fits(commit(5, settings=of_config), commit(0, settings=settings(None, None)), place)
