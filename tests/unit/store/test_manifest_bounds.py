"""A stranger's manifest: every number in it has bounds, which are looked at before anything is allocated."""

import dataclasses
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forgery import Forgery
from kinds import CODEC_KINDS, FEATURES, TARGETS_AND_RULES, manifest_of_kind
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import CodecSpec, Manifest, manifest_from_json, manifest_to_json
from sparsekd.logit_store.manifest_checks import (
    LARGEST_GRID,
    LARGEST_LENGTH,
    LARGEST_ROW_BYTES,
    LARGEST_ROWS_PER_SHARD,
    LARGEST_SPLITS,
    LARGEST_VOCABULARY,
    decoded_row_bytes,
)
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import planes_of_row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows

MOST_BYTES_ALLOCATED = 1 << 20

NEXT = synthetic_manifest()
CLASS = manifest_of_kind("exact", "class")
SAMPLED = synthetic_manifest(positions="sampled", share=0.5)
STATES = synthetic_manifest(features=FEATURES)
BARE = synthetic_manifest(k=0, n=0)
TOP = synthetic_manifest(k=4, n=0, temperatures=(1.0,), rest="derived")
LONG_GRID = [1 + step / 100 for step in range(LARGEST_GRID + 1)]
MANY_SPLITS = [f"split{number}" for number in range(LARGEST_SPLITS + 1)]

BROKEN: list[tuple[Manifest, str, Any, str]] = [
    (NEXT, "target", "previous", "target is 'previous', expected one of next_token, masked_token, class"),
    (NEXT, "sequence_length", 0, f"sequence_length is 0, expected from 1 to {LARGEST_LENGTH}"),
    (NEXT, "sequence_length", 2**20 + 1, f"sequence_length is 1048577, expected from 1 to {LARGEST_LENGTH}"),
    (NEXT, "rows_per_shard", 0, f"rows_per_shard is 0, expected from 1 to {LARGEST_ROWS_PER_SHARD}"),
    (NEXT, "rows_per_shard", 65_537, f"rows_per_shard is 65537, expected from 1 to {LARGEST_ROWS_PER_SHARD}"),
    (NEXT, "splits", [], "splits is 0, expected from 1 to 64 entries"),
    (NEXT, "splits", MANY_SPLITS, "splits is 65, expected from 1 to 64 entries"),
    (NEXT, "splits", ["train", "train"], "splits is ('train', 'train'), expected distinct entries"),
    (NEXT, "splits", ["../train"], "splits is ('../train',), expected plain names of at most 64 letters"),
    (NEXT, "splits", ["a" * 65], "expected plain names of at most 64 letters, digits and underscores"),
    (NEXT, "tokenizer.vocabulary_size", 0, f"vocabulary_size is 0, expected from 1 to {LARGEST_VOCABULARY}"),
    (NEXT, "tokenizer.vocabulary_size", 2**22 + 1, "vocabulary_size is 4194305, expected from 1 to 4194304"),
    (NEXT, "outcomes", ["no", "yes"], "outcomes is 'a list', expected null, because the target is no class"),
    (CLASS, "outcomes", None, "outcomes is None, expected the names of the classes"),
    (CLASS, "outcomes", ["yes"], "outcomes is 1, expected from 2 to 4194304 entries"),
    (CLASS, "outcomes", ["yes", "no", "yes", "maybe"], "expected distinct entries"),
    (NEXT, "planes", ["colours"], "planes is 'colours', expected one of weights, token_types"),
    (NEXT, "planes", ["weights", "weights"], "planes is ('weights', 'weights'), expected distinct entries"),
    (NEXT, "planes", ["weights", "token_types", "x"], "planes is 3, expected from 0 to 2 entries"),
    (NEXT, "record.k", -1, "record.k is -1, expected from 0 to 300"),
    (NEXT, "record.k", 301, "record.k is 301, expected from 0 to 300"),
    (CLASS, "record.k", 6, "record.k is 6, expected from 0 to 5"),
    (NEXT, "record.n", -1, f"record.n is -1, expected from 0 to {LARGEST_ROW_BYTES}"),
    (NEXT, "record.n", 2**28 + 1, f"record.n is 268435457, expected from 0 to {LARGEST_ROW_BYTES}"),
    (NEXT, "record.temperatures", LONG_GRID, "record.temperatures is 65, expected at most 64 of them"),
    (NEXT, "record.temperatures", [2.0, 1.0], "temperatures is (2.0, 1.0), expected ascending and above 0"),
    (NEXT, "record.temperatures", [1.0, 1.0], "temperatures is (1.0, 1.0), expected ascending and above 0"),
    (NEXT, "record.temperatures", [0.0, 1.0], "temperatures is (0.0, 1.0), expected ascending and above 0"),
    (
        NEXT,
        "record.draw_temperature",
        3.0,
        "draw_temperature is 3.0, expected one of the grid [1.0, 2.0",
    ),
    (NEXT, "teacher", None, "teacher is None, expected an identity, because k or n is above 0"),
    (BARE, "record.k", 1, "teacher is None, expected an identity, because k or n is above 0"),
    (NEXT, "record.seed", -1, "record.seed is -1, expected from 0 to 2^63 - 1"),
    (NEXT, "record.rest", "guessed", "record.rest is 'guessed', expected one of exact, derived, unknown"),
    (NEXT, "record.rest", "derived", "rest is 'derived', expected exact unless k > 0, n = 0, grid [1.0]"),
    (TOP, "record.tail_logprobs", True, "tail_logprobs is True, expected false, because there are no draws"),
    (NEXT, "record.positions", "some", "positions is 'some', expected one of counted, all, masked, sampled"),
    (NEXT, "record.positions", "masked", "'masked', expected another rule, because the target is next_token"),
    (CLASS, "record.positions", "all", "expected counted or sampled, because a class has one record"),
    (SAMPLED, "record.share", 0.0, "record.share is 0.0, expected above 0 and below 1, as sampled asks"),
    (SAMPLED, "record.share", 1.0, "record.share is 1.0, expected above 0 and below 1, as sampled asks"),
    (SAMPLED, "record.share", -0.5, "record.share is -0.5, expected above 0 and below 1, as sampled asks"),
    (NEXT, "record.share", 0.5, "record.share is 0.5, expected 1, as the rule counted asks"),
    (BARE, "features", [dataclasses.asdict(FEATURES[0])], "features is 1, expected none without a teacher"),
    (STATES, "features", [dataclasses.asdict(FEATURES[0])] * 2, "features is [3, 3], expected distinct"),
    (STATES, "features.0.layer", 4097, "features.layer is 4097, expected from 0 to 4096"),
    (STATES, "features.0.source_width", 65_537, "layer 3: source_width is 65537, expected from 1 to 65536"),
    (STATES, "features.0.width", 0, "features of layer 3: width is 0, expected from 1 to 5"),
    (STATES, "features.0.width", 4, "features of layer 3: width is 4, expected source_width"),
    (STATES, "features.0.projection", "random", "is 'random', expected one of none, orthonormal, pca"),
    (STATES, "features.0.projection", "pca", "features of layer 3: width is 5, expected below source_width"),
    (STATES, "features.0.projection_digest", "0" * 64, "expected one exactly where there is a projection"),
    (STATES, "features.0.kept", 1.5, "features of layer 3: kept is 1.5, expected from 0 to 1"),
    (STATES, "features.0.kind", "int4", "layer 3: kind is 'int4', expected one of int8, float16"),
    (STATES, "features.0.positions", "some", "positions is 'some', expected one of all, recorded"),
]


