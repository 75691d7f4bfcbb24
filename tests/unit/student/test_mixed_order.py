"""The order of a mixture: shares kept at every moment, each row once an epoch of its source, any ranks."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.trainer.config.schema import DataConfig
from sparsekd.trainer.data.chunked import ChunkedOrder
from sparsekd.trainer.data.mixed import PERIOD, MixedOrder, SourceOfRows, order_of, shares
from sparsekd.trainer.data.order import Place, batch_shape, micro_batches, step_rows
from sparsekd.trainer.run.errors import ConfigError

SLOTS = 840  # which 1 to 8 divide


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[MixedOrder, list[SourceOfRows]]:
    count = draw(st.integers(2, 5))
    sources = [
        SourceOfRows(f"s{number}", draw(st.integers(1, 300)), draw(st.floats(0.05, 1.0)))
        for number in range(count)
    ]
    data = DataConfig(
        shuffle=draw(st.sampled_from(["global", "chunked"])),
        streams=draw(st.integers(1, 80)),
        window=draw(st.integers(1, 5)),
    )
    order = order_of(data, sources, seed=draw(st.integers(0, 2**63)), slots=SLOTS)
    assert isinstance(order, MixedOrder)
    return order, sources


def by_source(places: list[Place], sources: list[SourceOfRows]) -> list[list[int]]:
    """Row numbers in each source, in the stream's order, found by walking through the sources."""
    found: list[list[int]] = [[] for _ in sources]
    for place in places:
        row = place.row
        for number, source in enumerate(sources):
            if row < source.rows:
                found[number].append(row)
                break
            row -= source.rows
        else:
            raise AssertionError(f"row {place.row} is of no source")
    return found


