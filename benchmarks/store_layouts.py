"""What the contestants of the store benchmark have in common, and sparsekd's own codecs as contestants.

L positions of a row, k head entries, n draws, G grid temperatures.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from store_data import DRAWN, TOP_K, Case

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.manifest import CodecSpec, Manifest
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row, TeacherRecord
from sparsekd.logit_store.synthetic import write_synthetic_tokenizer

SPLIT = "train"
RAGGED_MASS = 0.99


@dataclass(frozen=True)
class Decoded:
    """What a layout gives back of a row.

    Attributes:
        head_ids: int32 [L, k], most likely first; -1 where a head was cut short.
        head_logprobs: float32 [L, k].
        log_rest: float32 [L, G], or None where the layout does not keep it.
        tail_ids: int32 [L, n] ascending, -1 behind; [L, 0] where the layout keeps no draws.
        tail_counts: int32 [L, n].
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

    def prepare(self, folder: Path, manifest: Manifest, rows: Sequence[Row]) -> None:  # noqa: B027
        """What is done once for a store, not for each shard; not timed."""

    @abstractmethod
    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        """Writes a file of rows; timed."""

    def finish(self, folder: Path) -> None:  # noqa: B027
        """What makes the store readable, once; not timed."""

    @abstractmethod
    def open(self, folder: Path) -> Read:
        """Returns what reads any row, decodes it to int32 and float32, and checks it as the layout can."""

    def size(self, folder: Path) -> int:
        """Returns the bytes on disk that grow with the number of rows."""
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Ours(Layout):
    """A codec of sparsekd, through its own writer and reader: all checks are on, also those of reading."""

    is_ours = True
    lacks = ""

    def __init__(self, name: str, codec: str, case: Case, *, mass: float | None = None) -> None:
        self.name, self.codec, self.case, self.mass = name, codec, case, mass

    def manifest(self, manifest: Manifest, rows: Sequence[Row]) -> Manifest:
        """The manifest with this codec. `compact` counts the tokens of the rows, as `capture` does."""
        parameters = {}
        if self.codec == "compact":
            tokens = np.concatenate([row.token_ids for row in rows])
            counts = np.bincount(tokens, minlength=manifest.tokenizer.vocabulary_size)
            parameters = compact_parameters(counts, mass=self.mass)
        return replace(manifest, codec=CodecSpec(self.codec, parameters))

    def prepare(self, folder: Path, manifest: Manifest, rows: Sequence[Row]) -> None:
        tokenizer = write_synthetic_tokenizer(folder / "tokenizer", manifest.tokenizer.vocabulary_size)
        self._manifest = self.manifest(manifest, rows)
        create_store(folder / "store", self._manifest, tokenizer)

    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        write_shard(folder / "store", self._manifest, SPLIT, 0, rows)

    def finish(self, folder: Path) -> None:
        seal(folder / "store", {SPLIT: 1})

    def open(self, folder: Path) -> Read:
        store = open_store(folder / "store")
        return lambda index: _as_decoded(store.read_row(SPLIT, index).teacher)

    def size(self, folder: Path) -> int:
        """Shard and commit record. Manifest, index and tokenizer are a few kilobytes for a whole store."""
        return super().size(folder / "store" / "shards")

    def encode(self, row: Row) -> dict[str, bytes]:
        """The codec alone, without checks and files; after `prepare`."""
        return codec_of(self._manifest).encode(row, self._manifest)

    def decode(self, planes: dict[str, bytes]) -> Row:
        """The codec alone, without checks of the row's rules."""
        return codec_of(self._manifest).decode(planes, self._manifest)


def _as_decoded(record: TeacherRecord | None) -> Decoded:
    assert record is not None
    return Decoded(
        record.head_ids, record.head_logprobs, record.log_rest, record.tail_ids, record.tail_counts
    )


def ours() -> list[Ours]:
    """sparsekd's contestants: every codec at k = 64, and the default codec with draws."""
    named = [
        Ours("tkq8 (default)", "tkq8", TOP_K),
        Ours("plain", "plain", TOP_K),
        Ours("compact", "compact", TOP_K),
        Ours(f"compact, ragged to {RAGGED_MASS}", "compact", TOP_K, mass=RAGGED_MASS),
        Ours("fp16", "fp16", TOP_K),
        Ours("exact", "exact", TOP_K),
    ]
    for kept in DRAWN:
        for case in (kept, replace(kept, tail_logprobs=True)):
            named.append(Ours(f"tkq8, {case}", "tkq8", case))
    return named
