"""Writers that are killed, race each other or run out of disk: the same command continues, nothing is "
"torn."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsekd.logit_store import files
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.files import TEMPORARY_PREFIX, publish_bytes
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.synthetic import (
    synthetic_manifest,
    synthetic_rows,
    write_synthetic_store,
    write_synthetic_tokenizer,
)
from sparsekd.logit_store.verify import verify_store
from sparsekd.logit_store.writer import committed_shards, create_store, seal, write_shard

KILLS = 10
SHARDS = 12
SERVER = Path(__file__).with_name("crash_server.py")


def _tree(path: Path) -> dict[str, bytes]:
    return {
        item.relative_to(path).as_posix(): item.read_bytes() for item in path.rglob("*") if item.is_file()
    }


def _temporaries(path: Path) -> list[Path]:
    return list(path.rglob(TEMPORARY_PREFIX + "*"))


class Writers:
    """Writer processes, started by crash_server."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )

    def _ask(self, *words: object) -> list[int]:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write("|".join(map(str, words)) + "\n")
        self.server.stdin.flush()
        return [int(word) for word in self.server.stdout.readline().split()]

    def start(self, path: Path, tokenizer: Path, rank: int, world: int) -> int:
        """Starts a writer and returns its process id."""
        return self._ask("start", path, tokenizer, rank, world)[0]

    def wait(self) -> int:
        """Waits for the next writer to end and returns its status, 0 for success."""
        return self._ask("wait")[1]


@pytest.fixture
def writers() -> Iterator[Writers]:
    started = Writers()
    yield started
    assert started.server.stdin is not None and started.server.stdout is not None
    started.server.stdin.close()
    started.server.stdout.close()
    started.server.wait(timeout=30)


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, str]:
    """Returns the store that the writers make when nobody disturbs them, and its digest."""
    manifest = synthetic_manifest(sequence_length=128, rows_per_shard=4)
    rows = {"train": SHARDS * manifest.rows_per_shard}
    return tmp_path / "whole", write_synthetic_store(tmp_path / "whole", manifest, rows, seed=0)


def test_killed_writers_are_continued_to_the_same_store(
    tmp_path: Path, writers: Writers, whole: tuple[Path, str]
) -> None:
    path, tokenizer = tmp_path / "killed", tmp_path / "whole-tokenizer"
    begin = time.monotonic()
    writers.start(tmp_path / "undisturbed", tokenizer, 0, 1)
    assert writers.wait() == 0
    duration = time.monotonic() - begin
    chance = random.Random(0)
    killed = left_behind = done = 0
    while killed < KILLS:
        process = writers.start(path, tokenizer, 0, 1)
        time.sleep(chance.uniform(0, 0.3) * duration)
        os.kill(process, signal.SIGKILL)
        killed += writers.wait() == signal.SIGKILL
        if (path / "MANIFEST.json").exists():
            left_behind += len(_temporaries(path))
            done = len(committed_shards(path, "train"))
        if done == SHARDS:
            # Take half of the shards away, so that there is more to kill.
            for shard in range(0, SHARDS, 2):
                for ending in ("arrow", "json"):
                    (path / f"shards/train/{shard:06d}.{ending}").unlink()
    # One of two ranks goes on, then the other: no state but the folder.
    for rank in (1, 0):
        writers.start(path, tokenizer, rank, 2)
        assert writers.wait() == 0
    assert seal(path, {"train": SHARDS, "heldout": 0}) == whole[1]
    assert _temporaries(path) == []
    assert _tree(path) == _tree(whole[0])
    assert verify_store(path).ok
    print(f"{killed} kills left {left_behind} temporary files, all removed")


def test_writers_of_the_same_shards_do_not_disturb_each_other(
    tmp_path: Path, writers: Writers, whole: tuple[Path, str]
) -> None:
    path = tmp_path / "raced"
    # Two write everything, one of two writes half.
    ranks = ((0, 1), (0, 1), (1, 2))
    for rank, world in ranks:
        writers.start(path, tmp_path / "whole-tokenizer", rank, world)
    assert [writers.wait() for _ in ranks] == [0, 0, 0]
    assert seal(path, {"train": SHARDS, "heldout": 0}) == whole[1]
    assert _tree(path) == _tree(whole[0])


