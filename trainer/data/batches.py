"""Rows of a store become the tensors of a micro-batch, and a thread reads them ahead of the training loop.

Shapes: B rows of a micro-batch, M positions of each that pass the model (`model_inputs`), P of the B * M
reach the head, K stored entries.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekd.kernels import values
from sparsekd.kernels.objective import Objective
from sparsekd.kernels.targets import NOTHING, SparseTargets
from sparsekd.kernels.temperature import RestFormula, rest_at_temperature, rest_formula
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import (
    IGNORED_LABEL,
    Row,
    is_real,
    labels_of,
    weights_of_positions,
)
from sparsekd.trainer.data.inputs import model_inputs
from sparsekd.trainer.data.sources import Records, SourceRow
from sparsekd.trainer.run.errors import DataError


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of the student needs.

    A dataclass and not a tuple: DeepSpeed's hooks take tuples apart to look for activations, of which there
    are none here.
    """

    token_ids: Tensor  # (B, M) int64
    position_ids: Tensor  # (B, M) int64, restarting at each document
    positions: Tensor  # (P,) int64, ascending: which of the B * M positions reach the head
    labels: Tensor  # (P,) int64, the next token, or IGNORED_LABEL
    ce_weights: Tensor  # (P,) float32
    kd_weights: Tensor  # (P,) float32
    targets: SparseTargets | None  # of P positions; None where the distillation term has weight 0
    weight_sum: Tensor  # float32 scalar: what the micro-batch adds to the denominator of the loss
    routed: Tensor  # (B, M) bool: tokens, no padding, of rows in which the loss counts somewhere
    scale: Tensor | None = None  # float32 scalar, > 0: of the loss that is trained on; None for 1


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


class HeadPositions(NamedTuple):
    """The positions of some rows that reach the head, in the rows' order; those that fill it up weigh 0."""

    positions: NDArray[np.int64]  # (P,), ascending: which of the B * M positions they are
    labels: NDArray[np.int64]  # (P,), or IGNORED_LABEL
    ce_weights: NDArray[np.float32]  # (P,)
    kd_weights: NDArray[np.float32]  # (P,)
    records: NDArray[np.int64]  # (P,), which of the rows' records, all in a row; -1 where none is read
    weight_sum: np.float32  # of the counted positions: what the rows add to the denominator of the loss


def head_positions(
    labels: NDArray[np.int64],
    ce_weights: NDArray[np.float32],
    kd_weights: NDArray[np.float32],
    recorded: NDArray[np.bool_] | None,
    *,
    multiple: int = 1,
) -> HeadPositions:
    """Leaves out the positions of rows that nothing is learned from.

    Made on the CPU, so that the head's input can be gathered on the device without a wait for it.

    Args:
        labels: [B, M]; IGNORED_LABEL where there is none.
        ce_weights: [B, M], the weight of each position's document where the loss counts, else 0. Their sum
            is the denominator, of the positions without a label, too.
        kd_weights: [B, M], the same times the inverse of the probability with which the position was
            recorded, and 0 where it was not.
        recorded: [B, M], which positions have a record; None where every position has one.
        multiple: Of which P is one, so that shapes repeat: the first of the positions left out come in, with
            weight 0, as far as there are any. Where nothing is learned from at all, P stays 0.

    Raises:
        ValueError: a weight in `kd_weights` where nothing is recorded.
    """
    weight_sum = np.float32(ce_weights.sum(dtype=np.float64))
    ce_weights = np.where(labels == IGNORED_LABEL, np.float32(0), ce_weights)
    if recorded is None:
        records = np.arange(labels.size)
    else:
        records = np.where(recorded, recorded.cumsum().reshape(recorded.shape) - 1, -1).reshape(-1)
    reaches = ((ce_weights != 0) | (kd_weights != 0)).reshape(-1)
    # Others than those that count, so that each position stands once and its gradient has one addend.
    reaches[np.flatnonzero(~reaches)[: -np.count_nonzero(reaches) % multiple]] = True
    positions = np.flatnonzero(reaches)
    chosen = kd_weights.reshape(-1)[positions]
    read = np.where(chosen != 0, records[positions], -1)
    lost = positions[(chosen != 0) & (read < 0)]
    if lost.size:
        row, position = divmod(int(lost[0]), labels.shape[1])
        raise ValueError(
            f"kd_weights at row {row}, position {position} is {kd_weights[row, position]}, expected 0, "
            "because the position has no record"
        )
    of_label = ce_weights.reshape(-1)[positions]
    return HeadPositions(
        positions=positions,
        labels=labels.reshape(-1)[positions],
        ce_weights=of_label,
        kd_weights=chosen,
        records=read,
        weight_sum=weight_sum,
    )


