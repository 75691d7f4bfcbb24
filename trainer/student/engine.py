"""The DeepSpeed engine: made from an explicit configuration, and what training calls of it."""

from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups, set_z3_leaf_module
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from sparsekd.trainer.config.schema import OptimizerConfig


def leave_out_compiled_collectives() -> None:
    """Keeps DeepSpeed from compiling its shared-memory collective on the CPU, which training never calls.

    It would need a compiler and most of a minute at the first start; and a process killed meanwhile leaves a
    lock file behind, for which every later start would wait without end (seen).
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def partitioned_loading(settings: dict[str, Any]) -> HfDeepSpeedConfig:
    """While the returned object lives, transformers loads models as this configuration partitions them."""
    return HfDeepSpeedConfig(settings)


def forget_groups() -> None:
    """Lets DeepSpeed forget the process group, which it keeps beyond the group's end.

    A later training of this process has another group, and would die on the old one.
    """
    groups._release_process_group_references()


def adamw(model: nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW over two groups: matrices with weight decay, vectors (norms, biases) without."""
    # Under zero.Init a parameter is an empty vector here; its true shape is ds_shape.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in trainable]
    matrices = [parameter for parameter, shape in zip(trainable, shapes, strict=True) if len(shape) > 1]
    vectors = [parameter for parameter, shape in zip(trainable, shapes, strict=True) if len(shape) <= 1]
    groups = [
        {"params": matrices, "weight_decay": optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optimizer.learning_rate,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.epsilon,
    )


def gather_experts_together(student: nn.Module) -> None:
    """Has ZeRO-3 gather the experts of a list, and what stands beside them, whenever their block is called.

    It gathers a module's parameters when that is called, by collectives of all ranks. But ranks call other
    experts, each those to which its tokens are routed: each would wait for its own. DeepSpeed knows three
    classes of such blocks by name. Experts in one tensor, as those of transformers are, need nothing.
    """
    for block in student.modules():
        if any(
            isinstance(child, nn.ModuleList) and "expert" in name for name, child in block.named_children()
        ):
            set_z3_leaf_module(block, True)


def build_engine(
    student: nn.Module, settings: dict[str, Any], optimizer: OptimizerConfig
) -> deepspeed.DeepSpeedEngine:
    """Hands the student to DeepSpeed; `settings` is what `deepspeed_config` returned."""
    gather_experts_together(student)
    engine, *_ = deepspeed.initialize(
        model=student, optimizer=adamw(student, optimizer), config=settings, dist_init_required=False
    )
    # A script that DeepSpeed would put beside every checkpoint, on one rank and deaf to a full disk; `export`
    # does its work.
    engine._copy_recovery_script = lambda folder: None
    return engine


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Sets the rate of every parameter group for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def gradient_scale(global_weight: Tensor, world_size: int) -> Tensor:
    """What the sum of losses of a micro-batch is multiplied by, float32 scalar: its part in the global mean.

    Args:
        global_weight: Sum of the counted positions' weights over all micro-batches of all ranks in this step,
            float32 scalar.
        world_size: Number of ranks, over which DeepSpeed averages.
    """
    return world_size / global_weight


def backward(
    engine: deepspeed.DeepSpeedEngine,
    loss: Tensor,
    world_size: int,
    *,
    share: Tensor | None = None,
) -> None:
    """Accumulates the gradient of (sum of losses over the whole global batch) / (sum of its weights).

    DeepSpeed must not divide by the accumulation as well. So the result does not depend on accumulation,
    ranks or padding (7e-9, measured).

    Args:
        engine: The engine whose forward made the loss.
        loss: Weighted sum of the micro-batch times `gradient_scale`, float32 scalar. Nothing scales it any
            more, so that its own upstream gradient is 1.
        world_size: Number of ranks.
        share: What this micro-batch adds to the mean besides, float32 scalar.
    """
    # A tensor of our own in any case: at stage 0 DeepSpeed divides by the accumulation, whatever it is told,
    # where it is handed the very output of its forward (seen: 0.17 off).
    whole = loss.clone() if share is None else loss + share * world_size
    engine.backward(whole, scale_wrt_gas=False)


def parameter_count(student: nn.Module) -> int:
    """Parameters of the whole student, tied ones counted once."""
    # Under stage 3 a parameter is an empty vector between the passes.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in student.parameters())


def local_gradient_norm(engine: deepspeed.DeepSpeedEngine) -> Tensor | None:
    """Norm of the reduced gradient for stage 0, where DeepSpeed keeps none; read it before the step."""
    if engine.zero_optimization():
        return None
    norms = [parameter.grad.norm() for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.stack(norms).norm()
