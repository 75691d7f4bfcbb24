"""Units and the order in which workers take them: each once, side by side, meeting at the last ones."""

import random

import pytest

from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.teacher.units import Unit, micro_batches, rows_of_unit, turns_of, units_of_shard


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 40])
def test_workers_begin_with_shards_of_their_own_and_leave_none_out(workers: int) -> None:
    chance = random.Random(workers)
    for count in (0, 1, 2, 17, chance.randrange(18, 60)):
        shards = [("train", shard) for shard in range(count)] + [("heldout", 0)]
        turns = [turns_of(shards, worker, workers) for worker in range(workers)]
        orders = [[turn.shard for turn in each] for each in turns]
        assert all(sorted(order) == sorted(shards) for order in orders)
        shares = [[turn.shard for turn in each if not turn.backwards] for each in turns]
        assert sorted(shard for share in shares for shard in share) == sorted(shards)
        assert all(order[: len(share)] == share for order, share in zip(orders, shares, strict=True))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        # Side by side until all are done: each shard once.
        done = [shard for turn in zip(*orders, strict=True) for shard in turn]
        early = done[: len(shards) // workers * workers]
        assert len(set(early)) == len(early)
        # Whoever helps begins where the other one ends.
        for each in turns:
            helped = [turn.shard for turn in each if turn.backwards]
            for share in shares:
                assert [shard for shard in helped if shard in share] in ([], share[::-1])
        assert workers > 1 or orders == [shards]


def test_units_are_whole_micro_batches_and_leave_no_row_out() -> None:
    chance = random.Random(5)
    for _ in range(200):
        rows, micro, sort = chance.randint(1, 300), chance.randint(1, 20), chance.choice([0, 0, 7, 30])
        asked = chance.randint(1, 100)
        size = rows_of_unit(TeacherConfig(unit_rows=asked, micro_batch_rows=micro, sort_rows=sort))
        units = units_of_shard(("train", 3), rows, size)
        assert [row for unit in units for row in unit.rows] == list(range(rows))
        assert {(unit.split, unit.shard) for unit in units} == {("train", 3)}
        assert [unit.is_whole for unit in units] == ([True] if rows <= size else [False] * len(units))
        # The micro-batches are those of a shard that is not cut: so are its bytes.
        lengths = [chance.randint(1, 9) for _ in range(rows)]
        in_units = [
            [unit.rows.start + row for row in batch]
            for unit in units
            for batch in micro_batches(lengths[unit.rows.start : unit.rows.stop], micro, sort)
        ]
        assert in_units == [list(batch) for batch in micro_batches(lengths, micro, sort)]
        assert sorted(row for batch in in_units for row in batch) == list(range(rows))
        if not sort:
            assert [batch[0] for batch in in_units] == list(range(0, rows, micro))


def test_neighbours_of_a_length_pass_together_and_full_rows_keep_their_order() -> None:
    assert list(micro_batches([3, 9, 9, 1, 5, 9], 2, 5)) == [(1, 2), (5, 4), (0, 3)]
    assert list(micro_batches([3, 9, 9, 1, 5, 9], 2, 4)) == [(1, 2), (0, 3), (5, 4)]
    assert list(micro_batches([3, 9, 9], 2, 0)) == [(0, 1), (2,)]
    # Packed rows: a split's last one alone ends in padding.
    assert list(micro_batches([9, 9, 9, 9, 2], 2, 64)) == list(micro_batches([9, 9, 9, 9, 2], 2, 0))


def test_a_unit_is_not_smaller_than_it_was_asked_for() -> None:
    assert rows_of_unit(TeacherConfig()) == 64
    assert rows_of_unit(TeacherConfig(unit_rows=1, micro_batch_rows=8, sort_rows=0)) == 8
    assert rows_of_unit(TeacherConfig(unit_rows=9, micro_batch_rows=8, sort_rows=0)) == 16
    assert rows_of_unit(TeacherConfig(unit_rows=9, micro_batch_rows=8, sort_rows=12)) == 16
    assert rows_of_unit(TeacherConfig(unit_rows=9, micro_batch_rows=8)) == 64
    assert units_of_shard(("heldout", 0), 3, 64) == [Unit("heldout", 0, range(3), True)]
