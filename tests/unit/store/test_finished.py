"""Commands run again over what is finished, or beside what others left: nothing is written, or refused."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.places.file_system import TEMPORARY_PREFIX
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.recover import adopt_orphans
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer

NOBODY = 65534
PLAN = {"train": 2, "heldout": 0}


@contextlib.contextmanager
def _another_user() -> Iterator[None]:
    """Has this process act as a user without rights, where it is root's."""
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may enter and write to, as /tmp is."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o1777)
        yield Path(name)


def _modes(path: Path) -> dict[str, tuple[int, int]]:
    """Returns (inode, time of the last change in nanoseconds) of everything below a folder, and of itself."""
    places = [path, *path.rglob("*")]
    return {str(place): (place.lstat().st_ino, place.lstat().st_ctime_ns) for place in places}


@pytest.mark.parametrize("mode", [0o000, 0o644, 0o666])
def test_what_another_user_left_is_left(mode: int, shared: Path) -> None:
    path, manifest = shared / "store", synthetic_manifest()
    rows = synthetic_rows(manifest, 6, 0)
    with _another_user():
        tokenizer = write_synthetic_tokenizer(shared / "tokenizer", manifest.tokenizer.vocabulary_size)
        create_store(path, manifest, tokenizer)
    left = [path / folder / f"{TEMPORARY_PREFIX}1-a" for folder in (".", "tokenizer", "shards/train")]
    for place in left:
        place.parent.chmod(0o1777)  # sticky: only the owner of a file removes it
        place.write_bytes(b"half")
        place.chmod(mode)
        if os.geteuid() == 0:
            os.chown(place.parent, 0, 0)
    with _another_user():
        create_store(path, manifest, tokenizer)
        for shard in range(2):
            write_shard(path, manifest, "train", shard, rows[shard * 3 : shard * 3 + 3])
        seal(path, PLAN)
        assert open_store(path).rows("train") == 6
    if os.geteuid() == 0 or mode == 0:
        assert all(place.exists() for place in left)


def test_leftovers_that_are_no_files_are_left(tmp_path: Path) -> None:
    path, manifest = tmp_path / "store", synthetic_manifest()
    tokenizer = write_synthetic_tokenizer(tmp_path / "tokenizer", manifest.tokenizer.vocabulary_size)
    create_store(path, manifest, tokenizer)
    precious = tmp_path / "precious"
    precious.write_bytes(b"of another program")
    (path / f"{TEMPORARY_PREFIX}folder").mkdir()
    (path / f"{TEMPORARY_PREFIX}link").symlink_to(precious)
    create_store(path, manifest, tokenizer)
    assert precious.read_bytes() == b"of another program"


@pytest.fixture
def finished(tmp_path: Path) -> Iterator[Path]:
    """A sealed store on a disk that is mounted read-only."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    write_synthetic_store(tmp_path / "made/store", synthetic_manifest(), {"train": 6}, seed=0)
    (tmp_path / "disk").mkdir()
    for options in ("bind", "remount,bind,ro"):
        command = ["mount", "-o", options, str(tmp_path / "made"), str(tmp_path / "disk")]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode != 0:
            pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    yield tmp_path / "disk/store"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_finished_store_on_a_read_only_disk_is_finished(finished: Path) -> None:
    manifest = synthetic_manifest()
    with pytest.raises(OSError, match="Read-only"):
        (finished / "x").touch()
    rows = synthetic_rows(manifest, 6, 0)
    create_store(finished, manifest, finished.with_name("store-tokenizer"))
    assert adopt_orphans(finished, manifest) == (0, 0)
    for shard in range(2):
        write_shard(finished, manifest, "train", shard, rows[shard * 3 : shard * 3 + 3])
    assert seal(finished, PLAN) == open_store(finished).digest
    assert seal(finished, PLAN, replace=True) == open_store(finished).digest
    with pytest.raises(StoreError, match="sealed before with other shards"):
        (finished.parents[1] / "made/store/INDEX.json").write_bytes(b"{}")
        seal(finished, PLAN)


def test_a_dead_writers_file_on_a_read_only_disk_is_left(finished: Path) -> None:
    left = finished.parents[1] / "made/store/shards/train/.tmp-1-a"
    left.write_bytes(b"half")
    create_store(finished, synthetic_manifest(), finished.with_name("store-tokenizer"))
    seal(finished, PLAN)
    assert left.exists()


def test_an_unfinished_store_on_a_read_only_disk_is_one_sentence(finished: Path) -> None:
    made = finished.parents[1] / "made/store"
    (made / "INDEX.json").unlink()
    with pytest.raises(StoreError, match=r"^Could not use .*/INDEX\.json: Read-only file system\.$"):
        seal(finished, PLAN)
    (made / "shards/train/000/000001.json").unlink()
    (made / "shards/train/000/000001.arrow").unlink()
    rows = synthetic_rows(synthetic_manifest(), 3, 9)
    with pytest.raises(StoreError, match=r"^Could not use .*/000001\.arrow: Read-only file system\.$"):
        write_shard(finished, synthetic_manifest(), "train", 1, rows)


def test_what_is_finished_is_not_touched(tmp_path: Path) -> None:
    path, manifest = tmp_path / "store", synthetic_manifest()
    write_synthetic_store(path, manifest, {"train": 6}, seed=0)
    before = _modes(path)
    write_synthetic_store(path, manifest, {"train": 6}, seed=0)
    assert _modes(path) == before, "no file is made, not even for a moment, and none is replaced"


@pytest.mark.parametrize("is_sealed", [False, True])
def test_other_rows_than_those_of_a_committed_shard_are_refused(is_sealed: bool, tmp_path: Path) -> None:
    path, manifest = tmp_path / "store", synthetic_manifest(sequence_length=64)
    rows = synthetic_rows(manifest, 6, 0)
    write_synthetic_store(path, manifest, {"train": 6}, seed=0)
    if not is_sealed:
        (path / "INDEX.json").unlink()
    before = _modes(path)
    write_shard(path, manifest, "train", 1, rows[3:])
    other = rows[3].token_ids.copy()
    other[41:] = (other[41:] + 1) % 300
    rows[3].token_ids[:] = other
    with pytest.raises(
        StoreError,
        match=r"store, split train, shard 000001 is committed with other text than was given for it: row 3 "
        r"differs from position 41 on; write to a new folder",
    ):
        write_shard(path, manifest, "train", 1, rows[3:])
    with pytest.raises(StoreError, match=r"shard 000000 is committed with 3 rows, but 2 were given"):
        write_shard(path, manifest, "train", 0, rows[:2])
    shorter = synthetic_rows(synthetic_manifest(sequence_length=16), 3, 0)
    with pytest.raises(StoreError, match="row 0 differs from position"):
        write_shard(path, manifest, "train", 0, shorter)
    assert _modes(path) == before


def test_a_damaged_committed_shard_is_not_taken_for_written(tmp_path: Path) -> None:
    path, manifest = tmp_path / "store", synthetic_manifest()
    write_synthetic_store(path, manifest, {"train": 3}, seed=0)
    place = path / "shards/train/000/000000.arrow"
    offset = int(open_store(path).commit("train", 0).offsets[0])
    data = bytearray(place.read_bytes())
    data[offset + 100] ^= 1
    place.write_bytes(data)
    with pytest.raises(DamagedStoreError, match="the bytes of row 0 are not those that were written"):
        write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 3, 0))
    place.write_bytes(data[: offset + 10])
    with pytest.raises(DamagedStoreError, match="the bytes of row 0 are not those that were written"):
        write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 3, 0))
