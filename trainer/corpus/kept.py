"""Tokens of documents from the pass that encodes them to the one that writes them, in a file without a name.

Where there is no room for it, nothing is kept, and the documents are encoded once more.
"""

import contextlib
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from sparsekd.logit_store.places.paths import StorePath
from sparsekd.trainer.corpus.encoding import Encoded


class Kept:
    """Tokens that are kept on disk; use it in a `with` block, at whose end they go.

    Args:
        store: The store that will have them: they lie on its disk, which has room for more, where that is
            this machine's.
    """

    def __init__(self, store: StorePath) -> None:
        near = None
        if isinstance(store, Path):
            near = next((place for place in store.absolute().parents if place.is_dir()), None)
        self._file: IO[bytes] | None = None
        with contextlib.suppress(OSError):
            self._file = tempfile.TemporaryFile(dir=near)  # noqa: SIM115  # closed by `_drop`

    def __enter__(self) -> "Kept":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()

    @property
    def are_all(self) -> bool:
        """Whether all that were added are there."""
        return self._file is not None

    def add(self, batch: list[Encoded]) -> None:
        """Keeps tokens, behind those that were added before; where that fails, no longer any."""
        if self._file is None:
            return
        try:
            pickle.dump(batch, self._file, protocol=pickle.HIGHEST_PROTOCOL)
            self._file.flush()
        except OSError:
            self._drop()

    def batches(self) -> Iterator[list[Encoded]]:
        """Yields all that were added, in their order."""
        assert self._file is not None
        end = self._file.tell()
        self._file.seek(0)
        while self._file.tell() < end:
            yield pickle.load(self._file)

    def _drop(self) -> None:
        file, self._file = self._file, None
        with contextlib.suppress(OSError):  # what could not be written is tried once more
            if file is not None:
                file.close()
