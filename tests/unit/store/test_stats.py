"""`store stats` against numpy over all positions at once, and its picture."""

import builtins
from pathlib import Path

import numpy as np
import pytest
from synthetic_stores import write_synthetic_store
from whole import whole_manifest, whole_row

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.logit_store.tools.spread import Spread
from sparsekd.logit_store.tools.stats import store_stats, support_overlap
from sparsekd.logit_store.tools.stats_plot import plot_stats


@pytest.mark.parametrize("scale", [1e-8, 1.0, 40.0])
def test_a_spread_knows_percentiles_to_one_per_cent(scale: float) -> None:
    values = np.random.default_rng(0).lognormal(0, 2, 5000) * scale
    spread = Spread()
    for part in np.array_split(values, 7):
        spread.add(part)
    assert spread.count == 5000 and spread.mean == pytest.approx(values.mean())
    assert (spread.minimum, spread.maximum) == (values.min(), values.max())
    for percent in (1, 10, 50, 90, 99, 99.9):
        exact = np.sort(values)[int(np.ceil(percent / 100 * 5000)) - 1]
        assert spread.percentile(percent) == pytest.approx(exact, rel=0.0101)
    points = np.quantile(values, [0.1, 0.5, 0.9])
    np.testing.assert_allclose(spread.shares_below(points), [0.1, 0.5, 0.9], atol=0.01)


def test_a_spread_of_zeros_of_infinities_and_of_nothing() -> None:
    spread = Spread()
    assert np.isnan(spread.mean) and np.isnan(spread.percentile(50))
    spread.add(np.array([0.0, 0.0, 0.0, 1.0, np.inf]))
    assert spread.percentile(50) == 0 and spread.percentile(80) == pytest.approx(1, rel=0.01)
    assert spread.percentile(100) == np.inf and spread.mean == 0.25 and spread.infinite == 1


@pytest.mark.parametrize("positions", ["counted", "all"])
@pytest.mark.parametrize(("k", "n"), [(4, 6), (4, 0), (0, 6)])
def test_statistics_of_all_positions(tmp_path: Path, k: int, n: int, positions: str) -> None:
    manifest = synthetic_manifest(k=k, n=n, sequence_length=40, positions=positions)
    write_synthetic_store(tmp_path / "store", manifest, {"train": 9, "heldout": 2}, seed=0)
    stats = store_stats(tmp_path / "store").splits["train"]
    rows = synthetic_rows(manifest, 9, 0)
    # (row, position, number of its record)
    counted = [
        (row, int(place), int(row.recorded[:place].sum()))
        for row in rows
        for place in np.flatnonzero(row.loss_mask)
    ]
    assert positions == "counted" or len(counted) < sum(int(row.recorded.sum()) for row in rows)
    assert stats.rows == 9 and stats.positions == len(counted)
    nll = np.array([-row.teacher.true_logprob[number] for row, _, number in counted], np.float64)
    assert stats.teacher_nll.mean == pytest.approx(nll.mean(), rel=1e-6)
    assert stats.entropy.mean == pytest.approx(
        np.mean([row.teacher.entropy[number] for row, _, number in counted])
    )
    for column, temperature in enumerate(manifest.record.temperatures):
        masses = []
        for row, _, number in counted:
            head = np.exp(row.teacher.head_logprobs[number].astype(np.float64) / temperature).sum()
            rest = np.exp(float(row.teacher.log_rest[number, column]))
            masses.append(rest / (head + rest))
        assert stats.tail_mass[column].mean == pytest.approx(np.mean(masses), rel=1e-6)
    shares, found = [], 0
    for row, place, number in counted:
        record = row.teacher

        def ids(at: int, record=record) -> set[int]:
            return {int(i) for i in [*record.head_ids[at], *record.tail_ids[at]] if i >= 0}

        found += int(row.token_ids[place + 1]) in ids(number)
        if place not in row.segment_starts and row.recorded[place - 1]:
            shares.append(len(ids(number) & ids(number - 1)) / len(ids(number)))
    assert stats.overlap.mean == pytest.approx(np.mean(shares)) and stats.overlap.count == len(shares)
    assert stats.true_stored == pytest.approx(found / len(counted))
    assert store_stats(tmp_path / "store", split="heldout", rows=1).splits.keys() == {"heldout"}


def test_overlap_of_a_row_that_repeats_itself() -> None:
    row = whole_row(whole_manifest(k=4, n=0))
    row.teacher.head_ids[:] = np.arange(4)
    row.teacher.head_ids[5] = [0, 1, 100, 299]
    share, has_before = support_overlap(row)
    np.testing.assert_array_equal(share[[1, 4, 5, 6]], [1, 1, 0.5, 0.5])
    assert has_before.sum() == 16 - len(row.segment_starts)


def test_the_page_holds_the_numbers(tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "store", synthetic_manifest(), {"train": 4}, seed=0)
    stats = store_stats(tmp_path / "store")
    text = stats.text()
    for words in ("tail mass at T = 2", "p99", "teacher's loss", "support overlap", "head_ids", "container"):
        assert words in text, words
    assert f"{stats.splits['train'].tail_mass[0].mean:.4f}" in text
    assert max(map(len, text.splitlines())) <= 110
    write_synthetic_store(tmp_path / "tokens", synthetic_manifest(k=0, n=0), {"train": 4}, seed=0)
    tokens = store_stats(tmp_path / "tokens")
    assert "token store" in tokens.text() and "token_ids" in tokens.text()
    with pytest.raises(StoreError, match="no teacher's record to draw"):
        plot_stats(tokens, tmp_path / "tokens.png")


def test_the_picture_is_whole_and_says_what_it_needs(tmp_path: Path, monkeypatch) -> None:
    write_synthetic_store(tmp_path / "store", synthetic_manifest(), {"train": 4}, seed=0)
    stats = store_stats(tmp_path / "store")
    picture = tmp_path / "stats.png"
    for _ in range(2):  # the second replaces the first
        plot_stats(stats, picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert [item.name for item in tmp_path.iterdir() if "png" in item.name] == ["stats.png"]
    with pytest.raises(StoreError, match=r"does not end in \.png"):
        plot_stats(stats, tmp_path / "stats.pdf")
    with pytest.raises(StoreError, match="Could not use"):
        plot_stats(stats, tmp_path / "nowhere/stats.png")
    real = builtins.__import__

    def without(name: str, *rest: object):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StoreError, match="pip install matplotlib"):
        plot_stats(stats, picture)
