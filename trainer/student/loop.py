"""The training loop: a logit store teaches a student. Read `train_on`, then `_train`, then `take_step`."""

import functools
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import deepspeed
import torch

from sparsekd.trainer.config.schedule import learning_rate
from sparsekd.trainer.config.schema import Config, run_folder
from sparsekd.trainer.data.batches import ReadAhead
from sparsekd.trainer.data.skipping import RowsOrNothing
from sparsekd.trainer.run.failure import FailureWatch, failures_recorded, told_first
from sparsekd.trainer.run.folder import (
    CHECKPOINTS_NAME,
    DONE_NAME,
    LOGS_NAME,
    adopt,
    write_done,
    write_stopped,
)
from sparsekd.trainer.run.owner import Claim, owned
from sparsekd.trainer.run.pulse import Pulse
from sparsekd.trainer.run.ranks import Ranks, gather, on_first, together
from sparsekd.trainer.run.stop import StopRequest, StopWatch, watched
from sparsekd.trainer.run.tracking import NoTracker, Tracker, seconds_of_run, tracker_of
from sparsekd.trainer.run.vote import Vote, asked
from sparsekd.trainer.state import checkpoint
from sparsekd.trainer.state.record import Commit
from sparsekd.trainer.state.resume import Start, choose_start
from sparsekd.trainer.state.save import Saver
from sparsekd.trainer.student.announcement import announce, room_for_checkpoints, what_runs
from sparsekd.trainer.student.early_stop import stopped_early, unless_asked
from sparsekd.trainer.student.evaluation import heldout_figures, heldout_losses, is_evaluated, owes_evaluation
from sparsekd.trainer.student.feed import steps_ahead
from sparsekd.trainer.student.lines import log_step, paused, tell_left_out
from sparsekd.trainer.student.setup import Plan, build, flops_of, load_start, make_plan, prove_student
from sparsekd.trainer.student.speed import Speed
from sparsekd.trainer.student.spikes import Spikes
from sparsekd.trainer.student.step import NEVER, State, own_sums, take_step


def train_on(
    here: Ranks, config: Config, overrides: Sequence[str], watch: StopWatch | None = None
) -> StopRequest | None:
    """Trains as one of a job's ranks, from the newest checkpoint of the run folder or from the start.

    Args:
        here: This rank.
        config: The composed configuration.
        overrides: What the user typed, kept in the run folder.
        watch: What asks this process to stop; None for one of its own.

    Returns:
        None where the run is done; else why it stopped, after everything was saved.

    Raises:
        UserError: Something that the user can put right; where possible before the run folder is touched.
    """
    folder = Path(run_folder(config))
    with ExitStack() as stack:
        watch = watch or stack.enter_context(watched(os.environ))
        plan = unless_asked(lambda: make_plan(config, here, watch))
        token = on_first(here, lambda: uuid.uuid4().hex)
        claim = together(here, lambda: stack.enter_context(owned(folder, os.environ, here, token)))
        if isinstance(plan, StopRequest):
            return stopped_early(folder, plan, claim, here, steps=config.train.steps)
        start = unless_asked(lambda: choose_start(folder, config, plan.fresh_commit, here, watch))
        if isinstance(start, StopRequest):
            return stopped_early(folder, start, claim, here, steps=config.train.steps)
        if start.step == config.train.steps and not owes_evaluation(folder, config, plan, start.step, here):
            # Also where a run was killed between its last checkpoint and this mark.
            on_first(here, functools.partial(_make_up_for_end, folder, start.step, config, plan, claim))
            _say(here, f"{folder} is done: it stands at step {start.step} of {config.train.steps}.")
        else:
            adopt(folder, config, overrides, here, start.begun(), claim)
            logs = folder / LOGS_NAME
            pulse = together(here, lambda: stack.enter_context(Pulse(logs, here.rank, here.processes)))
            failures = stack.enter_context(failures_recorded(folder, here, pulse, claim))
            life = _Life(folder, watch, claim, pulse, failures)
            if (stopped := _run(config, plan, start, life, here)) is not None:
                return stopped
    _say(here, f"next: sparsekd export run.root={config.run.root} run.name={config.run.name}")
    return None


