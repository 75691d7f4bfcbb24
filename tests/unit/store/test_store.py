"""Writing and reading a whole store: order and number of writers leave no trace, gaps are refused."""

import dataclasses
import errno
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import DamagedStoreError, InvalidRowError, StoreError
from sparsekd.logit_store.manifest import Manifest, manifest_digest, manifest_from_json, manifest_to_json
from sparsekd.logit_store.places import access, local_files
from sparsekd.logit_store.protocol import reader, writer
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import committed_shards, create_store, seal, write_shard
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer

ROWS = {"train": 7, "heldout": 2}


def _tree(path: Path) -> dict[str, bytes]:
    return {
        item.relative_to(path).as_posix(): item.read_bytes() for item in path.rglob("*") if item.is_file()
    }


def _new_store(path: Path, manifest: Manifest) -> Path:
    tokenizer = write_synthetic_tokenizer(path.parent / "tokenizer", manifest.tokenizer.vocabulary_size)
    create_store(path, manifest, tokenizer)
    return path


def _assert_same_row(left: Row, right: Row) -> None:
    for name in ("token_ids", "loss_mask", "segment_starts", "segment_documents"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert (left.teacher is None) == (right.teacher is None)
    if left.teacher is not None and right.teacher is not None:
        for field in dataclasses.fields(left.teacher):
            one, other = getattr(left.teacher, field.name), getattr(right.teacher, field.name)
            if one is None and other is None:
                continue  # a plane that this store does not have
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, err_msg=field.name)


@pytest.mark.parametrize(("k", "n"), [(4, 6), (4, 0), (0, 6), (0, 0)])
def test_rows_come_back_in_any_order(tmp_path: Path, k: int, n: int) -> None:
    manifest = synthetic_manifest(k=k, n=n)
    digest = write_synthetic_store(tmp_path / "store", manifest, ROWS, seed=0)
    store = open_store(tmp_path / "store")
    assert store.digest == digest and store.manifest == manifest
    assert [store.rows(split) for split in manifest.splits] == [7, 2]
    assert [store.shards(split) for split in manifest.splits] == [3, 1]
    assert store.shard_rows("train", 1) == range(3, 6)
    assert store.shard_rows("train", 2) == range(6, 7)
    assert (store.tokenizer_path / "tokenizer.json").is_file()
    for split, seed in (("train", 0), ("heldout", 1)):
        expected = synthetic_rows(manifest, ROWS[split], seed)
        tokens, counted = store.tokens(split)
        assert tokens == ROWS[split] * manifest.sequence_length
        assert counted == sum(int(row.loss_mask.sum()) for row in expected)
        order = list(range(ROWS[split])) * 3
        random.Random(0).shuffle(order)
        with ThreadPoolExecutor(4) as pool:
            for index, row in zip(order, pool.map(store.read_row, [split] * len(order), order), strict=True):
                _assert_same_row(row, expected[index])


def test_other_arrow_readers_can_open_a_shard(tmp_path: Path) -> None:
    manifest = synthetic_manifest()
    write_synthetic_store(tmp_path / "store", manifest, ROWS, seed=0)
    with pa.ipc.open_file(tmp_path / "store/shards/train/000/000001.arrow") as shard:
        assert shard.num_record_batches == 3
        table = shard.read_all()
    assert table["row"].to_pylist() == [3, 4, 5]
    assert shard.schema.metadata[b"sparsekd.manifest_sha256"].decode() == manifest_digest(manifest)
    assert shard.schema.metadata[b"sparsekd.shard"] == b"1"


def test_order_and_repetition_leave_no_trace(tmp_path: Path) -> None:
    manifest = synthetic_manifest()
    expected = write_synthetic_store(tmp_path / "one", manifest, ROWS, seed=0)
    path = _new_store(tmp_path / "two", manifest)
    content = {"train": synthetic_rows(manifest, 7, 0), "heldout": synthetic_rows(manifest, 2, 1)}
    for split, shard in (
        ("train", 2),
        ("heldout", 0),
        ("train", 0),
        ("train", 2),
        ("train", 1),
        ("train", 1),
    ):
        write_shard(path, manifest, split, shard, content[split][shard * 3 : shard * 3 + 3])
        create_store(path, manifest, tmp_path / "tokenizer")
    assert committed_shards(path, "train") == {0, 1, 2}
    counts = {"heldout": 1, "train": 3}
    assert seal(path, counts) == expected
    assert seal(path, counts) == expected, "sealing is idempotent"
    assert _tree(path) == _tree(tmp_path / "one")
    write_shard(path, manifest, "train", 1, content["train"][3:6])
    assert _tree(path) == _tree(tmp_path / "one"), "a committed shard is left alone"