def _with(manifest: Manifest, place: str, value: Any) -> str:
    """The manifest's text with another value at a dotted place."""
    raw = json.loads(manifest_to_json(manifest))
    *parents, last = [int(name) if name.isdigit() else name for name in place.split(".")]
    owner = raw
    for name in parents:
        owner = owner[name]
    owner[last] = value
    return json.dumps(raw)


@pytest.mark.parametrize(("manifest", "place", "value", "words"), BROKEN)
def test_what_a_manifest_may_not_say_is_one_sentence(
    manifest: Manifest, place: str, value: Any, words: str
) -> None:
    manifest_from_json(manifest_to_json(manifest), "here")
    with pytest.raises(StoreError) as caught:
        manifest_from_json(_with(manifest, place, value), "here")
    message = str(caught.value)
    assert words in message and message.startswith("here: The manifest's ") and message.endswith(".")
    assert message.count(". ") == 0 and len(message) < 300


def test_a_teacher_must_have_said_something() -> None:
    with pytest.raises(StoreError, match=r"record\.k is 0, expected k or n above 0, or features, because"):
        dataclasses.replace(BARE, teacher=NEXT.teacher)


def test_a_manifest_from_before_targets_says_to_capture_again(tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "store", NEXT, {"train": 3}, seed=0)
    raw = json.loads((tmp_path / "store/MANIFEST.json").read_text())
    del raw["target"]
    forgery = Forgery.of(tmp_path / "store")
    forgery.set_manifest((json.dumps(raw, sort_keys=True, indent=1) + "\n").encode())
    with pytest.raises(StoreError, match=r"no `target`\).*run `prepare` and `capture` again\.$"):
        open_store(forgery.write(tmp_path / "old"))


