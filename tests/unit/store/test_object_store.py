"""Object stores: conditional uploads, their races, how many requests things take, addresses, credentials."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import NameTakenError, StoreError
from sparsekd.logit_store.places import object_stores
from sparsekd.logit_store.places.files import (
    exists,
    files_below,
    is_exclusive,
    move,
    names_in,
    publish_bytes,
    read_range,
    sizes_below,
)
from sparsekd.logit_store.places.paths import RemotePath, store_path
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import committed_shards, create_store, seal, write_shard
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.logit_store.tools.verify import verify_store

sys.path.append(str(Path(__file__).parent))
from s3_server import S3Server

WRITER = Path(__file__).with_name("crash_server.py")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    write_synthetic_store(tmp_path / "made", synthetic_manifest(), {"train": 9, "heldout": 2}, seed=0)
    return tmp_path / "made"


def _write(path: RemotePath, local: Path) -> None:
    manifest = synthetic_manifest()
    create_store(path, manifest, local / "tokenizer")
    for split, count, seed in (("train", 9, 0), ("heldout", 2, 1)):
        rows = synthetic_rows(manifest, count, seed)
        for shard in range(-(-count // 3)):
            write_shard(path, manifest, split, shard, rows[shard * 3 : shard * 3 + 3])


def test_of_eight_clients_that_make_one_object_one_wins(s3: S3Server, bucket: RemotePath) -> None:
    clients = [store_path(str(bucket)) for _ in range(8)]
    for race in range(25):
        start = threading.Barrier(len(clients))

        def publish(number: int, start: threading.Barrier = start, race: int = race) -> bool:
            start.wait(60)
            try:
                publish_bytes(clients[number] / f"{race}", b"%d" % number * 1000)
            except NameTakenError:
                return False
            return True

        with ThreadPoolExecutor(len(clients)) as pool:
            won = list(pool.map(publish, range(len(clients))))
        assert sum(won) == 1
        assert (bucket / f"{race}").read_bytes() == b"%d" % won.index(True) * 1000
        assert s3.accepted[f"{bucket.key}/{race}"] == 1, "and at no moment was there another"
    assert len(names_in(bucket)) == 25, "nothing of the trials stays"


def test_whether_a_service_honours_conditions_is_tried_out_once(s3: S3Server, bucket: RemotePath) -> None:
    s3.requests.clear()
    for number in range(3):
        publish_bytes(bucket / f"{number}", b"x")
    trials = [method for method, key, _ in s3.requests if "/.tmp-" in key]
    assert trials == ["PUT", "PUT", "DELETE"] and is_exclusive(bucket / "x")
    s3.requests.clear()
    publish_bytes(bucket / "0", b"x")
    with pytest.raises(NameTakenError):
        publish_bytes(bucket / "1", b"y")
    assert {method for method, _, _ in s3.requests} == {"GET"}, "nothing is uploaded over what is there"


@pytest.mark.usefixtures("careless")
def test_a_service_that_ignores_conditions_is_found_out(bucket: RemotePath) -> None:
    assert not is_exclusive(bucket / "x") and names_in(bucket) == []
    publish_bytes(bucket / "x", b"x")
    with pytest.raises(NameTakenError):
        publish_bytes(bucket / "x", b"y")


def test_a_service_that_refuses_conditions_is_found_out(
    bucket: RemotePath, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = s3.answer

    def without(environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        if "HTTP_IF_NONE_MATCH" in environment:
            environment["wsgi.input"].read(int(environment["CONTENT_LENGTH"]))
            start("501 Not Implemented", [("Content-Type", "application/xml"), ("Content-Length", "0")])
            return [b""]
        return real(environment, start)

    monkeypatch.setattr(s3, "answer", without)
    assert not is_exclusive(bucket / "x")
    publish_bytes(bucket / "x", b"x")
    assert (bucket / "x").read_bytes() == b"x"


def test_how_many_requests_things_take(s3: S3Server, bucket: RemotePath, local: Path) -> None:
    path = bucket / "store"
    _write(path, local)

    def asked() -> Counter[tuple[str, str]]:
        found: Counter[tuple[str, str]] = Counter()
        for method, key, lists in s3.requests:
            found["LIST" if lists else method, "" if lists else key.rpartition(".")[2]] += 1
        s3.requests.clear()
        return found

    asked()
    seal(path, {"train": 3, "heldout": 1})
    sealing = asked()
    assert sealing["GET", "arrow"] == sealing["HEAD", "arrow"] == 0
    commit_records = 4
    manifest, tokenizer, index = 1, 1, 2  # the index is looked for, and read back
    assert sealing["GET", "json"] == commit_records + manifest + tokenizer + index
    assert sealing["HEAD", "json"] == 1 and sealing["PUT", "json"] == 1
    assert sealing["LIST", ""] == 2 + 1, "each split's folder, and the tokenizer's"

    store = open_store(path)
    assert asked()["GET", "bin"] == 2, "the end of each split's table, which is the whole of a small one"
    for index_of_row in range(9):
        store.read_row("train", index_of_row)
    assert asked() == {("GET", "arrow"): 9}, "a row is one request"


def test_listings_of_more_than_a_page(s3: S3Server, bucket: RemotePath) -> None:
    s3.fill({f"{bucket.key}/{number:06d}": b"x" * (number % 7) for number in range(1203)})
    s3.requests.clear()
    assert sizes_below(bucket) == {f"{number:06d}": number % 7 for number in range(1203)}
    assert len(s3.requests) == 2
    assert names_in(bucket) == [f"{number:06d}" for number in range(1203)]
    s3.requests.clear()
    with pytest.raises(StoreError, match="more than 10 files"):
        sizes_below(bucket, most=10)
    assert len(s3.requests) == 1, "a listing that is too long is not read to its end"


def test_names_of_any_letters(bucket: RemotePath) -> None:
    names = [
        "é-日本",
        "a b",
        "100%",
        "a%2fb",
        "a%20b",
        "a+b&c=d",
        "x#y",
        "q?r",
        "[1]{2}",
        "~",
        "a'b\"c",
        "..x/y.",
    ]
    for name in names:
        publish_bytes(bucket / name, name.encode())
    assert files_below(bucket) == sorted(names)
    assert all((bucket / name).read_bytes() == name.encode() for name in files_below(bucket))


def test_ranges_sizes_and_moves_are_those_of_a_local_file(bucket: RemotePath, tmp_path: Path) -> None:
    for folder in (bucket, tmp_path / "local"):
        if isinstance(folder, Path):
            folder.mkdir()
        place = folder / "a"
        publish_bytes(place, b"0123456789")
        publish_bytes(folder / "empty", b"")
        found = [read_range(place, *piece) for piece in ((0, 4), (8, 4), (10, 1), (99, 5), (3, 0))]
        assert found == [b"0123", b"89", b"", b"", b""]
        assert read_range(folder / "empty", 0, 5) == b"" and sizes_below(folder) == {"a": 10, "empty": 0}
        with pytest.raises(FileNotFoundError):
            read_range(folder / "nothing", 0, 1)
        move(place, folder / "b")
        assert not exists(place) and read_range(folder / "b", 0, 99) == b"0123456789"
        publish_bytes(place, b"else")
        with pytest.raises(FileExistsError):
            move(place, folder / "b")
        assert read_range(folder / "b", 0, 99) == b"0123456789" and exists(place)


@pytest.mark.parametrize("ending", ["arrow", "json"])
def test_a_writer_killed_in_the_middle_of_an_upload_leaves_nothing(
    ending: str, s3: S3Server, bucket: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = synthetic_manifest(sequence_length=128, rows_per_shard=4)
    digest = write_synthetic_store(tmp_path / "whole", manifest, {"train": 48}, seed=0)
    path = bucket / "killed"
    command = [sys.executable, str(WRITER), str(path), str(tmp_path / "whole-tokenizer"), "never .arrow 1"]
    started: list[subprocess.Popen[bytes]] = []

    def kill(environment: dict[str, Any]) -> None:
        is_upload = environment["REQUEST_METHOD"] == "PUT"
        if is_upload and environment["PATH_INFO"].endswith(f"000002.{ending}") and not started[0].poll():
            environment["wsgi.input"].read(int(environment["CONTENT_LENGTH"]) // 2)
            started[0].kill()
            started[0].wait(60)

    monkeypatch.setattr(s3, "before", kill)
    started.append(subprocess.Popen(command, env={**os.environ, "PYTHONSAFEPATH": "1"}))
    assert started[0].wait(120) == -signal.SIGKILL
    monkeypatch.setattr(s3, "before", lambda environment: None)
    assert committed_shards(path, "train") == {0, 1}
    assert exists(path / "shards/train/000/000002.arrow") == (ending == "json")
    assert not exists(path / "shards/train/000/000002.json")
    rows = synthetic_rows(manifest, 48, 0)
    for shard in range(12):
        write_shard(path, manifest, "train", shard, rows[shard * 4 : shard * 4 + 4])
    assert seal(path, {"train": 12, "heldout": 0}) == digest and verify_store(path).ok


def test_googles_dialect(s3: S3Server, tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's XML is what Google's has, and its condition is translated: GCS itself is not to be had."""
    account = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
    host = s3.address.removeprefix("http://")
    place = store_path(f"gs://bucket/{tmp_path.name}?scheme=http&endpoint_override={host}")
    assert str(place) == f"gs://bucket/{tmp_path.name}" and isinstance(place, RemotePath)
    _write(place, local)
    assert is_exclusive(place / "x")
    seal(place, {"train": 3, "heldout": 1})
    assert verify_store(place).ok and open_store(place).digest == open_store(local).digest


