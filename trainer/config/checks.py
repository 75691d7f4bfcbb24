"""What can be wrong with a training run's settings, found before torch is imported."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from sparsekd.kernels.objective import MIXTURE_DIVERGENCES, Objective, resolve_objective
from sparsekd.logit_store.manifest import RecordSpec
from sparsekd.trainer.config.engine_settings import deepspeed_config
from sparsekd.trainer.config.schedule import check_schedule
from sparsekd.trainer.config.schema import Config, ObjectiveConfig, require
from sparsekd.trainer.data.order import BatchShape
from sparsekd.trainer.run.errors import ConfigError


def check_train(config: Config) -> None:
    """Checks what does not depend on the store, the student's files or the machine.

    Raises:
        ConfigError: naming keys, values and what is legal.
    """
    check_schedule(config.schedule, steps=config.train.steps)
    # Made for its checks alone: none of them depends on how rows are shared out.
    one = BatchShape(global_rows=1, micro_rows=1, world_size=1)
    deepspeed_config(config.engine, config.optimizer, one, pin_memory=False)
    if config.train.nonfinite == "skip" and config.engine.zero_stage == 0:
        raise ConfigError(
            "train.nonfinite=skip needs engine.zero_stage 1, 2 or 3, found 0, where DeepSpeed steps without "
            "a look at the gradient; raise the stage, or use train.nonfinite=stop."
        )
    if config.train.nonfinite == "skip" and config.engine.zero_stage < 3 and config.engine.offload != "none":
        raise ConfigError(
            f"train.nonfinite=skip with engine.offload={config.engine.offload} needs engine.zero_stage=3, "
            f"found {config.engine.zero_stage}, where DeepSpeed keeps such a gradient for the "
            "steps that follow; use engine.zero_stage=3, engine.offload=none or train.nonfinite=stop."
        )
    if 0 < config.train.spike_factor <= 1:
        raise ConfigError(
            f"train.spike_factor={config.train.spike_factor:g} would call every other step a spike; give "
            "more than 1, such as 5, or 0 for none."
        )
    if len(config.optimizer.betas) != 2:
        raise ConfigError(
            f"optimizer.betas={config.optimizer.betas} has not two numbers, such as [0.9,0.95]."
        )
    student = config.student
    if student.path is None:
        require(student.config, "student.path or student.config", "to know what to train")
    elif student.config:
        raise ConfigError(
            f"student.path={student.path} and student.config ({', '.join(sorted(student.config))}) are both "
            "set; a loaded student brings its own configuration: give one of the two."
        )


def objective_of(config: ObjectiveConfig) -> Objective:
    """What a configuration asks for, its target mode perhaps "auto"; not how it is computed."""
    return Objective(**{item.name: getattr(config, item.name) for item in fields(Objective)})


def resolved_objective(config: ObjectiveConfig, record: RecordSpec) -> Objective:
    """The objective of a configuration on a store's records, its target mode settled.

    Raises:
        ConfigError: It is no legal objective, or none for these records.
    """
    config = _served_by(config, record)
    try:
        return resolve_objective(
            objective_of(config),
            k=record.k,
            n=record.n,
            temperatures=record.temperatures,
            draw_temperature=record.draw_temperature,
        )
    except ValueError as error:
        raise ConfigError(f"objective: {error}.") from error


def shared_objective(config: ObjectiveConfig, records: Mapping[str, RecordSpec]) -> Objective:
    """The objective of a configuration on the records of all stores that a run reads.

    Args:
        config: Its section.
        records: By the sources' names.

    Raises:
        ConfigError: It is none for one of them, or "auto" is not the same for all.
    """
    found: dict[str, Objective] = {}
    for name, record in records.items():
        try:
            found[name] = resolved_objective(config, record)
        except ConfigError as error:
            raise ConfigError(f"data.mixture.{name}: {error}" if name else str(error)) from error
    (first, objective), *others = found.items()
    for name, other in others:
        if other != objective:
            raise ConfigError(
                f"data.mixture: objective.target_mode={config.target_mode} is {objective.target_mode} for "
                f"{first} and {other.target_mode} for {name}, by their records; name one that all serve, "
                "such as objective.target_mode=tail_bucket."
            )
    return objective


def objective_that_ran(objective: Objective) -> dict[str, Any]:
    """A resolved objective as plain values for readers, without what its loss does not read."""
    values = asdict(objective)
    if objective.divergence not in MIXTURE_DIVERGENCES:
        del values["mixture"]
    unread: tuple[str, ...] = ()
    if objective.kd_weight == 0:
        unread = ("divergence", "mixture", "target_mode", "temperature")
    elif objective.ce_weight == 0:
        unread = ("label_smoothing", "z_loss")
    return {name: value for name, value in values.items() if name not in unread}


def _served_by(config: ObjectiveConfig, record: RecordSpec) -> ObjectiveConfig:
    """Refuses what an imported record without a true log R cannot serve; "auto" becomes what it can.

    Raises:
        ConfigError: The target mode needs a rest, or a temperature, that the record does not hold.
    """
    # Draws alone are made at temperature 1 and serve `sampled` as any draws do.
    if record.rest in ("exact", "counts") or config.kd_weight == 0:
        return config
    if record.rest == "derived":
        if config.temperature != 1.0:
            raise ConfigError(
                f"objective: temperature is {config.temperature:g}, but this store was imported from "
                "log-probabilities without a rest (record.rest is derived), which is known at temperature 1 "
                "only; set objective.temperature=1, or capture the teacher with this temperature in its grid."
            )
        return config
    if config.target_mode not in ("auto", "renormalized"):
        raise ConfigError(
            f"objective: target_mode is {config.target_mode}, but this store was imported from logits "
            "without their normaliser (record.rest is unknown), so the rest's mass is not known; set "
            "objective.target_mode=renormalized, or capture the teacher to train with the rest."
        )
    return replace(config, target_mode="renormalized")
