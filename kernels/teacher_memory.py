"""How many positions of the teacher are taken at a time, and the memory that follows: no torch.

N positions, C positions of a chunk, V vocabulary, k head, n draws, S sums of a row (triton_teacher_rows.py).
"""

import math

from sparsekd.kernels.memory import row_stride

# `torch`: float32 logits of a chunk; and positions at most.
TORCH_BYTES = 128 * 1024 * 1024
TORCH_POSITIONS = (128, 1024)
# On the CPU the record of so many float32 logits is made at a time: more fall out of the cache, and fewer are
# dear by the calls.
SLICE_BYTES = 4 * 1024 * 1024
# `triton`: the float32 logits of a chunk exist once; 1024 to 2048 positions keep a GPU busy.
TRITON_BYTES = 1024 * 1024 * 1024
TRITON_POSITIONS = (256, 2048)

# `triton`: neighbouring columns of a row whose mass is summed for the draws.
PART = 128
# The largest head that `triton` makes: k entries want 2 k lanes of its first kernel.
MOST_ENTRIES = 2048


def positions_rule(impl: str, vocabulary_size: int) -> int:
    """C where the caller does not say: a multiple of 128, the rows of a matrix product's tile."""
    budget, (least, most) = (
        (TORCH_BYTES, TORCH_POSITIONS) if impl == "torch" else (TRITON_BYTES, TRITON_POSITIONS)
    )
    fitting = budget // (4 * row_stride(vocabulary_size))
    return min(max(fitting // 128 * 128, least), most)


def slice_positions(vocabulary_size: int) -> int:
    """C of `torch` on the CPU."""
    return max(SLICE_BYTES // (4 * vocabulary_size), 1)


def draw_bytes(n: int, vocabulary_size: int) -> int:
    """Of `torch` for the draws of a position: its parts with their columns, or the sums of its whole row."""
    return 24 * n * PART if n * PART < vocabulary_size else 8 * vocabulary_size * (n > 0) + 32 * n


def torch_slice(chunk: int, n: int, vocabulary_size: int, *, on_cpu: bool) -> int:
    """Positions whose record `torch` makes at a time, of a chunk.

    A GPU has no cache that holds a slice, and wants few launches; what draws take is bounded by the chunk.
    """
    draws = max(draw_bytes(n, vocabulary_size), 1)
    most = slice_positions(vocabulary_size) if on_cpu else 4 * chunk * vocabulary_size // draws
    return min(max(most, 1), chunk)


def list_room(k: int) -> int:
    """Entries that `triton` can list for a row before it takes the k largest of them.

    About k ln 2 * 2 lie above its bound where the k largest fall on lanes at random, at most; far fewer for
    k below 500. The rest of the room is for rows where they do not.
    """
    return 1 << (k + k // 2 + 63).bit_length()


def peak_bytes(
    impl: str,
    *,
    positions: int,
    vocabulary_size: int,
    k: int,
    n: int,
    grid: int,
    chunk_positions: int | None,
    on_cpu: bool = True,
) -> int:
    """Most bytes alive at one time in `teacher_statistics`, beyond its arguments; its result is counted.

    For inputs of bfloat16 on CUDA, or of float32; other bfloat16 inputs are widened once beside it. Chunks
    that `triton` does again with `torch` are an eighth as long and stay below it.

    Args:
        impl: "torch" or "triton".
        positions: N.
        vocabulary_size: V.
        k: entries of the head.
        n: draws.
        grid: temperatures of the grid, 1 and the draw temperature among them.
        chunk_positions: C; None takes `positions_rule`.
        on_cpu: where `torch` runs.
    """
    chunk = min(chunk_positions or positions_rule(impl, vocabulary_size), max(positions, 1))
    result = positions * (8 * k + 12 * n + 4 * (grid + 3))
    if impl == "torch":
        # The logits; powers and their products of a slice; and of each position the entries among which its
        # draws or its largest entries are, with their columns.
        rows = torch_slice(chunk, n, vocabulary_size, on_cpu=on_cpu)
        ranked = min((k + 2) * PART, vocabulary_size) if k else 0
        return (
            4 * vocabulary_size * (chunk + 2 * rows)
            + rows * max(draw_bytes(n, vocabulary_size), 16 * ranked)
            + result
        )
    stride, parts = row_stride(vocabulary_size), math.ceil(vocabulary_size / PART)
    # The logits, the list of keys before and after its sorting (values and places), masses and their sums.
    of_chunk = chunk * (4 * stride + 24 * list_room(k) + 12 * parts)
    # Draws one by one while they are coalesced: sorted ids, places, flags and counts.
    return max(of_chunk + result, positions * 48 * n + result)