@dataclass(frozen=True)
class _Life:
    """What keeps a run alive and tells of its end."""

    folder: Path
    watch: StopWatch
    claim: Claim
    pulse: Pulse
    failures: FailureWatch


def _run(config: Config, plan: Plan, start: Start, life: _Life, here: Ranks) -> StopRequest | None:
    """Builds the engine, trains, and leaves the mark of how it ended."""
    stopped = asked(here, life.watch)
    if stopped is not None:  # while it started: nothing is begun, and all that there is is saved
        on_first(here, functools.partial(write_stopped, life.folder, start.step, stopped, life.claim))
        return stopped
    if here.is_first:
        life.claim.require()
        checkpoint.clear_leftovers(life.folder / CHECKPOINTS_NAME)
    engine = build(config, plan, here)
    for remark in announce(engine, config, plan, start, here):
        _say(here, remark)
    if start.step < config.train.steps:
        _say(here, room_for_checkpoints(engine, config, life.folder / CHECKPOINTS_NAME, here))
    step = start.step
    life.pulse.at(step, "convert")
    stopped = load_start(engine, start, here, life.watch, life.claim)
    if stopped is None:
        step = _train(engine, config, plan, start.commit or plan.fresh_commit, life, here)
        stopped = asked(here, life.watch)
    engine.destroy()
    owed = owes_evaluation(life.folder, config, plan, step, here)
    if stopped is None or (step == config.train.steps and not owed):
        on_first(here, functools.partial(_mark_done, life.folder, step, plan, life.claim))
        return None
    on_first(here, functools.partial(write_stopped, life.folder, step, stopped, life.claim))
    return stopped


def _train(
    engine: deepspeed.DeepSpeedEngine, config: Config, plan: Plan, begin: Commit, life: _Life, here: Ranks
) -> int:
    """The loop: read, step, and at their times log, evaluate and save; until the last step, or asked to stop.

    Returns:
        The step at which it ended, of which there is a checkpoint.
    """
    train, pulse = config.train, life.pulse
    state = State(
        step=begin.step,
        rows_consumed=begin.rows_consumed,
        tokens=begin.tokens,
        sums=own_sums(begin.sums, here),
        first_bad=torch.tensor(NEVER, device=here.device),
        saved=begin.step,
        rows=RowsOrNothing(
            plan.sources,
            most=train.skip_damaged_rows,
            left_out=begin.skipped_rows,
            keep=plan.reads_again,
            readers=config.data.readers,
        ),
        vote=Vote(life.watch, here.device),
        speed=Speed(here, step_tokens=plan.step_tokens, token_flops=flops_of(engine, config, plan)),
        spikes=Spikes(train.spike_factor, here.device),
        heldout_losses=on_first(here, lambda: heldout_losses(life.folder, config, begin.step)),
    )
    owed = owes_evaluation(life.folder, config, plan, begin.step, here)
    saver = Saver(
        life.folder / CHECKPOINTS_NAME, here, behind=train.save_behind, require_owner=life.claim.require
    )
    with (
        state.rows,
        together(
            here,
            lambda: tracker_of(
                life.folder, config, begin.step, what_runs(config, plan, here), here, life.claim.require
            ),
        ) as tracker,
        ReadAhead(steps_ahead(plan, config, begin, state.rows, here), depth=train.prefetch_steps) as ahead,
        told_first(life.failures, saver.abandon),
    ):
        state.speed.begin()
        # Where this is cut short, no step is taken: the next start would not know that it is owed.
        goes_on = not owed or _evaluate(engine, tracker, state, config, plan, life, here)
        while goes_on and state.step < train.steps and not state.vote.has_passed():
            step = state.step + 1
            pulse.at(step, "read")
            batches = ahead.next()
            pulse.at(step, "step")
            began = time.perf_counter()
            rate = learning_rate(
                step, peak=config.optimizer.learning_rate, steps=train.steps, schedule=config.schedule
            )
            norm = take_step(engine, batches, state, rate, plan, here)
            life.failures.step_took(time.perf_counter() - began)
            is_last = step == train.steps
            if step == 1 or is_last or step % train.log_every == 0:
                pulse.at(step, "log")
                log_step(tracker, ahead, state, rate, norm, plan, here)
            if is_evaluated(config, plan, step) and not state.vote.has_passed():
                pulse.at(step, "evaluate")
                if not _evaluate(engine, tracker, state, config, plan, life, here):
                    break
            if is_last or step % train.checkpoint_every == 0:
                pulse.at(step, "save")
                _save(engine, saver, tracker, state, config, plan, life, here)
        if state.saved != state.step:
            pulse.at(state.step, "save")
            _save(engine, saver, tracker, state, config, plan, life, here)
        saver.finish()
    return state.step