def test_another_manifest_is_refused_naming_the_fields(tmp_path: Path) -> None:
    manifest = synthetic_manifest()
    path = _new_store(tmp_path / "store", manifest)
    before = _tree(path)
    other = synthetic_manifest(k=5, seed=8, dataset={"name": "other", "sources": []})
    for attempt in (
        lambda: create_store(path, other, tmp_path / "tokenizer"),
        lambda: write_shard(path, other, "train", 0, synthetic_rows(other, 3, 0)),
    ):
        with pytest.raises(StoreError) as caught:
            attempt()
        for words in ("record.k: found 4, wanted 5", "record.seed: found 7, wanted 8", "dataset.name"):
            assert words in str(caught.value)
    assert _tree(path) == before


def _leaves(
    value: object, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], object]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _leaves(item, (*path, key))
    if not isinstance(value, dict | list):
        yield path, value


def test_each_field_of_the_manifest_is_compared(tmp_path: Path) -> None:
    # Also what changes nothing but the order of rows: a seed, the order of sources.
    sources = [{"name": name, "sha256": name * 64} for name in "ab"]
    dataset = {"sources": sources, "packing": {"seed": 3, "order": "by document"}, "split": {"fraction": 0.5}}
    manifest = synthetic_manifest(dataset=dataset)
    path = _new_store(tmp_path / "store", manifest)
    before = _tree(path)
    content = json.loads(manifest_to_json(manifest))
    refused = 0
    for place, value in _leaves(content):
        other = json.loads(manifest_to_json(manifest))
        node = other
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = (
            value / 2 if isinstance(value, float) else value + 1 if isinstance(value, int) else "x"
        )
        name = ".".join(str(key) for key in place if isinstance(key, str))
        with pytest.raises(StoreError, match=f"{place[0]}|{place[-1]}|codec|The tokenizer files") as caught:
            create_store(path, manifest_from_json(json.dumps(other), name), tmp_path / "tokenizer")
        refused += "is another store than this run would write" in str(caught.value)
    assert refused > 20, "the others contradict themselves already"
    swapped = synthetic_manifest(dataset=dataset | {"sources": sources[::-1]})
    with pytest.raises(StoreError, match=r"dataset\.sources\[0\]\.name: found 'a', wanted 'b'"):
        create_store(path, swapped, tmp_path / "tokenizer")
    assert _tree(path) == before


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = write_synthetic_tokenizer(tmp_path / "tokenizer", 299)
    with pytest.raises(StoreError, match="digest"):
        create_store(tmp_path / "store", synthetic_manifest(), other)
    assert not (tmp_path / "store").exists()


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"notes\.txt"):
        _new_store(tmp_path / "store", synthetic_manifest())


def test_seal_refuses_gaps_short_and_foreign_shards(tmp_path: Path) -> None:
    manifest = synthetic_manifest()
    rows = synthetic_rows(manifest, 9, 0)
    path = _new_store(tmp_path / "store", manifest)
    with pytest.raises(StoreError, match="not finished"):
        open_store(path)
    write_shard(path, manifest, "train", 0, rows[:3])
    write_shard(path, manifest, "train", 2, rows[6:8])
    with pytest.raises(StoreError, match=r"1 of 3 shards are not committed \(000001\)"):
        seal(path, {"train": 3, "heldout": 0})
    write_shard(path, manifest, "train", 1, rows[3:6])
    with pytest.raises(StoreError, match="shard 000002, but the split has 2 shards"):
        seal(path, {"train": 2, "heldout": 0})
    write_shard(path, manifest, "train", 3, rows[8:])
    with pytest.raises(StoreError, match="shard 000002 has 2 rows, expected 3"):
        seal(path, {"train": 4, "heldout": 0})
    with pytest.raises(StoreError, match="give a number for each"):
        seal(path, {"train": 4})
    with pytest.raises(StoreError, match="nothing to seal"):
        seal(path, {"train": 0, "heldout": 0})
    assert not (path / "INDEX.json").exists()


