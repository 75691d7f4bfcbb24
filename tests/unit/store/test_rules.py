"""Where records stand: each rule against a transcription, broken rules, and what tools make of them."""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dense import write_rows
from forgery import swap_row
from kinds import TARGETS_AND_RULES, manifest_of_kind
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.errors import InvalidRowError, StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.positions import content_uniforms, recorded_positions
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import Row, take_records
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.logit_store.tools.combine import merge_stores, subset_store
from sparsekd.logit_store.tools.verify import verify_store

SHARES = (0.05, 0.25, 0.9)


def transcribed(row: Row, manifest: Manifest, split: str) -> list[bool]:
    """Where a record stands, position by position, by the words of docs/format.md."""
    record = manifest.record
    tokens = b"".join(int(token).to_bytes(4, "little") for token in row.token_ids)
    seed = record.seed.to_bytes(8, "little")
    key = hashlib.blake2b(tokens, digest_size=16, key=seed, person=b"positions").digest()
    words = [int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")]
    random = np.random.Generator(np.random.Philox(key=np.array(words, np.uint64)))
    found = []
    for position, counts in enumerate(row.loss_mask.tolist()):
        uniform = random.random()
        segment = max(number for number, start in enumerate(row.segment_starts) if start <= position)
        is_padding = int(row.segment_documents[segment]) == -1
        if record.positions == "all":
            found.append(not is_padding)
        elif record.positions == "sampled" and split == "train":
            found.append(counts and uniform < record.share)
        else:
            found.append(counts)
    return found


@pytest.mark.parametrize(("target", "rule"), TARGETS_AND_RULES)
def test_recorded_positions_are_those_of_the_rule(target: str, rule: str) -> None:
    manifest = manifest_of_kind("exact", target, rule, sequence_length=40)
    whole = 0
    for split in ("train", "heldout"):
        for row in synthetic_rows(manifest, 20, 5, split):
            found = recorded_positions(row, manifest, split)
            assert found.dtype == np.bool_ and found.tolist() == transcribed(row, manifest, split)
            assert row.recorded is not None and row.teacher is not None
            np.testing.assert_array_equal(row.recorded, found)
            assert len(row.teacher.entropy) == found.sum()
            bare = dataclasses.replace(row, teacher=None)
            np.testing.assert_array_equal(recorded_positions(bare, manifest, split), found)
            whole += np.array_equal(found, row.loss_mask)
    # Only training rows are thinned; `all` also records what does not count.
    if rule == "sampled":
        assert 20 <= whole < 40
    else:
        assert whole == (0 if rule == "all" else 40)


@pytest.mark.parametrize("share", SHARES)
def test_the_share_is_that_of_the_counted_positions(share: float) -> None:
    """In all, of each position of the row, and of each token: six standard deviations of a binomial."""
    manifest = synthetic_manifest(
        positions="sampled", share=share, sequence_length=64, vocabulary_size=7, k=1, n=0
    )
    random = np.random.default_rng(0)
    tokens = random.integers(0, 7, (4000, 64)).astype(np.int32)
    mask = np.ones(64, np.bool_)
    mask[-1] = False
    start, document = np.zeros(1, np.int32), np.zeros(1, np.int64)
    rows = [Row(ids, mask, start, document) for ids in tokens]
    kept = np.stack([recorded_positions(row, manifest, "train") for row in rows])
    assert not kept[:, -1].any(), "never where the loss does not count"
    kept, tokens = kept[:, :-1], tokens[:, :-1]
    groups = [kept, *kept.T, *(kept[tokens == token] for token in range(7))]
    for group in groups:
        deviation = np.sqrt(group.size * share * (1 - share))
        assert abs(group.sum() - group.size * share) < 6 * deviation
    # A neighbour's lot says nothing.
    assert abs(np.corrcoef(kept[:, :-1].ravel(), kept[:, 1:].ravel())[0, 1]) < 6 / kept.size**0.5


def test_the_positions_are_chosen_apart_from_the_draws() -> None:
    """Draws at chosen positions are uniform as everywhere: the two streams have nothing in common."""
    tokens = np.random.default_rng(1).integers(0, 50_000, 20_000).astype(np.int32)
    draws = content_uniforms(tokens, seed=3, count=4)
    chosen = content_uniforms(tokens, seed=3, count=1, purpose=b"positions")
    assert not np.isin(chosen, draws).any()
    for column in draws.T:
        assert abs(np.corrcoef(column, chosen[:, 0])[0, 1]) < 6 / len(tokens) ** 0.5
        among = column[chosen[:, 0] < 0.25]
        counts = np.histogram(among, bins=20, range=(0, 1))[0]
        chi_squared = float(((counts - len(among) / 20) ** 2 / (len(among) / 20)).sum())
        assert chi_squared < 60  # 19 degrees of freedom: 1 in 300,000 by chance
    other = content_uniforms(tokens, seed=4, count=1, purpose=b"positions")
    assert not (other == chosen).any(), "another seed chooses anew"


def _with_records(row: Row, recorded: np.ndarray) -> Row:
    """The row with as many records as there are places, whatever they say."""
    assert row.teacher is not None
    numbers = np.resize(np.arange(len(row.teacher.entropy)), recorded.sum())
    return dataclasses.replace(row, teacher=take_records(row.teacher, numbers), recorded=recorded)


def _at_padding(row: Row) -> np.ndarray:
    return np.ones(len(row.loss_mask), np.bool_)


def _none_at_a_counted_one(row: Row) -> np.ndarray:
    assert row.recorded is not None
    recorded = row.recorded.copy()
    recorded[row.loss_mask.argmax()] = False
    return recorded


def _where_nothing_counts(row: Row) -> np.ndarray:
    assert row.recorded is not None
    recorded = row.recorded.copy()
    recorded[(~row.loss_mask).argmax()] = True
    return recorded


BROKEN: list[tuple[str, str, str, Callable[[Row], np.ndarray], str]] = [
    ("next_token", "counted", "train", _where_nothing_counts, "where the loss does not count, .* counted"),
    ("next_token", "counted", "train", _none_at_a_counted_one, "no record stands where the loss counts"),
    ("next_token", "all", "train", _at_padding, "a record stands at padding"),
    ("next_token", "all", "train", _none_at_a_counted_one, "no record stands where the loss counts, .* all"),
    ("masked_token", "masked", "train", _where_nothing_counts, "does not count, against the rule masked"),
    ("masked_token", "masked", "train", _none_at_a_counted_one, "no record stands .* the rule masked"),
    ("next_token", "sampled", "train", _where_nothing_counts, "does not count, against the rule sampled"),
    ("next_token", "sampled", "heldout", _none_at_a_counted_one, "no record stands .* the rule counted"),
    ("class", "counted", "train", _where_nothing_counts, "does not count, against the rule counted"),
]


@pytest.mark.parametrize(("target", "rule", "split", "change", "words"), BROKEN)
def test_records_against_the_rule_are_refused_by_writer_and_reader(
    tmp_path: Path,
    target: str,
    rule: str,
    split: str,
    change: Callable[[Row], np.ndarray],
    words: str,
) -> None:
    manifest = manifest_of_kind("exact", target, rule)
    rows = synthetic_rows(manifest, 50, 2, split)
    row = next(row for row in rows if row.segment_documents[-1] == -1 and row.recorded.any())
    broken = _with_records(row, change(row))
    assert not np.array_equal(broken.recorded, row.recorded)
    with pytest.raises(InvalidRowError, match=rf"shard 000000, row 0, position \d+: .*{words}"):
        write_rows(tmp_path / "refused", manifest, {split: [broken]})
    assert not list((tmp_path / "refused/shards").rglob("*.*"))
    # A store of a stranger, whose checksums are right.
    sound = write_rows(tmp_path / "sound", manifest, {split: [row]})
    path = swap_row(sound, tmp_path / "forged", split, 0, broken)
    if rule == "counted":
        words = "plane head_ids"  # where records stand is not stored: these do not fit the loss mask
    with pytest.raises(StoreError, match=rf"shard 000000, row 0, .*{words}"):
        open_store(path).read_row(split, 0)
    (problem,) = verify_store(path).problems
    assert re.search(words, problem)


def test_positions_that_the_seed_does_not_choose_are_found(tmp_path: Path) -> None:
    manifest = manifest_of_kind("exact", "next_token", "sampled", splits=("train",), rows_per_shard=5)
    rows = synthetic_rows(manifest, 5, 0)
    assert verify_store(write_rows(tmp_path / "good", manifest, {"train": rows})).ok
    row = rows[3]
    for name, recorded in {"more": row.loss_mask, "others": row.loss_mask & ~row.recorded}.items():
        assert recorded.any() and not np.array_equal(recorded, row.recorded)
        changed = [*rows[:3], _with_records(row, recorded), rows[4]]
        path = write_rows(tmp_path / name, manifest, {"train": changed})
        result = verify_store(path)
        assert result.problems and not result.ok and result.rows == 4
        assert "row 3: records stand at other positions than the text and the seed choose" in result.text()


@pytest.mark.parametrize(("target", "rule"), TARGETS_AND_RULES)
def test_a_subset_by_documents_clears_and_never_widens(tmp_path: Path, target: str, rule: str) -> None:
    manifest = manifest_of_kind("exact", target, rule, planes=True)
    write_synthetic_store(tmp_path / "whole", manifest, {"train": 9, "heldout": 2}, seed=0)
    source = open_store(tmp_path / "whole")
    rows = [source.read_row("train", index) for index in range(9)]
    # The first of several documents of some rows: what is behind it must go.
    several = [row for row in rows if (row.segment_documents >= 0).sum() > 1]
    wanted = {int(row.segment_documents[0]) for row in several[:3]}
    subset_store(tmp_path / "whole", tmp_path / "part", split="train", documents=sorted(wanted))
    part, cleared = open_store(tmp_path / "part"), 0
    expected = [row for row in rows if wanted & set(row.segment_documents.tolist())]
    assert part.rows("train") == len(expected)
    for index, row in enumerate(expected):
        found = part.read_row("train", index)
        lengths = np.diff([*row.segment_starts, len(row.token_ids)])
        kept = np.repeat([number in wanted for number in row.segment_documents.tolist()], lengths)
        np.testing.assert_array_equal(found.loss_mask, row.loss_mask & kept)
        np.testing.assert_array_equal(found.recorded, row.recorded & kept)
        for name in ("token_ids", "segment_starts", "segment_documents"):
            np.testing.assert_array_equal(getattr(found, name), getattr(row, name))
        for name in ("weight_starts", "weights", "token_types"):
            np.testing.assert_array_equal(found.optional[name], row.optional[name])
        np.testing.assert_array_equal(found.optional["feature_3"], row.optional["feature_3"])
        states = row.optional["feature_7"][kept[row.recorded]]
        np.testing.assert_array_equal(found.optional["feature_7"], states)
        if target != "next_token":
            labels = row.optional["labels"][kept[row.loss_mask]]
            np.testing.assert_array_equal(found.optional["labels"], labels)
        for field in dataclasses.fields(row.teacher):
            old, new = getattr(row.teacher, field.name), getattr(found.teacher, field.name)
            np.testing.assert_array_equal(new, old[kept[row.recorded]], err_msg=field.name)
        cleared += int((row.recorded & ~kept).sum())
    assert cleared > 0
    assert verify_store(tmp_path / "part").problems == ()


def test_stores_of_another_rule_are_not_merged(tmp_path: Path) -> None:
    def store(name: str, seed: int, **fields: object) -> Path:
        write_synthetic_store(tmp_path / name, synthetic_manifest(**fields), {"train": 2}, seed=seed)
        return tmp_path / name

    one = store("one", 0, positions="sampled", share=0.5)
    for name, fields, words in (
        ("share", {"positions": "sampled", "share": 0.25}, "record.share: found 0.25, wanted 0.5"),
        ("counted", {}, "record.positions: found 'counted', wanted 'sampled'"),
        ("all", {"positions": "all"}, "record.positions: found 'all', wanted 'sampled'"),
        (
            "masked",
            {"positions": "sampled", "share": 0.5, "target": "masked_token"},
            "target: found 'masked_token', wanted 'next_token'",
        ),
        (
            "weighted",
            {"positions": "sampled", "share": 0.5, "planes": ("weights",)},
            "planes[0]: found 'weights', wanted nothing",
        ),
    ):
        with pytest.raises(StoreError) as caught:
            merge_stores([one, store(name, 7, **fields)], tmp_path / "new")
        assert words in str(caught.value)
    assert not (tmp_path / "new").exists()
    merge_stores([one, store("same", 7, positions="sampled", share=0.5)], tmp_path / "new")
    assert verify_store(tmp_path / "new").ok and open_store(tmp_path / "new").rows("train") == 4
