"""Weights, labels and classes: what must hold of them is asked of every writer and again of every reader."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense import write_rows
from forgery import swap_row
from kinds import CLASSES, CODEC_KINDS, VOCABULARY, manifest_of_kind

from sparsekd.logit_store.errors import InvalidRowError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import (
    IGNORED_LABEL,
    Row,
    labels_of,
    narrowed,
    take_records,
    weights_of_positions,
)
from sparsekd.logit_store.synthetic import synthetic_rows
from sparsekd.logit_store.tools.verify import verify_store

LENGTH = 16


def _row(manifest: Manifest) -> Row:
    """A row of two documents or more that counts at several positions and has several runs of weights."""
    return next(
        row
        for row in synthetic_rows(manifest, 200, 3)
        if (row.segment_documents >= 0).sum() > 1
        and row.loss_mask.sum() > 1
        and row.optional["weights"].size > 1
    )


def _set(name: str, *values: Any) -> Callable[[Row], Row]:
    """Replaces an optional plane."""

    def change(row: Row) -> Row:
        return dataclasses.replace(
            row, optional={**row.optional, name: np.array(values, row.optional[name].dtype)}
        )

    return change


def _first(name: str, value: float) -> Callable[[Row], Row]:
    """Replaces the first value of an optional plane."""

    def change(row: Row) -> Row:
        return _set(name, value, *row.optional[name][1:])(row)

    return change


def _runs(starts: list[int], weights: list[float]) -> Callable[[Row], Row]:
    def change(row: Row) -> Row:
        return _set("weights", *weights)(_set("weight_starts", *starts)(row))

    return change


def _counting(place: Callable[[Row], int]) -> Callable[[Row], Row]:
    """Lets the loss count at one more position, with a label and a record of its own."""

    def change(row: Row) -> Row:
        mask = row.loss_mask.copy()
        mask[place(row)] = True
        assert row.teacher is not None and mask.sum() > row.loss_mask.sum()
        numbers = np.resize(np.arange(len(row.teacher.entropy)), mask.sum())
        optional = dict(row.optional)
        for name in ("labels", "feature_7"):
            optional[name] = optional[name][numbers]
        teacher = take_records(row.teacher, numbers)
        return dataclasses.replace(row, loss_mask=mask, teacher=teacher, recorded=mask, optional=optional)

    return change


def _inside(row: Row) -> int:
    lengths = np.diff([*row.segment_starts, LENGTH])
    segment = next(number for number, length in enumerate(lengths) if length > 1)
    assert row.segment_documents[segment] >= 0
    return int(row.segment_starts[segment])


BROKEN: list[tuple[str, Callable[[Row], Row], str]] = [
    (
        "masked_token",
        _first("weights", -0.5),
        r"run place 0: weights is -0\.5, expected a finite number",
    ),
    ("masked_token", _first("weights", np.nan), "weights is nan"),
    ("masked_token", _first("weights", np.inf), "weights is inf"),
    ("masked_token", _first("weights", -np.inf), "weights is -inf"),
    ("masked_token", _runs([0], [0.0]), r"position \d+: the loss mask is True where the weight is 0"),
    ("masked_token", _runs([1], [2.0]), "the first run of weights starts at 1, expected 0"),
    ("masked_token", _runs([-1], [2.0]), "the first run of weights starts at -1, expected 0"),
    ("masked_token", _runs([0, 5, 5], [2, 1, 2]), "run of weights 2 starts at 5, not after the one before"),
    ("masked_token", _runs([0, 7, 3], [2, 1, 2]), "run of weights 2 starts at 3, not after the one before"),
    ("masked_token", _runs([0, LENGTH], [2, 1]), "last run of weights starts at 16, beyond the 16 positions"),
    ("masked_token", _runs([0, 5], [2.0]), r"weights is float32 \[1\], expected float32 \[2\]"),
    ("masked_token", _runs([0], [2.0, 1.0]), r"weights is float32 \[2\], expected float32 \[1\]"),
    (
        "masked_token",
        _first("labels", VOCABULARY),
        "counted place 0: labels is 300, .* -1 for none",
    ),
    ("masked_token", _first("labels", -2), r"counted place 0: labels is -?\d+, expected from 0 to 299"),
    ("class", _first("labels", len(CLASSES)), "counted place 0: labels is 5, expected from 0 to 4"),
    ("class", _counting(_inside), r"position \d+: the loss mask is True inside a document, whose class"),
]


@pytest.mark.parametrize(("target", "change", "words"), BROKEN)
def test_a_broken_rule_is_named_by_writer_and_reader(
    tmp_path: Path, target: str, change: Callable[[Row], Row], words: str
) -> None:
    manifest = manifest_of_kind("exact", target, planes=True, splits=("train",))
    row = _row(manifest)
    broken = change(row)
    with pytest.raises(InvalidRowError, match=rf"shard 000000, row 0.*{words}"):
        write_rows(tmp_path / "refused", manifest, {"train": [broken]})
    assert not list((tmp_path / "refused/shards/train").rglob("*.*"))
    sound = write_rows(tmp_path / "sound", manifest, {"train": [row]})
    path = swap_row(sound, tmp_path / "forged", "train", 0, broken)
    with pytest.raises(InvalidRowError, match=rf"shard 000000, row 0.*{words}"):
        open_store(path).read_row("train", 0)
    (problem,) = verify_store(path).problems
    assert re.search(words, problem)


def test_a_weight_of_nothing_takes_its_span_out_of_the_loss(tmp_path: Path) -> None:
    """Of every other weight the mask knows nothing; without runs every weight is 1."""
    manifest = manifest_of_kind("exact", planes=True, splits=("train",), rows_per_shard=9)
    row = next(row for row in synthetic_rows(manifest, 50, 0) if row.loss_mask[:9].any())
    kept = np.arange(LENGTH) >= 9
    runs = _runs([0, 4, 9], [0.0, 0.0, 7.5])
    with pytest.raises(InvalidRowError, match=r"True where the weight is 0"):
        write_rows(tmp_path / "refused", manifest, {"train": [runs(row)]})
    path = write_rows(
        tmp_path / "store",
        manifest,
        {"train": [runs(narrowed(row, kept, ["feature_7"])), _runs([], [])(row)]},
    )
    weighted, plain = (open_store(path).read_row("train", index) for index in range(2))
    assert weights_of_positions(weighted).tolist() == [0.0] * 9 + [7.5] * 7
    np.testing.assert_array_equal(weighted.loss_mask, row.loss_mask & kept)
    assert weights_of_positions(plain).tolist() == [1.0] * LENGTH
    np.testing.assert_array_equal(plain.loss_mask, row.loss_mask)


@pytest.mark.parametrize("target", ["masked_token", "class"])
@pytest.mark.parametrize("kind", CODEC_KINDS)
def test_a_record_may_speak_of_no_label(tmp_path: Path, kind: str, target: str) -> None:
    manifest = manifest_of_kind(kind, target, planes=True, splits=("train",))
    row = _row(manifest)
    silent = _first("labels", -1)(row)
    with pytest.raises(InvalidRowError, match=r"true_logprob is -\d.*, because the position has no label"):
        write_rows(tmp_path / "refused", manifest, {"train": [silent]})
    assert row.teacher is not None
    true = row.teacher.true_logprob.copy()
    true[0] = 0
    silent = dataclasses.replace(silent, teacher=dataclasses.replace(row.teacher, true_logprob=true))
    path = write_rows(tmp_path / "store", manifest, {"train": [silent]})
    found = open_store(path).read_row("train", 0)
    assert found.optional["labels"][0] == -1
    labels = labels_of(found, target)
    first = int(row.loss_mask.argmax())
    assert labels[first] == IGNORED_LABEL and (labels >= 0).sum() == row.loss_mask.sum() - 1
    np.testing.assert_array_equal(labels[row.loss_mask][1:], row.optional["labels"][1:])
    assert verify_store(path).ok
