"""Stores on S3 (moto's server on loopback) and behind pyarrow's interface: the same bytes and promises."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import DamagedStoreError, NameTakenError, StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.places import access, file_system
from sparsekd.logit_store.places.cache import FOLDER_VARIABLE, LIMIT_VARIABLE, Cache, default_cache
from sparsekd.logit_store.places.files import files_below, publish_bytes
from sparsekd.logit_store.places.paths import RemotePath, StorePath, store_path
from sparsekd.logit_store.places.remote_files import RemoteFiles
from sparsekd.logit_store.protocol import writer
from sparsekd.logit_store.protocol.layout import commit_file, shard_file
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.repair import repair_store
from sparsekd.logit_store.protocol.writer import committed_shards, create_store, seal, write_shard
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.logit_store.tools.verify import verify_store
from sparsekd.trainer.door.cli import main

sys.path.append(str(Path(__file__).parent))
from s3_server import S3Server

SERVER = Path(__file__).with_name("crash_server.py")
ROWS = {"train": 9, "heldout": 2}


def _tree(path: StorePath) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in files_below(path)}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The store of these tests on the local disk, and its digest."""
    path = tmp_path_factory.mktemp("local") / "store"
    return path, write_synthetic_store(path, synthetic_manifest(), ROWS, seed=0)


def _other_bits(manifest: Manifest, seed: int) -> list[Row]:
    """A shard's text, with what a teacher says whose bits differ from pass to pass."""
    rows = synthetic_rows(manifest, 3, 0)
    for row in rows:
        assert row.teacher is not None
        row.teacher.entropy[:] *= 1 - seed / 100
    return rows


def _shards(manifest: Manifest) -> list[tuple[str, int, list[Row]]]:
    train, heldout = synthetic_rows(manifest, 9, 0), synthetic_rows(manifest, 2, 1)
    return [
        *(("train", shard, train[shard * 3 : shard * 3 + 3]) for shard in range(3)),
        ("heldout", 0, heldout),
    ]


def _write(path: StorePath, local: Path) -> str:
    manifest = synthetic_manifest()
    create_store(path, manifest, local / "tokenizer")
    for split, shard, rows in _shards(manifest):
        write_shard(path, manifest, split, shard, rows)
    return seal(path, {"train": 3, "heldout": 1})


