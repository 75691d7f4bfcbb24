"""The table of planes: what is entered is stored, checked, read alone and exported, in all kinds of store."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from dense import write_rows
from kinds import CODEC_KINDS, TARGETS_AND_RULES, manifest_of_kind

from sparsekd.logit_store import checks
from sparsekd.logit_store.checks import check_row
from sparsekd.logit_store.codecs.codec import CODECS, codec_of, stored_record
from sparsekd.logit_store.errors import InvalidRowError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.manifest_checks import OPTIONAL_PLANES
from sparsekd.logit_store.planes import TABLE, needed_for, planes_of, text_planes
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import Row, planes_of_row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.logit_store.tools import export
from sparsekd.logit_store.tools.verify import verify_store

PLACES = {"position", "segment", "run", "counted", "recorded", "real"}
DOCUMENTED = (Path(__file__).parents[3] / "docs/format.md").read_text()


EVERYTHING = manifest_of_kind("exact", "masked_token", "all", planes=True)
"""Of a store that has every plane of the table, and hidden states of both kinds."""


def test_every_entry_names_what_there_is() -> None:
    assert planes_of(EVERYTHING)[: len(TABLE)] == TABLE
    names = [plane.name for plane in planes_of(EVERYTHING)]
    assert len(set(names)) == len(names) and names[len(TABLE) :] == ["feature_3", "feature_7"]
    for plane in planes_of(EVERYTHING):
        assert plane.stands in PLACES
        assert plane.rule in checks.RULES
        assert plane.column is None or plane.column in export.COLUMNS
        assert plane.merged in ("kept", "documents")
        assert not (plane.is_text and plane.is_rounded), "the text is exact"
        for name, codec in CODECS.items():
            assert plane.coding in codec.codings, (plane.name, name)


def test_every_plane_is_in_the_format_s_page() -> None:
    for plane in TABLE:
        assert f"`{plane.name}`" in DOCUMENTED, plane.name


def test_nothing_waits_for_a_plane_that_is_not_there() -> None:
    planes = planes_of(EVERYTHING)
    assert {plane.rule for plane in planes} == set(checks.RULES)
    assert {plane.column for plane in planes} - {None} == set(export.COLUMNS)
    for codec in CODECS.values():
        assert {plane.coding for plane in planes} == set(codec.codings)


def test_what_a_plane_needs_says_where_it_stands_and_needs_nothing_more() -> None:
    text = {"loss_mask"}
    record = {"loss_mask", "recorded"}
    expected = {
        "token_ids": set(),
        "loss_mask": set(),
        "segment_starts": {"segment_documents"},
        "segment_documents": {"segment_starts"},
        "weight_starts": set(),
        "weights": {"weight_starts"},
        "token_types": set(),
        "labels": text,
        "recorded": text,
        **{plane.name: record for plane in TABLE if plane.stands == "recorded"},
        "feature_3": {"segment_starts", "segment_documents"},
        "feature_7": record,
    }
    assert expected.keys() == {plane.name for plane in planes_of(EVERYTHING)}
    for name, others in expected.items():
        found = needed_for([name], EVERYTHING)
        assert found == {name} | others
        assert needed_for(found, EVERYTHING) == found, "closed"
    assert needed_for(expected, EVERYTHING) == set(expected)
    assert needed_for([], EVERYTHING) == frozenset()
    # A record stands at counted positions, where nothing else says so.
    counted = synthetic_manifest()
    assert {"loss_mask", "entropy"} <= needed_for(["entropy"], counted)


def _rows(manifest: Manifest, count: int = 3) -> dict[str, list[Row]]:
    return {split: synthetic_rows(manifest, count, seed, split) for seed, split in enumerate(manifest.splits)}


@pytest.mark.parametrize(("target", "rule"), TARGETS_AND_RULES)
@pytest.mark.parametrize("kind", CODEC_KINDS)
@pytest.mark.parametrize("planes", [False, True])
def test_each_plane_alone_is_that_of_the_whole_row(
    tmp_path: Path, kind: str, target: str, rule: str, planes: bool
) -> None:
    manifest = manifest_of_kind(kind, target, rule, planes=planes)
    rows = _rows(manifest)
    path = write_rows(tmp_path / "store", manifest, rows)
    found = verify_store(path)
    assert found.ok and found.rows == 6, found.text()
    store = open_store(path)
    for split, given in rows.items():
        for index, row in enumerate(given):
            whole = planes_of_row(store.read_row(split, index))
            for plane in planes_of(manifest):
                some = store.read_planes(split, index, [plane.name])
                assert some.keys() - {"recorded"} == needed_for([plane.name], manifest) - {"recorded"}
                for name, array in some.items():
                    assert array.dtype == whole[name].dtype and array.shape == whole[name].shape
                    np.testing.assert_array_equal(array, whole[name], err_msg=f"{name} with {plane.name}")
            _assert_exact_planes(row, whole, manifest)
            text = planes_of_row(store.read_text(split, index))
            assert text.keys() == set(text_planes(manifest))


def _assert_exact_planes(row: Row, whole: dict[str, np.ndarray], manifest: Manifest) -> None:
    """Compares what is not rounded with the row that was written."""
    assert row.teacher is not None
    written = planes_of_row(dataclasses.replace(row, teacher=stored_record(row.teacher, manifest)))
    for plane in planes_of(manifest):
        assert whole[plane.name].dtype == plane.dtype
        if not plane.is_rounded and plane.name != "head_ids":  # equal stored values go by id
            np.testing.assert_array_equal(whole[plane.name], written[plane.name], err_msg=plane.name)
    np.testing.assert_array_equal(whole["recorded"], written["recorded"])
    if manifest.record.k:
        np.testing.assert_array_equal(np.sort(whole["head_ids"]), np.sort(written["head_ids"]))


@pytest.mark.parametrize("kind", CODEC_KINDS)
def test_planes_that_are_not_asked_for_are_not_decoded(kind: str) -> None:
    """Whatever stands in their place: only a coding's own planes may be looked at together."""
    manifest = manifest_of_kind(kind, "masked_token", "all", planes=True)
    row = synthetic_rows(manifest, 1, 0)[0]
    stored = codec_of(manifest).encode(row, manifest)
    whole = codec_of(manifest).decode_planes(stored, manifest)
    for plane in planes_of(manifest):
        needed = needed_for([plane.name], manifest)
        codings = {other.coding for other in planes_of(manifest) if other.name in needed}
        kept = {other.name for other in planes_of(manifest) if other.coding in codings}
        garbled = {name: value if name in kept else b"garbled" for name, value in stored.items()}
        some = codec_of(manifest).decode_planes(garbled, manifest, [plane.name])
        np.testing.assert_array_equal(some[plane.name], whole[plane.name])


