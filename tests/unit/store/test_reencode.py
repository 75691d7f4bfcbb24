"""`store reencode`: what is made of a larger head must be what a capture with the smaller one would store."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.codecs.codec import CODECS
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import CodecSpec
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.logit_store.tools.reencode import narrowed_record, reencode_store

sys.path.append(str(Path(__file__).parent))
from dense import L, V, dense_logprobs, dense_manifest, dense_rows, write_rows


@pytest.mark.parametrize("k", [1, 3, 15, 16])
def test_a_smaller_head_is_that_of_a_capture_with_it(tmp_path: Path, k: int) -> None:
    logprobs = dense_logprobs(5, seed=0)
    large = write_rows(tmp_path / "large", dense_manifest(16), {"train": dense_rows(logprobs, 16)})
    reencode_store(large, tmp_path / "small", k=k)
    store = open_store(tmp_path / "small")
    assert store.manifest.record == dense_manifest(k).record
    for index, expected in enumerate(dense_rows(logprobs, k)):
        found, wanted = store.read_row("train", index).teacher, expected.teacher
        assert found is not None and wanted is not None
        np.testing.assert_array_equal(found.head_ids, wanted.head_ids)
        np.testing.assert_array_equal(found.head_logprobs, wanted.head_logprobs)
        # Sums of float32 values: their rounding, and no more.
        np.testing.assert_allclose(found.log_rest, wanted.log_rest, atol=3e-6)
        np.testing.assert_allclose(found.rest_entropy, wanted.rest_entropy, atol=1e-5)
        np.testing.assert_array_equal(found.true_logprob, wanted.true_logprob)
        np.testing.assert_array_equal(found.entropy, wanted.entropy)


def test_a_head_of_everything_leaves_an_exact_rest(tmp_path: Path) -> None:
    # With k = V the rest is empty (log R = -inf): all of the new rest comes from the dropped entries.
    logprobs = dense_logprobs(2, seed=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = dense_rows(logprobs, V)
    rows = [
        dataclasses.replace(
            row, teacher=dataclasses.replace(row.teacher, rest_entropy=np.zeros(L - 1, np.float32))
        )
        for row in rows
    ]
    whole = write_rows(tmp_path / "whole", dense_manifest(V), {"train": rows})
    reencode_store(whole, tmp_path / "small", k=4)
    store = open_store(tmp_path / "small")
    for index, expected in enumerate(dense_rows(logprobs, 4)):
        found, wanted = store.read_row("train", index).teacher, expected.teacher
        np.testing.assert_allclose(found.log_rest, wanted.log_rest, atol=3e-6)
        np.testing.assert_allclose(found.rest_entropy, wanted.rest_entropy, atol=1e-5)


def test_one_dropped_entry_of_an_empty_rest_has_no_entropy() -> None:
    row = dense_rows(dense_logprobs(1, seed=2), 8)[0]
    record = dataclasses.replace(
        row.teacher,
        log_rest=np.full((L - 1, 3), -np.inf, np.float32),
        rest_entropy=np.zeros(L - 1, np.float32),
    )
    narrow = narrowed_record(record, dense_manifest(8).record, 7)
    np.testing.assert_allclose(narrow.rest_entropy, 0, atol=1e-6)
    np.testing.assert_allclose(narrow.log_rest[:, 0], record.head_logprobs[:, 7], atol=1e-6)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize(("k", "n"), [(4, 6), (4, 0), (0, 0)])
def test_every_codec_can_be_reached_and_left(tmp_path: Path, codec: str, k: int, n: int) -> None:
    manifest = synthetic_manifest(k=k, n=n)
    write_synthetic_store(tmp_path / "exact", manifest, {"train": 4, "heldout": 1}, seed=0)
    reencode_store(tmp_path / "exact", tmp_path / "other", codec=codec)
    reencode_store(tmp_path / "other", tmp_path / "back", codec="exact")
    first, other, back = (open_store(tmp_path / name) for name in ("exact", "other", "back"))
    assert other.manifest.codec.name == codec
    for split, count in (("train", 4), ("heldout", 1)):
        for index in range(count):
            one, two, three = (store.read_row(split, index) for store in (first, other, back))
            np.testing.assert_array_equal(one.token_ids, three.token_ids)
            np.testing.assert_array_equal(one.loss_mask, three.loss_mask)
            if two.teacher is not None:
                # What a codec decodes, another one keeps.
                np.testing.assert_array_equal(two.teacher.head_ids, three.teacher.head_ids)
                np.testing.assert_array_equal(two.teacher.head_logprobs, three.teacher.head_logprobs)
                np.testing.assert_array_equal(one.teacher.tail_counts, three.teacher.tail_counts)


def test_provenance_names_the_source_and_the_step(tmp_path: Path) -> None:
    digest = write_synthetic_store(tmp_path / "a", synthetic_manifest(n=0), {"train": 4}, seed=0)
    reencode_store(tmp_path / "a", tmp_path / "b", k=2)
    reencode_store(tmp_path / "b", tmp_path / "c", k=1)
    dataset = open_store(tmp_path / "c").manifest.dataset
    assert dataset["name"] == "synthetic", "the source's identity stays"
    first, second = dataset["provenance"]
    assert first["action"] == "reencode" and first["k"] == [4, 2] and second["k"] == [2, 1]
    assert first["sources"] == [{"store": digest, "rows": {"train": 4, "heldout": 0}}]
    assert second["sources"][0]["store"] == open_store(tmp_path / "b").digest


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "drawn", synthetic_manifest(), {"train": 2}, seed=0)
    with pytest.raises(StoreError, match=r"n = 6 draws .* another rest: keep k, or .* --drop-draws"):
        reencode_store(tmp_path / "drawn", tmp_path / "new", k=3)
    with pytest.raises(StoreError, match="k = 5 cannot be made"):
        reencode_store(tmp_path / "drawn", tmp_path / "new", k=5)
    with pytest.raises(StoreError, match="Nothing of the teacher would be left"):
        reencode_store(tmp_path / "drawn", tmp_path / "new", k=0, drop_draws=True)
    with pytest.raises(StoreError, match="codec is 'zip'"):
        reencode_store(tmp_path / "drawn", tmp_path / "new", codec="zip")
    manifest = synthetic_manifest(n=0, temperatures=(2.0,), draw_temperature=2.0)
    write_synthetic_store(tmp_path / "warm", manifest, {"train": 2}, seed=0)
    with pytest.raises(StoreError, match="no temperature 1"):
        reencode_store(tmp_path / "warm", tmp_path / "new", k=3)
    assert not (tmp_path / "new").exists(), "nothing was written"
    reencode_store(tmp_path / "drawn", tmp_path / "bare", k=3, drop_draws=True)
    assert open_store(tmp_path / "bare").manifest.record.n == 0


def test_a_cut_off_run_goes_on_and_reads_finished_shards_no_more(tmp_path: Path, monkeypatch) -> None:
    write_synthetic_store(tmp_path / "a", synthetic_manifest(n=0), {"train": 9}, seed=0)
    expected = reencode_store(tmp_path / "a", tmp_path / "whole", k=2)

    class Cut(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise Cut

    with pytest.raises(Cut):
        reencode_store(tmp_path / "a", tmp_path / "new", k=2, progress=stop)
    with pytest.raises(StoreError, match="not finished"):
        open_store(tmp_path / "new")
    read: list[int] = []
    real = LogitStore.read_row
    monkeypatch.setattr(
        LogitStore, "read_row", lambda self, split, row: (read.append(row), real(self, split, row))[1]
    )
    assert reencode_store(tmp_path / "a", tmp_path / "new", k=2) == expected
    shards = ([0, 1, 2], [3, 4, 5], [6, 7, 8])
    assert read in shards, "one row after the other, those of the missing shard alone"
    with pytest.raises(StoreError, match="another store"):
        reencode_store(tmp_path / "a", tmp_path / "new", k=1)


def _ragged(path: Path, mass: float) -> LogitStore:
    manifest = synthetic_manifest(k=8, n=0, codec=CodecSpec("compact", {"mass": mass, "frequent_ids": ""}))
    write_synthetic_store(path, manifest, {"train": 4}, seed=0)
    return open_store(path)


def test_heads_that_were_cut_short_keep_their_mass_or_a_smaller_one(tmp_path: Path) -> None:
    source = _ragged(tmp_path / "cut", 0.5)
    for name, settings, mass in (
        ("same", {"codec": "compact"}, 0.5),
        ("asked", {"mass": 0.5}, 0.5),
        ("less", {"mass": 0.3}, 0.3),
        ("narrow", {"codec": "compact", "k": 3}, 0.5),
    ):
        reencode_store(tmp_path / "cut", tmp_path / name, **settings)
        store = open_store(tmp_path / name)
        assert store.manifest.codec.parameters["mass"] == mass
        for index in range(4):
            old, new = (item.read_row("train", index).teacher for item in (source, store))
            kept = new.head_ids >= 0
            np.testing.assert_array_equal(new.head_ids[kept], old.head_ids[:, : new.head_ids.shape[1]][kept])
            if mass == 0.5 and name != "narrow":
                np.testing.assert_array_equal(new.head_ids, old.head_ids)
    for settings in ({"mass": 0.95}, {"codec": "compact", "mass": 0.95}, {"mass": float("nan")}):
        with pytest.raises(StoreError, match=r"cut short at a mass of 0\.5, so .* --mass of at most 0\.5"):
            reencode_store(tmp_path / "cut", tmp_path / "new", **settings)
    with pytest.raises(StoreError, match="which tkq8 cannot hold"):
        reencode_store(tmp_path / "cut", tmp_path / "new", codec="tkq8")
    assert not (tmp_path / "new").exists(), "nothing was written"