def test_seal_refuses_a_shard_without_its_file_or_of_another_store(tmp_path: Path) -> None:
    manifest, other = synthetic_manifest(), synthetic_manifest(seed=8)
    path, stranger = _new_store(tmp_path / "store", manifest), _new_store(tmp_path / "other", other)
    write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 1, 0))
    write_shard(stranger, other, "train", 0, synthetic_rows(other, 1, 0))
    counts = {"train": 1, "heldout": 0}
    shard, commit = path / "shards/train/000/000000.arrow", path / "shards/train/000/000000.json"
    good_shard, good_commit = shard.read_bytes(), commit.read_bytes()
    shard.write_bytes((stranger / "shards/train/000/000000.arrow").read_bytes())
    with pytest.raises(DamagedStoreError, match=r"does not begin as shard 000000|bytes, but its commit"):
        seal(path, counts)
    commit.write_bytes((stranger / "shards/train/000/000000.json").read_bytes())
    with pytest.raises(DamagedStoreError, match="under manifest"):
        seal(path, counts)
    shard.write_bytes(good_shard[:-1])
    commit.write_bytes(good_commit)
    with pytest.raises(DamagedStoreError, match="bytes, but its commit record says"):
        seal(path, counts)
    shard.unlink()
    with pytest.raises(StoreError, match="not committed"):
        seal(path, counts)
    assert committed_shards(path, "train") == set()
    # The writing command makes the missing file anew, and the record still fits it.
    write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 1, 0))
    assert shard.read_bytes() == good_shard
    seal(path, counts)


def test_a_sealed_store_takes_no_more_shards(tmp_path: Path) -> None:
    manifest = synthetic_manifest()
    path = tmp_path / "store"
    digest = write_synthetic_store(path, manifest, ROWS, seed=0)
    with pytest.raises(StoreError, match="sealed"):
        write_shard(path, manifest, "heldout", 1, synthetic_rows(manifest, 1, 0))
    # A damaged shard is made anew by removing it and the seal.
    before = _tree(path)
    for name in ("shards/train/000/000001.arrow", "shards/train/000/000001.json", "INDEX.json"):
        (path / name).unlink()
    write_shard(path, manifest, "train", 1, synthetic_rows(manifest, 7, 0)[3:6])
    assert seal(path, {"train": 3, "heldout": 1}) == digest
    assert _tree(path) == before


def test_an_invalid_row_leaves_nothing(tmp_path: Path) -> None:
    manifest = synthetic_manifest()
    path = _new_store(tmp_path / "store", manifest)
    before = sorted(path.rglob("*"))  # with the folders
    rows = synthetic_rows(manifest, 3, 0)
    rows[2].token_ids[5] = 300
    with pytest.raises(InvalidRowError, match=r"shard 000004, row 14, position 5: token_ids is 300"):
        write_shard(path, manifest, "train", 4, rows)
    assert sorted(path.rglob("*")) == before


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    manifest = synthetic_manifest()
    path = _new_store(tmp_path / "store", manifest)
    with pytest.raises(StoreError, match="no split 'test'"):
        write_shard(path, manifest, "test", 0, synthetic_rows(manifest, 1, 0))
    with pytest.raises(StoreError, match="4 rows were given, expected 1 to 3"):
        write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 4, 0))
    with pytest.raises(StoreError, match="0 rows"):
        write_shard(path, manifest, "train", 0, [])
    with pytest.raises(StoreError, match="not a logit store"):
        open_store(tmp_path / "nowhere")
    write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 1, 0))
    seal(path, {"train": 1, "heldout": 0})
    store = open_store(path)
    for index in (-1, 1):
        with pytest.raises(StoreError, match="it has 1 rows"):
            store.read_row("train", index)
    with pytest.raises(StoreError, match="no split 'test'"):
        store.read_row("test", 0)
    with pytest.raises(StoreError, match="no shard 1"):
        store.shard_rows("train", 1)


def test_a_rule_broken_by_a_writer_is_found_by_the_reader(tmp_path: Path, monkeypatch) -> None:
    manifest = synthetic_manifest()
    path = _new_store(tmp_path / "store", manifest)
    rows = synthetic_rows(manifest, 1, 0)
    rows[0].token_ids[5] = 301  # fits the stored type, not the vocabulary
    with monkeypatch.context() as patch:
        patch.setattr("sparsekd.logit_store.protocol.shard.check_row", lambda *args, **named: None)
        write_shard(path, manifest, "train", 0, rows)
    seal(path, {"train": 1, "heldout": 0})
    with pytest.raises(InvalidRowError, match=r"row 0, position 5: token_ids is 301"):
        open_store(path).read_row("train", 0)


