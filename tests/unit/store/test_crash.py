"""Writers that are killed, race each other or run out of disk: the same command continues, nothing is torn.

Here 50 writers are killed; `make soak` kills the rest (see SPARSEKD_SOAK_KILLS).
"""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.places import local_files
from sparsekd.logit_store.places.file_system import STEPS
from sparsekd.logit_store.places.files import TEMPORARY_PREFIX, publish_bytes
from sparsekd.logit_store.protocol import writer
from sparsekd.logit_store.protocol.writer import committed_shards, create_store, seal, write_shard
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
from sparsekd.logit_store.tools.verify import verify_store

KILLS = int(os.environ.get("SPARSEKD_SOAK_KILLS", "50"))
# Every step for both kinds of file. Record, manifest and tokenizer are all .json, told apart by their turn.
PLACES = [f"{step} {ending}" for step in (*STEPS, "half written") for ending in (".arrow", ".json")]
LABELLED_TIMES = 5 if KILLS > 100 else 2
SHARDS = 12
SERVER = Path(__file__).with_name("crash_server.py")


def _tree(path: Path) -> dict[str, bytes]:
    return {
        item.relative_to(path).as_posix(): item.read_bytes() for item in path.rglob("*") if item.is_file()
    }


def _temporaries(path: Path) -> list[Path]:
    return list(path.rglob(TEMPORARY_PREFIX + "*"))


def _torn(path: Path, whole: dict[str, bytes]) -> list[str]:
    """Names under which something else stands than an undisturbed writer puts there."""
    published = {name: data for name, data in _tree(path).items() if TEMPORARY_PREFIX not in name}
    return [name for name, data in published.items() if data != whole.get(name)]


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

    def start(self, path: Path, tokenizer: Path, rank: int, world: int, where: str = "") -> int:
        """Starts a writer and returns its process id; for `where` it kills itself see crash_server."""
        return self._ask("start", path, tokenizer, rank, world, where)[0]

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


@pytest.mark.timeout(3600)
def test_killed_writers_are_continued_to_the_same_store(
    tmp_path: Path, writers: Writers, whole: tuple[Path, str]
) -> None:
    path, tokenizer = tmp_path / "killed", tmp_path / "whole-tokenizer"
    expected = _tree(whole[0])
    begin = time.monotonic()
    writers.start(tmp_path / "undisturbed", tokenizer, 0, 1)
    assert writers.wait() == 0
    duration = time.monotonic() - begin
    seed = time.time_ns() % 100_000
    chance = random.Random(seed)
    places = PLACES * LABELLED_TIMES
    places += ["anywhere"] * (KILLS - len(places))
    chance.shuffle(places)
    hit: Counter[str] = Counter()
    left_behind = 0
    for place in places:
        for _ in range(20):
            # The third .json is the first commit record: before it come the manifest and the tokenizer.
            where = "" if place == "anywhere" else f"{place} {chance.randint(1, 5)}"
            begin = time.monotonic()
            process = writers.start(path, tokenizer, 0, 1, where)
            # What a scheduler sends first, too: it must leave no more than SIGKILL does.
            ended_by = signal.SIGKILL if where else chance.choice((signal.SIGKILL, signal.SIGTERM))
            if not where:
                time.sleep(chance.uniform(0, 0.5) * duration)
                os.kill(process, ended_by)
            status = writers.wait()
            assert _torn(path, expected) == [], f"killed at {where or 'random'}, seed {seed}"
            hit[place] += status == ended_by
            left_behind += len(_temporaries(path)) if path.exists() else 0
            for shard in range(chance.randint(0, 2), SHARDS, 2):  # so that there is more to kill
                for ending in ("json", "arrow"):
                    (path / f"shards/train/{shard // 1000:03d}/{shard:06d}.{ending}").unlink(missing_ok=True)
            if status == ended_by:
                break
            assert status == 0
            # It ended before the kill: the first run may have been a slow one.
            duration = min(duration, time.monotonic() - begin)
    assert sum(hit.values()) == KILLS and all(hit[place] >= LABELLED_TIMES for place in PLACES), hit
    # One of two ranks goes on, then the other: no state but the folder.
    for rank in (1, 0):
        writers.start(path, tokenizer, rank, 2)
        assert writers.wait() == 0
    assert seal(path, {"train": SHARDS, "heldout": 0}) == whole[1]
    assert _temporaries(path) == []
    assert _tree(path) == expected
    assert verify_store(path).ok
    print(
        f"{KILLS} kills, {len(PLACES)} steps hit {LABELLED_TIMES} times or more, 0 torn files; "
        f"{left_behind} temporary files left, all removed (seed {seed})"
    )


