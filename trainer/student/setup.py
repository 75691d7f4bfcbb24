"""What stands before the first step: store, objective and start are checked, the engine is built."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from torch import Tensor

from sparsekd.kernels.loss import default_impl
from sparsekd.kernels.memory import MemoryPlan
from sparsekd.kernels.objective import MIXTURE_DIVERGENCES, Objective, needed_planes
from sparsekd.kernels.temperature import RestFormula
from sparsekd.logit_store.places.paths import StorePath, store_path
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.trainer.config.checks import resolved_objective
from sparsekd.trainer.config.engine_settings import deepspeed_config, further_keys
from sparsekd.trainer.config.loss_memory import cut_text, loss_memory, memory_budget
from sparsekd.trainer.config.schema import Config, require
from sparsekd.trainer.data.batches import rest_formula_of
from sparsekd.trainer.data.order import BatchShape, batch_shape, heldout_rows
from sparsekd.trainer.data.skipping import check_left_out
from sparsekd.trainer.models.causal_lm import DTYPES, head_transform, load_config
from sparsekd.trainer.models.probe import check_probe, probe_rows
from sparsekd.trainer.models.source import student_source
from sparsekd.trainer.run.errors import ConfigError, DataError
from sparsekd.trainer.run.folder import package_versions
from sparsekd.trainer.run.ranks import Ranks, agree, broadcast_object, leave_together, together
from sparsekd.trainer.state import checkpoint
from sparsekd.trainer.state.record import Commit
from sparsekd.trainer.state.resume import Start, choose_start, digest_of, settings_of
from sparsekd.trainer.state.universal import load_for_other_ranks
from sparsekd.trainer.student.engine import (
    build_engine,
    leave_out_compiled_collectives,
    partitioned_loading,
)
from sparsekd.trainer.student.head import LossSettings, Probe, Student
from sparsekd.trainer.student.model import check_student, load_student
from sparsekd.trainer.student.sums import means, no_sums


@dataclass(frozen=True)
class Plan:
    """What is fixed for the whole run."""

    store: LogitStore
    shape: BatchShape
    loss: LossSettings
    memory: MemoryPlan | None  # of the loss; None for impl reference, which is dense
    rest: RestFormula | None  # log R at the objective's temperature; None where no teacher is needed
    planes: frozenset[str]  # of the records: those that the loss reads, and so are decoded
    seed: int
    checks_values: bool
    fresh_commit: Commit  # what a checkpoint at step 0 would record

    @property
    def train_rows(self) -> int:
        return self.store.rows("train")

    @property
    def step_tokens(self) -> int:
        return self.shape.global_rows * self.store.manifest.sequence_length

    def means(self, sums: Tensor, *, heldout: bool) -> dict[str, float | None]:
        """Means over counted positions of reduced sums, named as in metrics.jsonl."""
        has_head = self.store.manifest.record.k > 0
        return means(sums, has_teacher=self.rest is not None, has_head=has_head, heldout=heldout)


def make_plan(config: Config, here: Ranks) -> Plan:
    """Opens the store and checks, without touching the run folder, that student and objective fit it.

    Raises:
        UserError: They do not, or the batch does not divide, or ranks see different stores (on the first
            rank; the others exit).
        StoreError: The store cannot be opened (likewise).
    """
    path = store_path(require(config.store.path, "store.path", "as the store that train reads"))
    store = _open_same_store(path, config.store.access, here)
    return together(here, lambda: _plan(config, store, here))


def _plan(config: Config, store: LogitStore, here: Ranks) -> Plan:
    train, manifest = config.train, store.manifest
    if store.rows("train") == 0:
        raise DataError(f"{store.path} has no training rows; prepare a corpus with more documents.")
    shape = batch_shape(
        global_rows=train.global_batch_rows, micro_rows=train.micro_batch_rows, world_size=here.world_size
    )
    # Read once now: damage in a held-out row is found while there is nothing yet to lose.
    for row in heldout_rows(wanted=train.evaluate_rows, rows=store.rows("heldout"))[
        here.rank :: here.world_size
    ]:
        store.read_row("heldout", row)
    objective = resolved_objective(config.objective, manifest.record)
    rest = rest_formula_of(objective, manifest)
    impl = _implementation(config.objective.impl, here.device)
    source = student_source(config.student, manifest.tokenizer)
    model_config = load_config(source, "student")
    check_student(model_config, source, manifest=manifest, tokenizer_path=store.tokenizer_path)
    settings = settings_of(config, objective, impl=impl)
    transform = head_transform(model_config, manifest.tokenizer.vocabulary_size)
    memory = None
    cut = (config.objective.chunk_positions, config.objective.memory_gib)
    if impl == "reference" and cut != (None, None):
        raise ConfigError(
            "objective.impl=reference is dense and cannot be cut: leave objective.chunk_positions and "
            "objective.memory_gib out, or use objective.impl=torch."
        )
    if impl != "reference":
        memory = loss_memory(
            config,
            impl,
            sequence_length=manifest.sequence_length,
            vocabulary_size=transform.vocabulary_size,
            hidden_size=model_config.get_text_config().hidden_size,
            softcap=transform.softcap is not None,
            on_cpu=here.device.type == "cpu",
        )
    return Plan(
        store=store,
        shape=shape,
        loss=LossSettings(
            objective=objective,
            transform=transform,
            impl=impl,
            chunk_positions=config.objective.chunk_positions,
            memory_budget=memory_budget(config.objective),
        ),
        memory=memory,
        rest=rest,
        planes=needed_planes(
            objective,
            k=manifest.record.k,
            n=manifest.record.n,
            on_grid=rest is None or rest.column is not None,
        ),
        seed=train.seed,
        checks_values=config.debug.check_values,
        fresh_commit=Commit(
            step=0,
            rows_consumed=0,
            tokens=0,
            sums=tuple(no_sums(torch.device("cpu")).tolist()),
            world_size=here.world_size,
            threads_per_rank=config.launch.threads_per_rank,
            store_digest=store.digest,
            settings=settings,
            config_digest=digest_of(settings),
            versions=package_versions(),
            files={},
        ),
    )


def resolve_start(folder: Path, config: Config, plan: Plan, here: Ranks) -> Start:
    """The checkpoint that this run goes on from, or the start (see `resume`)."""

    def choose() -> Start:
        start = choose_start(folder, config, plan.fresh_commit, here)
        if start.checkpoint is not None and start.commit is not None:
            most = config.train.skip_damaged_rows
            check_left_out(start.commit.skipped_rows, most=most, checkpoint=start.checkpoint)
        return start

    return together(here, choose)


def build(config: Config, plan: Plan, here: Ranks) -> deepspeed.DeepSpeedEngine:
    """Loads or makes the student, hands it to DeepSpeed, and proves its head on a probe batch.

    Raises:
        ModelError: The student cannot be loaded, its head is not as its configuration says, or documents of a
            row see one another in it.
    """
    torch.autograd.set_detect_anomaly(config.debug.detect_anomaly)
    leave_out_compiled_collectives()
    settings = deepspeed_config(
        config.engine, config.optimizer, plan.shape, pin_memory=torch.cuda.is_available()
    )
    # Alive while the model loads: transformers looks for it to partition weights as they come.
    partitioning = partitioned_loading(settings) if config.engine.zero_stage == 3 else None
    source = student_source(config.student, plan.store.manifest.tokenizer)
    load = functools.partial(
        load_student, config.student, source, dtype=DTYPES[config.engine.dtype], seed=plan.seed
    )
    # Partitioned loading is itself made of collectives: a rank that fails there breaks the others' (see
    # failures_recorded) and cannot first agree with them.
    model = load() if config.engine.zero_stage == 3 else together(here, load)
    del partitioning
    engine = build_engine(Student(model, plan.loss), settings, config.optimizer)
    _check_probe(engine, plan, here)
    return engine


def load_start(engine: deepspeed.DeepSpeedEngine, start: Start, here: Ranks) -> None:
    """Brings the chosen checkpoint, if there is one, into the engine."""
    if start.checkpoint is None or start.commit is None:
        return
    # Without ZeRO nothing is cut into parts: stage 0 reads any number of ranks' checkpoint as it is.
    if start.commit.world_size == here.world_size or not engine.zero_optimization():
        checkpoint.load(engine, start.checkpoint)
    else:
        load_for_other_ranks(engine, start.checkpoint, here)


def announce(
    engine: deepspeed.DeepSpeedEngine, config: Config, plan: Plan, start: Start, here: Ranks
) -> list[str]:
    """What will run, in a few lines for people."""
    shape, loss, store = plan.shape, plan.loss, plan.store
    student: Student = engine.module
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters())
    record, objective = store.manifest.record, loss.objective
    kd = (
        f"{_divergence_text(objective)} {objective.target_mode} at T={objective.temperature:g} "
        f"x {objective.kd_weight:g} + "
        if objective.kd_weight
        else ""
    )
    epochs = config.train.steps * shape.global_rows / plan.train_rows
    lines = [
        f"student: {parameters:,} parameters, head {'tied' if student.is_tied else 'untied'}, "
        f"vocabulary {loss.transform.vocabulary_size:,}",
        f"engine: {here.world_size} x {here.device.type}, ZeRO stage {config.engine.zero_stage}; weights "
        f"{config.engine.dtype}; optimizer state, gradient accumulation and reduction float32",
        f"loss: {kd}cross-entropy x {objective.ce_weight:g}, impl {loss.impl}; "
        f"store k={record.k} n={record.n}",
        "memory of the loss: "
        + (
            "dense"
            if plan.memory is None
            else f"{cut_text(plan.memory)}, {plan.memory.peak_bytes / 2**30:.2f} GiB at its peak"
        ),
        f"data: {shape.global_rows} rows x {store.manifest.sequence_length} = {plan.step_tokens:,} tokens "
        f"a step ({shape.accumulation} x {shape.micro_rows} rows a rank), {config.train.steps:,} steps "
        f"= {epochs:.2f} epochs of {plan.train_rows:,} rows",
    ]
    if plan.rest is not None and plan.rest.column is None:
        grid = ", ".join(f"{value:g}" for value in record.temperatures)
        lines.append(
            f"temperature: {objective.temperature:g} is not on the store's grid ({grid}): the mass of the "
            "rest is interpolated (docs/losses.md, 7)"
        )
    if further_keys(config.engine):
        lines.append(f"DeepSpeed keys of your own: {', '.join(further_keys(config.engine))}")
    if objective.kd_weight and record.n == 0:
        lines.append(
            f"warning: this store holds the top {record.k} alone. An early student learns nothing about "
            "the rest from it: in a trial top-16 alone ended behind plain cross-entropy (4.85 against 4.58 "
            "nats on held-out text) where records with draws ended ahead (4.34). Capture with store.n=24, or "
            "add objective.ce_weight=0.5 (4.43)."
        )
    lines += start.remarks
    lines.append(
        f"start: from {start.checkpoint}, step {start.step}" if start.checkpoint else "start: from step 0"
    )
    return lines


def _divergence_text(objective: Objective) -> str:
    if objective.divergence in MIXTURE_DIVERGENCES:
        return f"{objective.divergence}({objective.mixture:g})"
    return objective.divergence


def _open_same_store(path: StorePath, access: str, here: Ranks) -> LogitStore:
    store = together(here, lambda: open_store(path, access=access))
    expected = broadcast_object(store.digest)
    problem = agree(
        None
        if store.digest == expected
        else f"{path} has digest {store.digest[:12]} on one rank and {expected[:12]} on the first; "
        "wait until the file system shows the same files everywhere."
    )
    if problem is not None:
        leave_together(here, DataError(problem))
    return store


def _implementation(impl: str, device: torch.device) -> str:
    if impl == "auto":
        return default_impl(device)
    if impl == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"objective.impl=triton needs a GPU, but the device is {device.type}; use objective.impl=torch."
        )
    return impl


def _check_probe(engine: deepspeed.DeepSpeedEngine, plan: Plan, here: Ranks) -> None:
    rows = together(here, lambda: probe_rows(plan.store, here.device))
    engine.eval()
    with torch.no_grad():
        own, ours = engine(Probe(rows.token_ids, rows.position_ids))
    engine.train()
    name = type(engine.module.model).__name__
    together(here, lambda: check_probe(own, ours, rows, key="student", model_name=name))
