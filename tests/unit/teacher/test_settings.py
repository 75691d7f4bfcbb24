"""What is taken where a setting is left open, and what cannot run is refused before the teacher is loaded."""

import sys

import pytest
import torch

from sparsekd.kernels import teacher
from sparsekd.kernels.teacher_memory import positions_rule
from sparsekd.trainer.config.implementation import implementation_that_runs
from sparsekd.trainer.config.options import options
from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.run.errors import ConfigError
from sparsekd.trainer.teacher.settings import resolved_settings
from sparsekd.trainer.teacher.verify import runnable

CPU = torch.device("cpu")


def test_open_settings_are_decided_and_others_kept() -> None:
    found = resolved_settings(TeacherConfig(path="x"), CPU, 50257)
    assert (found.impl, found.chunk_positions) == ("torch", positions_rule("torch", 50257))
    assert found.path == "x"
    given = TeacherConfig(impl="torch", chunk_positions=37)
    assert resolved_settings(given, CPU, 50257) == given


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    settings = resolved_settings(TeacherConfig(impl="triton"), CPU, 50257)
    assert settings.chunk_positions == positions_rule("triton", 50257)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match=r"teacher\.impl=triton needs a GPU and the package triton, but"):
        resolved_settings(TeacherConfig(impl="triton"), CPU, 50257)


def test_a_gpu_without_the_package_triton_is_told_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    gpu = torch.device("cuda")
    assert implementation_that_runs("auto", gpu, key="objective.impl") == "torch"
    with pytest.raises(
        ConfigError, match=r"objective\.impl=triton needs .* the package is not installed; use"
    ):
        implementation_that_runs("triton", gpu, key="objective.impl")


def test_a_store_of_a_gpu_is_verified_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captured = TeacherConfig(impl="triton", chunk_positions=37)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runnable(captured, CPU, 50257) == captured and not capsys.readouterr().out
    monkeypatch.delenv("TRITON_INTERPRET")
    assert runnable(captured, CPU, 50257) == TeacherConfig(impl="torch", chunk_positions=37)
    assert "captured with impl triton, verified with impl torch on cpu" in capsys.readouterr().out


def test_the_choices_are_those_of_the_kernels() -> None:
    choices = {option.key: option.choices for option in options()}
    assert choices["teacher.impl"] == ("auto", *teacher.IMPLEMENTATIONS)
