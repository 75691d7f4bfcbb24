"""When losses on held-out rows are due, and how they are made: by the same forward as in training."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from sparsekd.trainer.config.schema import Config, TrainConfig
from sparsekd.trainer.data.batches import MicroBatch, ReadAhead, on_device
from sparsekd.trainer.data.sources import Source
from sparsekd.trainer.run.ranks import Ranks, on_first
from sparsekd.trainer.run.stop import StopWatch
from sparsekd.trainer.run.tracking import read_metrics
from sparsekd.trainer.run.vote import Vote
from sparsekd.trainer.student.feed import heldout_batch
from sparsekd.trainer.student.setup import Plan
from sparsekd.trainer.student.sums import all_reduced, no_sums, sums_of


def owes_evaluation(folder: Path, config: Config, plan: Plan, step: int, here: Ranks) -> bool:
    """Whether a run that goes on from `step` was stopped before, or in, the evaluation of that step."""
    if step == 0 or not is_evaluated(config, plan, step):
        return False
    return on_first(
        here,
        lambda: (
            not any(record["kind"] == "heldout" and record["step"] == step for record in read_metrics(folder))
        ),
    )


def heldout_losses(folder: Path, config: Config, step: int) -> dict[int, float]:
    """The losses on held-out rows of a run's steps up to this one, where `train.keep_best` needs them.

    Raises:
        DataError: A line is no line of metrics.
    """
    if not config.train.keep_best:
        return {}
    records = (record for record in read_metrics(folder) if record["kind"] == "heldout")
    return {
        record["step"]: record["loss"]
        for record in records
        if record["step"] <= step and isinstance(record.get("loss"), float)
    }


def is_evaluated(config: Config, plan: Plan, step: int) -> bool:
    """Whether the losses on held-out rows are due after a step."""
    every, train = config.train.evaluate_every, config.train
    is_due = step == train.steps or (every > 0 and step % every == 0)
    return is_due and bool(train.evaluate_rows and plan.sources.rows("heldout"))


def heldout_figures(
    engine: deepspeed.DeepSpeedEngine, train: TrainConfig, plan: Plan, here: Ranks, watch: StopWatch
) -> dict[str, Any] | None:
    """Means over held-out rows, named as in metrics.jsonl; None where the run is asked to stop meanwhile.

    Of a mixture those of each source as well, and the means of these by the sources' weights, however many
    held-out rows each has.
    """
    read = functools.partial(heldout_batch, plan, here)
    found: list[tuple[Source, dict[str, float | None]]] = []
    for source, rows in plan.sources.heldout(train.evaluate_rows):
        sums = _heldout_sums(engine, rows, read, micro_rows=train.micro_batch_rows, here=here, watch=watch)
        if sums is None:
            return None
        found.append((source, plan.means(sums, heldout=True, sources=[source])))
    if not plan.sources.is_mixture:
        return found[0][1]
    figures: dict[str, Any] = {}
    for name in {name: None for _, means in found for name in means}:
        known = [(source.weight, value) for source, means in found if (value := means.get(name)) is not None]
        weight = sum(each for each, _ in known)
        figures[name] = sum(each * value for each, value in known) / weight if known else None
    return figures | {"sources": {source.name: means for source, means in found}}


def _heldout_sums(
    engine: deepspeed.DeepSpeedEngine,
    rows: Sequence[int],
    read: Callable[[Sequence[int], int], MicroBatch],
    *,
    micro_rows: int,
    here: Ranks,
    watch: StopWatch,
) -> Tensor | None:
    """Sums over held-out rows and all ranks (see `sums`), float64 (9,), on every rank; None where the run is
    asked to stop meanwhile.

    Every rank runs as many forward passes as the others, since under ZeRO-3 each is a collective; the last
    ones may hold rows that count for nothing.

    Args:
        engine: The engine; left in training mode.
        rows: Numbers of the held-out rows.
        read: Makes a micro-batch of rows, of which only as many count as its second argument says.
        micro_rows: Rows in one forward pass.
        here: This rank.
        watch: What asks this rank to stop.
    """
    vote = Vote(watch, here.device)
    sums = no_sums(here.device)
    engine.eval()
    with torch.no_grad(), ReadAhead(_batches(rows, read, micro_rows=micro_rows, here=here), depth=2) as ahead:
        for _ in range(_passes(rows, micro_rows=micro_rows, here=here)):
            batch = on_device(ahead.next(), here.device)
            sums += sums_of(engine(batch), batch)
            vote.count(all_reduced(vote.ballot()))
            if vote.has_passed():
                break
    engine.train()
    if vote.has_passed():
        return None
    return all_reduced(sums)


def _passes(rows: Sequence[int], *, micro_rows: int, here: Ranks) -> int:
    return -(-len(rows) // (micro_rows * here.world_size))


def _batches(
    rows: Sequence[int],
    read: Callable[[Sequence[int], int], MicroBatch],
    *,
    micro_rows: int,
    here: Ranks,
) -> Iterator[MicroBatch]:
    for number in range(_passes(rows, micro_rows=micro_rows, here=here)):
        first = (number * here.world_size + here.rank) * micro_rows
        mine = list(rows[first : first + micro_rows])
        filler = [rows[0]] * (micro_rows - len(mine))
        yield read(mine + filler, len(mine))
