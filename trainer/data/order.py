"""Which rows an optimizer step reads: a pure function of (seed, rows consumed), for any number of ranks.

The training stream is endless: epoch after epoch, each a permutation of all rows of the store, joined without
a gap (the last partial batch of an epoch is filled from the next one's beginning). The only state is how many
rows the optimizer has consumed. Nothing here depends on numpy's or torch's random generators, whose streams
are promised for one build only; golden values in the tests pin the order.
"""

from dataclasses import dataclass

from sparsekd.trainer.run.errors import ConfigError

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


def mix64(value: int) -> int:
    """The finaliser of SplitMix64: a bijection of 64-bit integers, each input bit moving each output bit."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def mixed_seed(*parts: int) -> int:
    """One 64-bit key from several numbers; (1, 1) and (2, 0) give different keys, as a sum would not."""
    key = 0
    for part in parts:
        key = mix64(key + _GOLDEN_GAMMA + mix64(part + _GOLDEN_GAMMA))
    return key


def permuted(index: int, *, size: int, key: int) -> int:
    """The place of `index` in a keyed permutation of range(size), in constant time and memory.

    A balanced Feistel network over the smallest even number of bits that holds `size`, walked until it lands
    inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): fewer than four rounds through
    the network on average.
    """
    if size == 1:
        return 0
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_index in range(_ROUNDS):
            left, right = right, left ^ (mix64(key + (round_index << 48) + right) & mask)
        index = (left << half) | right
        if index < size:
            return index


def row_at(position: int, *, rows: int, seed: int) -> int:
    """The row of the store at a position of the endless training stream.

    Args:
        position: Rows consumed before this one, over all epochs.
        rows: Rows of the store's training split.
        seed: Seed of the data order.
    """
    epoch, index = divmod(position, rows)
    return permuted(index, size=rows, key=mixed_seed(seed, epoch))


def step_rows(consumed: int, shape: BatchShape, *, rows: int, seed: int) -> list[int]:
    """The rows of one optimizer step over all ranks, in order; it begins after `consumed` rows."""
    return [row_at(consumed + offset, rows=rows, seed=seed) for offset in range(shape.global_rows)]


def micro_batches(consumed: int, shape: BatchShape, *, rank: int, rows: int, seed: int) -> list[list[int]]:
    """One rank's contiguous slice of an optimizer step's rows, cut into micro-batches."""
    first = consumed + rank * shape.rank_rows
    slice_rows = [row_at(first + offset, rows=rows, seed=seed) for offset in range(shape.rank_rows)]
    return [
        slice_rows[start : start + shape.micro_rows] for start in range(0, len(slice_rows), shape.micro_rows)
    ]


def heldout_rows(*, wanted: int, rows: int) -> list[int]:
    """Held-out rows that stand for the split: spread evenly over it, the same in every run on the store."""
    count = min(wanted, rows)
    return [index * rows // count for index in range(count)]