@pytest.mark.parametrize(("target", "rule"), TARGETS_AND_RULES)
@pytest.mark.parametrize("kind", CODEC_KINDS)
def test_no_row_is_larger_than_is_said(kind: str, target: str, rule: str) -> None:
    """Not even one whose documents, and whose runs of weights, are of one position each."""
    manifest = manifest_of_kind(kind, target, rule, planes=True)
    length, bound = manifest.sequence_length, decoded_row_bytes(manifest)
    for row in synthetic_rows(manifest, 5, 0):
        planes = planes_of_row(row)
        for name in ("segment_starts", "segment_documents", "weight_starts", "weights"):
            planes[name] = np.zeros(length, planes[name].dtype)
        found = sum(plane.nbytes for plane in planes.values())
        everything = sum(length * plane.itemsize * int(np.prod(plane.shape[1:])) for plane in planes.values())
        assert found <= everything <= bound <= 1.1 * everything + 16 * length


def _at_most(limit: int, make: Callable[[int], Manifest]) -> int:
    """The largest number of which a manifest can be made, by bisection."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        try:
            make(middle)
            low = middle
        except StoreError:
            high = middle - 1
    return low


def test_a_row_of_more_than_256_mib_is_refused() -> None:
    def of_length(length: int) -> Manifest:
        return synthetic_manifest(k=64, n=50, sequence_length=length)

    # Ids, mask, places of records, at most a segment and a run of weights for each position, types, labels;
    # 64 ids and values, 50 draws and counts, 3 of log R, 3 other numbers.
    position = 4 + 1 + 1 + 12 + 8 + 1 + 4 + 8 * 64 + 8 * 50 + 4 * 3 + 12
    assert _at_most(LARGEST_LENGTH, of_length) == 2**28 // position
    with pytest.raises(StoreError) as caught:
        of_length(2**19)
    assert str(caught.value) == (
        "The manifest's rows of 524288 positions (k=64, n=50, 3 temperatures) take "
        f"{position * 2**19:,} bytes decoded, expected at most 268,435,456: use shorter rows or a smaller "
        "record."
    )
    wide = dataclasses.replace(FEATURES[0], width=60_000, source_width=60_000)
    assert synthetic_manifest(sequence_length=1000, features=(wide,)).sequence_length == 1000
    with pytest.raises(StoreError, match="decoded, expected at most"):
        synthetic_manifest(sequence_length=2000, features=(wide,))


HUGE: dict[str, dict[str, Any]] = {
    "a table of compact": {"tokenizer.vocabulary_size": 2**31},
    "a vocabulary beyond 64 bits": {"tokenizer.vocabulary_size": 2**80},
    "a row": {"sequence_length": 2**40},
    "a head": {"record.k": 2**31 - 1, "tokenizer.vocabulary_size": 2**31},
    "draws": {"record.n": 2**31},
    "a shard": {"rows_per_shard": 2**62},
    "a long row of many draws": {"sequence_length": 2**20, "record.n": 2**28},
}


@pytest.mark.parametrize("what", HUGE)
def test_nothing_is_allocated_for_what_is_refused(tmp_path: Path, what: str) -> None:
    codec = manifest_of_kind("compact").codec
    assert codec.parameters["frequent_ids"]
    manifest = synthetic_manifest(codec=codec)
    write_synthetic_store(tmp_path / "store", manifest, {"train": 3}, seed=0)
    text = manifest_to_json(manifest)
    for place, value in HUGE[what].items():
        raw = json.loads(text)
        *parents, last = place.split(".")
        (raw[parents[0]] if parents else raw)[last] = value
        text = json.dumps(raw, sort_keys=True, indent=1) + "\n"
    forgery = Forgery.of(tmp_path / "store")
    forgery.set_manifest(text.encode())
    path = forgery.write(tmp_path / "huge")
    tracemalloc.start()
    try:
        with pytest.raises(StoreError):
            open_store(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MOST_BYTES_ALLOCATED


def test_the_largest_vocabulary_has_its_tables() -> None:
    """Two tables of 16 MiB: what the largest legal manifest may ask for."""
    counts = np.zeros(LARGEST_VOCABULARY, np.int64)
    counts[-5:] = 1
    manifest = dataclasses.replace(
        NEXT,
        tokenizer=dataclasses.replace(NEXT.tokenizer, vocabulary_size=LARGEST_VOCABULARY),
        codec=CodecSpec("compact", compact_parameters(counts, mass=None)),
    )
    tracemalloc.start()
    try:
        codec_of(manifest)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1.1 * 2 * 2**24 and peak < 2**27
