"""What every test of the store has: a cache of its own; and, on wish, a server that speaks S3."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sparsekd.logit_store.places.cache import FOLDER_VARIABLE
from sparsekd.logit_store.places.paths import RemotePath, store_path
from sparsekd.logit_store.places.tokenizer_folder import tokenizer_digest
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows

sys.path.insert(0, str(Path(__file__).parent))
if TYPE_CHECKING:
    from s3_server import S3Server


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has no test leave anything in the machine's cache."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def unspelled(tmp_path: Path) -> Path:
    """A store whose tokenizer has no tokenizer.json."""
    folder, path = tmp_path / "spiece", tmp_path / "unspelled"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(b"of another library")
    plain = synthetic_manifest()
    manifest = replace(plain, tokenizer=replace(plain.tokenizer, digest=tokenizer_digest(folder)))
    create_store(path, manifest, folder)
    write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 3, 0))
    seal(path, {"train": 1, "heldout": 0})
    return path


@pytest.fixture(scope="module")
def s3() -> Iterator["S3Server"]:
    """A server, found as any is: by the variables of Amazon's own tools."""
    # Not at the top: it takes a second to import, which most tests have no need of.
    from s3_server import s3_server

    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def careless(s3: "S3Server") -> Iterator[None]:
    """Has the server replace an object also where it was asked not to."""
    s3.honours_conditions = False
    yield
    s3.honours_conditions = True


@pytest.fixture
def bucket(s3: "S3Server", tmp_path: Path) -> RemotePath:
    """A place on the server that no other test knows."""
    place = store_path(f"s3://bucket/{tmp_path.name}")
    assert isinstance(place, RemotePath)
    return place
