"""One optimizer step, and what changes with it. Nothing in a step waits for the device."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from sparsekd.trainer.data.batches import MicroBatch, check_values, on_device
from sparsekd.trainer.data.order import micro_batches, mixed_seed, step_rows
from sparsekd.trainer.data.skipping import RowsOrNothing
from sparsekd.trainer.run.errors import UserError
from sparsekd.trainer.run.ranks import Ranks, leave_together
from sparsekd.trainer.run.vote import Vote
from sparsekd.trainer.student.engine import backward, gradient_scale, local_gradient_norm, set_learning_rate
from sparsekd.trainer.student.setup import Plan
from sparsekd.trainer.student.speed import Speed
from sparsekd.trainer.student.spikes import Spikes
from sparsekd.trainer.student.sums import no_sums, sums_of

NEVER = torch.iinfo(torch.int64).max
_MOST_RANKS = 1 << 20
_NO_BATCH = (1 << 16) - 1


def _bad_code(step: int, micro_batch: int, rank: int) -> int:
    """Step, micro-batch and rank as one number, of which the least of all ranks is the first."""
    return (step * (_NO_BATCH + 1) + min(micro_batch, _NO_BATCH)) * _MOST_RANKS + rank


@dataclass
class State:
    """What changes from step to step, besides the engine."""

    step: int
    rows_consumed: int
    tokens: int
    sums: Tensor  # float64 (9,), since the last line of metrics, of this rank
    first_bad: Tensor  # int64 scalar: the first loss or gradient that is no number, see `_bad_code`
    saved: int  # the step of the last checkpoint, written or gone on from
    rows: RowsOrNothing
    vote: Vote
    speed: Speed
    spikes: Spikes
    first_skipped: Tensor | None = None  # likewise, of the steps that were left out and not told yet
    skipped: int = 0  # steps that this start left out, as they had such a number
    heldout_loss: float | None = None  # of this very step
    heldout_losses: dict[int, float] = field(default_factory=dict)  # of all steps, for train.keep_best
    not_removed: set[Path] = field(default_factory=set)  # old checkpoints that stayed, which was said

    def note(self, is_bad: Tensor, code: int) -> None:
        """Keeps the code of a number that is none; nothing waits for the device."""
        self.first_bad = torch.minimum(self.first_bad, torch.where(is_bad, code, NEVER))

    def leave_out(self) -> None:
        """Counts a step whose numbers were none, and which therefore changed nothing."""
        self.skipped += 1
        known = self.first_bad if self.first_skipped is None else self.first_skipped
        self.first_skipped = torch.minimum(known, self.first_bad)
        self.first_bad = torch.full_like(self.first_bad, NEVER)


def take_step(
    engine: deepspeed.DeepSpeedEngine,
    batches: list[MicroBatch],
    state: State,
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
    reduced = torch.stack([weight, state.vote.ballot()])
    dist.all_reduce(reduced)
    state.vote.count(reduced[1])
    weight = torch.where(reduced[0] == 0, 1.0, reduced[0])
    scale = gradient_scale(weight, here.world_size)
    norm = None
    step_sums = no_sums(here.device)
    for number, unscaled in enumerate(batches):
        batch = replace(unscaled, scale=scale)
        output = engine(batch)
        # A mean over tokens of its own: all micro-batches of all ranks count alike.
        factor = plan.loss.router_coefficient / (len(batches) * here.world_size)
        share = None if output.router is None else factor * output.router
        sums = sums_of(output, batch)
        step_sums += sums
        is_bad = ~torch.isfinite(sums).all()
        state.note(is_bad, _bad_code(state.step + 1, number, here.rank))
        loss = output.loss
        if plan.nonfinite_most is not None:
            # So every rank finds it in the gradient's norm, by which DeepSpeed leaves the step out.
            loss = loss * torch.where(is_bad, torch.nan, 1.0)
        backward(engine, loss, here.world_size, share=share)
        if engine.is_gradient_accumulation_boundary():
            norm = local_gradient_norm(engine)
        engine.step()
    if norm is None:
        norm = torch.as_tensor(engine.get_global_grad_norm(), device=here.device)
    state.step += 1
    state.speed.took_step()
    state.rows_consumed += plan.shape.global_rows
    state.tokens += plan.shape.global_rows * plan.store.manifest.sequence_length
    state.spikes.note(state.step, step_sums[0] / weight, norm)
    state.heldout_loss = None
    # The same on every rank: which one it came from, its losses say.
    state.note(~torch.isfinite(norm), _bad_code(state.step, _NO_BATCH, here.rank))
    # Known on the host already: DeepSpeed looks at the norm before it steps.
    if plan.nonfinite_most is not None and getattr(engine.optimizer, "overflow", False):
        state.leave_out()
    else:
        state.sums += step_sums
    return norm


@dataclass(frozen=True)
class BadNumber:
    """The first loss or gradient that is no finite number, and the step that it is of."""

    step: int
    found: str  # what, on which rank, in which micro-batch and rows


def stop_on_bad_numbers(state: State, plan: Plan, here: Ranks) -> BadNumber | None:
    """Stops the run when a loss or gradient since the last look was no finite number. Waits for the device.

    Returns:
        The first of the steps that were left out for that and not told yet, where `train.nonfinite=skip`.

    Raises:
        UserError: naming the first such step and its rows (on the first rank; the others exit).
    """
    skipped = torch.full_like(state.first_bad, NEVER) if state.first_skipped is None else state.first_skipped
    first = torch.stack([state.first_bad, skipped])
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    bad, left_out = (None if code == NEVER else _bad_number(code, plan) for code in first.tolist())
    most = plan.nonfinite_most
    remedy = "Lower optimizer.learning_rate, or check these rows with `sparsekd store verify`."
    if bad is not None:
        leave_together(
            here, UserError(f"Step {bad.step} gave {bad.found}; nothing of it was saved. {remedy}")
        )
    if left_out is not None and most is not None and state.skipped > most:
        leave_together(
            here,
            UserError(
                f"{state.skipped} steps of this start were left out, more than train.nonfinite_most={most}; "
                f"of the last ones, step {left_out.step} gave {left_out.found}. {remedy}"
            ),
        )
    return left_out


def _bad_number(code: int, plan: Plan) -> BadNumber:
    step, rest = divmod(code, (_NO_BATCH + 1) * _MOST_RANKS)
    number, rank = divmod(rest, _MOST_RANKS)
    begin = (step - 1) * plan.shape.global_rows
    if number == _NO_BATCH:
        rows = step_rows(begin, plan.shape, plan.order)
        return BadNumber(
            step,
            f"a gradient that is not a finite number, though its losses are, on {plan.sources.told(rows)}",
        )
    parts = micro_batches(begin, plan.shape, plan.order, rank=rank)
    return BadNumber(
        step,
        f"a loss that is not a finite number, on rank {rank}, micro-batch {number + 1} of {len(parts)}, "
        f"{plan.sources.told([place.row for place in parts[number]])}",
    )


def own_sums(sums: Sequence[Sequence[float]], here: Ranks) -> Tensor:
    """This rank's part of the running sums in a checkpoint: its own, to the bit; after another number of
    ranks the first one carries on the total."""
    total = torch.tensor(sums, dtype=torch.float64, device=here.device)
    if len(sums) == here.world_size:
        return total[here.rank]
    return total.sum(dim=0) * here.is_first
