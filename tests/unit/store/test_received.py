"""Stores that a stranger gave: names that lead elsewhere, links, FIFOs, folders of any size."""

import os
import posixpath
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.places import tokenizer_folder
from sparsekd.logit_store.places.files import files_below, names_in, publish_bytes
from sparsekd.logit_store.places.names import admitted_name
from sparsekd.logit_store.places.paths import RemotePath
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.recover import adopt_shard
from sparsekd.logit_store.protocol.repair import repair_store
from sparsekd.logit_store.protocol.writer import committed_shards, create_store, seal, write_shard
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.logit_store.tools.verify import verify_store

sys.path.append(str(Path(__file__).parent))
from s3_server import S3Server

pytestmark = pytest.mark.timeout(120)  # what hangs at a FIFO hangs for ever

REFUSED = {
    "": "has an empty part",
    "/etc/x": "is an absolute place",
    "//x": "is an absolute place",
    "C:x": "is an absolute place",
    "a/c:/x": "is an absolute place",
    "a//b": "has an empty part",
    "a/": "has an empty part",
    ".": "means another folder",
    "..": "means another folder",
    "../x": "means another folder",
    "a/../../x": "means another folder",
    "a/./x": "means another folder",
    "a/..": "means another folder",
    "a\\..\\x": "has a backslash",
    "a\0b": "do not print",
    "a\nb": "do not print",
    "a\x1b[2J": "do not print",
    "a\x7f": "do not print",
    "a\u202eb": "do not print",
    "a\udcff": "do not print",
    "n" * 256: "more than 255 bytes",
    "é" * 128: "more than 255 bytes",
    "/".join(["n" * 200] * 6): "more than 1,024 bytes",
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(StoreError, match=REFUSED[name]) as raised:
        admitted_name(name, Path("store/tokenizer"))
    said = str(raised.value)
    assert said.startswith("store/tokenizer lists a file named '") and said.isprintable() and len(said) < 400


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", ".gitattributes", "a/b/c", "..x", "x..", "a b", "é-日本", "n" * 255, "000001.arrow"],
)
def test_names_that_are_admitted(name: str) -> None:
    assert admitted_name(name, Path("store")) == name


@given(st.text(st.sampled_from("a./\\:\0\n~é"), max_size=12))
def test_an_admitted_name_stays_below_its_folder(name: str) -> None:
    try:
        admitted = admitted_name(name, Path("store"))
    except StoreError:
        return
    joined = posixpath.join("/stores/one", admitted)
    assert posixpath.normpath(joined) == joined != "/stores/one" and joined.startswith("/stores/one/")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    write_synthetic_store(tmp_path / "store", synthetic_manifest(), {"train": 6}, seed=0)
    return tmp_path / "store"


def _everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "key", ["../../../x", "../x", "a/../../../../x", "./x", "a//x", "a\\x", "/../x", "c:/x", "n" * 300]
)
def test_an_object_store_cannot_write_outside_of_the_cache(
    key: str, s3: S3Server, bucket: RemotePath, local: Path, tmp_path: Path
) -> None:
    for name in files_below(local):
        publish_bytes(bucket / name, (local / name).read_bytes())
    s3.put(f"{bucket.key}/tokenizer/{key}", b"not yours")
    before = _everything_below(tmp_path)
    store = open_store(bucket)
    s3.requests.clear()
    with pytest.raises(StoreError, match="lists a file named") as raised:
        _ = store.tokenizer_path
    assert "\n" not in str(raised.value)
    assert all(lists for _, _, lists in s3.requests), "nothing is fetched before all names are admitted"
    made = {name for name in _everything_below(tmp_path) - before if not name.startswith("cache/pieces")}
    assert made <= {"cache", "cache/account"}
    with pytest.raises(StoreError):
        seal(bucket, {"train": 2, "heldout": 0})
    assert not verify_store(bucket).ok


def _link(place: Path) -> None:
    place.symlink_to("/etc/passwd")


def _link_to_folder(place: Path) -> None:
    place.symlink_to("/etc")


def _socket(place: Path) -> None:
    # Bound by a short name: the path of a socket may have some 100 bytes.
    here = os.getcwd()
    os.chdir(place.parent)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place.name)
    os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "a FIFO": lambda place: os.mkfifo(place),
    "a socket": _socket,
    "a link": _link,
    "a folder": lambda place: place.mkdir(),
}


@pytest.mark.parametrize("kind", [*KINDS, "a link to a folder", "a backslash", "an escape", "not UTF-8"])
def test_a_tokenizer_folder_holds_plain_files(kind: str, local: Path) -> None:
    folder = local / "tokenizer"
    make = KINDS | {"a link to a folder": _link_to_folder}
    name = {"a backslash": "a\\b", "an escape": "a\x1bb", "not UTF-8": os.fsdecode(b"a\xff")}.get(
        kind, "more"
    )
    make.get(kind, lambda place: place.write_bytes(b"x"))(folder / name)
    if kind == "a folder":  # an empty one says nothing
        assert open_store(local).tokenizer_path == folder
        return
    said = "a backslash|do not print|more, a link|more, a FIFO, a socket or a device"
    with pytest.raises(StoreError, match=said):
        _ = open_store(local).tokenizer_path
    with pytest.raises(StoreError, match=said):
        seal(local, {"train": 2, "heldout": 0})
    with pytest.raises(StoreError, match=said):
        create_store(local, synthetic_manifest(), local.with_name("store-tokenizer"))
    found = verify_store(local)
    assert not found.ok and len(found.damaged) == 0, found.text()