def test_a_broken_protocol_is_caught(tmp_path: Path, writers: Writers, whole: tuple[Path, str]) -> None:
    # The test above can fail: a writer that writes in place leaves a torn shard at the first kill.
    path, tokenizer = tmp_path / "broken", tmp_path / "whole-tokenizer"
    writers.start(path, tokenizer, 0, 1, "in place half written .arrow 4")
    assert writers.wait() == signal.SIGKILL
    assert _torn(path, _tree(whole[0])) == ["shards/train/000/000000.arrow"]
    # And still no reader sees it: it has no commit record, and goes to quarantine.
    assert committed_shards(path, "train") == set()
    writers.start(path, tokenizer, 0, 1)
    assert writers.wait() == 0
    assert seal(path, {"train": SHARDS, "heldout": 0}) == whole[1]
    assert verify_store(path).quarantined == ("quarantine/train/000000.arrow",)


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
    folder = path / "shards/train/000"
    folder.mkdir()
    dead = [
        folder / (TEMPORARY_PREFIX + "1-abc"),
        folder.parent / (TEMPORARY_PREFIX + "1-abc"),
        path / (TEMPORARY_PREFIX + "2-abc"),
        path / "tokenizer/.tmp-3-a",
    ]
    for item in dead:
        item.write_bytes(b"half a shard")
    program = (
        "import sys; from pathlib import Path; from sparsekd.logit_store.places.files import publish\n"
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
    assert message.startswith(f"No room to write {path}/shards/train/000/{len(done):06d}.")
    assert "bytes are free" in message and "run the same command again" in message
    assert message.count(". ") == 0
    assert _temporaries(path) == []
    ballast.unlink()
    for shard in range(8):
        write_shard(path, manifest, "train", shard, content[shard * 3 : shard * 3 + 3])
    assert seal(path, {"train": 8, "heldout": 0}) == expected
    assert _tree(path) == _tree(whole)


@pytest.mark.parametrize("step", ["open", "write", "fsync", "pread", "link"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failing_step_publishes_nothing(
    small_store: tuple[Path, Manifest], monkeypatch, step: str, code: int
) -> None:
    path, manifest = small_store
    rows = synthetic_rows(manifest, 3, 0)
    (path / "shards/train/000").mkdir()  # whose making is the next test's
    before = _tree(path)

    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(writer, "read_manifest", lambda path: manifest)  # the steps of writing alone fail
        patch.setattr(local_files.os, step, fail)
        with pytest.raises(StoreError, match=r"000000\.arrow"):
            write_shard(path, manifest, "train", 0, rows)
    assert _tree(path) == before
    write_shard(path, manifest, "train", 0, rows)
    assert committed_shards(path, "train") == {0}


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failing_folder_sync_is_continued(
    small_store: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, code: int, is_new: bool
) -> None:
    path, manifest = small_store
    if not is_new:
        (path / "shards/train/000").mkdir()
    rows = synthetic_rows(manifest, 3, 0)

    def fail(folder: Path) -> None:
        raise OSError(code, os.strerror(code))

    # Folder or shard has its name, but whether the name is on the disk is not known: no commit record.
    with monkeypatch.context() as patch:
        patch.setattr(local_files, "sync_folder", fail)
        with pytest.raises(StoreError, match=r"/000\b" if is_new else r"000000\.arrow"):
            write_shard(path, manifest, "train", 0, rows)
    assert committed_shards(path, "train") == set() and _temporaries(path) == []
    write_shard(path, manifest, "train", 0, rows)
    assert committed_shards(path, "train") == {0}


def test_failing_rename_publishes_nothing(
    small_store: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, manifest = small_store
    before = _tree(path)

    def refuse(code: int) -> object:
        def call(*args: object) -> None:
            raise OSError(code, os.strerror(code))

        return call

    with monkeypatch.context() as patch:
        patch.setattr(local_files.os, "link", refuse(errno.EPERM))  # no hard links here: rename takes over
        patch.setattr(local_files.os, "rename", refuse(errno.EIO))
        with pytest.raises(StoreError, match=r"Could not use .*000000\.arrow: Input/output error"):
            write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 3, 0))
    assert _tree(path) == before
    write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 3, 0))


def test_disk_that_lies_is_found_before_publishing(small_store: tuple[Path, Manifest], monkeypatch) -> None:
    path, _ = small_store
    with monkeypatch.context() as patch:
        patch.setattr(local_files.os, "pread", lambda *args: b"")
        with pytest.raises(StoreError, match="read back with other bytes"):
            publish_bytes(path / "file", b"content")
    assert not (path / "file").exists() and _temporaries(path) == []


def test_file_system_without_hard_links(small_store: tuple[Path, Manifest], monkeypatch) -> None:
    path, manifest = small_store

    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(local_files.os, "link", refuse)
    write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 3, 0))
    assert committed_shards(path, "train") == {0} and _temporaries(path) == []
    publish_bytes(path / "file", b"content")
    publish_bytes(path / "file", b"content")
    with pytest.raises(StoreError, match="other bytes"):
        publish_bytes(path / "file", b"else")
    assert (path / "file").read_bytes() == b"content"
