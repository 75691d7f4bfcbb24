"""What a codec does not give back is not written: encoders and decoders that err, one number at a time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty import AT, Change, FaultyStore, rich_row
from kinds import CODEC_KINDS, WITH_MASS, manifest_of_kind

from sparsekd.logit_store.codecs.codec import CODECS, Arrays, stored_record
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import planes_of
from sparsekd.logit_store.row import RECORD_NAMES, Row, planes_of_row
from sparsekd.logit_store.synthetic import synthetic_rows

StoreOf = Callable[..., FaultyStore]


@pytest.fixture
def store_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreOf:
    """Makes stores whose rows have every plane, and records at what does not count, too."""

    def make(kind: str, **fields: Any) -> FaultyStore:
        manifest = manifest_of_kind(
            kind, "masked_token", "all", planes=True, splits=("train",), rows_per_shard=1, **fields
        )
        return FaultyStore(tmp_path / f"store {len(list(tmp_path.iterdir()))}", manifest, monkeypatch)

    return make


def _without_draws(kind: str) -> str:
    """Heads that end at a mass go without draws: what is asked of these is asked of `compact`."""
    return "compact" if kind == WITH_MASS else kind


def _add(name: str, place: tuple[int, ...], amount: float) -> Change:
    def change(arrays: Arrays) -> None:
        arrays[name][place] += np.asarray(amount).astype(arrays[name].dtype)

    return change


def _put(name: str, place: tuple[int, ...], value: float) -> Change:
    def change(arrays: Arrays) -> None:
        arrays[name][place] = value

    return change


def _flip(name: str, value: bool) -> Change:
    """The first bit of a value gets the other one."""

    def change(arrays: Arrays) -> None:
        arrays[name][(arrays[name] == value).argmax()] = not value

    return change


def _swapped_ids(arrays: Arrays) -> None:
    arrays["head_ids"][AT, [0, -1]] = arrays["head_ids"][AT, [-1, 0]]


def _swapped_neighbours(arrays: Arrays) -> None:
    """The last two ids whose values differ change places."""
    values, ids = arrays["head_logprobs"][AT], arrays["head_ids"][AT]
    last = int(np.flatnonzero((ids[1:] >= 0) & (values[1:] < values[:-1]))[-1])
    ids[[last, last + 1]] = ids[[last + 1, last]]


def _reversed_ids(arrays: Arrays) -> None:
    arrays["head_ids"][AT] = arrays["head_ids"][AT, ::-1]


def _reversed_head(arrays: Arrays) -> None:
    _reversed_ids(arrays)
    arrays["head_logprobs"][AT] = arrays["head_logprobs"][AT, ::-1]


def _moved_count(arrays: Arrays) -> None:
    arrays["tail_counts"][AT, :2] = [1, 2]


def _another_draw(arrays: Arrays) -> None:
    ids = arrays["tail_ids"][AT]
    last = int((ids >= 0).sum()) - 1
    ids[last] += 1 if ids[last] < 299 else -1


def _without_a_record(arrays: Arrays) -> None:
    """The last record is gone, where it stands and what it says."""
    arrays["recorded"][np.flatnonzero(arrays["recorded"])[-1]] = False
    for name in (*RECORD_NAMES, "feature_7"):
        arrays[name] = arrays[name][:-1]


def _twice_the_record(arrays: Arrays) -> None:
    """The third record stands at the fourth place as well."""
    for name in RECORD_NAMES:
        arrays[name][AT + 1] = arrays[name][AT]


CHANGES: dict[str, tuple[Change, str]] = {
    "a token": (_add("token_ids", (5,), 1), "token_ids"),
    "a bit of the mask, set": (_flip("loss_mask", False), "loss_mask|labels"),
    "a bit of the mask, cleared": (_flip("loss_mask", True), "loss_mask|labels"),
    "a place of a record": (_flip("recorded", True), "recorded|head_ids|head_logprobs"),
    "a document's start": (_add("segment_starts", (-1,), -1), "segment_starts|feature_3"),
    "a document": (_add("segment_documents", (0,), 1), "segment_documents"),
    "a weight": (_add("weights", (1,), 1e-6), "weights"),
    "a run of weights": (_add("weight_starts", (-1,), -1), "weight_starts"),
    "a text of a pair": (_add("token_types", (3,), 1), "token_types"),
    "a label": (_add("labels", (1,), 1), "labels"),
    "a head's id": (_add("head_ids", (AT, 1), 1), "head_ids"),
    "two ids of a head": (_swapped_ids, "head_ids"),
    "the order of a head's ids": (_reversed_ids, "head_ids"),
    "a draw": (_another_draw, "tail_ids"),
    "a count": (_moved_count, "tail_counts"),
    "a record that is dropped": (_without_a_record, "recorded"),
    "a record that is repeated": (_twice_the_record, "head_ids"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("kind", CODEC_KINDS)
def test_an_encoder_that_changes_something_writes_nothing(store_of: StoreOf, kind: str, what: str) -> None:
    change, planes = CHANGES[what]
    store = store_of(_without_draws(kind) if planes.startswith("tail") else kind)
    row = rich_row(store.manifest)
    store.refuses(planes, row, encode=change)
    store.write(row)


def test_where_places_are_not_stored_a_mask_that_differs_is_found_by_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in CODEC_KINDS:
        manifest = manifest_of_kind(kind, splits=("train",), rows_per_shard=1)
        store = FaultyStore(tmp_path / kind / "store", manifest, monkeypatch)
        row = next(row for row in synthetic_rows(manifest, 9, 0) if row.loss_mask.sum() > 2)
        for value in (True, False):
            store.refuses("loss_mask|head_ids|head_logprobs", row, encode=_flip("loss_mask", value))
        store.write(row)


ROUNDED = (
    "head_logprobs",
    "tail_logprobs",
    "log_rest",
    "true_logprob",
    "rest_entropy",
    "entropy",
    "feature_3",
    "feature_7",
)


def _moved(manifest: Manifest, row: Row, name: str, share: float) -> Change:
    """Puts a value of the row, moved by a share of the error that the codec states for it."""
    plane = next(plane for plane in planes_of(manifest) if plane.name == name)
    assert row.teacher is not None
    given = planes_of_row(dataclasses.replace(row, teacher=stored_record(row.teacher, manifest)))[name]
    place = (AT, *[1] * (given.ndim - 1))
    error = CODECS[manifest.codec.name].error_of(plane, given, manifest)[place]
    amount = share * error if error else np.sign(share) * 1e-6 * abs(given[place])

    def change(arrays: Arrays) -> None:
        arrays[name][place] = given[place] - np.float32(amount)

    return change


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("kind", CODEC_KINDS)
def test_a_value_may_move_by_its_stated_error_and_no_further(store_of: StoreOf, kind: str, name: str) -> None:
    store = store_of(_without_draws(kind) if name == "tail_logprobs" else kind)
    row, manifest = rich_row(store.manifest), store.manifest
    is_exact = CODECS[manifest.codec.name].is_lossless and not name.startswith("feature")
    for share in (1.3, -1.3, 3.0, -3.0):
        store.refuses(name, row, decode=_moved(manifest, row, name, share))
    # An entry that passes its neighbour takes its id along.
    store.refuses(f"{name}|head_ids", row, encode=_moved(manifest, row, name, 3.0))
    for share in (0.0,) if is_exact else (0.0, 0.9, -0.9):
        store.write(row, decode=_moved(manifest, row, name, share))


def test_stated_errors_are_half_a_step_of_what_is_stored() -> None:
    """By the steps of docs/format.md, with a tenth for the rounding of float32 and of scales."""
    manifest = manifest_of_kind("tkq8", planes=True)
    values = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32) - 3
    largest = np.abs(values).max(axis=1, keepdims=True)
    bounds = {
        "log_rest": np.abs(values) * 2.0**-11 + 2e-6,
        "entropy": np.full_like(values, 0.5 / 512),
        "feature_3": np.broadcast_to(largest / 127 / 2, values.shape),
        "feature_7": np.abs(values) * 2.0**-11,
        "head_logprobs": np.ptp(values, axis=1, keepdims=True) / 254 * 2 + np.abs(values) * 2.0**-10,
    }
    for plane in planes_of(manifest):
        if plane.name in bounds:
            error = CODECS["tkq8"].error_of(plane, values, manifest)
            assert error.dtype == np.float32 and error.shape == values.shape
            assert (error <= 1.1 * bounds[plane.name]).all(), plane.name
            assert (error > 0).all()


@pytest.mark.parametrize("kind", CODEC_KINDS)
def test_a_head_stands_in_the_order_of_its_stored_values(store_of: StoreOf, kind: str) -> None:
    """Entries that are stored as equal go by id, whatever told them apart; none else may change places."""
    store = store_of(kind, n=0, tail_logprobs=False)
    row = rich_row(store.manifest)
    record = row.teacher
    assert record is not None
    store.refuses("head_ids", row, decode=_reversed_head)
    record.head_ids[AT] = [50, 9, 3]
    record.head_logprobs[AT] = [-2.0, -3.00011, -3.00012]
    store.write(row)
    store.refuses("head_ids", row, decode=_reversed_ids)
    found = store.rows()[0].teacher
    assert found is not None
    is_exact = CODECS[store.manifest.codec.name].is_lossless
    assert found.head_ids[AT].tolist() == ([50, 9, 3] if is_exact else [50, 3, 9])
    assert (found.head_logprobs[AT, 1] == found.head_logprobs[AT, 2]) != is_exact


@pytest.mark.parametrize("kind", CODEC_KINDS)
def test_so_does_one_with_more_values_than_a_byte_counts(store_of: StoreOf, kind: str) -> None:
    store = store_of(kind, k=290, n=0, tail_logprobs=False)
    (row,) = synthetic_rows(store.manifest, 1, 0)
    record = row.teacher
    assert record is not None and len(record.entropy) > AT
    record.head_logprobs[:] = np.linspace(-2.0, -8.0, 290, dtype=np.float32)
    # Two of the last are stored as equal, and so change places.
    record.head_logprobs[:, 281] = record.head_logprobs[:, 280] - 1e-5
    record.head_ids[AT, [280, 281]] = np.sort(record.head_ids[AT, [280, 281]])[::-1]
    record.log_rest[:] = -20.0
    record.head_logprobs[:] -= np.log(np.exp(record.head_logprobs[AT]).sum() + 1e-6)
    store.write(row)
    store.refuses("head_ids", row, decode=_swapped_neighbours)


@pytest.mark.parametrize("kind", CODEC_KINDS)
def test_impossible_and_too_deep_entries_are_written_as_what_they_are(store_of: StoreOf, kind: str) -> None:
    """An infinity is no number that is far away."""
    store = store_of(kind, n=0, tail_logprobs=False)
    row = rich_row(store.manifest)
    record = row.teacher
    assert record is not None
    record.head_logprobs[:3] = [[-0.5, -9.0, -np.inf], [-0.5, -np.inf, -np.inf], [-0.5, -9.0, -1e9]]
    record.head_ids[:3].sort(axis=1)
    record.log_rest[:3] = [[-np.inf] * 3, [-1e9, -5e8, -2.5e8], [-2.0] * 3]
    record.rest_entropy[:3] = 0
    record.true_logprob[AT] = -1e9
    store.write(row)
    for name, place in {"head_logprobs": (0, 2), "log_rest": (0, 1)}.items():
        store.refuses(name, row, decode=_put(name, place, -65504.0))
    (found,) = (row.teacher for row in store.rows())
    assert found is not None
    codec = CODECS[store.manifest.codec.name]
    lowest = -1e9 if codec.is_lossless else -65504.0
    assert found.true_logprob[AT] == found.log_rest[1, 0] == np.float32(lowest)
    assert np.isneginf(found.log_rest[0]).all() and np.isfinite(found.log_rest[1:]).all()
    impossible = np.isneginf(found.head_logprobs[:3])
    kept = found.head_ids[:3] >= 0
    expected = np.array([[0, 0, 1], [0, 1, 1], [0, 0, codec.drops_deep]], np.bool_)
    assert impossible[kept].tolist() == expected[kept].tolist()


@pytest.mark.parametrize("name", ["head_logprobs", "tail_logprobs", "log_rest", "true_logprob"])
@pytest.mark.parametrize("kind", CODEC_KINDS)
def test_a_number_does_not_become_infinite(store_of: StoreOf, kind: str, name: str) -> None:
    store = store_of(_without_draws(kind) if name == "tail_logprobs" else kind)
    row = rich_row(store.manifest)
    place = (AT, 1) if getattr(row.teacher, name).ndim == 2 else (AT,)

    for value in (-np.inf, np.inf, np.nan):
        store.refuses(f"{name}|head_ids", row, decode=_put(name, place, value))
    store.write(row)
