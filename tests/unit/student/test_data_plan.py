"""The data order: a permutation in every epoch, whatever the ranks, micro-batches and stops."""

import random
from itertools import pairwise

import numpy as np
import pytest

from sparsekd.trainer.data.order import (
    GlobalOrder,
    batch_shape,
    heldout_rows,
    micro_batches,
    mix64,
    mixed_seed,
    permuted,
    step_rows,
)
from sparsekd.trainer.run.errors import ConfigError


def permutation(size: int, key: int) -> list[int]:
    return [int(place) for place in permuted(np.arange(size, dtype=np.uint64), size=size, key=key)]


def row_at(position: int, *, rows: int, seed: int) -> int:
    return GlobalOrder(rows, seed).places(position, 1)[0].row


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 97, 256, 1000, 1009])
def test_permutation_is_bijective(size: int) -> None:
    for key in (0, 1, mixed_seed(3, 4)):
        assert sorted(permutation(size, key)) == list(range(size))


def test_many_permutations_at_once_are_each_its_own() -> None:
    """Sizes and keys of their own, as windows have."""
    sizes = np.array([1, 2, 3, 5, 16, 17, 64, 1000, 2**40, 7], np.uint64)
    keys = np.array([mixed_seed(number, 1) for number in range(10)], np.uint64)
    together = permuted(sizes - np.uint64(1), size=sizes, key=keys)
    for number, (size, key) in enumerate(zip(sizes, keys, strict=True)):
        alone = permuted(np.array([size - np.uint64(1)]), size=int(size), key=int(key))
        assert together[number] == alone[0] < size


def test_order_is_pinned() -> None:
    """Golden values: a changed order would silently break every resumed run."""
    # The finaliser of SplitMix64 at 1, as the reference C code gives it.
    assert mix64(1) == 0x5692161D100B05E5
    first_epoch, second_epoch = [8, 1, 4, 9, 3, 2, 5, 0, 6, 7], [8, 0, 6, 5, 3, 9, 4, 2, 1, 7]
    assert [row_at(position, rows=10, seed=0) for position in range(20)] == first_epoch + second_epoch
    far = [row_at(position, rows=1_000_003, seed=7) for position in range(5)]
    assert far == [658351, 338104, 916918, 916665, 950383]


def test_seed_and_epoch_do_not_add_up() -> None:
    assert mixed_seed(1, 1) != mixed_seed(2, 0)
    orders = {
        tuple(row_at(epoch * 50 + i, rows=50, seed=seed) for i in range(50))
        for seed in range(6)
        for epoch in range(6)
    }
    assert len(orders) == 36


def test_order_looks_uniform() -> None:
    """Chi-square of where the first position lands, over keys; two rounds instead of six fail this."""
    size, keys = 64, 6400
    for index in (0, 1, 37):
        seeds = np.array([mixed_seed(seed, 0) for seed in range(keys)], np.uint64)
        places = permuted(np.full(keys, index, np.uint64), size=size, key=seeds)
        counts = np.bincount(places.astype(int), minlength=size).tolist()
        chi_square = sum((count - keys / size) ** 2 / (keys / size) for count in counts)
        # 63 degrees of freedom: mean 63, standard deviation 11.2; six deviations away is no chance.
        assert chi_square < 63 + 6 * 11.2
    # Neighbours stay neighbours as rarely as chance has it.
    order = permutation(4096, 9)
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 12


def test_ranks_and_micro_batches_share_out_the_same_rows() -> None:
    rows, seed = 37, 5
    whole = [row_at(position, rows=rows, seed=seed) for position in range(24 * 10)]
    for world_size, micro_rows in [(1, 1), (1, 24), (2, 3), (3, 4), (4, 6), (8, 1)]:
        shape = batch_shape(global_rows=24, micro_rows=micro_rows, world_size=world_size)
        seen: list[int] = []
        for step in range(10):
            parts = [
                micro_batches(step * 24, shape, GlobalOrder(rows, seed), rank=rank)
                for rank in range(world_size)
            ]
            assert all(len(part) == shape.accumulation for part in parts)
            assert all(len(batch) == micro_rows for part in parts for batch in part)
            joined = [place.row for part in parts for batch in part for place in batch]
            assert joined == step_rows(step * 24, shape, GlobalOrder(rows, seed))
            seen += joined
        assert seen == whole


def test_random_stops_do_not_change_the_stream() -> None:
    """Runs of random length on random numbers of ranks, one after another, read the uninterrupted stream."""
    chance = random.Random(1)
    for rows in (1, 2, 11, 30):
        consumed, seen = 0, []
        while consumed < 40 * 12:
            world_size = chance.choice([1, 2, 3, 4, 6, 12])
            shape = batch_shape(
                global_rows=12, micro_rows=chance.choice([1, 12 // world_size]), world_size=world_size
            )
            for _ in range(chance.randint(0, 7)):
                for rank in range(world_size):
                    for batch in micro_batches(consumed, shape, GlobalOrder(rows, 3), rank=rank):
                        seen += [place.row for place in batch]
                consumed += 12
        assert seen == [row_at(position, rows=rows, seed=3) for position in range(consumed)]
        for epoch in range(consumed // rows):
            assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@pytest.mark.parametrize(
    ("global_rows", "micro_rows", "world_size", "nearest"), [(30, 4, 2, "24 or 32"), (4, 4, 2, "use 8 rows")]
)
def test_uneven_batch_is_refused(global_rows: int, micro_rows: int, world_size: int, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        batch_shape(global_rows=global_rows, micro_rows=micro_rows, world_size=world_size)
    message = str(caught.value)
    assert nearest in message
    for number in (global_rows, micro_rows, world_size):
        assert str(number) in message


def test_heldout_rows_are_spread_and_within() -> None:
    assert heldout_rows(wanted=4, rows=100) == [0, 33, 66, 99]
    assert heldout_rows(wanted=64, rows=3) == [0, 1, 2]
    assert heldout_rows(wanted=0, rows=3) == []
