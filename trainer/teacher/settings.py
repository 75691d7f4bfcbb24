"""The teacher's settings with nothing left open: what runs is known before the teacher is loaded."""

import os
from dataclasses import replace

import torch

from sparsekd.kernels.loss import default_impl
from sparsekd.kernels.teacher_memory import positions_rule
from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.run.errors import ConfigError


def resolved_settings(config: TeacherConfig, device: torch.device, vocabulary_size: int) -> TeacherConfig:
    """The settings with the implementation and the chunk that are taken where none is named.

    Args:
        config: The teacher's settings.
        device: Where it runs.
        vocabulary_size: The true one.

    Raises:
        ConfigError: The implementation does not run on that device.
    """
    best = default_impl(device)
    impl = best if config.impl == "auto" else config.impl
    if impl == "triton" and best != "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"teacher.impl=triton needs a GPU and the package triton, but the device is {device.type}; use "
            "teacher.impl=torch."
        )
    chunk = config.chunk_positions or positions_rule(impl, vocabulary_size)
    return replace(config, impl=impl, chunk_positions=chunk)
