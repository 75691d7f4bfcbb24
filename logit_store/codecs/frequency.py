"""Renumbering ids by how often they occur, so that their high bytes repeat and compress.

The table is made once, before the first shard, and stands in the manifest: the frequent ids in falling order
become 0, 1, 2, ...; all other ids follow in their own order.

Shapes: V vocabulary, M ids of the table.
"""

import base64
import binascii
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.frames import PlaneError, compress_frame, decompress_frame
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.typed_json import short

TABLE_IDS = 16384
"""Ids of a table at most. More change little: rare ids are rare."""

DEFAULT_MASS = 0.99

_KEYS = {"mass", "frequent_ids"}


@dataclass(frozen=True)
class Renumbering:
    """Two tables, each the other's inverse.

    Attributes:
        new: int32 [V], number of each id.
        old: int32 [V], id of each number.
    """

    new: NDArray[np.int32]
    old: NDArray[np.int32]

    def old_ids(self, numbers: NDArray[np.int32], plane: str) -> NDArray[np.int32]:
        """Returns the ids of numbers.

        Raises:
            PlaneError: a number is V or more.
        """
        if numbers.size and int(numbers.max()) >= len(self.old):
            raise PlaneError(plane, f"it holds {numbers.max()}, expected below {len(self.old)}")
        return self.old[numbers]


def compact_parameters(
    counts: NDArray[np.int64], *, mass: float | None = DEFAULT_MASS, table_ids: int = TABLE_IDS
) -> dict[str, Any]:
    """Returns the parameters of `compact` for a store whose ids occur about as often as was counted.

    Args:
        counts: int64 [V], occurrences of each id, say in a sample of the tokens.
        mass: heads end where their probabilities reach it; None keeps all k entries.
        table_ids: how many ids the table has at most.
    """
    order = np.argsort(-counts, kind="stable")[:table_ids]
    frequent = order[counts[order] > 0].astype("<u4")
    parts = frequent.view(np.uint8).reshape(-1, 4).T
    table = base64.b64encode(compress_frame(np.ascontiguousarray(parts))).decode("ascii")
    return {"mass": mass, "frequent_ids": table if frequent.size else ""}


def check_compact(parameters: Mapping[str, Any], manifest: Manifest) -> None:
    """Raises StoreError, naming the key, for parameters that `compact` cannot use with this manifest."""
    if unknown := sorted(parameters.keys() - _KEYS):
        raise StoreError(
            f"The codec compact has no parameter {', '.join(unknown)}: it has mass and frequent_ids."
        )
    mass = parameters.get("mass")
    record = manifest.record
    if mass is not None:
        if isinstance(mass, bool) or not isinstance(mass, (int, float)) or not 0 < mass <= 1:
            raise StoreError(
                f"The codec's parameter mass is {short(mass)}, expected above 0 and at most 1, or null."
            )
        if record.n:
            raise StoreError(
                f"The codec's parameter mass is {mass} with n={record.n} draws, which were made from the "
                "rest behind all k head entries: use mass null, or n=0."
            )
        if record.k and (1.0 not in record.temperatures or record.rest == "unknown"):
            raise StoreError(
                f"The codec's parameter mass is {mass}, but what is cut off joins the rest, whose log R at "
                "temperature 1 this store does not have: use mass null."
            )
    table = parameters.get("frequent_ids", "")
    if not isinstance(table, str):
        raise StoreError(f"The codec's parameter frequent_ids is {short(table)}, expected text.")
    _table(table, manifest.tokenizer.vocabulary_size)


def mass_of(manifest: Manifest) -> float | None:
    """Returns the mass at which heads end, None where they have all k entries."""
    return manifest.codec.parameters.get("mass") if manifest.record.k else None


def renumbering_of(manifest: Manifest) -> Renumbering | None:
    """Returns the renumbering of a manifest's codec, None where ids stay as they are."""
    table = manifest.codec.parameters.get("frequent_ids", "")
    return _table(table, manifest.tokenizer.vocabulary_size) if table else None


@functools.lru_cache(maxsize=16)
def _table(text: str, vocabulary: int) -> Renumbering | None:
    if not text:
        return None
    problem = "The codec's parameter frequent_ids is no table of ids"
    try:
        stored = base64.b64decode(text, validate=True)
        plain = decompress_frame(stored, "frequent_ids", None, at_most=4 * vocabulary)
    except (binascii.Error, ValueError, PlaneError) as error:
        raise StoreError(f"{problem} ({error}).") from error
    if len(plain) % 4:
        raise StoreError(f"{problem}: it has {len(plain)} bytes, expected a multiple of 4.")
    parts = np.frombuffer(plain, np.uint8).reshape(4, -1)
    frequent = np.ascontiguousarray(parts.T).view("<u4").reshape(-1).astype(np.int64)
    if np.unique(frequent).size != frequent.size or frequent.max(initial=0) >= vocabulary:
        raise StoreError(f"{problem}: an id is in it twice, or is not below {vocabulary}.")
    others = np.ones(vocabulary, np.bool_)
    others[frequent] = False
    old = np.concatenate([frequent, np.flatnonzero(others)]).astype(np.int32)
    new = np.empty_like(old)
    new[old] = np.arange(vocabulary, dtype=np.int32)
    return Renumbering(new=new, old=old)
