"""DeepSpeed's configuration is complete and ours; the user's further keys cannot contradict it."""

from typing import Any

import pytest
import torch

from sparsekd.trainer.config.engine_settings import deepspeed_config, further_keys
from sparsekd.trainer.config.schema import EngineConfig, OptimizerConfig
from sparsekd.trainer.data.order import batch_shape
from sparsekd.trainer.run.errors import ConfigError
from sparsekd.trainer.student.engine import adamw

SHAPE = batch_shape(global_rows=24, micro_rows=3, world_size=2)


def made(optimizer: OptimizerConfig | None = None, **engine: Any) -> dict[str, Any]:
    return deepspeed_config(EngineConfig(**engine), optimizer or OptimizerConfig(), SHAPE, pin_memory=False)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_key_that_changes_numbers_is_written(stage: int) -> None:
    settings = made(zero_stage=stage, optimizer=OptimizerConfig(gradient_clipping=0.0))
    assert settings["gradient_clipping"] == 0.0  # left out, DeepSpeed clips at 1.0
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"
    assert settings["bf16"] == {"enabled": True}
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["zero_optimization"]["stage"] == stage
    assert "train_batch_size" not in settings
    assert "auto" not in str(settings)


def test_stage_3_takes_its_thresholds() -> None:
    section = made(
        persistence_threshold=1, max_live_parameters=2, max_reuse_distance=3, prefetch_bucket_size=4
    )
    section = section["zero_optimization"]
    assert section["stage3_param_persistence_threshold"] == 1
    assert section["stage3_max_live_parameters"] == 2
    assert section["stage3_max_reuse_distance"] == 3
    assert section["stage3_prefetch_bucket_size"] == 4


@pytest.mark.parametrize(
    "further",
    [
        {"gradient_clipping": 2.0},
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": 3},
        {"bf16": {"enabled": {"deep": True}}},
        {"train_batch_size": 8},
        {"optimizer": {"type": "Adam"}},
        {"fp16": {"enabled": True}},
    ],
)
def test_owned_keys_are_refused(further: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\..*sparsekd sets this key itself"):
        made(deepspeed=further)


def test_further_keys_are_merged_and_said() -> None:
    further = {"zero_optimization": {"overlap_comm": True}, "dump_state": True}
    settings = made(deepspeed=further)
    assert settings["zero_optimization"]["overlap_comm"] and settings["zero_optimization"]["stage"] == 3
    assert settings["dump_state"] is True
    said = further_keys(EngineConfig(deepspeed=further))
    assert said == ["zero_optimization.overlap_comm=True", "dump_state=True"]


def test_auto_and_impossible_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="write a value"):
        made(deepspeed={"zero_optimization": {"overlap_comm": "auto"}})
    with pytest.raises(ConfigError, match=r"zero_stage=0 with engine\.dtype=bfloat16"):
        made(zero_stage=0)
    with pytest.raises(ConfigError, match="offload=cpu needs"):
        made(zero_stage=0, dtype="float32", offload="cpu")


def test_weight_decay_is_for_matrices() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    groups = adamw(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.3), (3, 0.0)]
