"""What can be wrong with a training run's settings, found before torch is imported."""

from dataclasses import fields, replace

from sparsekd.kernels.objective import Objective, resolve_objective
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


def _served_by(config: ObjectiveConfig, record: RecordSpec) -> ObjectiveConfig:
    """Refuses what an imported record without a true log R cannot serve; "auto" becomes what it can.

    Raises:
        ConfigError: The target mode needs a rest, or a temperature, that the record does not hold.
    """
    if record.rest == "exact" or config.kd_weight == 0:
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
