"""What stands before the first step: stores, objective and student are checked, the engine is built."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import deepspeed
import torch
from torch import Tensor

from sparsekd.kernels.memory import MemoryPlan
from sparsekd.kernels.objective import Objective
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.trainer.config.engine_settings import deepspeed_config
from sparsekd.trainer.config.implementation import implementation_that_runs
from sparsekd.trainer.config.loss_memory import loss_memory, memory_budget
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.data.chunked import ChunkedOrder
from sparsekd.trainer.data.mixed import MixedOrder, SourceOfRows, order_of
from sparsekd.trainer.data.order import BatchShape, GlobalOrder, batch_shape
from sparsekd.trainer.data.sources import Source, Sources, joined_digest
from sparsekd.trainer.models.causal_lm import (
    DTYPES,
    ModelSource,
    head_transform,
    load_config,
    picked_attention,
)
from sparsekd.trainer.models.probe import check_probe, holds_several, probe_rows, watched_parts
from sparsekd.trainer.models.router import is_routed, router_coefficient
from sparsekd.trainer.models.source import student_source
from sparsekd.trainer.models.twin import check_exportable
from sparsekd.trainer.models.weights import content_of
from sparsekd.trainer.run.errors import ConfigError
from sparsekd.trainer.run.owner import Claim
from sparsekd.trainer.run.ranks import Ranks, on_first, together
from sparsekd.trainer.run.stop import StopRequest, StopWatch
from sparsekd.trainer.run.versions import TRAINING_PACKAGES, versions_of
from sparsekd.trainer.run.waiting import patiently
from sparsekd.trainer.state import checkpoint
from sparsekd.trainer.state.record import Commit
from sparsekd.trainer.state.resume import Start, digest_of, settings_of, store_kind
from sparsekd.trainer.state.universal import load_for_other_ranks
from sparsekd.trainer.student.engine import (
    build_engine,
    leave_out_compiled_collectives,
    parameter_count,
    partitioned_loading,
)
from sparsekd.trainer.student.head import LossSettings, Probe, Student
from sparsekd.trainer.student.model import check_student, load_student
from sparsekd.trainer.student.speed import token_flops
from sparsekd.trainer.student.stores import open_sources
from sparsekd.trainer.student.sums import means, no_sums


@dataclass(frozen=True)
class Plan:
    """What is fixed for the whole run."""

    sources: Sources
    shape: BatchShape
    loss: LossSettings
    memory: MemoryPlan | None  # of the loss; None for impl reference, which is dense
    order: GlobalOrder | ChunkedOrder | MixedOrder  # of the training rows
    seed: int
    checks_values: bool
    fresh_commit: Commit  # what a checkpoint at step 0 would record
    remarks: tuple[str, ...]  # of the first rank, about the student
    nonfinite_most: int | None = None  # steps that may be left out; None: the first one stops the run

    @property
    def store(self) -> LogitStore:
        """The first one, for what all are alike in: target, sequence length, tokenizer."""
        return self.sources.first

    @property
    def reads_again(self) -> bool:
        """Whether rows of a store elsewhere are worth room in the machine's cache."""
        steps = self.fresh_commit.settings["course"]["steps"]
        return self.order.reads_again(steps * self.shape.global_rows)

    @property
    def step_tokens(self) -> int:
        return self.shape.global_rows * self.store.manifest.sequence_length

    def means(
        self, sums: Tensor, *, heldout: bool, sources: Sequence[Source] | None = None
    ) -> dict[str, float | None]:
        """Means over counted positions of reduced sums, of all sources or some, named as in metrics.jsonl."""
        return means(
            sums,
            has_teacher=self.loss.objective.kd_weight > 0,
            has_head=all(source.store.manifest.record.k > 0 for source in sources or self.sources.members),
            heldout=heldout,
            router_coefficient=self.loss.router_coefficient,
        )


def make_plan(config: Config, here: Ranks, watch: StopWatch | None = None) -> Plan:
    """Opens the stores and checks, without touching the run folder, that student and objective fit them.

    Raises:
        UserError: They do not, or the batch does not divide, or ranks see different stores (on the first
            rank; the others exit).
        StoreError: The store cannot be opened (likewise).
        StopAsked: `watch` was asked while the student's files were read.
    """
    sources, objective = open_sources(config, here)
    source = student_source(config.student, sources.first.manifest.tokenizer)
    # Read once, by the first rank: its files, and the store's text for ids that it lacks, may be gigabytes on
    # a file system that all share.
    known = on_first(
        here,
        patiently(
            here,
            lambda: _known_student(source, sources, objective) if here.is_first else None,
            watch,
        ),
    )
    assert known is not None
    return together(here, lambda: _plan(config, sources, objective, source, known, here))


class _KnownStudent(NamedTuple):
    """What the first rank finds out about the student.

    Attributes:
        content: As `content_of` gives it.
        vocabulary: Over how many ids its distribution is.
    """

    content: str | None
    vocabulary: int


