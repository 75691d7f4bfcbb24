"""The teacher's settings with nothing left open: what runs is known before the teacher is loaded."""

from dataclasses import replace

import torch

from sparsekd.kernels.teacher_memory import positions_rule
from sparsekd.trainer.config.implementation import implementation_that_runs
from sparsekd.trainer.config.schema import TeacherConfig


def resolved_settings(config: TeacherConfig, device: torch.device, vocabulary_size: int) -> TeacherConfig:
    """The settings with the implementation and the chunk that are taken where none is named.

    Args:
        config: The teacher's settings.
        device: Where it runs.
        vocabulary_size: The true one.

    Raises:
        ConfigError: The implementation does not run on that device.
    """
    wanted = "torch" if config.tensor_parallel > 1 else config.impl  # which alone knows a divided head
    impl = implementation_that_runs(wanted, device, key="teacher.impl")
    chunk = config.chunk_positions or positions_rule(impl, vocabulary_size)
    return replace(config, impl=impl, chunk_positions=chunk)
