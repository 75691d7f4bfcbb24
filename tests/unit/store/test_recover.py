"""Shards without a record are adopted or put in quarantine, damaged ones made again; the writing thread."""

import copy
import dataclasses
import shutil
import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.places import file_system
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol import recover
from sparsekd.logit_store.protocol.background import BackgroundWriter
from sparsekd.logit_store.protocol.commit import commit_to_content, read_commit
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.recover import adopt_orphans, record_of_file
from sparsekd.logit_store.protocol.repair import repair_store
from sparsekd.logit_store.protocol.writer import committed_shards, create_store, seal, write_shard
from sparsekd.logit_store.row import Row, narrowed
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
from sparsekd.logit_store.tools import verify
from sparsekd.logit_store.tools.verify import verify_store

SHARD, RECORD = "shards/train/000/000000.arrow", "shards/train/000/000000.json"


def _tree(path: Path) -> dict[str, bytes]:
    return {
        item.relative_to(path).as_posix(): item.read_bytes() for item in path.rglob("*") if item.is_file()
    }


@pytest.fixture
def empty(tmp_path: Path) -> tuple[Path, Manifest]:
    manifest = synthetic_manifest()
    tokenizer = write_synthetic_tokenizer(tmp_path / "tokenizer", manifest.tokenizer.vocabulary_size)
    create_store(tmp_path / "store", manifest, tokenizer)
    return tmp_path / "store", manifest


def _rows(manifest: Manifest, seed: int = 0) -> list[Row]:
    """Rows of one shard. Another seed stands for a teacher whose bits differ from pass to pass."""
    return _other_bits(synthetic_rows(manifest, 3, 0), seed)