@pytest.fixture
def small_store(tmp_path: Path) -> tuple[Path, Manifest]:
    manifest = synthetic_manifest()
    tokenizer = write_synthetic_tokenizer(tmp_path / "tokenizer", manifest.tokenizer.vocabulary_size)
    create_store(tmp_path / "store", manifest, tokenizer)
    return tmp_path / "store", manifest


def test_only_dead_writers_lose_their_files(small_store: tuple[Path, Manifest]) -> None:
    path, manifest = small_store
    folder = path / "shards/train"
    dead = [
        folder / (TEMPORARY_PREFIX + "1-abc"),
        path / (TEMPORARY_PREFIX + "2-abc"),
        path / "tokenizer/.tmp-3-a",
    ]
    for item in dead:
        item.write_bytes(b"half a shard")
    program = (
        "import sys; from pathlib import Path; from sparsekd.logit_store.files import publish\n"
        "def produce(file):\n"
        "    file.write(b'half'); print('writing', flush=True); sys.stdin.readline(); file.write(b'whole')\n"
        "publish(Path(sys.argv[1]), produce)"
    )
    living = subprocess.Popen(
        [sys.executable, "-c", program, str(folder / "000009.arrow")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert living.stdout is not None and living.stdout.readline() == "writing\n"
    create_store(path, manifest, path.parent / "tokenizer")
    assert not any(item.exists() for item in dead)
    assert len(_temporaries(path)) == 1, "the living writer keeps its file"
    living.communicate("go on\n", timeout=60)
    assert living.returncode == 0
    assert (folder / "000009.arrow").read_bytes() == b"halfwhole"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_one_sentence_and_continues(full_disk: Path, tmp_path: Path) -> None:
    manifest = synthetic_manifest(sequence_length=128)
    whole = tmp_path / "whole"
    expected = write_synthetic_store(whole, manifest, {"train": 24}, seed=0)
    content = synthetic_rows(manifest, 24, 0)
    path = full_disk / "store"
    ballast = full_disk / "ballast"
    create_store(path, manifest, tmp_path / "whole-tokenizer")
    ballast.write_bytes(bytes(250_000))
    with pytest.raises(StoreError) as caught:
        for shard in range(8):
            write_shard(path, manifest, "train", shard, content[shard * 3 : shard * 3 + 3])
    done = committed_shards(path, "train")
    message = str(caught.value)
    assert 0 < len(done) < 8
    assert message.startswith(f"No room to write {path}/shards/train/{len(done):06d}.")
    assert "bytes are free" in message and "run the same command again" in message
    assert message.count(". ") == 0
    assert _temporaries(path) == []
    ballast.unlink()
    for shard in range(8):
        write_shard(path, manifest, "train", shard, content[shard * 3 : shard * 3 + 3])
    assert seal(path, {"train": 8, "heldout": 0}) == expected
    assert _tree(path) == _tree(whole)


@pytest.mark.parametrize("step", ["fsync", "link", "pread", "write"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failing_step_publishes_nothing(
    small_store: tuple[Path, Manifest], monkeypatch, step: str, code: int
) -> None:
    path, manifest = small_store
    rows = synthetic_rows(manifest, 3, 0)
    before = _tree(path)

    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, step, fail)
        with pytest.raises(StoreError, match=r"000000\.arrow"):
            write_shard(path, manifest, "train", 0, rows)
    assert _tree(path) == before
    write_shard(path, manifest, "train", 0, rows)
    assert committed_shards(path, "train") == {0}


def test_disk_that_lies_is_found_before_publishing(small_store: tuple[Path, Manifest], monkeypatch) -> None:
    path, _ = small_store
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "pread", lambda *args: b"")
        with pytest.raises(StoreError, match="read back with other bytes"):
            publish_bytes(path / "file", b"content")
    assert not (path / "file").exists() and _temporaries(path) == []


def test_file_system_without_hard_links(small_store: tuple[Path, Manifest], monkeypatch) -> None:
    path, manifest = small_store

    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files.os, "link", refuse)
    write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 3, 0))
    assert committed_shards(path, "train") == {0} and _temporaries(path) == []
    publish_bytes(path / "file", b"content")
    publish_bytes(path / "file", b"content")
    with pytest.raises(StoreError, match="other bytes"):
        publish_bytes(path / "file", b"else")
    assert (path / "file").read_bytes() == b"content"
