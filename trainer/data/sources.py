"""The stores that a run learns from, as one space of rows: those of the first source, then of the second, ...

So orders, checkpoints and messages name a row by one number, whether a run reads one store or a mixture.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sparsekd.kernels.temperature import RestFormula
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.row import Row
from sparsekd.trainer.data.mixed import shares
from sparsekd.trainer.data.order import heldout_rows

Message = bytes | memoryview | None


@dataclass(frozen=True)
class Records:
    """How the records of some rows are read; equal for rows whose records stand in planes of one shape.

    Attributes:
        rest: how they give log R at the objective's temperature; None leaves the teacher out.
        share: probability with which each counted position was recorded; the distillation weighs those that
            were by its inverse.
        source: the name of the source.
    """

    rest: RestFormula | None
    share: float = 1.0
    source: str = ""


class SourceRow(NamedTuple):
    """A row, and how its records are read."""

    row: Row
    records: Records


@dataclass(frozen=True)
class Source:
    """A store that rows are taken from.

    Attributes:
        name: in the mixture; "" for a run's only store.
        store: the store.
        weight: in proportion to which rows are taken.
        planes: of the records: those that the loss reads, and so are decoded.
        records: how those of the training rows are read; held-out rows are recorded at every position.
    """

    name: str
    store: LogitStore
    weight: float
    planes: frozenset[str]
    records: Records


class Sources:
    """All stores of a run. Reading is as of `LogitStore`, by the numbers of the one space of rows.

    Args:
        members: One, or those of a mixture, alike in what `mixture.check_alike` names.
    """

    def __init__(self, members: Sequence[Source]) -> None:
        self.members = tuple(members)
        self._ends = {
            split: list(itertools.accumulate(_rows(source, split) for source in members))
            for split in ("train", "heldout")
        }

    @classmethod
    def of_one(cls, store: LogitStore, planes: Collection[str], records: Records) -> "Sources":
        """A run's only store."""
        return cls([Source("", store, store.rows("train"), frozenset(planes), records)])

    @property
    def first(self) -> LogitStore:
        """Stands for all where they are alike: target, sequence length, tokenizer."""
        return self.members[0].store

    @property
    def is_mixture(self) -> bool:
        return self.members[0].name != ""

    @property
    def digest(self) -> str:
        """Identity of the content of all, sha256 in hex."""
        return joined_digest({source.name: source.store.digest for source in self.members})

    def rows(self, split: str) -> int:
        """Rows of all sources."""
        return self._ends[split][-1]

    def place(self, split: str, row: int) -> tuple[Source, int]:
        """The source that a row is of, and its number there."""
        ends = self._ends[split]
        number = bisect.bisect_right(ends, row)
        return self.members[number], row - (ends[number - 1] if number else 0)

    def read(self, split: str, row: int, *, message: Message = None) -> SourceRow:
        """A row with the planes that the loss reads; raises as `LogitStore.read_part`."""
        source, number = self.place(split, row)
        found = source.store.read_part(split, number, source.planes, message=message)
        is_heldout = split == "heldout"
        return SourceRow(found, replace(source.records, share=1.0) if is_heldout else source.records)

    def read_messages(self, split: str, first: int, stop: int, *, keep: bool = True) -> list[Message]:
        """Stored bytes of neighbouring rows of one source; see `LogitStore.read_messages`."""
        source, number = self.place(split, first)
        return source.store.read_messages(split, number, number + stop - first, keep=keep)

    def heldout(self, wanted: int) -> list[tuple[Source, list[int]]]:
        """The held-out rows that stand for the sources: shared out by their weights, at least one each,
        spread evenly over its split. A source may have fewer, or none.

        Args:
            wanted: Rows of all together, or one each where that is more; 0 for none.
        """
        firsts = zip((0, *self._ends["heldout"][:-1]), self.members, strict=True)
        able = [(first, source) for first, source in firsts if _rows(source, "heldout")]
        counts = shares([source.weight for _, source in able], wanted)
        found = []
        for (first, source), count in zip(able, counts, strict=True):
            rows = heldout_rows(wanted=max(count, min(wanted, 1)), rows=_rows(source, "heldout"))
            if rows:
                found.append((source, [first + row for row in rows]))
        return found

    def by_source(self, rows: Sequence[int]) -> dict[str, list[int]]:
        """Numbers of training rows in the sources that they are of, by these names."""
        found: dict[str, list[int]] = {}
        for row in rows:
            source, number = self.place("train", row)
            found.setdefault(source.name, []).append(number)
        return found

    def told(self, rows: Sequence[int]) -> str:
        """Training rows for people: `rows [3, 1] of PATH`."""
        paths = {source.name: source.store.path for source in self.members}
        return " and ".join(
            f"rows {numbers} of {paths[name]}" for name, numbers in self.by_source(rows).items()
        )

    def __str__(self) -> str:
        return ", ".join(str(source.store.path) for source in self.members)


def joined_digest(each: dict[str, str]) -> str:
    """One digest for those of a run's stores, by the sources' names; a single store's is its own."""
    if list(each) == [""]:
        return each[""]
    return hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()


def _rows(source: Source, split: str) -> int:
    return source.store.rows(split) if split in source.store.manifest.splits else 0
