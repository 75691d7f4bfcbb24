"""DeepSpeed's configuration, explicit: every key that changes numbers is written out. No torch here.

DeepSpeed has defaults of its own (it clips gradients at 1.0 when nothing is said, and accumulates in the
dtype of the weights); none of them decides here.
"""

from collections.abc import Mapping
from typing import Any

from sparsekd.logit_store.trees import flat
from sparsekd.trainer.config.schema import EngineConfig, OptimizerConfig
from sparsekd.trainer.data.order import BatchShape
from sparsekd.trainer.run.errors import ConfigError

# Keys that sparsekd sets through other options, or that would train something else than was asked for.
_NEVER = (
    "train_batch_size",
    "optimizer",
    "scheduler",
    "fp16",
    "amp",
    "torch_autocast",
    "data_efficiency",
    "curriculum_learning",
    "compression_training",
    "sparse_gradients",
    "managed_gradient_accumulation",
)


def deepspeed_config(
    engine: EngineConfig, optimizer: OptimizerConfig, shape: BatchShape, *, pin_memory: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration, complete, with the user's further keys merged in.

    Args:
        engine: The options of the engine.
        optimizer: Those of the optimizer.
        shape: How an optimizer step's rows are shared out.
        pin_memory: Whether offloaded states lie in page-locked memory.

    Raises:
        ConfigError: Stage 0 is asked for in bfloat16 or with offload, or engine.deepspeed holds a key that
            sparsekd owns or an "auto" value.
    """
    if engine.zero_stage == 0 and engine.dtype != "float32":
        raise ConfigError(
            f"engine.zero_stage=0 with engine.dtype={engine.dtype}: DeepSpeed refuses to accumulate float32 "
            "gradients there; use engine.dtype=float32, or stage 1, 2 or 3."
        )
    if engine.zero_stage == 0 and engine.offload != "none":
        raise ConfigError(
            f"engine.offload={engine.offload} needs engine.zero_stage 1, 2 or 3, found 0; "
            "raise the stage or use engine.offload=none."
        )
    own: dict[str, Any] = {
        # train_batch_size is left out: zero.Init checks it against a world of one rank (DeepSpeed #4703).
        "train_micro_batch_size_per_gpu": shape.micro_rows,
        "gradient_accumulation_steps": shape.accumulation,
        "gradient_clipping": float(optimizer.gradient_clipping),
        "bf16": {"enabled": engine.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_section(engine, pin_memory=pin_memory),
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    _check_further_keys(engine.deepspeed, own)
    return _merged(own, engine.deepspeed)


def _zero_section(engine: EngineConfig, *, pin_memory: bool) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 0:
        return section
    section |= {
        "reduce_bucket_size": engine.reduce_bucket_size,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "round_robin_gradients": False,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
    }
    if engine.offload == "cpu":
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    if engine.zero_stage == 3:
        section |= {
            "stage3_param_persistence_threshold": engine.persistence_threshold,
            "stage3_max_live_parameters": engine.max_live_parameters,
            "stage3_max_reuse_distance": engine.max_reuse_distance,
            "stage3_prefetch_bucket_size": engine.prefetch_bucket_size,
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_quantized_weights": False,
            "zero_quantized_gradients": False,
        }
    return section


def _check_further_keys(further: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    owned = flat(own, lists=False).keys()
    for key, value in flat(further, lists=False).items():
        parents = {key.rsplit(".", cut)[0] for cut in range(key.count(".") + 1)}
        children = {name for name in owned if name.startswith(f"{key}.")}
        if parents & owned or children or key.split(".")[0] in _NEVER:
            raise ConfigError(
                f"engine.deepspeed.{key}={value!r}: sparsekd sets this key itself; use the options of "
                "engine, optimizer, schedule and train instead."
            )
        if value == "auto":
            raise ConfigError(
                f"engine.deepspeed.{key}=auto: only the Hugging Face Trainer knows what auto means; "
                "write a value."
            )


def _merged(own: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(own)
    for key, value in further.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            value = _merged(merged[key], value)
        merged[key] = value
    return merged


def further_keys(engine: EngineConfig) -> list[str]:
    """The user's own DeepSpeed keys as `key=value`, to be announced."""
    return [f"{key}={value}" for key, value in flat(engine.deepspeed, lists=False).items()]
