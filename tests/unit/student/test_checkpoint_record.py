"""Records of checkpoints, damaged, old, or a stranger's: one sentence, and the sound older one is taken."""

import copy
import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from saving import save

from sparsekd.logit_store.json_text import signed_json
from sparsekd.trainer.config.schema import Config, LaunchConfig
from sparsekd.trainer.run.errors import CheckpointError
from sparsekd.trainer.run.ranks import Ranks, ranks
from sparsekd.trainer.state.checkpoint import newest_verified, published, verify
from sparsekd.trainer.state.record import (
    COMMIT_NAME,
    RECORD_BYTES,
    Commit,
    FileRecord,
    commit_bytes,
    engine_files,
    read_commit,
    step_name,
)
from sparsekd.trainer.state.resume import choose_start

SETTINGS: dict[str, Any] = {
    "numbers": {
        "train": {"seed": 0, "global_batch_rows": 8},
        "engine": {"dtype": "float32", "zero_stage": 1, "deepspeed": {}},
    },
    "bits": {"objective": {"impl": "torch"}},
    "course": {
        "schedule": {"kind": "wsd", "warmup_steps": 2, "decay_fraction": 0.2, "final_ratio": 0.1},
        "steps": 12,
        "learning_rate": 0.1,
    },
}


def commit_of(step: int) -> Commit:
    return Commit(
        step=step,
        rows_consumed=8 * step,
        tokens=80 * step,
        sums=((0.5, 1.0),),
        world_size=1,
        threads_per_rank=1,
        store_digest="a" * 64,
        settings=SETTINGS,
        config_digest="b" * 64,
        versions={"torch": "2"},
        files={},
    )


class Engine:
    """Stands for DeepSpeed's: on one rank, in stage 1."""

    def __init__(self, left_out: str = "") -> None:
        self.checkpoint_engine = type("Writer", (), {})()
        self.left_out = left_out

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        for name in engine_files(1, zero_stage=1, dtype="float32"):
            if name != self.left_out:
                self.checkpoint_engine.save({"name": name}, f"{folder}/{name}")


@pytest.fixture
def here() -> Iterator[Ranks]:
    with ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as joined:
        yield joined


@pytest.fixture
def run(tmp_path: Path, here: Ranks) -> Path:
    """A run folder with sound checkpoints of step 8 and step 12."""
    (tmp_path / "checkpoints").mkdir()
    for step in (8, 12):
        save(Engine(), tmp_path / "checkpoints", commit_of(step), here)
    return tmp_path


def record_of(run: Path) -> Path:
    return run / "checkpoints" / step_name(12) / COMMIT_NAME


def content_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(record_of(run).read_text())
    del content["digest"]
    return content


def passed_over(run: Path, here: Ranks) -> str:
    """The sentence about the checkpoint of step 12, in whose place that of step 8 is taken."""
    start = choose_start(run, Config(), commit_of(0), here)
    assert start.step == 8, start
    (remark,) = start.remarks
    assert remark.startswith("A newer checkpoint is damaged and passed over: ") and remark.endswith(".")
    assert not remark.endswith("..") and len(remark) < 1500 and remark.isprintable(), remark
    assert step_name(12) in remark
    return remark


def test_a_sound_record_is_believed(run: Path, here: Ranks) -> None:
    start = choose_start(run, Config(), commit_of(0), here)
    assert (start.step, start.remarks) == (12, [])


def test_the_record_of_another_step_is_not_believed(run: Path, here: Ranks) -> None:
    """Steps 9 to 12 would be taken twice, and the metrics would say nothing of it."""
    shutil.copy(run / "checkpoints" / step_name(8) / COMMIT_NAME, record_of(run))
    assert "is the record of step 8, expected that of a folder step-00000012" in passed_over(run, here)


def test_a_changed_step_is_not_believed(run: Path, here: Ranks) -> None:
    text = record_of(run).read_text()
    assert '\n "step": 12,' in text
    record_of(run).write_text(text.replace('\n "step": 12,', '\n "step": 8,'))
    assert "its digest does not fit its text" in passed_over(run, here)