@settings(deadline=None, max_examples=80)
@given(made=mixtures(), first=st.integers(0, 1000))
def test_each_source_gives_each_row_once_an_epoch(
    made: tuple[MixedOrder, list[SourceOfRows]], first: int
) -> None:
    order, sources = made
    found = by_source(order.places(0, 1500), sources)
    for rows, source in zip(found, sources, strict=True):
        for epoch in range(len(rows) // source.rows):
            part = rows[epoch * source.rows : (epoch + 1) * source.rows]
            assert sorted(part) == list(range(source.rows))
        assert max(Counter(rows[len(rows) // source.rows * source.rows :]).values(), default=0) <= 1
    assert order.places(first, 200) == order.places(0, first + 200)[first:], "a function of the position"


@settings(deadline=None, max_examples=80)
@given(made=mixtures())
def test_shares_hold_at_every_moment(made: tuple[MixedOrder, list[SourceOfRows]]) -> None:
    """No source is ever more rows ahead of, or behind, its share than there are others."""
    order, sources = made
    shares_of = [Fraction(turns, sum(order.turns)) for turns in order.turns]
    wanted = [source.weight / sum(each.weight for each in sources) for source in sources]
    for share, of_weight in zip(shares_of, wanted, strict=True):
        assert abs(share - of_weight) <= 1 / sum(order.turns)
    for count in (1, 7, 64, 500, 1200):
        found = by_source(order.places(0, count), sources)
        for rows, share in zip(found, shares_of, strict=True):
            assert abs(len(rows) - share * count) < len(sources)


@settings(deadline=None, max_examples=40)
@given(made=mixtures(), data=st.data())
def test_any_ranks_read_the_same_batches(
    made: tuple[MixedOrder, list[SourceOfRows]], data: st.DataObject
) -> None:
    order, _ = made
    for step in range(4):
        world_size = data.draw(st.integers(1, 8))
        micro_rows = data.draw(st.sampled_from([n for n in range(1, SLOTS) if SLOTS // world_size % n == 0]))
        shape = batch_shape(global_rows=SLOTS, micro_rows=micro_rows, world_size=world_size)
        rows = [
            place.row
            for rank in range(world_size)
            for part in micro_batches(step * SLOTS, shape, order, rank=rank)
            for place in part
        ]
        assert rows == step_rows(step * SLOTS, shape, order)


def test_the_order_is_pinned() -> None:
    """Golden values: a changed order would silently break every resumed run."""
    sources = [SourceOfRows("a", 10, 0.7), SourceOfRows("b", 6, 0.3)]
    order = order_of(DataConfig(), sources, seed=0, slots=8)
    assert [place.row for place in order.places(0, 12)] == [3, 12, 5, 2, 15, 7, 4, 1, 11, 9, 0, 13]
    chunked = order_of(DataConfig(shuffle="chunked"), sources, seed=0, slots=8)
    assert isinstance(chunked, MixedOrder) and chunked.turns == (6, 2)
    assert [place.row for place in chunked.places(0, 12)] == [6, 5, 12, 9, 4, 8, 11, 1, 7, 3, 14, 2]
    assert [place.row for place in order.places(10**12, 4)] == [6, 1, 10, 2]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_chunks_of_a_mixture_are_still_read_once(world_size: int) -> None:
    """A stream of a source stays on one rank: an eighth of a read for each row, or less."""
    sources = [SourceOfRows("a", 4000, 0.75), SourceOfRows("b", 1500, 0.25)]
    order = order_of(DataConfig(shuffle="chunked"), sources, seed=1, slots=64)
    assert isinstance(order, MixedOrder)
    shape = batch_shape(global_rows=64, micro_rows=1, world_size=world_size)
    steps, reads, streams = 200, set(), set()
    for step in range(steps):
        for rank in range(world_size):
            for part in micro_batches(step * 64, shape, order, rank=rank):
                reads |= {(rank, place.stream, place.window, place.first) for place in part}
                streams |= {(rank, place.stream) for place in part}
    assert len(streams) == sum(each.streams for each in order.orders if isinstance(each, ChunkedOrder)) == 64
    assert len(reads) <= steps * 64 / 8


def test_rows_of_different_sources_are_never_read_together() -> None:
    sources = [SourceOfRows("a", 40, 1), SourceOfRows("b", 40, 1)]
    order = order_of(DataConfig(shuffle="chunked", streams=4), sources, seed=1, slots=8)
    for place in order.places(0, 400):
        assert place.first // 40 == place.row // 40 == (place.stop - 1) // 40
        assert (place.stream >= 2) == (place.row >= 40)


def test_what_cannot_be_mixed() -> None:
    sources = [SourceOfRows("web", 10, 0.99), SourceOfRows("rare", 10, 0.01)]
    order_of(DataConfig(), sources, seed=0, slots=8)
    with pytest.raises(ConfigError, match=r"mixture\.rare has the share 0\.01 .*one in 8 rows of a batch"):
        order_of(DataConfig(shuffle="chunked"), sources, seed=0, slots=8)
    tiny = [replace(sources[0], weight=1.0), replace(sources[1], weight=1e-9)]
    with pytest.raises(ConfigError, match=rf"the share 1e-09 .*one in {PERIOD}; give it more, or none"):
        order_of(DataConfig(), tiny, seed=0, slots=8)


@settings(deadline=None)
@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), count=st.integers(0, 10_000))
def test_shares_are_whole_and_near(weights: list[float], count: int) -> None:
    found = shares(weights, count)
    assert sum(found) == count
    total = sum(map(Fraction, weights))
    for weight, share in zip(weights, found, strict=True):
        assert abs(share - Fraction(weight) / total * count) < 1 + 1e-6


def test_the_cache_is_for_sources_that_come_again() -> None:
    sources = [SourceOfRows("a", 100, 1.0), SourceOfRows("b", 1000, 1.0)]
    order = order_of(DataConfig(), sources, seed=0, slots=8)
    assert order.reads_again(202) and not order.reads_again(200), "a's half of them is an epoch and a row"
    recorded = order.recorded()["mixture"]
    assert recorded == {"a": {"turns": PERIOD // 2}, "b": {"turns": PERIOD // 2}}
