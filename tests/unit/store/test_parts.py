"""Parts of shards: joined in any cut they are the shard to the byte; one that is not sound joins nothing."""

import itertools
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import CodecSpec, Manifest
from sparsekd.logit_store.places import file_system
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.layout import part_file, shard_file, work_folder
from sparsekd.logit_store.protocol.parts import (
    clear_work,
    is_committed,
    join_parts,
    missing_parts,
    write_part,
)
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
from sparsekd.logit_store.tools.verify import verify_store

ROWS = 9


def tree(path: Path) -> dict[str, bytes]:
    return {
        item.relative_to(path).as_posix(): item.read_bytes() for item in path.rglob("*") if item.is_file()
    }


def store_at(path: Path, codec: str = "tkq8", k: int = 4) -> tuple[Path, Manifest]:
    manifest = synthetic_manifest(rows_per_shard=ROWS, codec=CodecSpec(codec, {}), k=k)
    tokenizer = write_synthetic_tokenizer(
        path.with_name(path.name + "-tokenizer"), manifest.tokenizer.vocabulary_size
    )
    create_store(path, manifest, tokenizer)
    return path, manifest


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, Manifest]:
    return store_at(tmp_path / "store")


def write(path: Path, manifest: Manifest, rows: list[Row], *parts: range) -> None:
    for places in parts:
        write_part(path, manifest, "train", 1, places, rows[places.start : places.stop])


def cut(count: int, borders: list[int]) -> list[range]:
    edges = [0, *borders, count]
    return [range(first, stop) for first, stop in itertools.pairwise(edges)]


@pytest.mark.parametrize("codec", ["tkq8", "plain", "exact"])
def test_parts_of_any_cut_and_order_join_to_the_shard(tmp_path: Path, codec: str) -> None:
    _, manifest = store_at(tmp_path / "quiet", codec)
    chance = random.Random(codec)
    for trial in range(4):
        count = chance.choice([ROWS, ROWS - 2])  # the last shard of a split may be short
        rows = synthetic_rows(manifest, count, trial)
        parts = cut(count, sorted(chance.sample(range(1, count), chance.randint(1, count - 1))))
        path, _ = store_at(tmp_path / f"store{trial}", codec)
        whole = tmp_path / f"whole{trial}"
        store_at(whole, codec)
        write_shard(whole, manifest, "train", 1, rows)
        for places in chance.sample(parts, len(parts)):
            assert places in missing_parts(path, "train", 1, parts)
            write(path, manifest, rows, places)
        assert missing_parts(path, "train", 1, parts) == []
        assert not is_committed(path, "train", 1)
        assert join_parts(path, manifest, "train", 1, parts) is None
        assert is_committed(path, "train", 1)
        assert tree(path) == tree(whole), (count, parts)
        assert not work_folder(path, "train", 1).exists()
        assert join_parts(path, manifest, "train", 1, parts) is None  # once more, by one who came late


def test_a_part_with_any_byte_changed_is_not_joined_but_made_again(store: tuple[Path, Manifest]) -> None:
    path, manifest = store
    rows, parts = synthetic_rows(manifest, ROWS, 0), cut(ROWS, [3, 7])
    write(path, manifest, rows, *parts)
    sound = tree(path)
    chance = random.Random(7)
    place = part_file(path, "train", 1, parts[1])
    content = place.read_bytes()
    for trial in range(40):
        changed = bytearray(content)
        if trial < 3:
            del changed[[0, 11, len(content) - 5][trial] :]
        elif trial == 3:
            changed += b"x"
        else:
            spot = chance.randrange(len(content)) if trial < 30 else len(content) - 1 - trial % 9
            changed[spot] ^= 1 << chance.randrange(8)
        place.write_bytes(changed)
        said = join_parts(path, manifest, "train", 1, parts)
        assert said is not None and f"{place} is not as it was written (" in said, trial
        assert "\n" not in said and not place.exists() and not is_committed(path, "train", 1)
        assert missing_parts(path, "train", 1, parts) == [parts[1]]
        assert tree(path).keys() == sound.keys() - {place.relative_to(path).as_posix()}
    write(path, manifest, rows, parts[1])
    assert tree(path) == sound
    assert join_parts(path, manifest, "train", 1, parts) is None and is_committed(path, "train", 1)


def test_a_part_of_other_rows_or_of_another_store_is_not_joined(
    store: tuple[Path, Manifest], tmp_path: Path
) -> None:
    path, manifest = store
    rows, parts = synthetic_rows(manifest, ROWS, 0), cut(ROWS, [3, 6])
    other, another = store_at(tmp_path / "other", k=5)
    foreign = synthetic_rows(another, ROWS, 0)
    write(other, another, foreign, *parts)
    write_part(path, manifest, "heldout", 1, parts[1], rows[3:6])
    write_part(path, manifest, "train", 0, parts[1], rows[3:6])
    for stranger in (
        part_file(other, "train", 1, parts[1]),
        part_file(path, "heldout", 1, parts[1]),
        part_file(path, "train", 0, parts[1]),
        part_file(path, "train", 1, parts[2]),
        part_file(path, "train", 1, range(3, 5)),
    ):
        write(path, manifest, rows, *parts, range(3, 5))
        part_file(path, "train", 1, parts[1]).write_bytes(stranger.read_bytes())
        said = join_parts(path, manifest, "train", 1, parts)
        assert said is not None and "is not as it was written (" in said, stranger
        assert not is_committed(path, "train", 1)