def test_a_row_is_one_positional_read(tmp_path: Path, monkeypatch) -> None:
    write_synthetic_store(tmp_path / "store", synthetic_manifest(), ROWS, seed=0)
    store = open_store(tmp_path / "store")
    store.commit("train", 1)
    reads: list[int] = []
    pread = local_files.os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        reads.append(length)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(local_files.os, "pread", counted)
    store.read_row("train", 4)
    assert reads == [int(store.commit("train", 1).lengths[1])]


def test_one_bad_read_is_forgiven(tmp_path: Path, monkeypatch) -> None:
    write_synthetic_store(tmp_path / "store", synthetic_manifest(), ROWS, seed=0)
    store = open_store(tmp_path / "store")
    good = store.read_row("train", 4)
    answers = iter([b"", b"", None, None])  # of the row, of the table's block, then both
    real = access.read_range

    def flaky(path: Path, offset: int, length: int) -> bytes:
        answer = next(answers)
        return real(path, offset, length) if answer is None else answer

    monkeypatch.setattr(access, "read_range", flaky)
    _assert_same_row(store.read_row("train", 4), good)


def test_commit_records_are_read_late_and_forgotten(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "store"
    write_synthetic_store(path, synthetic_manifest(rows_per_shard=1, splits=("train",)), {"train": 6}, seed=0)
    monkeypatch.setattr(reader, "COMMIT_RECORDS_KEPT", 2)
    (path / "shards/train/000/000003.json").rename(path / "away")
    store = open_store(path)
    for index in (0, 1, 2, 4, 5, 0, 1):
        assert store.commit("train", index).rows == 1
        assert len(store._commits) <= 2
    with pytest.raises(DamagedStoreError, match=r"000003\.json is missing"):
        store.commit("train", 3)
    assert store.read_row("train", 3) is not None  # a row needs no commit record


def test_nothing_on_disk_tells_who_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "store"
    write_synthetic_store(path, synthetic_manifest(), ROWS, seed=0)
    for name in ("INDEX.json", "MANIFEST.json", "shards/train/000/000000.json"):
        text = (path / name).read_text()
        assert str(tmp_path) not in text
        assert text == json.dumps(json.loads(text), sort_keys=True, indent=1) + "\n"
    assert not [item for item in path.rglob(writer.TEMPORARY_PREFIX + "*")]


def test_a_read_that_fails_is_told_from_a_file_cut_off(tmp_path: Path, monkeypatch) -> None:
    manifest = synthetic_manifest()
    write_synthetic_store(tmp_path / "store", manifest, {"train": 9, "heldout": 2}, seed=0)
    store = open_store(tmp_path / "store")

    def fails(path: Path, offset: int, length: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(access, "read_range", fails)
        with pytest.raises(DamagedStoreError, match=r"cannot be read \(Input/output error\)") as raised:
            store.read_row("train", 0)
    assert "expected" not in str(raised.value) and "cut off" not in str(raised.value)
    place = tmp_path / "store/shards/train/000/000000.arrow"
    place.write_bytes(place.read_bytes()[:300])
    with pytest.raises(DamagedStoreError, match=r"has 300 bytes, expected \d+ or more: the file is cut off;"):
        store.read_row("train", 0)


def test_a_damaged_sealed_store_names_its_repair(tmp_path: Path) -> None:
    manifest = synthetic_manifest()
    write_synthetic_store(tmp_path / "store", manifest, {"train": 9, "heldout": 0}, seed=0)
    path, shard = tmp_path / "store", tmp_path / "store/shards/train/000/000000.arrow"
    whole, repair = shard.read_bytes(), f"sparsekd store verify {path} --repair"
    plan = {"train": 3, "heldout": 0}
    for damaged in (whole[:-1], whole.replace(b"ARROW1", b"ARROW2")):
        shard.write_bytes(damaged)
        with pytest.raises(DamagedStoreError, match=repair):
            seal(path, plan)
    shard.unlink()
    with pytest.raises(StoreError, match=repair):
        seal(path, plan)
    with pytest.raises(StoreError, match=repair):
        write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 3, 9))
    shard.with_suffix(".json").unlink()
    with pytest.raises(StoreError, match=repair):
        write_shard(path, manifest, "train", 0, synthetic_rows(manifest, 9, 0)[:3])
    assert not (path / "quarantine").exists()
