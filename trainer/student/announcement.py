"""What a run is, told before its first step: in lines for people, and as values for trackers."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed

from sparsekd.kernels.objective import MIXTURE_DIVERGENCES, Objective
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.config.checks import objective_that_ran
from sparsekd.trainer.config.engine_settings import further_keys
from sparsekd.trainer.config.loss_memory import cut_text
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.data.chunked import CHUNK_ROWS, ChunkedOrder
from sparsekd.trainer.data.mixed import MixedOrder
from sparsekd.trainer.models.causal_lm import attention_of
from sparsekd.trainer.models.router import own_coefficient
from sparsekd.trainer.run.ranks import Ranks, on_first
from sparsekd.trainer.state import checkpoint
from sparsekd.trainer.state.resume import Start
from sparsekd.trainer.state.room import checkpoint_size, room_told
from sparsekd.trainer.student.engine import parameter_count
from sparsekd.trainer.student.head import Student
from sparsekd.trainer.student.setup import Plan


def what_runs(config: Config, plan: Plan, here: Ranks) -> dict[str, Any]:
    """What a run is, as nested plain values: the settings that training reads, with "auto" settled, and the
    store, records and teacher as they are instead of the settings that made them."""
    cut = config.objective
    how = {"impl": plan.loss.impl, "chunk_positions": cut.chunk_positions, "memory_gib": cut.memory_gib}
    sections = ("run", "student", "optimizer", "schedule", "engine", "train", "launch", "debug")
    stores = {source.name: _values_of(source.store) for source in plan.sources.members}
    teachers = {source.name: _teacher_of(source.store) for source in plan.sources.members}
    return {
        **{name: asdict(getattr(config, name)) for name in sections},
        "objective": objective_that_ran(plan.loss.objective) | how,
        "data": plan.order.recorded(),
        "store": stores if plan.sources.is_mixture else stores[""],
        "teacher": teachers if plan.sources.is_mixture else teachers[""],
        "tokenizer": plan.store.manifest.tokenizer.name,
        "world_size": here.world_size,
        "versions": plan.fresh_commit.versions,
    }


def _values_of(store: LogitStore) -> dict[str, Any]:
    manifest = store.manifest
    return {
        "path": str(store.path),
        "digest": store.digest,
        "sequence_length": manifest.sequence_length,
        **asdict(manifest.record),
    }


def _teacher_of(store: LogitStore) -> dict[str, Any] | None:
    teacher = store.manifest.teacher
    if teacher is None:
        return None
    return {"name": teacher.name, "revision": teacher.revision, "dtype": teacher.dtype}


def announce(
    engine: deepspeed.DeepSpeedEngine, config: Config, plan: Plan, start: Start, here: Ranks
) -> list[str]:
    """What will run, in a few lines for people."""
    shape, loss, length = plan.shape, plan.loss, plan.store.manifest.sequence_length
    student: Student = engine.module
    objective, members = loss.objective, plan.sources.members
    kd = (
        f"{_divergence_text(objective)} {objective.target_mode} at T={objective.temperature:g} "
        f"x {objective.kd_weight:g} + "
        if objective.kd_weight
        else ""
    )
    rows, rows_taken = plan.sources.rows("train"), config.train.steps * shape.global_rows
    records = {source.name: source.store.manifest.record for source in members}
    lines = [
        f"student: {parameter_count(student):,} parameters, head {'tied' if student.is_tied else 'untied'}, "
        f"vocabulary {loss.transform.vocabulary_size:,}, attention {attention_of(student.model)}",
        f"engine: {here.world_size} x {here.device.type}, ZeRO stage {config.engine.zero_stage}; weights "
        f"{config.engine.dtype}; optimizer state, gradient accumulation and reduction float32",
        f"loss: {kd}cross-entropy x {objective.ce_weight:g}, impl {loss.impl}; "
        + "; ".join(
            f"store {name}{name and ' '}k={it.k} n={it.n}"
            + (" (draws alone: kd is up to the teacher's entropy)" if it.rest == "counts" else "")
            for name, it in records.items()
        ),
        "memory of the loss: "
        + (
            "dense"
            if plan.memory is None
            else f"{cut_text(plan.memory)}, {plan.memory.peak_bytes / 2**30:.2f} GiB at its peak"
        ),
        f"data: {shape.global_rows} rows x {length} = {plan.step_tokens:,} tokens "
        f"a step ({shape.accumulation} x {shape.micro_rows} rows a rank), {config.train.steps:,} steps"
        + ("" if plan.sources.is_mixture else f" = {_epochs_text(rows_taken, rows)}"),
        *_mixture_lines(plan, rows_taken),
    ]
    own = own_coefficient(student.model.config)
    if loss.router_coefficient:
        lines.append(f"router: load-balancing loss x {loss.router_coefficient:g}, over each micro-batch")
    elif own is not None:
        lines.append(
            "router: no load-balancing loss"
            + (
                f", as the model's configuration says; student.router_loss={own:g} adds it with its weight"
                if config.student.router_loss is None
                else ""
            )
        )
    if config.data.shuffle == "chunked":
        lines.append(_chunked_text(plan))
    for source in members:
        rest, record = source.records.rest, records[source.name]
        if rest is not None and rest.column is None:
            grid = ", ".join(f"{value:g}" for value in record.temperatures)
            lines.append(
                f"temperature: {objective.temperature:g} is not on the grid of {source.store.path} ({grid}): "
                "the mass of the rest is interpolated (docs/losses.md, 7)"
            )
    if further_keys(config.engine):
        lines.append(f"DeepSpeed keys of your own: {', '.join(further_keys(config.engine))}")
    heads = {record.k for record in records.values() if record.n == 0}
    if objective.kd_weight and heads:
        lines.append(
            f"warning: a store holds the top {max(heads)} alone. An early student learns nothing about "
            "the rest from it: in a trial top-16 alone ended behind plain cross-entropy (4.85 against 4.58 "
            "nats on held-out text) where records with draws ended ahead (4.34). Capture with store.n=24, or "
            "add objective.ce_weight=0.5 (4.43)."
        )
    lines += [*plan.remarks, *start.remarks]
    lines.append(
        f"start: from {start.checkpoint}, step {start.step}" if start.checkpoint else "start: from step 0"
    )
    return lines


def _mixture_lines(plan: Plan, rows_taken: int) -> list[str]:
    """A line for each source of a mixture: its share as it will be, and how often its rows come."""
    if not isinstance(plan.order, MixedOrder):
        return []
    turns, weights = plan.order.turns, [source.weight for source in plan.sources.members]
    lines = []
    for source, count, weight in zip(plan.sources.members, turns, weights, strict=True):
        share, wanted = count / sum(turns), weight / sum(weights)
        of_wanted = "" if abs(share / wanted - 1) < 0.005 else f", where the weights ask for {wanted:.2%}"
        rows = source.store.rows("train")
        epochs = _epochs_text(rows_taken * share, rows)
        lines.append(f"source {source.name}: {share:.2%} of the rows{of_wanted}, {epochs}")
    return lines


def _epochs_text(taken: float, rows: int) -> str:
    return f"{taken / rows:.2f} epochs of {rows:,} rows"


def _chunked_text(plan: Plan) -> str:
    orders = plan.order.orders if isinstance(plan.order, MixedOrder) else (plan.order,)
    held, streams, windows = 0.0, 0, set()
    for order, source in zip(orders, plan.sources.members, strict=True):
        assert isinstance(order, ChunkedOrder)
        index = source.store.index("train")
        held += min(order.chunks_held() * CHUNK_ROWS * index.file_bytes / index.rows, index.file_bytes)
        streams += order.streams
        windows.add(order.window)
    return (
        f"data order: chunked, {streams} streams with windows of {max(windows)} x {CHUNK_ROWS} rows; all "
        f"ranks together hold {held / 2**30:.2f} GiB of stored rows"
    )


def room_for_checkpoints(engine: deepspeed.DeepSpeedEngine, config: Config, folder: Path, here: Ranks) -> str:
    """What checkpoints will take on the disk and in memory, in a line; every rank calls it.

    Raises:
        UserError: Not even one fits (on the first rank; the others exit).
    """
    size = checkpoint_size(
        parameter_count(engine.module),
        stage=config.engine.zero_stage,
        dtype=config.engine.dtype,
        ranks=here.world_size,
    )
    return on_first(
        here,
        lambda: room_told(
            folder,
            size,
            config.train,
            there=len(checkpoint.published(folder)),
            pinned=here.device.type == "cuda",
        ),
    )


def _divergence_text(objective: Objective) -> str:
    if objective.divergence in MIXTURE_DIVERGENCES:
        return f"{objective.divergence}({objective.mixture:g})"
    return objective.divergence
