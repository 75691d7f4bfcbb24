"""Who makes tokens of documents and bytes of rows: this process, or others beside it, to the same result.

This process reads documents and cuts rows, a thirtieth of the work. The rest goes to `corpus.jobs` processes,
block by block of documents and shard by shard of rows, and comes back in the order of the documents: what is
written, counted and refused does not depend on how many there are.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.writer import write_shard
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.tools.processes import ITEMS_AHEAD, Processes
from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.documents import Document
from sparsekd.trainer.corpus.encoding import Block, Encoded, Encoder, blocks_of, size_of
from sparsekd.trainer.corpus.findings import Records

CHARACTERS_AHEAD = 1 << 24
"""For each process: of documents that are encoded or wait for it, unless one alone has more."""

SHARDS_AHEAD = 2
"""For each process: shards that are written or wait for it."""


class Shard(NamedTuple):
    """Rows that `write_shard` takes."""

    path: StorePath
    manifest: Manifest
    split: str
    number: int
    rows: list[Row]


class _Found(NamedTuple):
    """What became of a block."""

    parts: list[Encoded]
    records: Records


@dataclass(frozen=True)
class _Work:
    """What another process does."""

    tokenizer: PreTrainedTokenizerBase
    config: CorpusConfig

    @cached_property
    def _encoder(self) -> Encoder:
        # There are processes for all processors; a tokenizer's own threads would only be in their way.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return Encoder(self.tokenizer, self.config)

    def __call__(self, item: Block | Shard) -> _Found | None:
        if isinstance(item, Shard):
            write_shard(*item)
            return None
        records = Records()
        return _Found([part for batch in self._encoder.encode(item, records) for part in batch], records)


class Workers:
    """Encodes documents and writes shards; use it in a `with` block.

    Args:
        tokenizer: The store's tokenizer.
        config: How documents are encoded, and by how many processes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: CorpusConfig) -> None:
        self._work, self._jobs = _Work(tokenizer, config), config.jobs
        self._processes: Processes[Any, Any] | None = None
        self._writing: deque[Future[None]] = deque()
        if self._jobs > 1:
            self._processes = Processes(self._work, self._jobs, what="prepare", option="corpus.jobs")
        else:
            self._encoder = Encoder(tokenizer, config)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._processes is not None:
            self._processes.__exit__(kind, error, trace)

    def encoded(self, documents: Iterable[tuple[int, Document]], records: Records) -> Iterator[list[Encoded]]:
        """Yields the tokens of numbered documents in their order, as `Encoder.encode` does.

        Raises:
            DataError: A document cannot be encoded and is not to be skipped; the first of them.
            WorkerKilledError: A process was killed.
        """
        if self._processes is None:
            for block in blocks_of(documents):
                yield from self._encoder.encode(block, records)
            return
        waiting: deque[tuple[Future[_Found], int]] = deque()
        ahead = 0
        for block in blocks_of(documents):
            size = sum(size_of(document) for _, document in block)
            while waiting and (
                len(waiting) == self._jobs * ITEMS_AHEAD or ahead + size > self._jobs * CHARACTERS_AHEAD
            ):
                future, done = waiting.popleft()
                yield self._taken(self._processes.result(future), records)
                ahead -= done
            waiting.append((self._processes.begin(block), size))
            ahead += size
        while waiting:
            yield self._taken(self._processes.result(waiting.popleft()[0]), records)

    def _taken(self, found: _Found, records: Records) -> list[Encoded]:
        records.take_in(found.records)
        return found.parts

    def write(self, shard: Shard) -> None:
        """Writes a shard, or has it written.

        Raises:
            StoreError: This one or an earlier one cannot be written.
            WorkerKilledError: A process was killed.
        """
        if self._processes is None:
            write_shard(*shard)
            return
        while len(self._writing) >= self._jobs * SHARDS_AHEAD:
            self._processes.result(self._writing.popleft())
        self._writing.append(self._processes.begin(shard))

    def finish(self) -> None:
        """Waits until all shards are written.

        Raises:
            StoreError: One cannot be.
            WorkerKilledError: A process was killed.
        """
        while self._processes is not None and self._writing:
            self._processes.result(self._writing.popleft())