def test_a_record_without_a_digest_is_one_sentence(run: Path, here: Ranks) -> None:
    """As all were before."""
    record_of(run).write_text(json.dumps(content_of(run), indent=1, sort_keys=True) + "\n")
    assert "its digest does not fit its text" in passed_over(run, here)


@pytest.mark.parametrize("files", [0, 1])
def test_a_list_that_lacks_files_is_not_whole(run: Path, here: Ranks, files: int) -> None:
    content = content_of(run)
    content["files"] = dict(list(content["files"].items())[:files])
    record_of(run).write_bytes(signed_json(content))
    assert "as files, expected all that 1 ranks write in stage 1" in passed_over(run, here)


def test_a_file_that_the_record_does_not_name_is_found(run: Path, here: Ranks) -> None:
    """Loading and exporting look for files by pattern, and unpickle what they find."""
    engine = record_of(run).parent / "engine"
    (engine / "notes.txt").write_text("harmless")
    assert verify(engine.parent, here) is None
    (engine / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"x")
    assert "is not in the checkpoint's record" in passed_over(run, here)


def test_what_deepspeed_did_not_write_is_not_published(tmp_path: Path, here: Ranks) -> None:
    left_out = "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with pytest.raises(CheckpointError, match=f"also {left_out}.*please report this"):
        save(Engine(left_out), tmp_path, commit_of(8), here)
    assert list(tmp_path.iterdir()) == []


def test_what_no_record_can_hold_is_not_published(tmp_path: Path, here: Ranks) -> None:
    for bad in ({"x": float("nan")}, {"x": 2**70}):
        commit = replace(commit_of(8), settings={**SETTINGS, "bits": bad})
        with pytest.raises(CheckpointError, match="not published"):
            save(Engine(), tmp_path, commit, here)


def test_the_files_of_thousands_of_ranks_fit_into_a_record(tmp_path: Path) -> None:
    numbers = {**SETTINGS["numbers"], "engine": {**SETTINGS["numbers"]["engine"], "zero_stage": 3}}
    files = {
        name: FileRecord(2**40, 2**32 - 1) for name in engine_files(4_000, zero_stage=3, dtype="float32")
    }
    settings = {**SETTINGS, "numbers": numbers}
    commit = replace(
        commit_of(8), world_size=4_000, sums=((0.5, 1.0),) * 4_000, settings=settings, files=files
    )
    place = tmp_path / step_name(8)
    place.mkdir()
    data = commit_bytes(commit, place)
    assert 10 * len(data) < RECORD_BYTES and len(files) == 8_000
    (place / COMMIT_NAME).write_bytes(data)
    assert read_commit(place) == commit


def _leave(path: Path) -> None:
    path.unlink()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(path.parent)  # such a name may be no longer than 107 bytes
        try:
            listener.bind(path.name)
        finally:
            os.chdir(before)


KINDS: list[Callable[[Path], None]] = [_fifo, _folder, _link, _dangling, _circle, _socket]


@pytest.mark.parametrize("put", KINDS)
def test_what_is_no_file_is_told(run: Path, here: Ranks, put: Callable[[Path], None]) -> None:
    put(record_of(run))
    assert "where a file belongs" in passed_over(run, here)


@pytest.mark.parametrize("put", [*KINDS, _leave])
def test_a_part_that_is_no_file_is_told(run: Path, here: Ranks, put: Callable[[Path], None]) -> None:
    put(record_of(run).parent / "engine" / "mp_rank_00_model_states.pt")
    said = passed_over(run, here)
    assert "is missing" in said if put is _leave else "where a file of the checkpoint belongs" in said


def test_a_folder_of_parts_that_is_a_link_is_told(run: Path, here: Ranks) -> None:
    engine = record_of(run).parent / "engine"
    engine.rename(run / "engine")
    engine.symlink_to(run / "engine")
    assert "where a file of the checkpoint belongs" in passed_over(run, here)


