"""Uniform numbers: a pure function of seed and tokens, the same for ever."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.logit_store.positions import content_uniforms

ROW = np.array([3, 1, 4, 1, 5], dtype=np.int32)


def test_known_numbers() -> None:
    # A store that was begun with one version of sparsekd or numpy must be finished the same with another.
    found = content_uniforms(ROW, seed=7, count=2)
    assert found.dtype == np.float64 and found.shape == (5, 2)
    assert [value.hex() for value in found[[0, 4]].ravel().tolist()] == [
        "0x1.7959a313a2720p-4",
        "0x1.0ec2ea9e4d3f0p-3",
        "0x1.a786e60a07b63p-1",
        "0x1.dc2580b42e780p-5",
    ]


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20), st.integers(0, 2**63), st.integers(0, 9))
def test_range_and_independence_of_memory_layout(ids: list[int], seed: int, n: int) -> None:
    row = np.array(ids, dtype=np.int32)
    found = content_uniforms(row, seed=seed, count=n)
    assert found.shape == (len(ids), n)
    assert ((found >= 0) & (found < 1)).all()
    assert np.array_equal(found * 2.0**53, np.floor(found * 2.0**53))
    strided = np.repeat(row, 2)[::2]
    assert np.array_equal(content_uniforms(strided, seed=seed, count=n), found)


def test_seed_and_every_token_matter_and_positions_differ() -> None:
    found = content_uniforms(ROW, seed=7, count=3)
    others = [content_uniforms(ROW, seed=8, count=3)]
    for position in range(len(ROW)):
        changed = ROW.copy()
        changed[position] += 1
        others.append(content_uniforms(changed, seed=7, count=3))
    for other in others:
        assert not (other == found).any()
    assert len(np.unique(found)) == found.size


def test_numbers_are_uniform() -> None:
    found = content_uniforms(np.arange(20_000, dtype=np.int32), seed=0, count=10)
    counts = np.histogram(found, bins=20, range=(0, 1))[0]
    chi_squared = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_squared < 60  # 19 degrees of freedom: 1 in 300,000 by chance
    # Neighbouring draws and neighbouring positions are not correlated (6 standard deviations).
    for left, right in ((found[:, :-1], found[:, 1:]), (found[:-1], found[1:])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 6 / left.size**0.5
