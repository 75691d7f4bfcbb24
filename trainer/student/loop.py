"""The training loop: a logit store teaches a student. Read `train_on`, then `_train`, then `_step`."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.logit_store.row import Row
from sparsekd.trainer.config.schedule import learning_rate
from sparsekd.trainer.config.schema import Config, run_folder
from sparsekd.trainer.data.batches import (
    MicroBatch,
    ReadAhead,
    check_values,
    micro_batch,
    on_device,
    pinned,
)
from sparsekd.trainer.data.order import heldout_rows, micro_batches, mixed_seed, step_rows
from sparsekd.trainer.data.skipping import RowsOrNothing
from sparsekd.trainer.run.errors import UserError
from sparsekd.trainer.run.folder import CHECKPOINTS_NAME, adopt, failures_recorded, write_done
from sparsekd.trainer.run.ranks import Ranks, leave_together, together
from sparsekd.trainer.run.tracking import NoTracker, Tracker, tracker_of
from sparsekd.trainer.state import checkpoint
from sparsekd.trainer.state.record import Commit
from sparsekd.trainer.student.engine import backward, local_gradient_norm, set_learning_rate
from sparsekd.trainer.student.evaluation import heldout_sums
from sparsekd.trainer.student.setup import Plan, announce, build, load_start, make_plan, resolve_start
from sparsekd.trainer.student.sums import all_reduced, no_sums, sums_of

_NEVER = torch.iinfo(torch.int64).max


def train_on(here: Ranks, config: Config, overrides: Sequence[str]) -> None:
    """Trains as one of a job's ranks, from the newest checkpoint of the run folder or from the start.

    Args:
        here: This rank.
        config: The composed configuration.
        overrides: What the user typed, kept in the run folder.

    Raises:
        UserError: Something that the user can put right; where possible before the run folder is touched.
    """
    folder = Path(run_folder(config))
    plan = make_plan(config, here)
    start = resolve_start(folder, config, plan, here)
    if start.step == config.train.steps:
        # Also where a run was killed between its last checkpoint and this mark.
        together(here, functools.partial(_mark_done, folder, start.step, plan, here))
        _say(here, f"{folder} is done: it stands at step {start.step} of {config.train.steps}.")
    else:
        adopt(folder, config, overrides, here)
        with failures_recorded(folder, here):
            if here.is_first:
                checkpoint.clear_leftovers(folder / CHECKPOINTS_NAME)
            engine = build(config, plan, here)
            for remark in announce(engine, config, plan, start, here):
                _say(here, remark)
            load_start(engine, start, here)
            _train(engine, config, plan, folder, start.commit or plan.fresh_commit, here)
            engine.destroy()
    _say(here, f"next: sparsekd export run.root={config.run.root} run.name={config.run.name}")


@dataclass
class _State:
    """What changes from step to step, besides the engine."""

    step: int
    rows_consumed: int
    tokens: int
    sums: Tensor  # float64 (7,), since the last line of metrics, of this rank
    first_bad_step: Tensor  # int64 scalar: the first step with a loss or gradient that is no number
    saved: int  # the step of the last checkpoint, written or gone on from
    rows: RowsOrNothing
    steps: int = 0  # since the last line of metrics
    began: float = 0.0  # clock at the last line of metrics, in seconds
    paused: float = 0.0  # seconds of evaluations and checkpoints since then
    not_removed: set[Path] = field(default_factory=set)  # old checkpoints that stayed, which was said


def _train(
    engine: deepspeed.DeepSpeedEngine, config: Config, plan: Plan, folder: Path, begin: Commit, here: Ranks
) -> None:
    """The loop: read, step, and at their times log, evaluate and save."""
    train = config.train
    state = _State(
        step=begin.step,
        rows_consumed=begin.rows_consumed,
        tokens=begin.tokens,
        # Sums in a checkpoint are over all ranks; the first one carries them on.
        sums=torch.tensor(begin.sums, dtype=torch.float64, device=here.device) * here.is_first,
        first_bad_step=torch.tensor(_NEVER, device=here.device),
        saved=begin.step,
        rows=RowsOrNothing(
            plan.store, planes=plan.planes, most=train.skip_damaged_rows, left_out=begin.skipped_rows
        ),
    )
    heldout_row = functools.partial(plan.store.read_part, "heldout", names=plan.planes)
    read_heldout = functools.partial(_batch_of, heldout_row, plan, here, heldout=True)
    heldout = heldout_rows(wanted=train.evaluate_rows, rows=plan.store.rows("heldout"))
    with (
        together(here, lambda: tracker_of(folder, config, begin.step, here)) as tracker,
        ReadAhead(_steps_ahead(plan, config, begin, state.rows, here), depth=train.prefetch_steps) as ahead,
    ):
        state.began = time.perf_counter()
        while state.step < train.steps:
            step = state.step + 1
            rate = learning_rate(
                step, peak=config.optimizer.learning_rate, steps=train.steps, schedule=config.schedule
            )
            norm = _step(engine, ahead.next(), state, rate, plan, here)
            is_last = step == train.steps
            if step == 1 or is_last or step % train.log_every == 0:
                _log_step(tracker, ahead, state, rate, norm, plan, here)
            if heldout and (is_last or (train.evaluate_every and step % train.evaluate_every == 0)):
                with _paused(state, plan, here):
                    sums = heldout_sums(
                        engine, heldout, read_heldout, micro_rows=train.micro_batch_rows, here=here
                    )
                    means = plan.means(sums, heldout=True)
                    record = {"kind": "heldout", "step": step, "tokens": state.tokens, **means}
                    together(here, functools.partial(tracker.log, record))
            if is_last or step % train.checkpoint_every == 0:
                with _paused(state, plan, here):
                    _save(engine, tracker, state, config, plan, folder, here)
    together(here, functools.partial(_mark_done, folder, state.step, plan, here))


def _mark_done(folder: Path, step: int, plan: Plan, here: Ranks) -> None:
    if here.is_first:
        write_done(folder, {"step": step, "tokens": step * plan.step_tokens})


@contextmanager
def _paused(state: _State, plan: Plan, here: Ranks) -> Iterator[None]:
    """Takes an evaluation or a checkpoint out of the time of steps, which are over when it begins."""
    _stop_on_bad_numbers(state, plan, here)
    began = time.perf_counter()
    yield
    state.paused += time.perf_counter() - began


def _step(
    engine: deepspeed.DeepSpeedEngine,
    batches: list[MicroBatch],
    state: _State,
    rate: float,
    plan: Plan,
    here: Ranks,
) -> Tensor:
    """One optimizer step over the global batch; returns the gradient norm. Nothing waits for the device."""
    # Dropout is a function of (seed, step, rank) too, so that no generator has to be saved.
    torch.manual_seed(mixed_seed(plan.seed, state.step, here.rank))
    set_learning_rate(engine, rate)
    batches = [on_device(batch, here.device) for batch in batches]
    if plan.checks_values:
        for batch in batches:
            check_values(
                batch,
                vocabulary_size=plan.loss.transform.vocabulary_size,
                objective=plan.loss.objective,
            )
    weight = torch.stack([batch.weight_sum for batch in batches]).sum()
    dist.all_reduce(weight)
    weight = torch.where(weight == 0, 1.0, weight)
    norm = None
    step_sums = no_sums(here.device)
    for batch in batches:
        output = engine(batch)
        backward(engine, output.loss, weight, here.world_size)
        step_sums += sums_of(output, batch)
        if engine.is_gradient_accumulation_boundary():
            norm = local_gradient_norm(engine)
        engine.step()
    if norm is None:
        norm = torch.as_tensor(engine.get_global_grad_norm(), device=here.device)
    state.step += 1
    state.steps += 1
    state.rows_consumed += plan.shape.global_rows
    state.tokens += plan.shape.global_rows * plan.store.manifest.sequence_length
    state.sums += step_sums
    is_bad = ~(torch.isfinite(step_sums).all() & torch.isfinite(norm))
    state.first_bad_step = torch.minimum(state.first_bad_step, torch.where(is_bad, state.step, _NEVER))
    return norm


def _log_step(
    tracker: Tracker | NoTracker,
    ahead: ReadAhead[list[MicroBatch]],
    state: _State,
    rate: float,
    norm: Tensor,
    plan: Plan,
    here: Ranks,
) -> None:
    _stop_on_bad_numbers(state, plan, here)
    _tell_left_out(tracker, state, here)
    sums = all_reduced(state.sums)
    means = plan.means(sums, heldout=False)
    record = {"kind": "train", "step": state.step, "tokens": state.tokens, **means}
    # A GPU works behind the program's back: only now, after its numbers came, are the steps over.
    now = time.perf_counter()
    seconds = now - state.began - state.paused
    record |= {
        "learning_rate": rate,
        "gradient_norm": norm.item(),
        "tokens_per_second": state.steps * plan.step_tokens / seconds,
        "data_wait_share": ahead.seconds_waited / seconds,
    }
    if here.device.type == "cuda":
        record["peak_memory_gib"] = torch.cuda.max_memory_reserved(here.device) / 2**30
    together(here, functools.partial(tracker.log, record))
    state.sums, state.steps, state.began, state.paused = no_sums(here.device), 0, now, 0.0
    ahead.seconds_waited = 0.0


def _stop_on_bad_numbers(state: _State, plan: Plan, here: Ranks) -> None:
    """Stops the run when a loss or gradient since the last look was no finite number. Waits for the device.

    Raises:
        UserError: naming the first such step and its rows (on the first rank; the others exit).
    """
    first = state.first_bad_step.clone()
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if first.item() == _NEVER:
        return
    step = int(first.item())
    rows = step_rows((step - 1) * plan.shape.global_rows, plan.shape, rows=plan.train_rows, seed=plan.seed)
    problem = UserError(
        f"Step {step} gave a loss or gradient that is not a finite number, on rows {rows} of "
        f"{plan.store.path}; nothing of it was saved. Lower optimizer.learning_rate, or check these "
        "rows with `sparsekd store verify`."
    )
    leave_together(here, problem)


def _save(
    engine: deepspeed.DeepSpeedEngine,
    tracker: Tracker | NoTracker,
    state: _State,
    config: Config,
    plan: Plan,
    folder: Path,
    here: Ranks,
) -> None:
    _tell_left_out(tracker, state, here)
    together(here, tracker.sync)
    # Sums become those of all ranks, in this process as in one that goes on from here: equal bits in both.
    total = all_reduced(state.sums)
    state.sums = total * here.is_first
    commit = replace(
        plan.fresh_commit,
        step=state.step,
        rows_consumed=state.rows_consumed,
        tokens=state.tokens,
        sums=tuple(total.tolist()),
        skipped_rows=tuple(state.rows.left_out),
    )
    began = time.perf_counter()
    place = folder / CHECKPOINTS_NAME
    path = checkpoint.save(engine, place, commit, here)
    keep = config.train.keep_checkpoints
    if here.is_first:
        left = checkpoint.prune(place, step=state.step, after=state.saved, keep=keep)
        for kept in sorted(left.keys() - state.not_removed):
            tracker.say(
                f"warning: {kept} cannot be removed ({left[kept]}); remove it by hand, training goes on."
            )
        state.not_removed |= left.keys()
    state.saved = state.step
    tracker.say(f"checkpoint {path} ({time.perf_counter() - began:.1f} s)")


def _tell_left_out(tracker: Tracker | NoTracker, state: _State, here: Ranks) -> None:
    """Logs, once each, the damaged rows that were left out since the last look."""
    for row, reason in state.rows.newly_left_out(state.step, here):
        record: dict[str, str | int] = {"kind": "skipped", "step": state.step, "tokens": state.tokens}
        together(here, functools.partial(tracker.log, record | {"row": row, "reason": reason}))


def _steps_ahead(
    plan: Plan, config: Config, begin: Commit, rows: RowsOrNothing, here: Ranks
) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches, step by step."""
    for number in range(config.train.steps - begin.step):
        consumed = begin.rows_consumed + number * plan.shape.global_rows
        parts = micro_batches(consumed, plan.shape, rank=here.rank, rows=plan.train_rows, seed=plan.seed)
        read = functools.partial(rows.read, step=begin.step + number + 1)
        yield [_batch_of(read, plan, here, part) for part in parts]


def _batch_of(
    read: Callable[[int], Row],
    plan: Plan,
    here: Ranks,
    rows: Sequence[int],
    counting: int | None = None,
    *,
    heldout: bool = False,
) -> MicroBatch:
    manifest = plan.store.manifest
    batch = micro_batch(
        [read(row) for row in rows],
        rest=plan.rest,
        target=manifest.target,
        share=1.0 if heldout else manifest.record.share,
        weighted=not heldout,
        counting=counting,
    )
    return pinned(batch) if here.device.type == "cuda" else batch


def _say(here: Ranks, text: str) -> None:
    if here.is_first:
        print(text, flush=True)