def test_a_checkpoint_that_is_a_file_or_never_got_a_record_was_never_one(run: Path, here: Ranks) -> None:
    (run / "checkpoints" / step_name(13)).write_text("")
    (run / "checkpoints" / step_name(14)).mkdir()
    assert [path.name for path in published(run / "checkpoints")] == [step_name(8), step_name(12)]
    assert newest_verified(run / "checkpoints", here)[0] == record_of(run).parent


RAW = (
    *(b"", b"\n", b"null", b"[]", b"{}", b"7", b'"x"', b"\x00" * 99, b"\xff\xfe", b"{", b'{"step": 12}'),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b"[" + b"0," * 10**6 + b"0]"),
    *(b'{"step": ' + number + b"}" for number in (b"NaN", b"Infinity", b"1e999", b"9" * 10_000, b"-0")),
    *(b'{"step": 12, "step": 8}', b" " * (RECORD_BYTES + 1), "schön".encode(), '{"ä": 1}'.encode("utf-16")),
)


@pytest.mark.parametrize("data", RAW, ids=range(len(RAW)))
def test_no_text_at_all_of_a_record_is_believed(run: Path, here: Ranks, data: bytes) -> None:
    record_of(run).write_bytes(data)
    passed_over(run, here)


def test_no_changed_byte_is_believed(run: Path, here: Ranks) -> None:
    """Cut at each line, and changed at three hundred places."""
    whole, chance = record_of(run).read_bytes(), random.Random(1)
    cuts = [at for at, byte in enumerate(whole) if byte == ord("\n")][:-1]
    texts = [whole[:at] for at in cuts]
    for _ in range(300):
        changed = bytearray(whole)
        changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        texts.append(bytes(changed))
    texts += [whole + b" ", whole + whole, b" " + whole, whole.replace(b"\n", b"\r\n")]
    for text in texts:
        record_of(run).write_bytes(text)
        passed_over(run, here)


NUMBERS = (-1, 0, 1, 8, 3.5, 2**31, 2**63 - 1, 2**63, 10**4000, 1e308)
TEXTS = ("", "x", "12", "../x", "\x1b[2J", "x" * 5000)
ESCAPING = {"engine/../../x": {"bytes": 1, "crc32": 0}}
VALUES: tuple[Any, ...] = (None, True, False, *NUMBERS, *TEXTS, [], [[]], [0] * 50, {}, {"": {}}, ESCAPING)


def places_in(node: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a tree of JSON."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from places_in(value, (*before, key))


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def strange(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records with one thing changed, by what it was."""
    for place in places_in(content):
        *inside, key = place
        for value in (*VALUES, nested(40), "removed", "doubled"):
            changed = copy.deepcopy(content)
            node: Any = changed
            for step in inside:
                node = node[step]
            if value == "removed":
                del node[key]
            elif value == "doubled" and isinstance(node, dict):
                node[f"{key}2"] = node[key]
            elif value == "doubled":
                node.append(node[key])
            else:
                node[key] = value
            yield f"{'.'.join(map(str, place))} = {str(value)[:40]}", changed


def test_a_stranger_s_record_with_a_sound_digest_gives_no_traceback(run: Path, here: Ranks) -> None:
    """Values of every type and range: told and passed over, refused in a sentence, or as good as before."""
    cases = told = 0
    problems: list[str] = []
    for name, content in strange(content_of(run)):
        record_of(run).write_bytes(signed_json(content))
        cases += 1
        try:
            start = choose_start(run, Config(), commit_of(0), here)
        except CheckpointError as error:
            sentence = str(error)
        except Exception as error:  # what the test is for
            problems.append(f"{name}: {type(error).__name__}: {error}")
            continue
        else:
            told += start.step == 8
            sentence = "".join(start.remarks) or "."
            if start.step not in (8, 12) or (start.step == 8 and len(start.remarks) != 1):
                problems.append(f"{name}: {start}")
        if len(sentence) > 4_000 or not sentence.isprintable() or not sentence.endswith("."):
            problems.append(f"{name}: {sentence[:200]!r}")
    assert not problems, (len(problems), problems[:20])
    assert cases > 900 and told > 600, (cases, told)