def _known_student(source: ModelSource, sources: Sources, objective: Objective) -> _KnownStudent:
    config = load_config(source, "student")
    vocabulary = max(
        check_student(config, source, each.store, reads_records=objective.kd_weight > 0)
        for each in sources.members
    )
    return _KnownStudent(content_of(source, "student"), vocabulary)


def _plan(
    config: Config,
    sources: Sources,
    objective: Objective,
    source: ModelSource,
    student: _KnownStudent,
    here: Ranks,
) -> Plan:
    train, store = config.train, sources.first
    manifest = store.manifest
    shape = batch_shape(
        global_rows=train.global_batch_rows, micro_rows=train.micro_batch_rows, world_size=here.world_size
    )
    # Read once now: damage in a held-out row is found while there is nothing yet to lose.
    heldout = [row for _, rows in sources.heldout(train.evaluate_rows) for row in rows]
    for row in heldout[here.rank :: here.world_size]:
        of, number = sources.place("heldout", row)
        of.store.read_row("heldout", number)
    impl = implementation_that_runs(config.objective.impl, here.device, key="objective.impl")
    model_config = load_config(source, "student")
    order = order_of(
        config.data,
        [SourceOfRows(each.name, each.store.rows("train"), each.weight) for each in sources.members],
        seed=train.seed,
        slots=shape.global_rows,
    )
    # A gathered result would tell no more: every rank has the same files.
    remarks = (
        check_exportable(model_config, source, store, dtype=DTYPES[config.export.dtype])
        if here.is_first
        else []
    )
    router = router_coefficient(config.student, model_config)
    attention = picked_attention(model_config, source)
    settings = settings_of(
        replace(config, student=replace(config.student, attention=attention)),
        objective,
        impl=impl,
        student_content=student.content,
        order=order.recorded(),
        router_coefficient=router,
    )
    transform = head_transform(model_config, student.vocabulary)
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
        sources=sources,
        shape=shape,
        loss=LossSettings(
            objective=objective,
            transform=transform,
            impl=impl,
            chunk_positions=config.objective.chunk_positions,
            memory_budget=memory_budget(config.objective),
            router_coefficient=router,
        ),
        memory=memory,
        order=order,
        seed=train.seed,
        checks_values=config.debug.check_values,
        fresh_commit=Commit(
            step=0,
            rows_consumed=0,
            tokens=0,
            sums=(tuple(no_sums(torch.device("cpu")).tolist()),) * here.world_size,
            world_size=here.world_size,
            threads_per_rank=config.launch.threads_per_rank,
            store_digest=sources.digest,
            store_kind=joined_digest(
                {each.name: store_kind(each.store.manifest) for each in sources.members}
            ),
            settings=settings,
            config_digest=digest_of(settings),
            versions=versions_of(TRAINING_PACKAGES),
            files={},
        ),
        remarks=tuple(remarks),
        nonfinite_most=train.nonfinite_most if train.nonfinite == "skip" else None,
    )


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
    prove_student(engine, plan, here)
    return engine


def load_start(
    engine: deepspeed.DeepSpeedEngine, start: Start, here: Ranks, watch: StopWatch, claim: Claim
) -> StopRequest | None:
    """Brings the chosen checkpoint, if any, into the engine; returns why it was broken off, or None."""
    if start.checkpoint is None or start.commit is None:
        return None
    # Without ZeRO nothing is cut into parts: stage 0 reads any number of ranks' checkpoint as it is.
    if start.commit.world_size == here.world_size or not engine.zero_optimization():
        checkpoint.load(engine, start.checkpoint)
        return None
    return load_for_other_ranks(engine, start.checkpoint, here, watch, claim.require)


def flops_of(engine: deepspeed.DeepSpeedEngine, config: Config, plan: Plan) -> float | None:
    """Operations of the student for each token (see `speed.token_flops`), where they run in bfloat16."""
    student: Student = engine.module
    fields = student.model.config.get_text_config()
    layers, heads, width = (
        getattr(fields, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if config.engine.dtype != "bfloat16" or not layers or not heads or not width:
        return None
    return token_flops(
        parameters=parameter_count(student),
        layers=layers,
        attention_width=heads * (getattr(fields, "head_dim", None) or width // heads),
        sequence_length=plan.store.manifest.sequence_length,
        routed=is_routed(fields),
    )


def prove_student(engine: deepspeed.DeepSpeedEngine, plan: Plan, here: Ranks) -> None:
    """Proves the student's head, and that documents do not see one another; every rank calls it.

    Raises:
        ModelError: It is not so (on the first rank; the others exit).
    """
    packed = any(holds_several(each.store) for each in plan.sources.members)
    size = plan.loss.transform.vocabulary_size
    rows = together(here, lambda: probe_rows(plan.store, here.device, size, packed=packed))
    engine.eval()
    with torch.no_grad(), watched_parts(engine.module.model, rows) as parts:
        own, ours = engine(Probe(rows.token_ids, rows.position_ids))
    engine.train()
    name = type(engine.module.model).__name__
    together(here, lambda: check_probe(own, ours, parts, rows, key="student", model_name=name))
