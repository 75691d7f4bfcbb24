"""The memory of a run's loss: `train` takes it, `plan` prints it."""

from sparsekd.kernels.memory import LossShape, MemoryPlan, plan_memory
from sparsekd.trainer.config.schema import Config, ObjectiveConfig
from sparsekd.trainer.run.errors import ConfigError


def memory_budget(objective: ObjectiveConfig) -> int | None:
    """Bytes that the loss may take, or None for the rule."""
    return None if objective.memory_gib is None else int(objective.memory_gib * 2**30)


def loss_memory(
    config: Config,
    impl: str,
    *,
    sequence_length: int,
    vocabulary_size: int,
    hidden_size: int,
    softcap: bool,
    on_cpu: bool,
) -> MemoryPlan:
    """How the loss of a micro-batch in which every position counts is cut on each rank, and its peak.

    Where fewer count, it needs less and may be cut otherwise. What is gathered for it of the decoder's hidden
    states is its argument, as large as they are: with `triton` it comes on top, `torch` makes no copy of its
    own then.

    Args:
        config: objective, micro-batch and dtype.
        impl: "torch" or "triton".
        sequence_length: tokens of a row.
        vocabulary_size: true one.
        hidden_size: of the student.
        softcap: whether its head has one.
        on_cpu: whether it runs on the CPU.

    Raises:
        ConfigError: no cut keeps objective.memory_gib, or objective.chunk_positions is set beside it.
    """
    shape = LossShape(
        positions=config.train.micro_batch_rows * sequence_length,
        vocabulary_size=vocabulary_size,
        hidden_size=hidden_size,
        element_bytes=2 if config.engine.dtype == "bfloat16" else 4,
        temperature=config.objective.temperature,
        softcap=softcap,
        on_cpu=on_cpu,
    )
    try:
        return plan_memory(
            impl,
            shape,
            chunk_positions=config.objective.chunk_positions,
            memory_budget=memory_budget(config.objective),
        )
    except ValueError as error:
        raise ConfigError(f"objective.memory_gib={config.objective.memory_gib}: {error}.") from error


def cut_text(plan: MemoryPlan) -> str:
    """A cut in words: what of the logits exists at one time."""
    if plan.slice_columns:
        return f"logits twice, {plan.slice_columns:,} columns of the vocabulary at a time"
    return f"logits of {plan.slab_positions:,} positions at a time"
