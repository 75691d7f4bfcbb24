"""The data types: positions restart at segments; the manifest is canonical, strict and comparable."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import (
    CodecSpec,
    Manifest,
    RecordSpec,
    compare_manifests,
    manifest_digest,
    manifest_from_json,
    manifest_to_json,
)
from sparsekd.logit_store.places.tokenizer_folder import tokenizer_digest
from sparsekd.logit_store.protocol.writer import create_store
from sparsekd.logit_store.row import Row, document_of_position, position_ids
from sparsekd.logit_store.synthetic import synthetic_manifest, write_synthetic_tokenizer


def test_positions_restart_at_each_segment() -> None:
    row = Row(
        token_ids=np.arange(8, dtype=np.int32),
        loss_mask=np.zeros(8, np.bool_),
        segment_starts=np.array([0, 3, 7], np.int32),
        segment_documents=np.array([5, 6, -1], np.int64),
        teacher=None,
    )
    assert position_ids(row).tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert position_ids(row).dtype == np.int32
    assert document_of_position(row).tolist() == [5, 5, 5, 6, 6, 6, 6, -1]


def test_manifest_round_trip_is_canonical() -> None:
    manifest = synthetic_manifest(dataset={"b": (1, 2), "a": {"z": None, "y": 0.5}}, temperatures=(1, 2))
    text = manifest_to_json(manifest)
    again = manifest_from_json(text, "here")
    assert again == manifest
    assert manifest_to_json(again) == text
    assert text.endswith("}\n") and json.loads(text)["dataset"] == {"a": {"y": 0.5, "z": None}, "b": [1, 2]}
    # Whole numbers in the grid must not make another store than the same floats.
    assert manifest_digest(manifest) == manifest_digest(
        synthetic_manifest(dataset={"a": {"z": None, "y": 0.5}, "b": [1, 2]}, temperatures=(1.0, 2.0))
    )


def _paths(value: object, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        return [path for name, item in value.items() for path in _paths(item, (*prefix, name))]
    return [prefix]


def _another(value: object) -> object:
    if isinstance(value, int):
        return value + 5
    if isinstance(value, float):
        return 2.0
    if isinstance(value, list):
        return value[:-1]
    return "something else"


def test_every_field_is_compared_by_name() -> None:
    manifest = synthetic_manifest()
    raw = json.loads(manifest_to_json(manifest))
    # One value alone, or values that go with those of other fields: see the next test.
    bound = {("format_version",), ("outcomes",), ("features",), ("record", "rest"), ("record", "share")}
    chosen = {
        ("target",): "masked_token",
        ("planes",): ["weights"],
        ("record", "positions"): "all",
        ("record", "tail_logprobs"): True,
    }
    paths = [path for path in _paths(raw) if path not in bound]
    assert ("record", "seed") in paths and len(paths) > 15
    for path in paths:
        changed = json.loads(manifest_to_json(manifest))
        place = changed
        for name in path[:-1]:
            place = place[name]
        if isinstance(place[path[-1]], dict):
            continue  # codec parameters and versions, empty here
        place[path[-1]] = chosen.get(path, _another(place[path[-1]]))
        other = manifest_from_json(json.dumps(changed), "there")
        lines = compare_manifests(manifest, other)
        assert lines and all(line.startswith(".".join(path)) for line in lines), (path, lines)
        assert manifest_digest(other) != manifest_digest(manifest)
    assert compare_manifests(manifest, manifest) == []


def test_difference_names_both_values() -> None:
    found, wanted = synthetic_manifest(k=4), synthetic_manifest(k=8)
    assert compare_manifests(found, wanted) == ["record.k: found 4, wanted 8"]


def test_fields_that_go_together_are_named_each() -> None:
    found = synthetic_manifest(k=2, n=0, temperatures=(1.0,), positions="sampled", share=0.25)
    assert compare_manifests(found, dataclasses.replace(found, record=_with(found, share=0.5))) == [
        "record.share: found 0.25, wanted 0.5"
    ]
    assert compare_manifests(found, dataclasses.replace(found, record=_with(found, rest="derived"))) == [
        "record.rest: found 'exact', wanted 'derived'"
    ]
    classes = dataclasses.replace(found, target="class", outcomes=("no", "maybe", "yes"))
    assert compare_manifests(classes, dataclasses.replace(classes, outcomes=("no", "yes"))) == [
        "outcomes[1]: found 'maybe', wanted 'yes'",
        "outcomes[2]: found 'yes', wanted nothing",
    ]
    assert [line.partition(":")[0] for line in compare_manifests(found, classes)] == [
        "outcomes",
        "outcomes[0]",
        "outcomes[1]",
        "outcomes[2]",
        "target",
    ]


def _with(manifest: Manifest, **fields: object) -> RecordSpec:
    return dataclasses.replace(manifest.record, **fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw | {"format_version": 2, "new": 1}, ["version 2", "up to 1", "update"]),
        (lambda raw: raw | {"format_version": "1"}, ["'1'"]),
        (lambda raw: {name: raw[name] for name in raw if name != "splits"}, ["lacks splits"]),
        (lambda raw: raw | {"colour": "red"}, ["unknown colour"]),
        (lambda raw: raw | {"sequence_length": "16"}, ["sequence_length", "'16'"]),
        (lambda raw: raw | {"target": "other"}, ["target", "'other'", "next_token, masked_token, class"]),
        (lambda raw: raw | {"teacher": None}, ["teacher"]),
        (lambda raw: raw | {"rows_per_shard": 0}, ["rows_per_shard", "0"]),
        (lambda raw: raw | {"splits": ["a", "a"]}, ["splits"]),
        (lambda raw: raw | {"splits": ["../x"]}, ["splits"]),
        (lambda raw: raw | {"record": raw["record"] | {"temperatures": [2.0, 1.0]}}, ["temperatures"]),
        (
            lambda raw: raw | {"record": raw["record"] | {"draw_temperature": 3.0}},
            ["draw_temperature", "3.0"],
        ),
        (lambda raw: raw | {"record": raw["record"] | {"k": 301}}, ["record.k", "301", "300"]),
        (lambda raw: raw | {"record": 3}, ["3"]),
        (lambda raw: raw | {"record": raw["record"] | {"tail_logprobs": 1}}, ["1", "tail_logprobs", "bool"]),
        (
            lambda raw: raw | {"record": raw["record"] | {"tail_logprobs": True, "n": 0}},
            ["record.tail_logprobs", "no draws"],
        ),
        (lambda raw: [raw], ["list"]),
    ],
)
def test_bad_manifest_is_refused_by_name(change, words: list[str]) -> None:
    raw = json.loads(manifest_to_json(synthetic_manifest()))
    with pytest.raises(StoreError) as caught:
        manifest_from_json(json.dumps(change(raw)), "here")
    assert all(word in str(caught.value) for word in words), caught.value


def test_every_field_is_written_also_the_usual_ones() -> None:
    raw = json.loads(manifest_to_json(synthetic_manifest()))
    assert set(raw) == {field.name for field in dataclasses.fields(Manifest)}
    assert set(raw["record"]) == {field.name for field in dataclasses.fields(RecordSpec)}
    assert (raw["target"], raw["outcomes"], raw["planes"]) == ("next_token", None, [])
    assert (raw["record"]["positions"], raw["record"]["share"]) == ("counted", 1.0)
    for place in (raw, raw["record"]):
        for name in place:
            less = json.loads(json.dumps(raw))
            del (less["record"] if place is raw["record"] else less)[name]
            with pytest.raises(StoreError, match=name):
                manifest_from_json(json.dumps(less), "here")
    every = synthetic_manifest(
        target="class", outcomes=("no", "yes"), planes=("weights", "token_types"), k=2, n=0
    )
    assert manifest_from_json(manifest_to_json(every), "here") == every


def test_long_tables_are_not_printed() -> None:
    one, other = (synthetic_manifest(codec=CodecSpec("compact", {"frequent_ids": c * 9000})) for c in "ab")
    (line,) = compare_manifests(one, other)
    assert line.startswith("codec.parameters.frequent_ids: found 'aaa") and len(line) < 250
    assert "(9,002 letters)" in line


def test_manifest_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(StoreError, match="dataset"):
        synthetic_manifest(dataset={"path": object()})
    with pytest.raises(StoreError, match="dataset"):
        synthetic_manifest(dataset={"x": float("nan")})


def test_token_store_has_no_teacher() -> None:
    assert synthetic_manifest(k=0, n=0).teacher is None
    with pytest.raises(StoreError, match=r"record\.k"):
        dataclasses.replace(synthetic_manifest(k=0, n=0), teacher=synthetic_manifest().teacher)


def test_tokenizer_digest_sees_names_and_bytes(tmp_path) -> None:
    folder = write_synthetic_tokenizer(tmp_path / "one", 10)
    assert tokenizer_digest(folder) == synthetic_manifest(vocabulary_size=10, k=1).tokenizer.digest
    before = tokenizer_digest(folder)
    (folder / "more.json").write_bytes(b"")
    assert tokenizer_digest(folder) != before
    (folder / "more.json").rename(folder / "else.json")
    with_else = tokenizer_digest(folder)
    (folder / "else.json").write_bytes(b"x")
    assert len({before, with_else, tokenizer_digest(folder)}) == 3
    with pytest.raises(StoreError, match="does not exist"):
        tokenizer_digest(tmp_path / "none")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dataset": {"words": ["w" * 1000] * 17_000}}, "expected at most 16,777,216: describe the data"),
        ({"dataset": {"many": list(range(10)), "deep": json.loads("[" * 40 + "]" * 40)}}, "32 levels"),
        ({"dataset": {"count": 2**63}}, "expected an int of 64 bits"),
    ],
)
def test_what_no_reader_takes_is_not_written(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    manifest = synthetic_manifest(**fields)
    tokenizer = write_synthetic_tokenizer(tmp_path / "tokenizer", manifest.tokenizer.vocabulary_size)
    with pytest.raises(StoreError, match=words):
        create_store(tmp_path / "store", manifest, tokenizer)
    assert not (tmp_path / "store").exists()


def test_of_long_texts_the_words_that_differ_are_shown() -> None:
    engine = "transformers attention=sdpa device=cpu threads=1 micro_batch_rows={} sort_rows=64 chunk=640"
    manifest = synthetic_manifest()
    assert manifest.teacher is not None
    one, other = (
        dataclasses.replace(
            manifest,
            teacher=dataclasses.replace(manifest.teacher, engine=engine.format(rows) + " impl=torch" * 9),
        )
        for rows in (2, 16)
    )
    (line,) = compare_manifests(one, other)
    assert line.startswith("teacher.engine: found '...micro_batch_rows=2 ")
    assert "wanted '...micro_batch_rows=16 " in line and len(line) < 250