def test_another_tokenizer_than_the_manifests_is_not_handed_out(local: Path) -> None:
    (local / "tokenizer/tokenizer.json").write_bytes(b"{}")
    with pytest.raises(DamagedStoreError, match="does not hold the manifest's tokenizer"):
        _ = open_store(local).tokenizer_path


@pytest.mark.parametrize("place", ["tokenizer", "shards", "shards/train", "quarantine", "projections"])
def test_nothing_is_written_or_removed_through_a_link(place: str, local: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    if (local / place).exists():
        shutil.move(local / place, elsewhere)
    (elsewhere / "train").mkdir(parents=True, exist_ok=True)
    (local / place).symlink_to(elsewhere)
    (elsewhere / ".tmp-mine").write_bytes(b"of another program")
    before = _everything_below(elsewhere)
    manifest = synthetic_manifest()
    with pytest.raises(StoreError, match=f"{place} is a link|does not hold|is not a logit store"):
        seal(local, {"train": 2, "heldout": 0})
    with pytest.raises(StoreError, match=f"{place} is a link"):
        create_store(local, manifest, local.with_name("store-tokenizer"))
    with pytest.raises(StoreError, match=f"{place} is a link"):
        repair_store(local, [("train", 0)], lambda split, shard: synthetic_rows(manifest, 3, 0))
    assert _everything_below(elsewhere) == before


def test_a_users_own_tokenizer_may_be_links(tmp_path: Path) -> None:
    manifest = synthetic_manifest()
    write_synthetic_store(tmp_path / "other", manifest, {"train": 1}, seed=0)
    snapshot = tmp_path / "snapshot"  # as in Hugging Face's cache: names that lead to blobs
    snapshot.mkdir()
    for number, name in enumerate(files_below(tmp_path / "other-tokenizer")):
        shutil.copy(tmp_path / "other-tokenizer" / name, tmp_path / f"blob{number}")
        (snapshot / name).symlink_to(f"../blob{number}")
    create_store(tmp_path / "store", manifest, snapshot)
    copies = list((tmp_path / "store/tokenizer").iterdir())
    assert copies and not any(path.is_symlink() for path in copies)
    assert files_below(tmp_path / "store/tokenizer") == sorted(path.name for path in snapshot.iterdir())


@pytest.mark.parametrize("what", ["many", "large"])
def test_a_tokenizer_folder_is_bounded_before_it_is_read(what: str, local: Path, tmp_path: Path) -> None:
    for folder in (local / "tokenizer", tmp_path / "own"):
        folder.mkdir(exist_ok=True)
        if what == "many":
            for number in range(1001):
                (folder / f"{number}").touch()
        else:
            with open(folder / "weights", "wb") as file:
                file.truncate(1 << 40)  # nobody could read this
    with pytest.raises(StoreError, match=r"more than 1,000 files|1,099,511,\d+,\d+ bytes"):
        _ = open_store(local).tokenizer_path
    with pytest.raises(StoreError, match=r"own holds (1,001 files|1 files of 1,099,511,627,776)"):
        create_store(tmp_path / "new", synthetic_manifest(), tmp_path / "own")
    assert not (tmp_path / "new").exists()


def test_a_remote_tokenizer_is_bounded_before_it_is_read(
    s3: S3Server, bucket: RemotePath, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files_below(local):
        publish_bytes(bucket / name, (local / name).read_bytes())
    publish_bytes(bucket / "tokenizer/more", b"x" * 5000)
    store = open_store(bucket)
    s3.requests.clear()
    for bound, value in (("MOST_FILES", 1), ("LARGEST_BYTES", 5000)):
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer_folder, bound, value)
            with pytest.raises(StoreError, match=r"more than 1 files|holds 2 files of \d,\d+ bytes"):
                _ = store.tokenizer_path
    assert len(s3.requests) == 2 and all(lists for _, _, lists in s3.requests)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["MANIFEST.json", "INDEX.json"])
def test_what_is_no_file_is_refused_in_place_of_a_text(kind: str, name: str, local: Path) -> None:
    (local / name).unlink()
    KINDS[kind](local / name)
    said = rf"^Could not use .*/store/{name}: it is {kind} where a file belongs\.$"
    for use in (
        lambda: open_store(local),
        lambda: seal(local, {"train": 2, "heldout": 0}),
    ):
        with pytest.raises(StoreError, match=said):
            use()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("access", ["positional", "mapped"])
@pytest.mark.parametrize("ending", ["arrow", "json"])
def test_what_is_no_file_is_refused_in_a_shards_place(
    kind: str, access: str, ending: str, local: Path
) -> None:
    place = local / f"shards/train/000/000001.{ending}"
    place.unlink()
    KINDS[kind](place)
    store = open_store(local, access=access)
    if ending == "arrow":
        with pytest.raises(StoreError, match=f"000001.arrow.*it is {kind} where a file belongs") as raised:
            store.read_row("train", 3)
        assert "\n" not in str(raised.value)
    else:
        assert store.read_row("train", 3) is not None, "the index is enough: no commit record is read"
    assert store.read_row("train", 2) is not None
    found = verify_store(local)
    assert found.damaged == (("train", 1),), found.text()
    manifest, rows = synthetic_manifest(), synthetic_rows(synthetic_manifest(), 3, 0)
    with pytest.raises(StoreError):
        seal(local, {"train": 2, "heldout": 0})
    with pytest.raises(StoreError):
        write_shard(local, manifest, "train", 1, rows)
    if kind != "a folder":
        with pytest.raises(StoreError, match="a store has files and folders only"):
            names_in(place.parent)
        with pytest.raises(StoreError):
            committed_shards(local, "train")
    if ending == "arrow":
        (local / "shards/train/000/000001.json").unlink()
        assert not adopt_shard(local, manifest, "train", 1), "in quarantine"