def test_a_store_on_s3_is_the_local_one_to_the_byte(
    bucket: RemotePath, local: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = bucket / "store"
    assert _write(path, local[0]) == local[1]
    assert _write(path, local[0]) == local[1], "again, with nothing left to do"
    assert _tree(path) == _tree(local[0])
    store = open_store(str(path))
    expected = open_store(local[0])
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(store.read_row, ["train"] * 9, range(9))
        for row, index in zip(found, range(9), strict=True):
            assert (row.token_ids == expected.read_row("train", index).token_ids).all()
    assert (store.tokenizer_path / "tokenizer.json").read_bytes() == (
        local[0] / "tokenizer/tokenizer.json"
    ).read_bytes()
    # By the command line, where it is a word like any other path.
    assert main(["store", "verify", str(path)]) == 0
    assert main(["store", "inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"store      {path}" in printed and "every byte is as it was written" in printed
    assert f"next: sparsekd train store.path={path}" in printed


@pytest.mark.parametrize("kind", ["pyarrow", "fsspec"])
def test_other_file_systems_go_by_a_temporary_name(
    kind: str, local: tuple[Path, str], tmp_path: Path
) -> None:
    behind = RemoteFiles(LocalFileSystem())
    path: StorePath = RemotePath(behind, "test://", str(tmp_path / "behind")) / "store"
    if kind == "fsspec":
        path = store_path("memory://folder/store")
    assert isinstance(path, RemotePath)
    assert _write(path, local[0]) == local[1]
    assert _tree(path) == _tree(local[0]) and verify_store(path).ok
    with pytest.raises(NameTakenError, match="holds other bytes"):
        publish_bytes(path / "INDEX.json", b"else")
    assert _tree(path) == _tree(local[0]), "and no temporary file stays"


def test_words_that_name_places(s3: None) -> None:
    assert store_path("runs/a/store") == Path("runs/a/store")
    assert store_path("file:///runs/a") == Path("/runs/a")
    place = store_path("s3://bucket/a/store/?region=eu-west-1&scheme=http")
    assert isinstance(place, RemotePath)
    assert str(place) == "s3://bucket/a/store" and place.parent / place.name == place
    assert str(store_path(str(place))) == str(place)
    # Credentials open the store, and show nowhere.
    secret = store_path("s3://KEY:SE%2FCRET@bucket/a@b/store?region=eu-west-1")
    assert isinstance(secret, RemotePath) and secret.key == "a@b/store"
    assert str(secret) == "s3://bucket/a@b/store" and secret.root == "s3://bucket/"
    assert (secret / "x").parent == secret and "CRET" not in repr(secret)
    for wrong in (
        "s3://KEY:SE/CRET@bucket/a",
        "s3://KEY:SE CRET@bucket/a?b=CRET",
        "nothing://me:SE/CRET@host/a",
    ):
        with pytest.raises(StoreError, match=r"^(s3://bucket|nothing://host)/a") as raised:
            store_path(wrong)
        assert "CRET" not in str(raised.value) and raised.value.__cause__ is None
    with pytest.raises(StoreError, match=r"neither pyarrow nor fsspec opens nothing:// addresses"):
        store_path("nothing://bucket/a")
    with pytest.raises(StoreError, match=r"^s3://bucket/nowhere is not a logit store: it has no MANIFEST"):
        open_store("s3://bucket/nowhere")
    with pytest.raises(StoreError, match=r"cannot be read 'mapped'"):
        open_store("s3://bucket/nowhere", access="mapped")


@pytest.mark.parametrize("where", ["uploading .arrow 2", "uploaded .arrow 1", "uploading .json 3"])
def test_a_killed_upload_leaves_nothing_that_is_read(where: str, bucket: RemotePath, tmp_path: Path) -> None:
    manifest = synthetic_manifest(sequence_length=128, rows_per_shard=4)
    whole = tmp_path / "whole"
    digest = write_synthetic_store(whole, manifest, {"train": 48}, seed=0)
    path = bucket / "killed"
    command = [sys.executable, str(SERVER), str(path), str(tmp_path / "whole-tokenizer"), where]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    expected = _tree(whole)
    assert all(data == expected[name] for name, data in _tree(path).items())
    done = committed_shards(path, "train")
    assert done == set(range(len(done))) and len(done) < 4
    # The same in this process, which has not seen the other.
    create_store(path, manifest, tmp_path / "whole-tokenizer")
    rows = synthetic_rows(manifest, 48, 0)
    for shard in range(12):
        write_shard(path, manifest, "train", shard, rows[shard * 4 : shard * 4 + 4])
    assert seal(path, {"train": 12, "heldout": 0}) == digest
    assert _tree(path) == expected


@pytest.mark.parametrize("honours", [True, False])
def test_of_racing_writers_with_other_bits_one_is_left(
    bucket: RemotePath,
    s3: S3Server,
    local: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    honours: bool,
) -> None:
    monkeypatch.setattr(s3, "honours_conditions", honours)
    path, manifest = bucket / "raced", synthetic_manifest()
    create_store(path, manifest, local[0] / "tokenizer")
    # One writer begins its upload, another does all of its own, then the first one's upload is completed.
    for shard, step in enumerate(("uploading", "read back")):
        raced = []

        def other(
            found: str, final: StorePath, shard: int = shard, step: str = step, raced: list[int] = raced
        ) -> None:
            if found == step and final.name == f"00000{shard}.arrow" and not raced:
                raced.append(1)
                write_shard(path, manifest, "train", shard, _other_bits(manifest, 9))

        with monkeypatch.context() as patch:
            patch.setattr(file_system, "reached", other)
            write_shard(path, manifest, "train", shard, _other_bits(manifest, shard))
        assert raced
    # And without any order.
    start = threading.Barrier(2)

    def write(seed: int) -> None:
        for shard in (2, 3):
            start.wait(60)
            write_shard(path, manifest, "train", shard, _other_bits(manifest, seed))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (1, 2)))
    seal(path, {"train": 4, "heldout": 0})
    result = verify_store(path)
    assert result.ok, result.text()


def test_only_the_bytes_that_the_record_names_are_accepted(
    bucket: RemotePath, local: tuple[Path, str]
) -> None:
    path, manifest = bucket / "store", synthetic_manifest()
    _write(path, local[0])
    create_store(bucket / "other", manifest, local[0] / "tokenizer")
    write_shard(bucket / "other", manifest, "train", 1, synthetic_rows(manifest, 3, 9))
    # A writer that should be dead completes its upload.
    stray = (bucket / "other/shards/train/000/000001.arrow").read_bytes()
    publish_bytes(shard_file(path, "train", 1), stray, replace=True)
    store = open_store(path)
    with pytest.raises(DamagedStoreError, match=r"s3://bucket/.*split train, shard 000001, row 3: "):
        store.read_row("train", 3)
    found = verify_store(path)
    assert found.damaged == (("train", 1),)
    rows = synthetic_rows(manifest, 9, 0)
    result = repair_store(path, found.damaged, lambda split, shard: rows[3:6])
    assert result.digest == local[1] and (path / "quarantine/train/000001.arrow").read_bytes() == stray
    assert verify_store(path).ok
    # Each of the open store's handles and cached pieces is of the old file; a second look finds the new one.
    assert (store.read_row("train", 3).token_ids == rows[3].token_ids).all()


def test_the_cache_keeps_its_bound_and_is_not_trusted(
    bucket: RemotePath, local: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bucket / "store"
    _write(path, local[0])
    asked: list[Any] = []
    real = access.read_range

    def counted(place: StorePath, offset: int, length: int) -> bytes:
        asked.append((place, offset))
        return real(place, offset, length)

    monkeypatch.setattr(access, "read_range", counted)
    large = open_store(path, cache=Cache(tmp_path / "large", 1 << 20))
    rows = [large.read_row("train", index) for index in range(9)]
    assert len(asked) == 9 + 2, "each row, and each split's table"
    for index in range(9):
        large.read_row("train", index)
    assert len(asked) == 11, "all from the cache"
    # A damaged piece is fetched anew.
    pieces = sorted((tmp_path / "large/pieces").iterdir())
    assert len(pieces) == 9 + 2
    for piece in pieces:
        piece.write_bytes(piece.read_bytes()[:-5] + b"wrong")
    again = open_store(path, cache=Cache(tmp_path / "large", 1 << 20))
    assert all(
        (again.read_row("train", index).token_ids == rows[index].token_ids).all() for index in range(9)
    )
    assert len(asked) == 11 + 9 * 2, "each row, and the table, which might have been the damaged one"

    row_bytes = max(piece.stat().st_size for piece in pieces)
    limit = 4 * row_bytes
    small = Cache(tmp_path / "small", limit)
    stores = [open_store(path, cache=cache) for cache in (small, Cache(tmp_path / "small", limit))]
    sizes = []

    def read(number: int) -> None:
        stores[number % 2].read_row("train", number * 7 % 9)
        sizes.append(small.size())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(120)))
    assert 0 < max(sizes) <= limit
    print(f"cache of {limit:,} bytes held {max(sizes):,} at most")


