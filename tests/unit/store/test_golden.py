"""Stores of old decode to the same bits for ever, also by a reader that shares no code with ours."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import zstandard

from sparsekd.logit_store.codecs.codec import CODECS, codec_of
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.protocol.commit import commit_to_content
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.recover import record_of_file
from sparsekd.logit_store.row import planes_of_row
from sparsekd.logit_store.tools.verify import verify_store

GOLDEN = Path(__file__).parent / "golden"
DIGESTS = json.loads((GOLDEN / "DIGESTS.json").read_text())

# What the bytes, and the random rows behind them, depend on; what they decode to depends on neither.
WRITTEN_WITH = ((1, 5, 7), "2.4")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load(GOLDEN / "make.py")
independent = _load(Path(__file__).parent / "independent_reader.py")


def test_every_codec_has_a_golden_store() -> None:
    assert {codec for codec, _ in make.KINDS.values()} == set(CODECS)
    assert set(make.KINDS) == set(DIGESTS)


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_golden_store_decodes_to_fixed_digests(name: str) -> None:
    store = open_store(GOLDEN / name)
    assert store.digest == DIGESTS[name]["store"]
    assert verify_store(GOLDEN / name).problems == ()
    for place, planes in DIGESTS[name]["rows"].items():
        split, index = place.split("/")
        assert make.digests_of(store.read_row(split, int(index))) == planes, place


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_golden_shards_would_be_adopted_with_the_records_they_have(name: str) -> None:
    """Whatever releases are installed: every byte of a shard follows from its planes."""
    store = open_store(GOLDEN / name)
    for split in store.manifest.splits:
        for shard in range(store.shards(split)):
            made = record_of_file(store.path, store.manifest, split, shard)
            assert commit_to_content(made) == commit_to_content(store.commit(split, shard))


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_independent_reader_agrees(name: str) -> None:
    store = open_store(GOLDEN / name)
    read = 0
    for split, index, planes in independent.read_store(GOLDEN / name):
        row = store.read_row(split, index)
        for plane in names_of(planes_of(store.manifest)):
            ours = planes_of_row(row)[plane]
            np.testing.assert_array_equal(np.asarray(planes[plane], ours.dtype), ours, err_msg=plane)
        read += 1
    assert read == len(DIGESTS[name]["rows"]) == 4


@pytest.mark.skipif(
    (zstandard.ZSTD_VERSION, np.__version__[:3]) != WRITTEN_WITH, reason="another zstd or numpy, other bytes"
)
@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_writing_again_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    manifest = make.golden_manifest(name)
    store = open_store(GOLDEN / name)
    assert store.manifest == manifest
    for split, rows in make.golden_rows(manifest).items():
        for index, row in enumerate(rows):
            stored = codec_of(manifest).encode(row, manifest)
            message = store.read_message(split, index)
            assert all(plane in message for plane in stored.values() if plane)


def test_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    path = shutil.copytree(GOLDEN / "tkq8", tmp_path / "store")
    content = json.loads((path / "MANIFEST.json").read_text())
    (path / "MANIFEST.json").write_text(json.dumps({**content, "format_version": 2, "unheard": {"of": 1}}))
    with pytest.raises(StoreError, match=r"format version 2.*versions up to 1.*update sparsekd"):
        open_store(path)


def test_unknown_codec_is_refused_by_its_name() -> None:
    manifest = open_store(GOLDEN / "tkq8").manifest
    newer = dataclasses.replace(manifest, codec=dataclasses.replace(manifest.codec, name="tkq9"))
    with pytest.raises(StoreError, match=r"'tkq9'.*compact, exact, fp16, plain, tkq8"):
        codec_of(newer)