def test_addresses_of_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "aGVsbG8=")
    place = store_path("abfs://box@account.dfs.core.windows.net/a/store")
    assert isinstance(place, RemotePath) and place.key == "a/store"
    assert str(place) == "abfs://box@account.dfs.core.windows.net/a/store"
    with pytest.raises(StoreError, match=r"^az://box/a cannot be opened: its settings are not complete"):
        store_path("az://box/a")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert str(store_path("az://box/a/store")) == "az://box/a/store"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/a?regoin=SECRET", "an option behind its question mark is none of"),
        ("s3://KEY:SE/CRET@bucket/a", "a slash in a secret is written %2F"),
        ("s3://KEY:SE CRET@bucket/a", "a slash in a secret is written %2F"),
        ("s3:///a", "no bucket's name where one belongs"),
        ("s3://", "no bucket's name where one belongs"),
        ("az://box/a?region=SECRET", "an option behind its question mark is none of"),
    ],
)
def test_addresses_that_are_refused(address: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as raised:
        store_path(address)
    assert "CRET" not in str(raised.value) and raised.value.__cause__ is None


def test_credentials_from_amazons_files(
    s3: S3Server, bucket: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_bytes(bucket / "x", b"x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    seen: list[str] = []
    monkeypatch.setattr(
        s3, "before", lambda environment: seen.append(environment.get("HTTP_AUTHORIZATION", ""))
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = FIRST\naws_secret_access_key = a%b\n"
        "[work]\naws_access_key_id = SECOND\naws_secret_access_key = b\naws_session_token = c\n"
    )
    (tmp_path / ".aws/config").write_text(
        "[default]\nregion = eu-west-1\n[profile work]\nregion = eu-north-1\n[profile sso]\nsso_session = s\n"
    )
    place = str(bucket / "x")
    for profile, expected in ((None, "FIRST/%/eu-west-1"), ("work", "SECOND/%/eu-north-1")):
        if profile is not None:
            monkeypatch.setenv("AWS_PROFILE", profile)
        found = store_path(place)
        seen.clear()
        assert isinstance(found, RemotePath) and found.read_bytes() == b"x"
        key, _, region = expected.split("/")
        assert f"Credential={key}/" in seen[0] and f"/{region}/s3/" in seen[0]
    seen.clear()
    found = store_path(place.replace("s3://", "s3://THIRD:x%2Fy@") + "?region=us-west-2")
    assert found.read_bytes() == b"x" and "Credential=THIRD/" in seen[0] and "/us-west-2/s3/" in seen[0]
    monkeypatch.setenv("AWS_PROFILE", "sso")
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "obstore.auth.boto3", raising=False)
    with pytest.raises(StoreError, match="the AWS profile signs on by SSO"):
        store_path(place)
    (tmp_path / ".aws/credentials").write_text("no SECRET section\n")
    with pytest.raises(StoreError, match="credentials cannot be read") as raised:
        store_path(place)
    assert "SECRET" not in str(raised.value)


def test_without_the_library_the_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreError, match=r"^s3://bucket/a needs the package obstore"):
        store_path("s3://bucket/a")


def test_the_region_of_a_bucket_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    asked: list[str] = []

    def unknown(bucket: str) -> str:
        asked.append(bucket)
        raise OSError("no such bucket\nbehind")

    monkeypatch.setattr(object_stores, "resolve_s3_region", unknown)
    said = r"region .* could not be found out \(no such bucket\); set AWS_REGION"
    with pytest.raises(StoreError, match=said):
        store_path("s3://bucket/a")
    assert asked == ["bucket"]


def test_a_place_goes_to_another_process(bucket: RemotePath, tmp_path: Path) -> None:
    publish_bytes(bucket / "x", b"x")
    copy = pickle.loads(pickle.dumps(bucket))
    assert copy == bucket and (copy / "x").read_bytes() == b"x"
    # By fork it cannot, and says so: the library's threads live in the first process alone.
    program = (
        "import os, signal, sys\n"
        "from sparsekd.logit_store.places.paths import store_path\n"
        "place = store_path(sys.argv[1])\n"
        "assert place.read_bytes() == b'x'\n"
        "if os.fork() == 0:\n"
        "    signal.alarm(20)\n"
        "    try: place.read_bytes()\n"
        "    except Exception as error: print(type(error).__name__, error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(bucket / "x")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert "StoreError Remote stores were used before this process was forked" in done.stdout, done.stderr