def test_the_least_recently_used_piece_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 100)
    for name in ("a", "b", "c"):
        cache.put(name, bytes(30))
        os.utime(tmp_path / "cache/pieces" / name, ns=(ord(name), ord(name)))
    assert cache.get("a") is not None  # used now
    cache.put("d", bytes(30))
    assert [name for name in "abcd" if cache.get(name) is not None] == ["a", "c", "d"]
    cache.put("huge", bytes(101))
    assert cache.get("huge") is None and cache.size() <= 100
    (tmp_path / "cache/account").write_text("nonsense")
    cache.put("e", bytes(30))
    assert cache.get("e") is not None and cache.size() <= 100


def test_the_cache_is_a_matter_of_the_machine(tmp_path: Path) -> None:
    cache = default_cache({FOLDER_VARIABLE: str(tmp_path / "here"), LIMIT_VARIABLE: "0.5"})
    assert (cache.folder, cache.limit) == (tmp_path / "here", 2**29)
    assert default_cache({"XDG_CACHE_HOME": str(tmp_path)}).folder == tmp_path / "sparsekd"
    with pytest.raises(StoreError, match=r"SPARSEKD_CACHE_GIB=much is not a number"):
        default_cache({FOLDER_VARIABLE: str(tmp_path), LIMIT_VARIABLE: "much"})


