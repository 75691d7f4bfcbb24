"""Which positions of a row have a record: the manifest's rule, as a pure function of the text.

Shapes: L positions of a row.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import Row, is_real

SAMPLED_SPLIT = "train"
"""The one split in which the rule `sampled` leaves counted positions without a record."""

KEY_BYTES = 16
"""The key of numpy's Philox: two words of 64 bits."""


def rule_of_split(manifest: Manifest, split: str) -> str:
    """Returns the rule that holds in a split: `sampled` thins `train` alone, so that figures over other
    splits are over every counted position."""
    rule = manifest.record.positions
    return "counted" if rule == "sampled" and split != SAMPLED_SPLIT else rule


def recorded_positions(row: Row, manifest: Manifest, split: str) -> NDArray[np.bool_]:
    """Returns bool [L], where a teacher pass records a row.

    Args:
        row: of tokens; a record in it is not looked at.
        manifest: of the store that is written.
        split: of the row.
    """
    rule = rule_of_split(manifest, split)
    if rule == "all":
        return is_real(row)
    if rule == "sampled":
        return row.loss_mask & is_sampled(row.token_ids, manifest.record.seed, manifest.record.share)
    return row.loss_mask


def is_sampled(token_ids: NDArray[np.int32], seed: int, share: float) -> NDArray[np.bool_]:
    """Returns bool [L], each True with probability `share`, by the row's tokens and the seed alone."""
    return content_uniforms(token_ids, seed=seed, count=1, purpose=b"positions")[:, 0] < share


def content_uniforms(
    token_ids: NDArray[np.int32], *, seed: int, count: int, purpose: bytes = b""
) -> NDArray[np.float64]:
    """Returns uniform numbers for every position of a row, a function of its tokens and the seed alone.

    The key of a Philox 4x64-10 generator is BLAKE2b of the row's token ids, keyed with the seed and, for
    streams that must not depend on one another, personalised with a purpose; position t takes the generator's
    outputs t * count to (t + 1) * count. The top 53 bits of an output are the number. Raw outputs of numpy's
    bit generators are kept stable across its versions (NEP 19), unlike distributions.

    Args:
        token_ids: int32 [L].
        seed: from 0 to 2^64 - 1.
        count: numbers for each position.
        purpose: at most 16 bytes; the teacher's draws have none.

    Returns:
        float64 [L, count] in [0, 1), multiples of 2^-53.
    """
    content = np.ascontiguousarray(token_ids, dtype="<i4").tobytes()
    digest = hashlib.blake2b(
        content, digest_size=KEY_BYTES, key=seed.to_bytes(8, "little"), person=purpose
    ).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))
    raw = generator.random_raw(len(token_ids) * count)
    return (raw >> np.uint64(11)).astype(np.float64).reshape(len(token_ids), count) * 2.0**-53