def micro_batch(
    found: Sequence[SourceRow],
    *,
    target: str = "next_token",
    weighted: bool = True,
    counting: int | None = None,
    multiple: int = 1,
) -> MicroBatch:
    """Stacks rows into the tensors of a forward pass, on the CPU.

    Args:
        found: B rows of equal length, and how the records of each are read: alike in whether they are.
        target: The manifest's: what a label is.
        weighted: Whether weights of documents count; held-out figures are one per counted position.
        counting: How many of the rows count; those behind them fill a forward pass. None: all do.
        multiple: Of which the number of positions that reach the head is one (`head_positions`).
    """
    rows, records = [row for row, _ in found], [records for _, records in found]
    token_ids, places = model_inputs(rows)
    passes = slice(token_ids.shape[1])  # behind it there is nothing but padding
    mask = np.stack([row.loss_mask[passes] for row in rows])
    weights = mask.astype(np.float32)
    if weighted:
        weights *= np.stack([weights_of_positions(row)[passes] for row in rows])
    if counting is not None:
        weights[counting:] = 0
    recorded, kd_weights = None, np.zeros_like(weights)
    if records[0].rest is not None:
        recorded = np.stack([row.recorded[passes] for row in rows if row.recorded is not None])
        kd_weights = weights * recorded
        kd_weights /= np.array([[each.share] for each in records], np.float32)
    labels = np.stack([labels_of(row, target)[passes] for row in rows])
    head = head_positions(labels, weights, kd_weights, recorded, multiple=multiple)
    return MicroBatch(
        token_ids=token_ids,
        position_ids=places,
        positions=torch.from_numpy(head.positions),
        labels=torch.from_numpy(head.labels),
        ce_weights=torch.from_numpy(head.ce_weights),
        kd_weights=torch.from_numpy(head.kd_weights),
        targets=None if recorded is None else _targets(rows, records, recorded, head),
        weight_sum=torch.tensor(head.weight_sum),
        # By rows, since one that was left out may hold the tokens of another.
        routed=torch.from_numpy(
            np.stack([is_real(row)[passes] for row in rows]) & (weights > 0).any(1, keepdims=True)
        ),
    )


def _targets(
    rows: Sequence[Row], records: Sequence[Records], recorded: NDArray[np.bool_], head: HeadPositions
) -> SparseTargets:
    """The teacher's records at P positions, of rows of one source or several.

    Args:
        rows: B rows.
        records: [B], how their records are read.
        recorded: [B, M], where each has them.
        head: The positions.
    """
    kinds = list(dict.fromkeys(records))
    if len(kinds) == 1:
        assert kinds[0].rest is not None
        return sparse_targets(rows, kinds[0].rest, head.records)
    row_of, counts = head.positions // recorded.shape[1], recorded.sum(axis=1)
    before = counts.cumsum() - counts  # records of the rows before each
    parts = []
    for kind in kinds:
        assert kind.rest is not None
        is_mine = np.array([each == kind for each in records])
        mine = np.where(is_mine, counts, 0)
        chosen = np.flatnonzero(is_mine[row_of] & (head.records >= 0))
        places = (head.records - before[row_of] + (mine.cumsum() - mine)[row_of])[chosen]
        its_rows = [row for row, own in zip(rows, is_mine, strict=True) if own]
        parts.append((torch.from_numpy(chosen), sparse_targets(its_rows, kind.rest, places)))
    return _joined(parts, len(head.positions))