def test_of_two_teachers_bits_those_of_the_quicker_stay(store: tuple[Path, Manifest]) -> None:
    path, manifest = store
    rows, parts = synthetic_rows(manifest, ROWS, 0), cut(ROWS, [4])
    write(path, manifest, rows, parts[0])
    before = tree(path)
    others = synthetic_rows(manifest, ROWS, 0)
    for row in others:
        assert row.teacher is not None
        row.teacher.entropy[:] *= 0.5
    write(path, manifest, others, parts[0])
    assert tree(path) == before
    write(path, manifest, others, parts[1])
    assert join_parts(path, manifest, "train", 1, parts) is None
    # One that comes when the shard is there leaves nothing, and changes nothing.
    before = tree(path)
    write(path, manifest, rows, *parts)
    assert tree(path) == before


def test_a_part_that_is_written_while_its_shard_is_joined_goes_again(
    store: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that lost its lease comes late: the folder goes away under its hands."""
    path, manifest = store
    rows, parts = synthetic_rows(manifest, ROWS, 0), cut(ROWS, [4])
    write(path, manifest, rows, *parts)
    late = part_file(path, "train", 1, range(0, 2))
    for step in ("opened", "read back"):
        was_joined = False

        def reached(here: str, final: StorePath, step: str = step) -> None:
            nonlocal was_joined
            if final == late and here == step and not was_joined:
                was_joined = True
                write(path, manifest, rows, *parts)
                assert join_parts(path, manifest, "train", 1, parts) is None

        monkeypatch.setattr(file_system, "reached", reached)
        write(path, manifest, rows, range(0, 2))
        assert was_joined and not work_folder(path, "train", 1).exists()
        for file in (shard_file(path, "train", 1), shard_file(path, "train", 1).with_suffix(".json")):
            file.unlink()


def test_two_who_join_at_one_moment_make_one_shard(store: tuple[Path, Manifest], tmp_path: Path) -> None:
    path, manifest = store
    rows, parts = synthetic_rows(manifest, ROWS, 0), cut(ROWS, [1, 5, 6])
    write_shard(store_at(tmp_path / "whole")[0], manifest, "train", 1, rows)
    problems: list[object] = []
    for _ in range(5):
        write(path, manifest, rows, *parts)
        begin = threading.Barrier(3)

        def join(begin: threading.Barrier = begin) -> None:
            begin.wait()
            try:
                problems.append(join_parts(path, manifest, "train", 1, parts))
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=join) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(problems) == {None}
        assert tree(path) == tree(tmp_path / "whole")
        for file in (shard_file(path, "train", 1), shard_file(path, "train", 1).with_suffix(".json")):
            file.unlink()


def test_rows_that_break_a_rule_leave_no_part(store: tuple[Path, Manifest]) -> None:
    path, manifest = store
    rows = synthetic_rows(manifest, ROWS, 0)
    rows[2] = replace(rows[2], token_ids=rows[2].token_ids[:-1])
    with pytest.raises(StoreError, match="row 11"):
        write(path, manifest, rows, range(0, 4))
    assert not [item for item in work_folder(path, "train", 1).glob("*")]


def test_work_is_cleared_but_what_links_lead_to_is_not(store: tuple[Path, Manifest], tmp_path: Path) -> None:
    path, manifest = store
    write(path, manifest, synthetic_rows(manifest, ROWS, 0), range(0, 4))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (path / "work" / "train" / "link").symlink_to(tmp_path / "precious")
    (path / "work" / "seal.lease").touch()
    clear_work(path / "work")
    assert not (path / "work").exists() and (tmp_path / "precious" / "file").exists()
    clear_work(path / "work")  # there need not be one
    (path / "work").symlink_to(tmp_path / "precious")
    with pytest.raises(StoreError, match="work is a link"):
        clear_work(path / "work")
    assert (tmp_path / "precious" / "file").exists()


def test_many_may_clear_the_same_work_at_one_moment(tmp_path: Path) -> None:
    for _ in range(5):
        for number in range(60):
            (tmp_path / "work" / "train" / f"{number:06d}").mkdir(parents=True)
            (tmp_path / "work" / "train" / f"{number:06d}" / "000000-000003.part").touch()
        begin, problems = threading.Barrier(4), list[BaseException]()

        def clear(begin: threading.Barrier = begin, problems: list[BaseException] = problems) -> None:
            begin.wait()
            try:
                clear_work(tmp_path / "work")
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=clear) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == [] and not (tmp_path / "work").exists()


def test_verify_names_what_a_killed_worker_left(store: tuple[Path, Manifest]) -> None:
    path, manifest = store
    rows = synthetic_rows(manifest, ROWS, 0)
    write_shard(path, manifest, "train", 0, rows)
    write(path, manifest, rows, range(0, 4))
    with pytest.raises(StoreError, match="is not finished"):
        verify_store(path)
    seal(path, {"train": 1, "heldout": 0})
    found = verify_store(path)
    assert found.ok and found.strangers == ("work/train/000001/000000-000003.part (left by a killed writer)",)
