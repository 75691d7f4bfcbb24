"""Damage: every byte of a small store flipped, files cut, swapped and lost. All of it is found and placed."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.protocol.message import decode_row, read_batch
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
from sparsekd.logit_store.tools.verify import verify_store

SHARD = "shards/train/000/000000.arrow"


def _small_store(path: Path, **overrides) -> Path:
    settings = {
        "sequence_length": 4,
        "vocabulary_size": 9,
        "k": 1,
        "n": 1,
        "temperatures": (1.0,),
        "splits": ("train",),
        "rows_per_shard": 2,
        "dataset": {},
    }
    write_synthetic_store(path, synthetic_manifest(**settings | overrides), {"train": 1}, seed=0)
    return path


def _flip(path: Path, offset: int, bits: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ bits]))


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    # Without teacher planes, because each flip costs a whole verification; the next test flips those planes.
    path = _small_store(tmp_path / "store", k=0, n=0)
    assert verify_store(path).ok
    flipped = 0
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        for offset in range(file.stat().st_size):
            # A digit becomes another digit, a letter changes case, an end of line becomes a space: the
            # flips that leave a text as valid as it was take turns.
            bits = (0x01, 0x20, 0x2A, 0x80)[offset % 4]
            _flip(file, offset, bits)
            try:
                sound = verify_store(path).ok
            except StoreError:
                sound = False  # the manifest now claims a newer format, which is not damage
            _flip(file, offset, bits)
            assert not sound, (file.name, offset, bits)
            flipped += 1
    assert flipped > 3500
    assert verify_store(path).ok


def test_every_flipped_byte_of_a_row_is_found_and_placed(tmp_path: Path) -> None:
    path = _small_store(tmp_path / "store", k=2, n=2, positions="all")
    store = open_store(path)
    assert store.read_row("train", 0).recorded.any()
    commit = store.commit("train", 0)
    begin, length = int(commit.offsets[0]), int(commit.lengths[0])
    owners = _plane_of_byte(store)
    file = path / SHARD
    assert set(owners.values()) == set(names_of(planes_of(store.manifest)))
    for offset in range(begin, begin + length):
        _flip(file, offset, 1 << offset % 8)
        with pytest.raises(DamagedStoreError) as caught:
            store.read_row("train", 0)
        _flip(file, offset, 1 << offset % 8)
        message = str(caught.value)
        assert f"{path}, split train, shard 000000, row 0" in message
        if offset in owners:
            found = re.search(rf"in plane {owners[offset]}, bytes (\d+) to (\d+) of the file", message)
            assert found is not None and int(found[1]) <= offset <= int(found[2]), (offset, message)
        else:
            # Arrow's header, the row number, the planes' checksums and the padding.
            assert re.search(r"in (no single plane|every plane|plane \w+)[,:] ", message)
    store.read_row("train", 0)


def _plane_of_byte(store: LogitStore) -> dict[int, str]:
    begin = int(store.commit("train", 0).offsets[0])
    message = store.read_message("train", 0)
    _, _, planes = read_batch(message, names_of(planes_of(store.manifest)))
    owners = {}
    for name, stored in planes.items():
        place = message.index(stored)
        owners |= dict.fromkeys(range(begin + place, begin + place + len(stored)), name)
    return owners


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = _small_store(tmp_path / "store")
    file = path / SHARD
    whole = file.read_bytes()
    for length in range(0, len(whole), 37):
        file.write_bytes(whole[:length])
        result = verify_store(path)
        assert not result.ok and "000000.arrow" in result.problems[0]
    file.write_bytes(whole[:600])
    with pytest.raises(DamagedStoreError, match=r"row 0: 000000\.arrow has 600 bytes, expected \d+ or more"):
        open_store(path).read_row("train", 0)
    file.write_bytes(whole + b"\0")
    assert "is not the file that was written" in verify_store(path).problems[0]


@pytest.mark.parametrize(
    "name", ["INDEX.json", "MANIFEST.json", "tokenizer/tokenizer.json", SHARD[:-5] + "json"]
)
def test_every_truncated_record_is_found(tmp_path: Path, name: str) -> None:
    path = _small_store(tmp_path / "store")
    whole = (path / name).read_bytes()
    for length in range(0, len(whole), 11):
        (path / name).write_bytes(whole[:length])
        assert not verify_store(path).ok
    (path / name).write_bytes(whole + b"\n")
    assert not verify_store(path).ok


def _store_of_equal_batches(path: Path) -> Path:
    """Writes three shards whose batches have one length, so that they can change places unseen by Arrow."""
    manifest = synthetic_manifest(k=0, n=0)
    tokenizer = write_synthetic_tokenizer(path.parent / "tokenizer", manifest.tokenizer.vocabulary_size)
    create_store(path, manifest, tokenizer)
    row = synthetic_rows(manifest, 1, 0)[0]
    rows = [
        dataclasses.replace(row, token_ids=(row.token_ids * 7 + index).astype(np.int32) % 256)
        for index in range(9)
    ]
    for shard in range(3):
        write_shard(path, manifest, "train", shard, rows[shard * 3 : shard * 3 + 3])
    seal(path, {"train": 3, "heldout": 0})
    return path


def _store_of_nine(path: Path, *, rows_seed: int = 0, **overrides) -> Path:
    write_synthetic_store(path, synthetic_manifest(**overrides), {"train": 9, "heldout": 3}, seed=rows_seed)
    return path


def _swap(one: Path, other: Path) -> None:
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def test_swapped_rows_are_named(tmp_path: Path) -> None:
    path = _store_of_equal_batches(tmp_path / "store")
    store = open_store(path)
    commit = store.commit("train", 1)
    assert commit.lengths[0] == commit.lengths[1]
    file = path / "shards/train/000/000001.arrow"
    data = bytearray(file.read_bytes())
    first, second, length = int(commit.offsets[0]), int(commit.offsets[1]), int(commit.lengths[0])
    data[first : first + length], data[second : second + length] = (
        data[second : second + length],
        data[first : first + length],
    )
    file.write_bytes(data)
    with pytest.raises(DamagedStoreError, match=r"row 3: .*it is the batch of row 4"):
        store.read_row("train", 3)
    with pytest.raises(DamagedStoreError, match=r"row 4: .*it is the batch of row 3"):
        store.read_row("train", 4)
    problems = verify_store(path).problems
    assert len(problems) == 2 and all("shard 000001" in problem for problem in problems)


def test_swapped_shards_are_found(tmp_path: Path) -> None:
    path = _store_of_equal_batches(tmp_path / "store")
    one, other = path / "shards/train/000/000000.arrow", path / "shards/train/000/000002.arrow"
    _swap(one, other)
    with pytest.raises(DamagedStoreError, match=r"shard 000000, row 1: .*it is the batch of row 7"):
        open_store(path).read_row("train", 1)
    assert not verify_store(path).ok
    # With their commit records the swap is whole in itself, but not what was sealed.
    _swap(one.with_suffix(".json"), other.with_suffix(".json"))
    with pytest.raises(DamagedStoreError, match="is the record of shard 000002"):
        open_store(path).read_row("train", 1)
    assert len(verify_store(path).problems) == 2


def test_sound_bytes_of_another_row_are_refused(tmp_path: Path) -> None:
    store = open_store(_store_of_nine(tmp_path / "store"))
    message = store.read_message("train", 4)
    with pytest.raises(DamagedStoreError, match="row 3 holds row 4 instead"):
        decode_row(message, store.manifest, "train", 3, "store, row 3")


def test_shard_of_another_split_or_store_is_found(tmp_path: Path) -> None:
    path = _store_of_nine(tmp_path / "store")
    other = _store_of_nine(tmp_path / "other", rows_seed=4, seed=8)
    for source in (path / "shards/heldout/000/000000", other / "shards/train/000/000000"):
        copy = shutil.copytree(path, tmp_path / "copy")
        for ending in (".arrow", ".json"):
            shutil.copy(source.with_suffix(ending), copy / ("shards/train/000/000000" + ending))
        with pytest.raises(DamagedStoreError, match="is the record of shard 000000"):
            open_store(copy).read_row("train", 0)
        (copy / "shards/train/000/000000.json").write_bytes(
            (path / "shards/train/000/000000.json").read_bytes()
        )
        with pytest.raises(DamagedStoreError, match="shard 000000, row 0"):
            open_store(copy).read_row("train", 0)
        assert not verify_store(copy).ok
        shutil.rmtree(copy)


def test_rewritten_shard_with_valid_record_is_not_the_sealed_one(tmp_path: Path) -> None:
    path = _store_of_nine(tmp_path / "store")
    write_synthetic_store(tmp_path / "rewritten", synthetic_manifest(), {"train": 9, "heldout": 3}, seed=5)
    for ending in (".arrow", ".json"):
        shutil.copy(
            tmp_path / f"rewritten/shards/train/000/000000{ending}", path / f"shards/train/000/000000{ending}"
        )
    with pytest.raises(DamagedStoreError, match="not the one that was sealed"):
        open_store(path).read_row("train", 0)


def test_missing_files_are_named(tmp_path: Path) -> None:
    whole = _store_of_nine(tmp_path / "store")
    for name in ("shards/train/000/000001.arrow", "shards/train/000/000001.json"):
        copy = shutil.copytree(whole, tmp_path / "copy")
        (copy / name).unlink()
        store = open_store(copy)
        with pytest.raises(DamagedStoreError, match=rf"{name} is missing.*made again with .*--repair"):
            store.read_row("train", 4) if name.endswith(".arrow") else store.commit("train", 1)
        result = verify_store(copy)
        assert len(result.problems) == 1 and name in result.problems[0] and "DAMAGED" in result.text()
        assert result.rows == 9
        shutil.rmtree(copy)
    (whole / "tokenizer/tokenizer.json").unlink()
    assert "tokenizer" in verify_store(whole).problems[0]
    (whole / "MANIFEST.json").unlink()
    with pytest.raises(StoreError, match="not a logit store"):
        verify_store(whole)


def test_edited_manifest_is_found(tmp_path: Path) -> None:
    path = _store_of_nine(tmp_path / "store")
    manifest = path / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(DamagedStoreError, match=r"MANIFEST\.json is not the manifest that was sealed"):
        open_store(path)


def test_strangers_are_reported_but_harmless(tmp_path: Path) -> None:
    path = _store_of_nine(tmp_path / "store")
    (path / "shards/notes.txt").write_text("mine")
    result = verify_store(path)
    assert result.ok and result.strangers == ("shards/notes.txt",)
    assert "notes.txt" in result.text()
