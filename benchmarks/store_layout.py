"""What the contestants of the store benchmark have in common.

L positions of a row, M of them recorded, k head entries, n draws, G grid temperatures.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from store_data import Case

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import Row


@dataclass(frozen=True)
class Decoded:
    """What a layout gives back of a row.

    Attributes:
        head_ids: int32 [M, k], most likely first; -1 where a head was cut short.
        head_logprobs: float32 [M, k].
        log_rest: float32 [M, G], or None where the layout does not keep it.
        tail_ids: int32 [M, n] ascending, -1 behind; [M, 0] where the layout keeps no draws.
        tail_counts: int32 [M, n].
    """

    head_ids: NDArray[np.int32]
    head_logprobs: NDArray[np.float32]
    log_rest: NDArray[np.float32] | None
    tail_ids: NDArray[np.int32]
    tail_counts: NDArray[np.int32]


Read = Callable[[int], Decoded]


class Layout(ABC):
    """One way to keep rows.

    Attributes:
        name: in tables.
        lacks: what it does not carry, in words; empty for nothing.
        case: of the records it is given.
        is_ours: whether it is sparsekd's.
    """

    name: str
    lacks: str
    case: Case
    is_ours: bool = False

    def prepare(self, folder: Path, manifest: Manifest, rows: Sequence[Row]) -> None:  # noqa: B027 - not every layout needs it
        """What is done once for a store, not for each shard; not timed."""

    @abstractmethod
    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        """Writes a file of rows; timed."""

    def finish(self, folder: Path) -> None:  # noqa: B027 - not every layout needs it
        """What makes the store readable, once; not timed."""

    @abstractmethod
    def open(self, folder: Path) -> Read:
        """Returns what reads any row, decodes it to int32 and float32, and checks it as the layout can."""

    def size(self, folder: Path) -> int:
        """Returns the bytes on disk that grow with the number of rows."""
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
