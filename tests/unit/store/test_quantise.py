"""Arithmetic on many codes at once, against the plain kind."""

import numpy as np
import pytest

from sparsekd.logit_store.codecs.quantise import DEEPEST, SLACK, never_falls, running_sums, without_deep


@pytest.mark.parametrize("entries", [1, 2, 7, 8, 9, 16, 17, 64, 65, 129, 600])
@pytest.mark.parametrize("largest", [0, 1, 7, 255])
def test_sums_of_eight_bytes_at_once_are_the_sums(entries: int, largest: int) -> None:
    """Also of more words than a word has bytes; a sum above 255, in whatever word, is found in each case."""
    draw = np.random.default_rng(entries)
    steps = draw.integers(0, largest + 1, (300, entries - 1)).astype(np.uint8)
    # Most steps are 0, so that sums of many lie on both sides of 255.
    steps *= draw.random(steps.shape) < draw.random((300, 1)) * min(1, 600 / (entries * max(largest, 1)))
    sums = np.pad(np.cumsum(steps, axis=1, dtype=np.int64), ((0, 0), (1, 0)))
    fits = sums[:, -1] <= 255
    assert (running_sums(steps, entries)[fits] == sums[fits]).all()
    assert [never_falls(running_sums(one[None], entries)) for one in steps] == fits.tolist()
    assert never_falls(running_sums(steps, entries)) == fits.all()


def test_a_sum_of_256_is_found_at_every_place() -> None:
    for entries in (2, 8, 9, 64, 100):
        for place in range(entries - 1):
            steps = np.zeros((3, entries - 1), np.uint8)
            steps[1, 0] = 255
            assert never_falls(running_sums(steps, entries))
            steps[1, place] = 255 if place else 0
            steps[1, 0] = 1
            assert never_falls(running_sums(steps, entries)) == (place == 0)


def test_entries_are_too_deep_for_their_own_position_alone() -> None:
    """Whatever the others are: by the rule of each, on both sides of it."""
    deepest = float(DEEPEST) * (1 + SLACK)
    for low in (-deepest + 0.01, -deepest, -deepest - 0.01):
        for other in (-300.0, 0.0, low, -np.inf):
            values = np.array([[0.0, low], [other, other - 1], [-np.inf, -np.inf]], np.float32)
            expected = values.copy()
            if values[0, 1] < np.float32(-deepest):
                expected[0, 1] = -np.inf
            assert without_deep(values).tolist() == expected.tolist()
            assert without_deep(values[:1]).tolist() == expected[:1].tolist()
    assert without_deep(np.empty((0, 4), np.float32)).shape == (0, 4)
