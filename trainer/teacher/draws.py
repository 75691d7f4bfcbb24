"""The uniform numbers behind a row's draws: a function of the store's seed and the row's tokens alone.

So the draws depend neither on ranks nor on order, and a row that is captured again is drawn the same.

Shapes: L positions of a row, n draws.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

# The key of numpy's Philox: two words of 64 bits.
KEY_BYTES = 16


def row_uniforms(token_ids: NDArray[np.int32], *, seed: int, n: int) -> NDArray[np.float64]:
    """Uniform numbers for the draws of every position of a row.

    The key of a Philox 4x64-10 generator is BLAKE2b of the row's token ids, keyed with the seed; position t
    takes the generator's outputs t * n to (t + 1) * n. The top 53 bits of an output are the number. Raw
    outputs of numpy's bit generators are kept stable across its versions (NEP 19), unlike distributions.

    Args:
        token_ids: int32 [L].
        seed: The store's seed, from 0 to 2^64 - 1.
        n: Draws at each position.

    Returns:
        float64 [L, n] in [0, 1), multiples of 2^-53.
    """
    content = np.ascontiguousarray(token_ids, dtype="<i4").tobytes()
    digest = hashlib.blake2b(content, digest_size=KEY_BYTES, key=seed.to_bytes(8, "little")).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))
    raw = generator.random_raw(len(token_ids) * n)
    return (raw >> np.uint64(11)).astype(np.float64).reshape(len(token_ids), n) * 2.0**-53
