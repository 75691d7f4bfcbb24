"""Rows that are read one by one, when they are written: what becomes a shard need not fit in memory."""

from collections.abc import Sequence
from typing import Protocol, overload

from sparsekd.logit_store.row import Row


class Rows(Protocol):
    """Rows that can be read in any order."""

    @property
    def count(self) -> int:
        """Returns how many there are."""

    def get(self, index: int) -> Row:
        """Returns one, from 0 to count - 1; a `StoredRow` is copied without being decoded."""


class OneByOne(Sequence[Row]):
    """Some of these rows, each read when it is asked for: only one is in memory."""

    def __init__(self, rows: Rows, places: range) -> None:
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return OneByOne(self._rows, self._places[index])
        return self._rows.get(self._places[index])
