"""`store export` read back by pyarrow and pandas."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import CodecSpec
from sparsekd.logit_store.manifest_checks import OPTIONAL_PLANES
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import document_of_position
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.logit_store.tools import export
from sparsekd.logit_store.tools.export import export_schema, export_store


@pytest.mark.parametrize(("k", "n"), [(4, 6), (4, 0), (0, 6), (0, 0)])
def test_every_value_is_there(tmp_path: Path, monkeypatch, k: int, n: int) -> None:
    monkeypatch.setattr(export, "POSITIONS_PER_FILE", 40)  # two rows of 16 in a file
    manifest = synthetic_manifest(k=k, n=n, temperatures=(0.5, 1.0, 2.0))
    digest = write_synthetic_store(tmp_path / "store", manifest, {"train": 5, "heldout": 1}, seed=0)
    files = export_store(tmp_path / "store", tmp_path / "out", text=True)
    assert [file.name for file in files] == [
        "train-000000.parquet", "train-000001.parquet", "train-000002.parquet", "heldout-000000.parquet",
    ]  # fmt: skip
    assert pq.read_metadata(files[0]).metadata[b"sparsekd.store"].decode() == digest
    table = pd.concat([pd.read_parquet(file) for file in files[:3]], ignore_index=True)
    store = open_store(tmp_path / "store")
    assert len(table) == 5 * 16
    for index in range(5):
        row = store.read_row("train", index)
        lines = table[table["row"] == index].reset_index(drop=True)
        np.testing.assert_array_equal(lines["position"], np.arange(16))
        np.testing.assert_array_equal(lines["token_id"], row.token_ids)
        np.testing.assert_array_equal(lines["document"], document_of_position(row))
        np.testing.assert_array_equal(lines["loss_mask"], row.loss_mask)
        assert list(lines["text"]) == [f"w{token}" for token in row.token_ids]
        lasts = np.append(row.segment_starts[1:], 16) - 1
        follows = ~np.isin(np.arange(16), lasts) & (document_of_position(row) >= 0)
        np.testing.assert_array_equal(lines["next_token_id"].notna(), follows)
        np.testing.assert_array_equal(lines["next_token_id"][follows], np.roll(row.token_ids, -1)[follows])
        record = row.teacher
        if record is None:
            assert "entropy" not in lines
            continue
        there = row.loss_mask
        assert 0 < there.sum() < 16
        for name in ("entropy", "rest_entropy", "true_logprob"):
            np.testing.assert_array_equal(lines[name].notna(), there)
            np.testing.assert_array_equal(lines[name][there], getattr(record, name))
        for column, name in enumerate(("log_rest_0_5", "log_rest_1", "log_rest_2")):
            np.testing.assert_array_equal(lines[name].notna(), there)
            np.testing.assert_array_equal(lines[name][there], record.log_rest[:, column])
        if k:
            np.testing.assert_array_equal(lines["head_ids"].notna(), there)
            np.testing.assert_array_equal(np.stack(lines["head_ids"][there]), record.head_ids)
            np.testing.assert_array_equal(np.stack(lines["head_logprobs"][there]), record.head_logprobs)
        if n:
            np.testing.assert_array_equal(lines["tail_ids"].notna(), there)
            for number, place in enumerate(np.flatnonzero(there)):
                used = record.tail_counts[number] > 0
                np.testing.assert_array_equal(lines["tail_ids"][place], record.tail_ids[number][used])
                np.testing.assert_array_equal(lines["tail_counts"][place], record.tail_counts[number][used])


def test_records_of_another_rule_and_the_other_planes_are_there(tmp_path: Path) -> None:
    """`all` records prompts and document ends, whose true token is null where no token follows."""
    manifest = synthetic_manifest(positions="all", planes=OPTIONAL_PLANES, rows_per_shard=9)
    write_synthetic_store(tmp_path / "store", manifest, {"train": 9}, seed=0)
    table = pd.read_parquet(export_store(tmp_path / "store", tmp_path / "out")[0])
    store = open_store(tmp_path / "store")
    for index in range(9):
        row = store.read_row("train", index)
        lines = table[table["row"] == index].reset_index(drop=True)
        real = document_of_position(row) >= 0
        np.testing.assert_array_equal(lines["recorded"], real)
        np.testing.assert_array_equal(lines["entropy"].notna(), real)
        np.testing.assert_array_equal(lines["true_logprob"].notna(), lines["next_token_id"].notna())
        np.testing.assert_array_equal(lines["token_type"], row.optional["token_types"])
        weights = np.ones(16, np.float32)
        for start, weight in zip(row.optional["weight_starts"], row.optional["weights"], strict=True):
            weights[start:] = weight
        np.testing.assert_array_equal(lines["weight"], weights)


@pytest.mark.parametrize("target", ["masked_token", "class"])
def test_stored_labels_are_a_column_in_place_of_the_next_token(tmp_path: Path, target: str) -> None:
    outcomes = ("no", "maybe", "yes") if target == "class" else None
    manifest = synthetic_manifest(target=target, outcomes=outcomes, k=2, n=0)
    write_synthetic_store(tmp_path / "store", manifest, {"train": 3}, seed=0)
    table = pd.read_parquet(export_store(tmp_path / "store", tmp_path / "out")[0])
    assert "next_token_id" not in table
    for index in range(3):
        row = open_store(tmp_path / "store").read_row("train", index)
        lines = table[table["row"] == index].reset_index(drop=True)
        np.testing.assert_array_equal(lines["label"].notna(), row.loss_mask)
        np.testing.assert_array_equal(lines["label"][row.loss_mask], row.optional["labels"])


def test_heads_cut_short_are_exported_as_far_as_they_go(tmp_path: Path) -> None:
    codec = CodecSpec("compact", {"mass": 0.5, "frequent_ids": ""})
    write_synthetic_store(
        tmp_path / "store", synthetic_manifest(k=8, n=0, codec=codec), {"train": 3, "heldout": 1}, seed=0
    )
    files = export_store(tmp_path / "store", tmp_path / "out", text=True)
    table, store = pd.read_parquet(files[0]), open_store(tmp_path / "store")
    lengths = set()
    for index in range(3):
        row = store.read_row("train", index)
        record = row.teacher
        lines = table[table["row"] == index].reset_index(drop=True)
        for number, place in enumerate(np.flatnonzero(row.recorded)):
            used = record.head_ids[number] >= 0
            lengths.add(int(used.sum()))
            np.testing.assert_array_equal(lines["head_ids"][place], record.head_ids[number][used])
            np.testing.assert_array_equal(lines["head_logprobs"][place], record.head_logprobs[number][used])
        np.testing.assert_array_equal(lines["log_rest_1"][row.recorded], record.log_rest[:, 0])
    assert len(lengths) > 1, "of unequal length"


def test_the_documented_columns_are_the_file_s(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs/store.md").read_text().split("## export")[1].split("## ")[0]
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    documented = [name for cell in table for name in re.findall("`([a-z_0-9]+)`", cell)]
    manifest = synthetic_manifest(
        tail_logprobs=True, temperatures=(0.5, 1.0), positions="all", planes=OPTIONAL_PLANES
    )
    assert documented == export_schema(manifest, text=True).names


def test_an_export_goes_on_and_is_not_mixed_with_another(tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "store", synthetic_manifest(), {"train": 3, "heldout": 1}, seed=0)
    files = export_store(tmp_path / "store", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in files}
    files[0].unlink()
    export_store(tmp_path / "store", tmp_path / "out")
    assert {file.name: file.read_bytes() for file in files} == before
    with pytest.raises(StoreError, match="another export"):
        export_store(tmp_path / "store", tmp_path / "out", split="train")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds notes\.txt"):
        export_store(tmp_path / "store", tmp_path / "mine")
    (tmp_path / "store/tokenizer/tokenizer.json").unlink()
    with pytest.raises(StoreError, match="does not hold the manifest's tokenizer"):
        export_store(tmp_path / "store", tmp_path / "texts", text=True)


def test_a_tokenizer_that_cannot_spell_is_said(unspelled: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="without --text"):
        export_store(unspelled, tmp_path / "texts", text=True)
