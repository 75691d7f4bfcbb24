"""Which token ids occur in a store's text: an id that a model lacks matters only where the text has it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from sparsekd.logit_store.protocol.reader import LogitStore


class Occurrence(NamedTuple):
    """An id in the text, and where it stands."""

    token_id: int
    place: str


class UsedIds:
    """The ids in the rows of a store, padding included, since a model sees that as well.

    Rows are read when there is a question, and no further than to the answer: where it is no, to the end.

    Attributes:
        store: The store.
    """

    def __init__(self, store: LogitStore, *, looks: bool = True) -> None:
        """Of the ranks of a job one looks for all of them; to the others nothing occurs."""
        self.store = store
        self._looks = looks
        # By id: where it was found first.
        self._found: dict[int, str] = {}
        self._unread = self._rows()

    def first(self, ids: Iterable[int]) -> Occurrence | None:
        """One of some ids that occurs, or None. An id that the store's vocabulary lacks never does."""
        size = self.store.manifest.tokenizer.vocabulary_size
        possible = {index for index in ids if index < size}
        if not possible or not self._looks:
            return None
        if known := possible & self._found.keys():
            return Occurrence(min(known), self._found[min(known)])
        for split, row in self._unread:
            token_ids = self.store.read_planes(split, row, ("token_ids",))["token_ids"]
            distinct, positions = np.unique(token_ids, return_index=True)
            places = {
                int(index): f"split {split}, row {row}, position {position}"
                for index, position in zip(distinct, positions, strict=True)
            }
            self._found = places | self._found
            if known := possible & places.keys():
                return Occurrence(min(known), places[min(known)])
        return None

    def _rows(self) -> Iterator[tuple[str, int]]:
        for split in self.store.manifest.splits:
            for row in range(self.store.rows(split)):
                yield split, row
