"""The chunked order: each row once an epoch, the same batches for every number of ranks, few reads."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.trainer.config.schema import DataConfig
from sparsekd.trainer.data.chunked import CHUNK_ROWS, ChunkedOrder, chunked_order
from sparsekd.trainer.data.mixed import SourceOfRows, order_of
from sparsekd.trainer.data.order import GlobalOrder, Order, batch_shape, micro_batches, step_rows

ORDERS = st.builds(
    chunked_order,
    rows=st.one_of(st.integers(1, 70), st.integers(71, 1500)),
    seed=st.integers(0, 2**63),
    slots=st.integers(1, 100),
    streams=st.integers(1, 80),
    window=st.integers(1, 6),
)


def stream_of(order: Order, positions: range) -> list[int]:
    return [place.row for place in order.places(positions.start, len(positions))]


@settings(deadline=None, max_examples=120)
@given(order=ORDERS, epoch=st.integers(0, 4))
def test_every_epoch_has_each_row_once(order: ChunkedOrder, epoch: int) -> None:
    """Whatever is ragged: chunks, streams, windows, or batches that do not end with the epoch."""
    rows = order.rows
    assert sorted(stream_of(order, range(epoch * rows, (epoch + 1) * rows))) == list(range(rows))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), units=st.integers(1, 4), is_chunked=st.booleans())
def test_any_ranks_and_accumulation_read_the_same_batches(
    data: st.DataObject, units: int, is_chunked: bool
) -> None:
    """World sizes 1 to 8 by turns, each with an accumulation of its own, as of a run that is resized."""
    slots = 840 * units if data.draw(st.booleans()) else data.draw(st.sampled_from([8, 24, 120]))
    rows = data.draw(st.integers(1, 700))
    order: Order = GlobalOrder(rows, 3)
    if is_chunked:
        order = chunked_order(rows=rows, seed=3, slots=slots, streams=data.draw(st.integers(1, 80)), window=3)
    worlds = [size for size in range(1, 9) if slots % size == 0]
    consumed, seen = 0, []
    while consumed < min(2 * slots, 4 * rows + slots):
        world_size = data.draw(st.sampled_from(worlds))
        share = slots // world_size
        micro_rows = data.draw(st.sampled_from([part for part in range(1, share + 1) if share % part == 0]))
        shape = batch_shape(global_rows=slots, micro_rows=micro_rows, world_size=world_size)
        step = []
        for rank in range(world_size):
            parts = micro_batches(consumed, shape, order, rank=rank)
            assert [len(part) for part in parts] == [micro_rows] * shape.accumulation
            step += [place.row for part in parts for place in part]
        assert step == step_rows(consumed, shape, order)
        seen += step
        consumed += slots
    assert seen == stream_of(order, range(consumed))


def test_the_chunked_order_is_pinned() -> None:
    """Golden values: a changed order would silently break every resumed run."""
    order = chunked_order(rows=40, seed=0, slots=6, streams=2, window=1)
    assert stream_of(order, range(0, 12)) == [22, 23, 29, 9, 5, 11, 24, 17, 16, 15, 13, 6]
    far = chunked_order(rows=25_000_003, seed=7, slots=512, streams=64, window=4)
    assert stream_of(far, range(10**9, 10**9 + 4)) == [1522814, 8312750, 8312736, 8312749]


@settings(deadline=None, max_examples=60)
@given(order=ORDERS)
def test_rows_that_are_read_together_are_of_one_window(order: ChunkedOrder) -> None:
    """Along a stream windows rise, and the rows named with a row are exactly those of its reads to come."""
    rows = order.rows
    named: dict[tuple[int, int], set[int]] = {}
    pieces: dict[tuple[int, int], set[range]] = {}
    last: dict[int, int] = {}
    for place in order.places(0, 3 * rows):
        assert place.first <= place.row < place.stop <= rows
        assert place.first // CHUNK_ROWS == (place.stop - 1) // CHUNK_ROWS, "one chunk"
        assert last.get(place.stream, -1) <= place.window
        last[place.stream] = place.window
        key = (place.stream, place.window)
        assert place.row not in named.setdefault(key, set())
        named[key].add(place.row)
        pieces.setdefault(key, set()).add(range(place.first, place.stop))
    for key, found in pieces.items():
        assert len(found) <= order.window
        assert named[key] == {row for piece in found for row in piece}


@pytest.mark.parametrize(("rows", "slots"), [(2048, 64), (4099, 48), (3000, 256)])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_row_takes_an_eighth_of_a_read_or_less(rows: int, slots: int, world_size: int) -> None:
    """Over three epochs, also where no batch ends with an epoch; each rank reads for itself."""
    order = chunked_order(rows=rows, seed=1, slots=slots, streams=64, window=4)
    shape = batch_shape(global_rows=slots, micro_rows=1, world_size=world_size)
    reads = set()
    steps = 3 * rows // slots
    for step in range(steps):
        for rank in range(world_size):
            for part in micro_batches(step * slots, shape, order, rank=rank):
                reads |= {(rank, place.stream, place.window, place.first) for place in part}
    assert len(reads) <= steps * slots / 8


def test_neighbours_are_apart_and_batches_are_mixed() -> None:
    """Rows of one chunk are spread over steps: a batch is no run of neighbours."""
    order = chunked_order(rows=64 * 64 * CHUNK_ROWS, seed=0, slots=64, streams=64, window=4)
    shape = batch_shape(global_rows=64, micro_rows=1, world_size=1)
    for step in (0, 17, 500):
        assert len({row // CHUNK_ROWS for row in step_rows(step * 64, shape, order)}) == 64
    stream = [order.places(step * 64, 1)[0].row for step in range(1000)]
    beside = sum(abs(a - b) == 1 for a, b in pairwise(stream))
    # By chance 2 of 64 follow a row of their window directly.
    assert beside < 60


def test_what_a_configuration_makes() -> None:
    plain = order_of(DataConfig(), [SourceOfRows("", 100, 1)], seed=4, slots=8)
    assert plain == GlobalOrder(100, 4) and plain.recorded() == {}
    assert plain.reads_again(101) and not plain.reads_again(100), "one epoch, and a row more"
    data = DataConfig(shuffle="chunked", streams=64, window=2)
    chunked = order_of(data, [SourceOfRows("", 100, 1)], seed=4, slots=8)
    assert chunked == ChunkedOrder(rows=100, seed=4, slots=8, streams=7, window=2), "as many as chunks"
    assert not chunked.reads_again(10**6)
    few = order_of(DataConfig(shuffle="chunked"), [SourceOfRows("", 10**6, 1)], seed=0, slots=8)
    recorded = {"shuffle": "chunked", "chunk_rows": 16, "streams": 8, "window": 4}
    assert few.recorded() == recorded, "as many as rows of a batch"


def test_no_list_of_rows_is_made() -> None:
    """A store of any size begins at once: 10^15 rows are as good as ten."""
    order = chunked_order(rows=10**15, seed=0, slots=1024, streams=64, window=4)
    assert len({place.row for place in order.places(10**17, 100)}) == 100