def _other_bits(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same text, with other entropies."""
    for row in rows:
        assert row.teacher is not None
        row.teacher.entropy[:] *= 1 - seed / 100
    return list(rows)


def test_the_record_made_from_a_file_is_the_writers(empty: tuple[Path, Manifest]) -> None:
    path, manifest = empty
    write_shard(path, manifest, "train", 0, _rows(manifest))
    written, _ = read_commit(path, record_of_file(path, manifest, "train", 0).manifest_sha256, "train", 0)
    again = record_of_file(path, manifest, "train", 0)
    assert commit_to_content(again) == commit_to_content(written)


def test_a_whole_shard_without_a_record_is_adopted(empty: tuple[Path, Manifest]) -> None:
    path, manifest = empty
    write_shard(path, manifest, "train", 0, _rows(manifest))
    before = _tree(path)
    # Killed between the two; the teacher of the next run gives other bits, and its rows are not needed.
    (path / RECORD).unlink()
    write_shard(path, manifest, "train", 0, _rows(manifest, 9))
    assert _tree(path) == before
    (path / RECORD).unlink()
    assert adopt_orphans(path, manifest) == (1, 0)
    assert _tree(path) == before and adopt_orphans(path, manifest) == (0, 0)


@pytest.mark.parametrize(
    "damage", ["garbage", "cut", "flipped", "longer", "another split's", "another store's"]
)
def test_an_unsound_shard_without_a_record_is_replaced_and_kept(
    empty: tuple[Path, Manifest], tmp_path: Path, damage: str
) -> None:
    path, manifest = empty
    write_shard(path, manifest, "train", 0, _rows(manifest))
    whole = _tree(path)
    content = whole[SHARD]
    if damage.startswith("another"):
        other = synthetic_manifest(seed=8) if damage == "another store's" else manifest
        create_store(tmp_path / "other", other, tmp_path / "tokenizer")
        split = "train" if damage == "another store's" else "heldout"
        write_shard(tmp_path / "other", other, split, 0, _rows(other))
        content = (tmp_path / f"other/shards/{split}/000/000000.arrow").read_bytes()
    middle = len(content) // 2
    bad = {
        "garbage": b"something else",
        "cut": content[:-1],
        "flipped": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
        "longer": content + b"\0",
    }.get(damage, content)
    (path / SHARD).write_bytes(bad)
    (path / RECORD).unlink()
    write_shard(path, manifest, "train", 0, _rows(manifest))
    assert _tree(path) == whole | {"quarantine/train/000000.arrow": bad}


def test_every_flipped_byte_keeps_a_shard_from_being_adopted(empty: tuple[Path, Manifest]) -> None:
    path, manifest = empty
    write_shard(path, manifest, "train", 0, _rows(manifest))
    whole = (path / SHARD).read_bytes()
    # Each 19th byte, and all of Arrow's footer, which no reader of ours looks at.
    for offset in sorted({*range(0, len(whole), 19), *range(len(whole) - 900, len(whole))}):
        (path / SHARD).write_bytes(
            whole[:offset] + bytes([whole[offset] ^ 1 << offset % 8]) + whole[offset + 1 :]
        )
        with pytest.raises(StoreError):
            record_of_file(path, manifest, "train", 0)


def test_the_slower_of_two_writers_with_other_bits_gives_way(
    empty: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, manifest = empty
    raced = []

    def other_writer(step: str, final: StorePath) -> None:
        if step == "read back" and final.name == "000000.arrow" and not raced:
            raced.append(True)
            write_shard(path, manifest, "train", 0, _rows(manifest, 9))

    monkeypatch.setattr(file_system, "reached", other_writer)
    write_shard(path, manifest, "train", 0, _rows(manifest))
    assert raced and committed_shards(path, "train") == {0}
    seal(path, {"train": 1, "heldout": 0})
    assert verify_store(path).ok
    stored, expected = open_store(path).read_row("train", 0).teacher, _rows(manifest, 9)[0].teacher
    assert stored is not None and expected is not None
    assert np.allclose(stored.entropy, expected.entropy, atol=1e-3) and seal(path, {"train": 1, "heldout": 0})


def test_a_record_without_its_shard_gives_way(empty: tuple[Path, Manifest]) -> None:
    path, manifest = empty
    write_shard(path, manifest, "train", 0, _rows(manifest))
    (path / SHARD).unlink()
    write_shard(path, manifest, "train", 0, _rows(manifest, 9))
    seal(path, {"train": 1, "heldout": 0})
    result = verify_store(path)
    assert result.ok and result.quarantined == ("quarantine/train/000000.json",)


@pytest.mark.parametrize("step", ["opened", "folder synced"])
def test_a_record_without_its_shard_gives_way_also_to_a_killed_writer(
    empty: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path, manifest = empty
    write_shard(path, manifest, "train", 0, _rows(manifest))
    (path / SHARD).unlink()

    def stop(found: str, final: StorePath) -> None:
        if found == step and final.suffix == (".arrow" if step == "folder synced" else ".json"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(file_system, "reached", stop)
        write_shard(path, manifest, "train", 0, _rows(manifest, 9))
    assert committed_shards(path, "train") == set(), "the shard stands beside no record of other bytes"
    write_shard(path, manifest, "train", 0, _rows(manifest, 5))
    seal(path, {"train": 1, "heldout": 0})
    assert verify_store(path).ok


@pytest.mark.parametrize("differing", ["rows", "token_ids", "loss_mask", "segment_documents"])
def test_a_shard_of_another_text_is_not_adopted(empty: tuple[Path, Manifest], differing: str) -> None:
    path, manifest = empty
    rows = _rows(manifest)
    if differing == "rows":
        other = rows[:2]
    else:
        if differing == "loss_mask":
            changed = narrowed(rows[1], np.arange(len(rows[1].loss_mask)) != rows[1].loss_mask.argmax())
        else:
            values = getattr(rows[1], differing).copy()
            values[0] += 1
            changed = dataclasses.replace(rows[1], **{differing: values})
        other = [rows[0], changed, rows[2]]
    for take in (
        lambda: write_shard(path, manifest, "train", 0, rows),
        lambda: adopt_orphans(path, manifest, lambda split, shard: rows),
    ):
        write_shard(path, manifest, "train", 0, other)
        (path / RECORD).unlink()
        stranger = (path / SHARD).read_bytes()
        take()
        assert (path / "quarantine/train/000000.arrow").read_bytes() == stranger
        write_shard(path, manifest, "train", 0, rows)
        seal(path, {"train": 1, "heldout": 0})
        store = open_store(path)
        assert store.rows("train") == 3
        assert recover.is_same_text(store.read_row("train", 1), rows[1], manifest)
        for name in ("INDEX.json", SHARD, RECORD, "quarantine/train/000000.arrow"):
            (path / name).unlink()


def test_a_shard_behind_the_plan_is_not_adopted(empty: tuple[Path, Manifest]) -> None:
    path, manifest = empty
    write_shard(path, manifest, "train", 7, _rows(manifest))
    (path / "shards/train/000/000007.json").unlink()
    assert adopt_orphans(path, manifest, lambda split, shard: []) == (0, 1)


@pytest.mark.parametrize("module", [recover, verify])
def test_one_decoded_row_is_held_at_a_time(
    sealed: tuple[Path, list[Row], str], monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    path, _, _ = sealed
    living: list[weakref.ref[Row]] = []
    held = []
    plain = module.decode_row

    def counted(*args: object) -> Row:
        held.append(sum(row() is not None for row in living))
        row = plain(*args)
        living.append(weakref.ref(row))
        return row

    monkeypatch.setattr(module, "decode_row", counted)
    if module is verify:
        assert verify_store(path).ok
    else:
        record_of_file(path, open_store(path).manifest, "train", 0)
    assert len(held) == (11 if module is verify else 3) and max(held) <= 1


@pytest.fixture
def sealed(tmp_path: Path) -> tuple[Path, list[Row], str]:
    manifest = synthetic_manifest()
    digest = write_synthetic_store(tmp_path / "store", manifest, {"train": 9, "heldout": 2}, seed=0)
    return tmp_path / "store", synthetic_rows(manifest, 9, 0), digest


def test_repair_gives_the_sealed_store_back(sealed: tuple[Path, list[Row], str]) -> None:
    path, rows, digest = sealed
    whole = _tree(path)
    bad = bytearray(whole["shards/train/000/000001.arrow"])
    bad[len(bad) // 2] ^= 1
    (path / "shards/train/000/000001.arrow").write_bytes(bad)
    (path / "shards/train/000/000002.json").write_bytes(b"no record")
    (path / "shards/heldout/000/000000.arrow").unlink()
    asked = []

    def recapture(split: str, shard: int) -> Sequence[Row]:
        asked.append((split, shard))
        if split == "heldout":
            return synthetic_rows(open_store(path).manifest, 2, 1)
        return rows[shard * 3 : shard * 3 + 3]

    found = verify_store(path)
    assert found.damaged == (("train", 1), ("train", 2), ("heldout", 0)) and "DAMAGED" in found.text()
    result = repair_store(path, found.damaged, recapture)
    assert (result.digest, result.resealed) == (digest, False)
    # Shard 2 has lost its record alone, which is made from the shard: no teacher runs for it.
    assert asked == [("train", 1), ("heldout", 0)]
    kept = {
        "quarantine/train/000001.arrow": bytes(bad),
        "quarantine/train/000001.json": whole["shards/train/000/000001.json"],
        "quarantine/train/000002.json": b"no record",
        "quarantine/heldout/000000.json": whole["shards/heldout/000/000000.json"],
    }
    assert _tree(path) == whole | kept
    after = verify_store(path)
    assert after.ok and set(after.quarantined) == set(kept) and after.strangers == ()
    assert "quarantine 4 files" in after.text()


def test_repair_with_other_bits_names_them_or_seals_anew(sealed: tuple[Path, list[Row], str]) -> None:
    path, _, digest = sealed
    bad = bytearray((path / "shards/train/000/000001.arrow").read_bytes())
    record = open_store(path).commit("train", 1)
    bad[int(record.offsets[0]) + int(record.lengths[0]) // 2] ^= 1  # in its first row; two can be read
    (path / "shards/train/000/000001.arrow").write_bytes(bad)
    broken = _tree(path)

    def recapture(split: str, shard: int) -> Sequence[Row]:
        again = synthetic_rows(open_store(path).manifest, 9, 0)[3:6] if split == "train" else []
        teacher = again[1].teacher
        assert teacher is not None
        teacher.entropy[3] += 1e-4
        return again

    with pytest.raises(
        StoreError, match=r"shard 000001.*row 4 differs in entropy \(1 of \d+ values\).*--reseal"
    ):
        repair_store(path, [("train", 1)], recapture)
    assert _tree(path) == broken, "nothing was touched"
    result = repair_store(path, [("train", 1)], recapture, reseal=True)
    assert result.resealed and result.digest != digest and open_store(path).digest == result.digest
    assert verify_store(path).ok
    assert (path / "quarantine/INDEX.json").read_bytes() == broken["INDEX.json"]
    # Once more: the older file in quarantine is not replaced.
    (path / "shards/train/000/000001.arrow").write_bytes(bad)
    repair_store(path, [("train", 1)], recapture)
    assert (path / "quarantine/train/000001.arrow.1").read_bytes() == bytes(bad)


def _two_cut_shards(path: Path) -> None:
    whole = (path / "shards/train/000/000000.arrow").read_bytes()
    (path / "shards/train/000/000000.arrow").write_bytes(whole[:-9])
    (path / "shards/train/000/000002.arrow").unlink()


def test_resealing_takes_several_shards_and_seals_once(sealed: tuple[Path, list[Row], str]) -> None:
    path, rows, digest = sealed
    index = (path / "INDEX.json").read_bytes()
    _two_cut_shards(path)

    def other(split: str, shard: int) -> Sequence[Row]:
        return _other_bits(copy.deepcopy(rows[shard * 3 : shard * 3 + 3]), 9)

    result = repair_store(path, verify_store(path).damaged, other, reseal=True)
    assert result.repaired == (("train", 0), ("train", 2)) and result.resealed and result.digest != digest
    assert verify_store(path).ok and open_store(path).digest == result.digest
    assert (path / "quarantine/INDEX.json").read_bytes() == index
    assert not (path / "quarantine/INDEX.json.1").exists()


def test_resealing_that_was_killed_goes_on(
    sealed: tuple[Path, list[Row], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows, _ = sealed
    index = (path / "INDEX.json").read_bytes()
    seeds = iter(range(1, 99))

    def other(split: str, shard: int) -> Sequence[Row]:
        return _other_bits(copy.deepcopy(rows[shard * 3 : shard * 3 + 3]), next(seeds))  # never as before

    def fail_at_two(split: str, shard: int) -> Sequence[Row]:
        if shard == 2:
            raise StoreError("the teacher went away")
        return other(split, shard)

    _two_cut_shards(path)
    with pytest.raises(StoreError, match="went away"):
        repair_store(path, verify_store(path).damaged, fail_at_two, reseal=True)
    assert verify_store(path).damaged == (("train", 0), ("train", 2)), "in the eyes of every reader"
    for step in file_system.STEPS:
        for name in ("000000.arrow", "000002.arrow", "000002.json", "INDEX.json"):

            def stop(found: str, final: StorePath, wanted: tuple[str, str] = (step, name)) -> None:
                if (found, final.name) == wanted:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(file_system, "reached", stop)
                repair_store(path, verify_store(path).damaged, other, reseal=True)
            if verify_store(path).ok:  # stopped when all was done
                _two_cut_shards(path)
    repair_store(path, verify_store(path).damaged, other, reseal=True)
    assert verify_store(path).ok and (path / "quarantine/INDEX.json").read_bytes() == index


def test_repair_that_was_killed_goes_on(
    sealed: tuple[Path, list[Row], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows, digest = sealed
    whole = _tree(path)
    (path / "shards/train/000/000001.arrow").write_bytes(b"broken")

    def recapture(split: str, shard: int) -> Sequence[Row]:
        return rows[shard * 3 : shard * 3 + 3]

    for step in file_system.STEPS:
        for ending in (".arrow", ".json"):

            def stop(found: str, final: StorePath, wanted: tuple[str, str] = (step, ending)) -> None:
                if (found, final.name[-len(wanted[1]) :]) == wanted:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(file_system, "reached", stop)
                repair_store(path, verify_store(path).damaged, recapture)
                (path / "shards/train/000/000001.arrow").write_bytes(b"broken")
                repair_store(path, verify_store(path).damaged, recapture)
    repair_store(path, verify_store(path).damaged, recapture)
    assert verify_store(path).ok and open_store(path).digest == digest
    assert {name: data for name, data in _tree(path).items() if "quarantine" not in name} == whole
    shutil.rmtree(path / "quarantine")


def test_writing_overlaps_with_making_and_waits_at_its_bound() -> None:
    go, written = threading.Event(), []

    def slow(shard: int) -> None:
        go.wait(20)
        written.append(shard)

    with BackgroundWriter() as writer:
        writer.put(partial(slow, 0))  # being written
        while not writer._waiting.empty():
            time.sleep(0.001)
        writer.put(partial(slow, 1))  # waits
        third = threading.Thread(target=writer.put, args=(partial(slow, 2),))
        third.start()
        third.join(0.1)
        assert third.is_alive() and written == [], "one too many: whoever makes it has to wait"
        go.set()
        third.join(20)
        writer.flush()
        assert written == [0, 1, 2]


def test_a_failed_write_fails_the_next_put_and_the_end(empty: tuple[Path, Manifest]) -> None:
    path, manifest = empty
    before = _tree(path)
    invalid = _rows(manifest)
    invalid[1].token_ids[0] = 300
    with pytest.raises(StoreError, match="token_ids is 300"), BackgroundWriter() as writer:
        writer.put(partial(write_shard, path, manifest, "train", 0, invalid))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:  # never blocks, however much is put
            writer.put(partial(write_shard, path, manifest, "train", 1, _rows(manifest)))
    assert {name for name in _tree(path) if "train" in name} <= {"shards/train/000/000001.arrow"} | set(
        before
    )
    with pytest.raises(StoreError, match="token_ids is 300"), BackgroundWriter() as writer:
        writer.put(partial(write_shard, path, manifest, "train", 2, invalid))
    assert committed_shards(path, "train") == set()


def test_leaving_by_an_exception_publishes_nothing_more(
    empty: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, manifest = empty
    begun, go = threading.Event(), threading.Event()

    def held(step: str, final: StorePath) -> None:
        begun.set()
        go.wait(20)

    monkeypatch.setattr(file_system, "reached", held)
    with (
        pytest.raises(ValueError, match="of the one who makes rows"),
        BackgroundWriter() as writer,
    ):
        writer.put(partial(write_shard, path, manifest, "train", 0, _rows(manifest)))
        begun.wait(20)
        writer.put(partial(write_shard, path, manifest, "train", 1, _rows(manifest)))
        threading.Timer(0.2, go.set).start()
        raise ValueError("of the one who makes rows")
    assert committed_shards(path, "train") == {0}, (
        "the one that was being written is whole, the other not there"
    )
