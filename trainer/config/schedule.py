"""The learning rate as a pure function of the step, so that nothing of it has to be saved."""

import math

from sparsekd.trainer.config.schema import ScheduleConfig
from sparsekd.trainer.run.errors import ConfigError


def check_schedule(schedule: ScheduleConfig, *, steps: int) -> None:
    """Checks that warm-up and decay fit into the run.

    Raises:
        ConfigError: They do not, or warm-up and decay overlap.
    """
    if schedule.warmup_steps >= steps:
        raise ConfigError(
            f"schedule.warmup_steps={schedule.warmup_steps} leaves nothing of train.steps={steps}; "
            f"use fewer warm-up steps (such as {steps // 10}) or more steps."
        )
    if schedule.kind == "wsd" and schedule.warmup_steps > _decay_start(schedule, steps):
        raise ConfigError(
            f"schedule.warmup_steps={schedule.warmup_steps} and the decay of the last "
            f"schedule.decay_fraction={schedule.decay_fraction:g} of train.steps={steps} overlap; "
            "shorten one."
        )


def learning_rate(step: int, *, peak: float, steps: int, schedule: ScheduleConfig) -> float:
    """The learning rate of one optimizer step.

    Args:
        step: Number of the step that is taken, from 1 to `steps`.
        peak: Rate after warm-up.
        steps: Steps of the whole run.
        schedule: `cosine` falls along half a cosine, `wsd` (warm-up, stable, decay: Hu et al. 2024, MiniCPM)
            stays and then falls linearly, `constant` stays; the first two end at final_ratio * peak.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    final = peak * schedule.final_ratio
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":
        start = _decay_start(schedule, steps)
        return peak if step <= start else peak + (final - peak) * (step - start) / (steps - start)
    progress = (step - schedule.warmup_steps) / (steps - schedule.warmup_steps)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _decay_start(schedule: ScheduleConfig, steps: int) -> int:
    """Last step at the peak rate of `wsd`."""
    return steps - round(schedule.decay_fraction * steps)