def _evaluate(
    engine: deepspeed.DeepSpeedEngine,
    tracker: Tracker | NoTracker,
    state: State,
    config: Config,
    plan: Plan,
    life: _Life,
    here: Ranks,
) -> bool:
    """Logs the losses on held-out rows; False where the run is asked to stop meanwhile."""
    with paused(state, plan, here):
        figures = heldout_figures(engine, config.train, plan, here, life.watch)
        if figures is None:
            return False
        state.heldout_loss = figures["loss"]
        if figures["loss"] is not None:
            state.heldout_losses[state.step] = figures["loss"]
        record = {"kind": "heldout", "step": state.step, "tokens": state.tokens, **figures}
        on_first(here, functools.partial(tracker.log, record))
    return True


def _make_up_for_end(folder: Path, step: int, config: Config, plan: Plan, claim: Claim) -> None:
    """What a run owes that was killed after its last checkpoint: older ones go, and it has its mark."""
    claim.require()
    if not (folder / DONE_NAME).exists():
        losses = heldout_losses(folder, config, step)
        checkpoint.prune(folder / CHECKPOINTS_NAME, step=step, after=step, keep=_kept(config, losses))
    _mark_done(folder, step, plan, claim)


def _kept(config: Config, losses: dict[int, float]) -> checkpoint.Kept:
    train = config.train
    return checkpoint.Kept(train.keep_checkpoints, train.keep_every, train.keep_best, losses)


def _mark_done(folder: Path, step: int, plan: Plan, claim: Claim) -> None:
    seconds = seconds_of_run(folder)
    write_done(folder, {"step": step, "tokens": step * plan.step_tokens, "run_seconds": seconds}, claim)


def _save(
    engine: deepspeed.DeepSpeedEngine,
    saver: Saver,
    tracker: Tracker | NoTracker,
    state: State,
    config: Config,
    plan: Plan,
    life: _Life,
    here: Ranks,
) -> None:
    """Has a checkpoint written; the steps go on as soon as it is copied to the host.

    Before the first one the student is proved once more, with what it has learnt.
    """
    with paused(state, plan, here):
        if state.saved == 0:
            prove_student(engine, plan, here)
        tell_left_out(tracker, state, here)
        on_first(here, tracker.sync)
        sums = gather(here, lambda: tuple(state.sums.tolist()))
        commit = replace(
            plan.fresh_commit,
            step=state.step,
            rows_consumed=state.rows_consumed,
            tokens=state.tokens,
            sums=tuple(sums),
            skipped_rows=tuple(state.rows.left_out),
            heldout_loss=state.heldout_loss,
        )
        published = functools.partial(_prune, tracker, state, config, life, state.step, state.saved)
        saver.begin(engine, commit, published)
        state.saved = state.step
        if saver.seconds:
            life.watch.save_takes(saver.seconds)


def _prune(
    tracker: Tracker | NoTracker,
    state: State,
    config: Config,
    life: _Life,
    step: int,
    after: int,
    path: Path,
    seconds: float,
) -> None:
    """After a checkpoint was published, by the first rank's thread: older ones go."""
    life.claim.require()
    left = checkpoint.prune(path.parent, step=step, after=after, keep=_kept(config, state.heldout_losses))
    for kept in sorted(left.keys() - state.not_removed):
        tracker.say(f"warning: {kept} cannot be removed ({left[kept]}); remove it by hand, training goes on.")
    state.not_removed |= left.keys()
    tracker.say(f"checkpoint {path} ({seconds:.1f} s)")


def _say(here: Ranks, text: str) -> None:
    if here.is_first:
        print(text, flush=True)