def test_names_that_a_store_does_not_have_are_left_out(tmp_path: Path) -> None:
    manifest = synthetic_manifest(k=0, n=0)
    store = open_store(write_rows(tmp_path / "store", manifest, _rows(manifest)))
    assert store.read_planes("train", 0, ["head_ids", "weights", "token_ids"]).keys() == {"token_ids"}
    assert store.read_planes("train", 0, ["no such plane"]) == {}


STRANGERS = {
    "weights": np.ones(1, np.float32),
    "token_types": np.zeros(16, np.uint8),
    "labels": np.zeros(3, np.int32),
    "feature_3": np.zeros((16, 4), np.float32),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_planes_that_the_manifest_does_not_declare_are_refused(tmp_path: Path, name: str) -> None:
    manifest = synthetic_manifest(splits=("train",))
    row = synthetic_rows(manifest, 1, 0)[0]
    stranger = dataclasses.replace(row, optional={name: STRANGERS[name]})
    with pytest.raises(InvalidRowError, match=rf"row 0 has {name}, which the manifest does not declare"):
        write_rows(tmp_path / "store", manifest, {"train": [stranger]})
    assert not list((tmp_path / "store/shards/train").rglob("*.*"))


def test_values_of_draws_that_the_manifest_does_not_keep_are_refused() -> None:
    manifest, keeping = synthetic_manifest(), synthetic_manifest(tail_logprobs=True)
    row = synthetic_rows(keeping, 1, 0)[0]
    with pytest.raises(InvalidRowError, match="has tail_logprobs, which the manifest does not declare"):
        check_row(row, manifest, split="train", where="row 0")


@pytest.mark.parametrize("name", [*OPTIONAL_PLANES, "weight_starts", "labels", "feature_3"])
def test_planes_that_the_manifest_declares_must_be_there(name: str) -> None:
    manifest = manifest_of_kind("exact", "masked_token", planes=True)
    row = synthetic_rows(manifest, 1, 0)[0]
    optional = {other: value for other, value in row.optional.items() if other != name}
    with pytest.raises(InvalidRowError, match=f"row 0 has no {name}, which the manifest asks for"):
        check_row(dataclasses.replace(row, optional=optional), manifest, split="train", where="row 0")


@pytest.mark.parametrize("name", [plane.name for plane in planes_of(EVERYTHING)])
def test_every_plane_has_one_type_and_one_shape(name: str) -> None:
    rows = synthetic_rows(EVERYTHING, 20, 1)
    row = next(row for row in rows if row.optional["weights"].size > 1 and row.recorded.sum() > 1)
    planes = planes_of_row(row)
    for broken in (planes[name].astype(np.float16), planes[name][..., None], planes[name][:-1]):
        with pytest.raises(InvalidRowError) as caught:
            checks.check_planes(planes | {name: broken}, EVERYTHING, split="train", where="row 0")
        assert str(caught.value).startswith("row 0")
