"""`store subset` and `store merge`: the same rows, by other names."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from dense import write_rows
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.projections import projections_of
from sparsekd.logit_store.protocol.message import read_batch
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row, document_of_position
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.logit_store.tools.combine import merge_stores, row_key, subset_store
from sparsekd.logit_store.tools.verify import verify_store


def _rows(store: LogitStore, split: str = "train") -> list[Row]:
    return [store.read_row(split, index) for index in range(store.rows(split))]


def _same(left: Row, right: Row) -> bool:
    pairs = [
        (getattr(left, name), getattr(right, name))
        for name in ("token_ids", "loss_mask", "segment_documents")
    ]
    pairs += [
        (getattr(left.teacher, name), getattr(right.teacher, name)) for name in ("head_logprobs", "log_rest")
    ]
    return all(np.array_equal(one, other) for one, other in pairs)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write_synthetic_store(tmp_path / "whole", synthetic_manifest(), {"train": 8, "heldout": 2}, seed=0)
    return tmp_path / "whole"


def test_parts_of_a_store_merge_to_its_rows(tmp_path: Path, whole: Path) -> None:
    subset_store(whole, tmp_path / "a", split="train", rows=range(0, 5))
    subset_store(whole, tmp_path / "b", split="train", rows=[7, 6, 5])
    subset_store(whole, tmp_path / "c", split="heldout")
    store = open_store(whole)
    assert [row.token_ids.tolist() for row in _rows(open_store(tmp_path / "b"))] == [
        row.token_ids.tolist() for row in _rows(store)[5:]
    ]
    assert open_store(tmp_path / "c").rows("train") == 0 and open_store(tmp_path / "c").rows("heldout") == 2
    merge_stores([tmp_path / name for name in "abc"], tmp_path / "again")
    again = open_store(tmp_path / "again")
    for split in ("train", "heldout"):
        assert again.rows(split) == store.rows(split)
        assert all(_same(*pair) for pair in zip(_rows(again, split), _rows(store, split), strict=True))
    # One corpus: documents keep their numbers, and the identity is the source's but for its steps.
    dataset = again.manifest.dataset
    assert {name: value for name, value in dataset.items() if name != "provenance"} == store.manifest.dataset
    (step,) = dataset["provenance"]
    assert step["action"] == "merge" and step["document_shifts"] == [0, 0, 0]
    assert [entry["store"] for entry in step["sources"]] == [
        open_store(tmp_path / name).digest for name in "abc"
    ]
    assert step["sources"][1]["provenance"][0]["row_numbers"] == [[5, 8]]


def test_a_store_that_is_merged_with_more_text_is_not_touched(tmp_path: Path, whole: Path) -> None:
    more = synthetic_manifest(dataset={"name": "more"})
    write_synthetic_store(tmp_path / "more", more, {"train": 3, "heldout": 1}, seed=9)
    parts = (whole, tmp_path / "more")
    before = [_files(part) for part in parts]
    merge_stores(parts, tmp_path / "both")
    assert [_files(part) for part in parts] == before
    old, both = open_store(whole), open_store(tmp_path / "both")
    for split, count in (("train", 11), ("heldout", 3)):
        assert both.rows(split) == count
        first = _rows(both, split)[: old.rows(split)]
        assert all(_same(*pair) for pair in zip(first, _rows(old, split), strict=True))


def _files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of each file, by name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_documents_of_different_corpora_stay_apart(tmp_path: Path) -> None:
    left = synthetic_manifest(dataset={"name": "left"})
    right = synthetic_manifest(dataset={"name": "right"}, rows_per_shard=2)
    write_synthetic_store(tmp_path / "left", left, {"train": 3}, seed=0)
    write_synthetic_store(tmp_path / "right", right, {"train": 3}, seed=5)
    merge_stores([tmp_path / "left", tmp_path / "right"], tmp_path / "both")
    both = open_store(tmp_path / "both")
    one, other = _rows(both)[:3], _rows(both)[3:]
    known = {int(number) for row in one for number in row.segment_documents}
    added = {int(number) for row in other for number in row.segment_documents}
    assert not (known & added) - {-1}, "padding stays padding"
    shift = max(known) + 1
    source = _rows(open_store(tmp_path / "right"))
    expected = [np.where(row.segment_documents < 0, -1, row.segment_documents + shift) for row in source]
    assert all(np.array_equal(row.segment_documents, want) for row, want in zip(other, expected, strict=True))
    assert both.manifest.dataset["corpora"] == [{"name": "left"}, {"name": "right"}]
    assert both.manifest.rows_per_shard == 3


GOLDEN = Path(__file__).parent / "golden"


def _stored(store: LogitStore, split: str, index: int) -> dict[str, bytes]:
    planes = names_of(planes_of(store.manifest))
    return {
        name: bytes(data) for name, data in read_batch(store.read_message(split, index), planes)[2].items()
    }


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/INDEX.json")))
def test_rows_of_every_kind_are_copied_as_they_are_stored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_store(GOLDEN / name)
    split = next(split for split in source.manifest.splits if source.rows(split))
    # Of another corpus, so that merge moves its documents' numbers.
    manifest = dataclasses.replace(source.manifest, dataset={"name": "other"}, rows_per_shard=2)
    rows = [source.read_row(split, index) for index in range(source.rows(split))]
    tokenizer, projections = source.tokenizer_path, projections_of(source.path, source.manifest)
    create_store(tmp_path / "other", manifest, tokenizer, projections)
    for shard, first in enumerate(range(0, len(rows), 2)):
        write_shard(tmp_path / "other", manifest, split, shard, rows[first : first + 2])
    seal(tmp_path / "other", dict.fromkeys(manifest.splits, 0) | {split: shard + 1})
    other = open_store(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.delattr(LogitStore, "read_row")  # which decodes
        wanted = range(1, len(rows)) if len(rows) > 1 else [0]
        subset_store(source.path, tmp_path / "part", split=split, rows=wanted)
        merge_stores([source.path, tmp_path / "other"], tmp_path / "both", allow_repeated_rows=True)
    part, both = open_store(tmp_path / "part"), open_store(tmp_path / "both")
    for number, index in enumerate(wanted):
        assert _stored(part, split, number) == _stored(source, split, index)
    shift = both.manifest.dataset["provenance"][0]["document_shifts"][1]
    assert shift > max(int(row.segment_documents.max()) for row in rows) and both.rows(split) > len(rows)
    for index, row in enumerate(rows):
        moved, before = _stored(both, split, len(rows) + index), _stored(other, split, index)
        assert moved.pop("segment_documents") != before.pop("segment_documents") and moved == before
        found = both.read_row(split, len(rows) + index)
        numbers = row.segment_documents
        np.testing.assert_array_equal(found.segment_documents, np.where(numbers < 0, -1, numbers + shift))
        assert _stored(both, split, index) == _stored(source, split, index)
    for made in (part, both):
        assert verify_store(made.path).problems == ()


def test_documents_whose_numbers_cannot_be_moved_apart(tmp_path: Path) -> None:
    for name in ("left", "right"):
        manifest = synthetic_manifest(dataset={"name": name})
        (row,) = synthetic_rows(manifest, 1, seed=len(name))
        numbers = np.where(row.segment_documents < 0, -1, 2**62 + row.segment_documents)
        write_rows(
            tmp_path / name, manifest, {"train": [dataclasses.replace(row, segment_documents=numbers)]}
        )
    with pytest.raises(StoreError, match=r"right have numbers up to 9,223,\S+ when they are kept apart"):
        merge_stores([tmp_path / "left", tmp_path / "right"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_row_that_is_there_twice_is_named(tmp_path: Path, whole: Path) -> None:
    subset_store(whole, tmp_path / "a", split="train", rows=[1, 4])
    with pytest.raises(StoreError, match="the stores overlap") as caught:
        merge_stores([whole, tmp_path / "a"], tmp_path / "new")
    part = tmp_path / "a"
    named = f"row 0 of split train of {part} has the tokens of row 1 of split train of {whole}: "
    assert str(caught.value).startswith(named), "the first one"
    assert not (tmp_path / "new").exists()
    merge_stores([whole, tmp_path / "a"], tmp_path / "new", allow_repeated_rows=True)
    assert open_store(tmp_path / "new").rows("train") == 10


def test_stores_of_another_kind_are_refused_by_field(tmp_path: Path, whole: Path) -> None:
    write_synthetic_store(tmp_path / "k5", synthetic_manifest(k=5, seed=9), {"train": 1}, seed=3)
    with pytest.raises(StoreError) as caught:
        merge_stores([whole, tmp_path / "k5"], tmp_path / "new")
    assert "record.k: found 5, wanted 4" in str(caught.value) and "record.seed" in str(caught.value)
    with pytest.raises(StoreError, match="two stores or more"):
        merge_stores([whole], tmp_path / "new")


def test_a_fraction_depends_on_the_tokens_alone(tmp_path: Path) -> None:
    manifest = synthetic_manifest()
    rows = synthetic_rows(manifest, 60, 0)
    one = write_rows(tmp_path / "one", manifest, {"train": rows})
    other = write_rows(
        tmp_path / "other", dataclasses.replace(manifest, rows_per_shard=7), {"train": rows[::-1]}
    )
    for path in (one, other):
        subset_store(path, path.with_name(path.name + "-part"), fraction=0.3, seed=4)
    found = [
        sorted(row.token_ids.tolist() for row in _rows(open_store(tmp_path / name)))
        for name in ("one-part", "other-part")
    ]
    expected = [row for row in rows if row_key(row, 4) < 0.3 * 2**64]
    assert found[0] == found[1] == sorted(row.token_ids.tolist() for row in expected)
    assert 8 <= len(expected) <= 30
    subset_store(one, tmp_path / "all", fraction=1.0)
    assert open_store(tmp_path / "all").rows("train") == 60


def test_documents_are_taken_with_their_rows_and_nothing_else_counts(tmp_path: Path, whole: Path) -> None:
    rows = _rows(open_store(whole))
    wanted = [int(rows[1].segment_documents[0]), int(rows[4].segment_documents[0])]
    subset_store(whole, tmp_path / "new", split="train", documents=wanted)
    found = _rows(open_store(tmp_path / "new"))
    expected = [row for row in rows if np.isin(row.segment_documents, wanted).any()]
    assert [row.token_ids.tolist() for row in found] == [row.token_ids.tolist() for row in expected]
    for row, source in zip(found, expected, strict=True):
        inside = np.isin(document_of_position(source), wanted)
        np.testing.assert_array_equal(row.loss_mask, source.loss_mask & inside)


def test_ranges_stay_ranges(tmp_path: Path, whole: Path) -> None:
    wanted = range(2, 3 * 10**9)  # more numbers than fit in memory
    subset_store(whole, tmp_path / "a", split="train", documents=wanted)
    subset_store(whole, tmp_path / "b", split="train", documents=[4, range(2, 9), range(9, wanted.stop), 3])
    found = [_rows(open_store(tmp_path / name)) for name in "ab"]
    assert found[0] and all(_same(*pair) for pair in zip(*found, strict=True))
    for row in found[0]:
        assert np.isin(document_of_position(row)[row.loss_mask], range(2, 1000)).all()
    for name in "ab":
        (step,) = open_store(tmp_path / name).manifest.dataset["provenance"]
        assert step["documents"] == [[2, wanted.stop]]
    subset_store(whole, tmp_path / "c", split="train", rows=[range(0, 8, 3), range(6, 8), 1])
    (step,) = open_store(tmp_path / "c").manifest.dataset["provenance"]
    assert step["row_numbers"] == [[0, 2], [3, 4], [6, 8]] and open_store(tmp_path / "c").rows("train") == 5


def test_a_bad_choice_is_one_sentence(tmp_path: Path, whole: Path) -> None:
    cases = [
        ({}, "needs a choice"),
        ({"rows": [0]}, "name one with --split"),
        ({"rows": [8], "split": "train"}, "has no row 8: it has 8 rows"),
        ({"rows": [0], "fraction": 0.5}, "give one of them"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"documents": [10**6]}, "No row of"),
        ({"rows": [], "split": "train"}, "rows is empty: name at least one"),
        ({"rows": range(3, 3), "split": "train"}, "rows is empty: name at least one"),
        ({"documents": []}, "documents is empty: name at least one"),
        ({"rows": [-1], "split": "train"}, "rows holds -1, expected numbers from 0"),
        ({"rows": [range(2, 3 * 10**9)], "split": "train"}, "has no row 8: it has 8 rows"),
        ({"documents": [10**23]}, f"documents holds {10**23}, expected numbers from 0"),
        ({"documents": [range(5, 10**23)]}, "documents holds 9+, expected numbers from 0"),
        ({"fraction": 0.5, "seed": 10**23}, f"seed is {10**23}, expected a whole number from 0"),
        ({"split": "test"}, "no split 'test'"),
    ]
    for choice, words in cases:
        with pytest.raises(StoreError, match=words):
            subset_store(whole, tmp_path / "new", **choice)
    assert not (tmp_path / "new").exists()