def test_a_record_of_another_upload_is_not_taken(bucket: RemotePath, local: tuple[Path, str]) -> None:
    path = bucket / "store"
    _write(path, local[0])
    other = (path / "shards/train/000/000002.json").read_bytes()
    publish_bytes(commit_file(path, "train", 1), other, replace=True)
    assert open_store(path).read_row("train", 3), "a row needs no commit record"
    problems = "; ".join(map(str, verify_store(path).problems))
    assert "is the record of shard 000002" in problems


@pytest.mark.usefixtures("careless")
@pytest.mark.parametrize("kept", ["record", "shard"])
def test_a_third_writer_in_between_is_waited_for(
    bucket: RemotePath, local: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    path, manifest = bucket / "third", synthetic_manifest()
    create_store(path, manifest, local[0] / "tokenizer")
    create_store(bucket / "other", manifest, local[0] / "tokenizer")
    write_shard(bucket / "other", manifest, "train", 0, _other_bits(manifest, 9))
    name = "publish" if kept == "record" else "publish_bytes"
    plain, refused = getattr(writer, name), []

    def others(step: str, final: StorePath) -> None:
        # Another writer that died has left its record or its shard beside this one's.
        if step == "read back" and final == commit_file(path, "train", 0) and not refused:
            monkeypatch.setattr(file_system, "reached", lambda step, final: None)
            place = shard_file if kept == "record" else commit_file
            stray = place(bucket / "other", "train", 0).read_bytes()
            publish_bytes(place(path, "train", 0), stray, replace=True)
            monkeypatch.setattr(writer, name, third)

    def third(*args: Any, **settings: Any) -> str:
        if not refused:
            refused.append(True)
            raise NameTakenError("holds the bytes of a third writer")
        return plain(*args, **settings)

    monkeypatch.setattr(writer.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(file_system, "reached", others)
    write_shard(path, manifest, "train", 0, _other_bits(manifest, 1))
    assert refused
    seal(path, {"train": 1, "heldout": 0})
    assert verify_store(path).ok


def test_a_plan_counts_tokens_that_are_elsewhere(
    bucket: RemotePath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = synthetic_manifest(k=0, n=0)
    write_synthetic_store(tmp_path / "tokens", manifest, ROWS, seed=0)
    create_store(bucket / "tokens", manifest, tmp_path / "tokens-tokenizer")
    for split, rows in ROWS.items():
        content = synthetic_rows(manifest, rows, manifest.splits.index(split), split)
        for shard in range(-(-rows // 3)):
            write_shard(bucket / "tokens", manifest, split, shard, content[3 * shard : 3 * shard + 3])
    seal(bucket / "tokens", {"train": 3, "heldout": 1})
    printed = []
    for place in (tmp_path / "tokens", bucket / "tokens"):
        assert main(["plan", f"store.tokens={place}"]) == 0
        printed.append(capsys.readouterr().out.replace(str(place), "TOKENS"))
    assert printed[0] == printed[1] and "11 of 16 tokens" in printed[1] and "next: torchrun" in printed[1]
    # One that is not there yet.
    assert (
        main(["plan", f"store.tokens={bucket}/nothing", "plan.tokens=1e6", "plan.vocabulary_size=300"]) == 0
    )
    assert "next: sparsekd prepare" in capsys.readouterr().out