def _joined(parts: Sequence[tuple[Tensor, SparseTargets]], count: int) -> SparseTargets:
    """Targets of `count` positions from those of some each, which may differ in k and n; the rest is
    `NOTHING`."""
    k = max(part.head_size for _, part in parts)
    draws = max(part.ids.shape[1] - part.head_size for _, part in parts)
    widths = {"ids": (k + draws,), "head_logprobs": (k,), "tail_counts": (draws,)}
    whole = {
        name: value.new_full((count, *widths.get(name, ())), NOTHING[name])
        for name, value in parts[0][1]._asdict().items()
    }
    for chosen, part in parts:
        own = part.head_size
        whole["ids"][chosen, :own] = part.ids[:, :own]
        whole["ids"][chosen, k : k + part.ids.shape[1] - own] = part.ids[:, own:]
        whole["head_logprobs"][chosen, :own] = part.head_logprobs
        whole["tail_counts"][chosen, : part.tail_counts.shape[1]] = part.tail_counts
        whole["log_rest"][chosen], whole["entropy"][chosen] = part.log_rest, part.entropy
    return SparseTargets(**whole)


def sparse_targets(rows: Sequence[Row], rest: RestFormula, places: NDArray[np.int64]) -> SparseTargets:
    """The teacher's records at P positions, ids = head | draws, log R as `rest` says.

    Planes that were not decoded, which the loss does not read (`objective.needed_planes`), are `NOTHING`.

    Args:
        rows: B rows.
        rest: How the records give log R at the objective's temperature.
        places: [P], which of the rows' records, one row's after another's; -1 is filled with `NOTHING`.
    """
    there = places >= 0
    records = [row.teacher for row in rows if row.teacher is not None]
    count = sum(int(np.count_nonzero(row.recorded)) for row in rows if row.recorded is not None)

    def plane(name: str) -> Tensor | None:
        values = np.concatenate([getattr(record, name) for record in records])
        return None if count and not len(values) else torch.from_numpy(values[places[there]])

    lists = {name: plane(name) for name in ("head_ids", "tail_ids", "head_logprobs", "tail_counts")}
    width = {
        name: torch.empty(int(there.sum()), 0) if value is None else value for name, value in lists.items()
    }
    log_rest, rest_entropy = plane("log_rest"), plane("rest_entropy")
    nothing = torch.zeros(int(there.sum()))
    entropy = plane("entropy")
    found = {
        "ids": torch.cat([width["head_ids"], width["tail_ids"]], dim=1).long(),
        "head_logprobs": width["head_logprobs"].float(),
        "tail_counts": width["tail_counts"].float(),
        "log_rest": nothing
        if log_rest is None
        else rest_at_temperature(rest, log_rest, nothing if rest_entropy is None else rest_entropy),
        "entropy": nothing if entropy is None else entropy,
    }
    if there.all():
        return SparseTargets(**found)
    rows_there = torch.from_numpy(there)
    for name, value in found.items():
        found[name] = value.new_full((len(places), *value.shape[1:]), NOTHING[name])
        found[name][rows_there] = value
    return SparseTargets(**found)


def check_values(batch: MicroBatch, *, vocabulary_size: int, objective: Objective) -> None:
    """Checks a micro-batch where it lies, after its way to the device. Waits for the device: for debugging.

    Args:
        batch: To be checked.
        vocabulary_size: The true one.
        objective: For whose temperature the records' log R was made.

    Raises:
        DataError: naming what is not as the store's format promises.
    """
    try:
        _check_token_ids(batch.token_ids, vocabulary_size)
        _check_positions(batch)
        values.check_values(
            batch.targets,
            batch.labels,
            batch.ce_weights,
            batch.kd_weights,
            vocabulary_size=vocabulary_size,
            objective=objective,
        )
    except ValueError as error:
        raise DataError(
            f"In a micro-batch, positions counted among the {batch.positions.numel()} that reach the head, "
            f"{error}, which no store can hold; check the store with `sparsekd store verify` and the "
            "machine's memory."
        ) from error


def _check_token_ids(token_ids: Tensor, vocabulary_size: int) -> None:
    good = (token_ids >= 0) & (token_ids < vocabulary_size)
    if not bool(good.all()):
        row, position = (~good).nonzero()[0].tolist()
        raise ValueError(
            f"token_ids at row {row}, position {position} is {token_ids[row, position].item()}, expected an "
            f"id from 0 to {vocabulary_size - 1}"
        )


def _check_positions(batch: MicroBatch) -> None:
    inside = (batch.positions >= 0) & (batch.positions < batch.token_ids.numel())
    if not bool(inside.all()):
        place = int((~inside).nonzero()[0])
        raise ValueError(
            f"positions at {place} is {batch.positions[place].item()}, expected a number from 0 to "
            f"{batch.token_ids.numel() - 1}"
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
