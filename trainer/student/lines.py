"""What a run writes of its steps: the lines of metrics, on the first rank, from the numbers of all."""

import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from sparsekd.trainer.data.batches import MicroBatch, ReadAhead
from sparsekd.trainer.data.order import step_rows
from sparsekd.trainer.run.ranks import Ranks, on_first
from sparsekd.trainer.run.tracking import NoTracker, Record, Tracker
from sparsekd.trainer.student.setup import Plan
from sparsekd.trainer.student.step import State, stop_on_bad_numbers
from sparsekd.trainer.student.sums import all_reduced, no_sums

_MOST_ROWS, _MOST_LETTERS = 1024, 8192
"""Of a step, in a line of metrics, whose last one is looked for at the end of the file."""


@contextmanager
def paused(state: State, plan: Plan, here: Ranks) -> Iterator[None]:
    """Takes an evaluation or a checkpoint out of the time of steps, which are over when it begins."""
    stop_on_bad_numbers(state, plan, here)
    began = time.perf_counter()
    yield
    state.speed.pause(time.perf_counter() - began)


def log_step(
    tracker: Tracker | NoTracker,
    ahead: ReadAhead[list[MicroBatch]],
    state: State,
    rate: float,
    norm: Tensor,
    plan: Plan,
    here: Ranks,
) -> None:
    """Writes the line of a step, and before it those of steps that were spikes or left out; waits for the
    device."""
    left_out = stop_on_bad_numbers(state, plan, here)
    state.first_skipped = None
    tell_left_out(tracker, state, here)
    reduced = all_reduced(torch.cat([state.sums, state.spikes.losses()]))
    sums, losses = reduced.split([len(state.sums), len(reduced) - len(state.sums)])
    means = plan.means(sums, heldout=False)
    record = {"kind": "train", "step": state.step, "tokens": state.tokens, **means}
    # A GPU works behind the program's back: only now, after its numbers came, are the steps over.
    record |= {"learning_rate": rate, **state.speed.line(ahead.seconds_waited)}
    record["gradient_norm"] = norm.item() if math.isfinite(norm.item()) else None
    lines = [*_lines_of_spikes(state, losses, plan), record]
    if left_out is not None:
        told = {"step": left_out.step, "tokens": left_out.step * plan.step_tokens, "skipped": state.skipped}
        lines.insert(0, {"kind": "nonfinite", **told, "found": left_out.found[:_MOST_LETTERS]})
    on_first(here, lambda: [tracker.log(line) for line in lines])
    state.sums = no_sums(here.device)
    ahead.seconds_waited = 0.0


def _lines_of_spikes(state: State, losses: Tensor, plan: Plan) -> list[Record]:
    lines: list[Record] = []
    for spike in state.spikes.found(losses):
        rows = step_rows((spike.step - 1) * plan.shape.global_rows, plan.shape, plan.order)[:_MOST_ROWS]
        line = {"kind": "spike", **asdict(spike), "tokens": spike.step * plan.step_tokens}
        lines.append({**line, "rows": plan.sources.by_source(rows) if plan.sources.is_mixture else rows})
    return lines


def tell_left_out(tracker: Tracker | NoTracker, state: State, here: Ranks) -> None:
    """Logs, once each, the damaged rows that were left out since the last look."""
    for row, reason in state.rows.newly_left_out(state.step, here):
        record: dict[str, str | int] = {"kind": "skipped", "step": state.step, "tokens": state.tokens}
        on_first(here, functools.partial(tracker.log, record | {"row": row, "reason": reason}))
