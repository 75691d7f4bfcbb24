"""Calibration, bootstrap and categories on cases whose answer is known."""

import math

import numpy as np
import pytest

from sparsekd.trainer.quality import statistics


def test_reliability_against_a_loop() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.random(500).astype(np.float32)
    confidence[:3] = [0.0, 1.0, 1 / 15]
    hit = generator.random(500) < confidence
    bins = statistics.reliability(confidence, hit)
    error = 0.0
    for index, found in enumerate(bins):
        inside = [
            position
            for position, value in enumerate(confidence.astype(float))
            if min(math.floor(value * 15), 14) == index
        ]
        assert found.count == len(inside)
        if inside:
            mean, accuracy = np.mean(confidence[inside].astype(float)), np.mean(hit[inside])
            assert found.confidence == pytest.approx(mean)
            assert found.accuracy == pytest.approx(accuracy)
            error += len(inside) / 500 * abs(mean - accuracy)
    assert statistics.calibration_error(bins) == pytest.approx(error)


def test_a_model_that_is_always_sure_and_half_right() -> None:
    bins = statistics.reliability(np.ones(10, np.float32), np.arange(10) % 2 == 0)
    assert statistics.calibration_error(bins) == pytest.approx(0.5)


def test_bootstrap_interval_is_that_of_the_normal_approximation() -> None:
    """Many documents of equal length: the interval must be mean +- 1.96 standard errors."""
    generator = np.random.default_rng(1)
    documents, length = 400, 50
    tokens = np.full(documents, length)
    difference = generator.normal(0.1, 0.3, documents)
    baseline = generator.normal(4.0, 1.0, documents)  # the hardness of a document, which must cancel
    margin = statistics.paired_bootstrap(
        (baseline - difference) * length, baseline * length, tokens, samples=4000, seed=0
    )
    assert margin.low is not None and margin.high is not None
    error = difference.std() / math.sqrt(documents)
    assert margin.value == pytest.approx(difference.mean())
    assert margin.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.15 * error)
    assert margin.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.15 * error)
    assert margin.wins == pytest.approx((difference > 0).mean())


def test_bootstrap_is_a_ratio_of_sums_and_repeats() -> None:
    student, baseline, tokens = np.array([10.0, 300.0]), np.array([20.0, 290.0]), np.array([10, 100])
    first = statistics.paired_bootstrap(student, baseline, tokens, samples=300, seed=3)
    assert first == statistics.paired_bootstrap(student, baseline, tokens, samples=300, seed=3)
    assert first.value == pytest.approx(0.0)  # a mean of means would be 0.45
    assert (first.low, first.high, first.wins) == (pytest.approx(-0.1), pytest.approx(1.0), 0.5)


def test_one_document_has_no_interval() -> None:
    margin = statistics.paired_bootstrap(np.array([1.0]), np.array([3.0]), np.array([4]), samples=200, seed=0)
    assert (margin.value, margin.low, margin.high) == (0.5, None, None)


def test_documents_and_categories() -> None:
    values = np.arange(6, dtype=np.float32)
    sums = statistics.sums_by_document(values, np.array([7, 2, 7, 2, 9, 9]))
    np.testing.assert_array_equal(sums, [4.0, 2.0, 9.0])
    groups = statistics.deciles(np.array([5.0] * 10 + list(range(10, 20)), np.float32))
    np.testing.assert_array_equal(np.bincount(groups), [2] * 10)
    assert statistics.means_by_category(values, np.array([0, 0, 2, 2, 2, 0]), 3) == [2.0, None, 3.0]
