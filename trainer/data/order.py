"""Which rows an optimizer step reads: a pure function of (seed, rows consumed), for any number of ranks.

The training stream is endless: epoch after epoch, each a permutation of all rows of the store, joined without
a gap (the last partial batch of an epoch is filled from the next one's beginning). The only state is how many
rows the optimizer has consumed. Nothing here depends on numpy's or torch's random generators, whose streams
are promised for one build only; golden values in the tests pin the order.

This is the global order, any row after any other; `chunked` has the one that reads rows by chunks, `mixed`
the one of several stores.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.spacing import evenly
from sparsekd.trainer.run.errors import ConfigError

Numbers = NDArray[np.uint64]
Word = TypeVar("Word", int, Numbers)
"""64 bits: one number, or many, whose sums and products wrap by themselves."""

_MASK64 = (1 << 64) - 1
# The increment of SplitMix64 (Steele, Lea, Flood 2014), here to keep 0 from being a fixed point of `mix64`.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
# Three rounds already look uniform, two do not (measured, chi-square over positions); six leaves a margin.
_ROUNDS = 6


@dataclass(frozen=True)
class BatchShape:
    """How the rows of one optimizer step are shared out."""

    global_rows: int
    micro_rows: int
    world_size: int

    @property
    def rank_rows(self) -> int:
        return self.global_rows // self.world_size

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return self.rank_rows // self.micro_rows


def batch_shape(*, global_rows: int, micro_rows: int, world_size: int) -> BatchShape:
    """Checks that a global batch divides evenly over ranks and micro-batches.

    Raises:
        ConfigError: It does not; the message names the three numbers and the nearest legal values.
    """
    unit = world_size * micro_rows
    if global_rows % unit:
        below, above = global_rows // unit * unit, (global_rows // unit + 1) * unit
        nearest = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"train.global_batch_rows={global_rows} does not divide by {world_size} ranks times "
            f"train.micro_batch_rows={micro_rows} (= {unit}); "
            f"use {nearest} rows, or other ranks or micro-batches."
        )
    return BatchShape(global_rows=global_rows, micro_rows=micro_rows, world_size=world_size)


def mix64(value: Word) -> Word:
    """The finaliser of SplitMix64: a bijection of 64-bit integers, each input bit moving each output bit."""
    mixed: Any = value & _MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
    mixed ^= mixed >> 31
    return mixed


def mixed_seed(*parts: Word) -> Word:
    """One 64-bit key from several numbers; (1, 1) and (2, 0) give different keys, as a sum would not."""
    key: Any = 0
    for part in parts:
        key = mix64(key + _GOLDEN_GAMMA + mix64(part + _GOLDEN_GAMMA))
    return key


def word(value: int) -> Numbers:
    """A number, for arithmetic with many."""
    return np.array([value & _MASK64], np.uint64)


def permuted(index: Numbers, *, size: int | Numbers, key: int | Numbers) -> Numbers:
    """The places of indices in keyed permutations of range(size), in constant time and memory for each.

    A balanced Feistel network over the smallest even number of bits that holds `size`, walked until it lands
    inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): fewer than four rounds through
    the network on average.

    Args:
        index: uint64 [N], each below its size.
        size: one for all or uint64 [N], up to 2^52.
        key: uint64, one for all or [N].
    """
    sizes, key = (np.broadcast_to(np.asarray(value, np.uint64), index.shape) for value in (size, key))
    bits = np.frexp((sizes - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    found = np.empty_like(index)
    walking: Any = np.arange(index.size)
    half: Any = (bits + np.uint64(1)) >> np.uint64(1)
    mask: Any = (np.uint64(1) << half) - np.uint64(1)
    while walking.size:
        left, right = index >> half, index & mask
        for round_index in range(_ROUNDS):
            left, right = right, left ^ (mix64(key + np.uint64(round_index << 48) + right) & mask)
        index = (left << half) | right
        outside = index >= sizes
        found[walking[~outside]] = index[~outside]
        walking, index, half, mask = (values[outside] for values in (walking, index, half, mask))
        sizes, key = sizes[outside], key[outside]
    return found


class Place(NamedTuple):
    """A row as the training stream names it, and the rows that are worth reading with it.

    Attributes:
        row: its number in the training split.
        first: of the neighbouring rows that the stream names soon, before or after this one.
        stop: behind the last of them.
        stream: which of the order's streams it belongs to.
        window: rises along a stream; what was read for one window is not asked for in the next.
    """

    row: int
    first: int
    stop: int
    stream: int
    window: int


class Order(Protocol):
    """A training stream. Equal for every number of ranks, as none is known here."""

    def places(self, first: int, count: int) -> list[Place]:
        """What stands at `count` positions of the stream; `first` is the number of rows consumed before."""

    def recorded(self) -> dict[str, Any]:
        """What a checkpoint remembers of it, besides the store, the seed and the batch."""

    def reads_again(self, taken: int) -> bool:
        """Whether rows of a store elsewhere are worth room in the machine's cache, in a run that takes so
        many."""


@dataclass(frozen=True)
class GlobalOrder:
    """Any row after any other: each epoch is a permutation of all rows.

    Attributes:
        rows: of the store's training split.
        seed: of the data order.
    """

    rows: int
    seed: int

    def places(self, first: int, count: int) -> list[Place]:
        positions = np.arange(first, first + count, dtype=np.uint64)
        epoch, index = np.divmod(positions, np.uint64(self.rows))
        rows = permuted(index, size=self.rows, key=mixed_seed(word(self.seed), epoch)).tolist()
        return [Place(row, row, row + 1, 0, position) for position, row in enumerate(rows, start=first)]

    def recorded(self) -> dict[str, Any]:
        return {}  # the only one there was: checkpoints from then stay good

    def reads_again(self, taken: int) -> bool:
        return taken > self.rows


def step_rows(consumed: int, shape: BatchShape, order: Order) -> list[int]:
    """The rows of one optimizer step over all ranks, in order; it begins after `consumed` rows."""
    return [place.row for place in order.places(consumed, shape.global_rows)]


def micro_batches(consumed: int, shape: BatchShape, order: Order, *, rank: int) -> list[list[Place]]:
    """One rank's contiguous slice of an optimizer step's rows, cut into micro-batches."""
    places = order.places(consumed + rank * shape.rank_rows, shape.rank_rows)
    return [places[start : start + shape.micro_rows] for start in range(0, len(places), shape.micro_rows)]


def heldout_rows(*, wanted: int, rows: int) -> list[int]:
    """Held-out rows that stand for the split: spread evenly over it, the same in every run on the store."""
    return evenly(rows, wanted)
