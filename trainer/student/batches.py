"""Rows of a store become the tensors of a micro-batch, and a thread reads them ahead of the training loop.

Shapes: B rows of a micro-batch, L tokens of a row, N = B * L positions, K stored entries, k head, n draws.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekd.kernels import values
from sparsekd.kernels.objective import Objective
from sparsekd.kernels.targets import SparseTargets
from sparsekd.kernels.temperature import RestFormula, rest_at_temperature, rest_formula
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import NO_ID, Row, position_ids
from sparsekd.trainer.errors import DataError

IGNORED_LABEL = -100
"""Label of a position without a true next token, as torch's cross-entropy has it."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of the student needs.

    A dataclass and not a tuple: DeepSpeed's hooks take tuples apart to look for activations, of which there
    are none here.
    """

    token_ids: Tensor  # (B, L) int64
    position_ids: Tensor  # (B, L) int64, restarting at each document
    labels: Tensor  # (N,) int64, the next token, or IGNORED_LABEL
    weights: Tensor  # (N,) float32, 1 where the loss counts
    targets: SparseTargets | None  # None where the distillation term has weight 0


def rest_formula_of(objective: Objective, manifest: Manifest) -> RestFormula | None:
    """How a store's records give log R at the objective's temperature; None where no record is needed."""
    if objective.kd_weight == 0:
        return None
    record = manifest.record
    return rest_formula(
        objective.temperature,
        temperatures=record.temperatures,
        rest_size=manifest.tokenizer.vocabulary_size - record.k,
    )


def micro_batch(rows: Sequence[Row], *, rest: RestFormula | None) -> MicroBatch:
    """Stacks rows into the tensors of a forward pass, on the CPU.

    Args:
        rows: B rows of equal length.
        rest: How the records give log R at the objective's temperature; None leaves the teacher out.
    """
    token_ids = np.stack([row.token_ids for row in rows]).astype(np.int64)
    mask = np.stack([row.loss_mask for row in rows])
    labels = np.full_like(token_ids, IGNORED_LABEL)
    labels[:, :-1] = token_ids[:, 1:]
    labels[~mask] = IGNORED_LABEL
    return MicroBatch(
        token_ids=torch.from_numpy(token_ids),
        position_ids=torch.from_numpy(np.stack([position_ids(row) for row in rows]).astype(np.int64)),
        labels=torch.from_numpy(labels.reshape(-1)),
        weights=torch.from_numpy(mask.reshape(-1).astype(np.float32)),
        targets=None if rest is None else sparse_targets(rows, rest),
    )


def sparse_targets(rows: Sequence[Row], rest: RestFormula) -> SparseTargets:
    """The teacher's records of B rows as N = B * L positions, ids = head | draws, log R as `rest` says."""
    ids = np.concatenate(
        [_spread(rows, "head_ids", NO_ID), _spread(rows, "tail_ids", NO_ID)], axis=1
    )  # (N, K)
    return SparseTargets(
        ids=torch.from_numpy(ids.astype(np.int64)),
        head_logprobs=torch.from_numpy(_spread(rows, "head_logprobs", -np.inf)),
        tail_counts=torch.from_numpy(_spread(rows, "tail_counts", 0).astype(np.float32)),
        log_rest=rest_at_temperature(
            rest,
            torch.from_numpy(_spread(rows, "log_rest", 0)),
            torch.from_numpy(_spread(rows, "rest_entropy", 0)),
        ),
        entropy=torch.from_numpy(_spread(rows, "entropy", 0)),
    )


def _spread(rows: Sequence[Row], name: str, nothing: float) -> NDArray[Any]:
    """A record plane of all rows at their N positions; `nothing` where no record stands."""
    parts = []
    for row in rows:
        values = getattr(row.teacher, name)
        assert row.recorded is not None
        part = np.full((len(row.recorded), *values.shape[1:]), nothing, values.dtype)
        part[row.recorded] = values
        parts.append(part)
    return np.concatenate(parts)


def counting_rows(batch: MicroBatch, count: int) -> MicroBatch:
    """The same micro-batch, of which only the first `count` rows count; the others fill a forward pass."""
    weights = batch.weights.reshape(batch.token_ids.shape).clone()
    weights[count:] = 0.0
    return replace(batch, weights=weights.reshape(-1))


def check_values(batch: MicroBatch, *, vocabulary_size: int, temperature: float) -> None:
    """Checks a micro-batch where it lies, after its way to the device. Waits for the device: for debugging.

    Args:
        batch: To be checked.
        vocabulary_size: The true one.
        temperature: The objective's, for which the records' log R was made.

    Raises:
        DataError: naming what is not as the store's format promises.
    """
    try:
        _check_token_ids(batch.token_ids, vocabulary_size)
        values.check_values(
            batch.targets,
            batch.labels,
            batch.weights,
            vocabulary_size=vocabulary_size,
            temperature=temperature,
        )
    except ValueError as error:
        raise DataError(
            f"In a micro-batch {error}, which no store can hold; check the store with `sparsekd store "
            "verify` and the machine's memory."
        ) from error


def _check_token_ids(token_ids: Tensor, vocabulary_size: int) -> None:
    good = (token_ids >= 0) & (token_ids < vocabulary_size)
    if not bool(good.all()):
        row, position = (~good).nonzero()[0].tolist()
        raise ValueError(
            f"token_ids at row {row}, position {position} is {token_ids[row, position].item()}, expected an "
            f"id from 0 to {vocabulary_size - 1}"
        )


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Copies a (pinned) micro-batch to the device without waiting."""
    return _each_tensor(batch, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(batch: MicroBatch) -> MicroBatch:
    """The micro-batch in page-locked memory, from which a GPU copies without the CPU's help."""
    return _each_tensor(batch, lambda tensor: tensor.pin_memory())


def _each_tensor(batch: MicroBatch, change: Callable[[Tensor], Tensor]) -> MicroBatch:
    values: dict[str, Any] = {item.name: getattr(batch, item.name) for item in fields(batch)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = change(value)
        elif value is not None:
            values[name] = SparseTargets(*(change(tensor) for tensor in value))
    return MicroBatch(**values)


Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """Takes items from an iterator in a thread, a bounded number ahead, in their own order.

    An exception in the thread is raised again by the `next()` that would have returned its item.
    `seconds_waited` grows by the time that `next()` had to wait.
    """

    def __init__(self, items: Iterator[Item], *, depth: int) -> None:
        self.seconds_waited = 0.0
        self._items = items
        self._ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self._thread.start()

    def next(self) -> Item:
        """The next item.

        Raises:
            StopIteration: There are no more.
            Exception: Whatever stopped the thread.
        """
        began = time.perf_counter()
        item, problem = self._ready.get()
        self.seconds_waited += time.perf_counter() - began
        if problem is not None:
            raise problem
        assert item is not None
        return item

    def __enter__(self) -> "ReadAhead[Item]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _read(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as problem:  # it belongs to the loop, whatever it is
            self._put((None, problem))

    def _put(self, entry: tuple[Item | None, BaseException | None]) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
