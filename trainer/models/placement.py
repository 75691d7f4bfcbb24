"""Models that do not fit one device as they are saved: of fewer bits, over several devices, host and disk, or
several ranks.

transformers, accelerate and bitsandbytes do the work. What is here says it to them, and gives the head's
weight to those who multiply by it themselves.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from sparsekd.kernels.shard import VocabularyShard
from sparsekd.trainer.run.errors import ModelError


@dataclass(frozen=True)
class Placement:
    """How the weights of a model are laid out; by default whole on one device, as they are saved.

    Attributes:
        quantization: `int8` or `nf4`, of bitsandbytes; None for the folder's own, or none.
        device_map: How accelerate divides the layers among all devices that it sees; None for one device.
        max_memory: That each device, by its number, and `cpu` may hold of them, such as "70GiB".
        tensor_parallel: Ranks of the job that hold one model together, each a part of every layer; 1 for a
            whole model on each.
    """

    quantization: str | None = None
    device_map: str | None = None
    max_memory: Mapping[str | int, str] = field(default_factory=dict)
    tensor_parallel: int = 1

    def arguments(self, config: PretrainedConfig, device: torch.device) -> dict[str, Any]:
        """What `from_pretrained` is told.

        Args:
            config: The model's.
            device: Where it goes, unless it is divided.

        Raises:
            ImportError: bitsandbytes is needed and not installed.
            ValueError: The model cannot be divided among the ranks.
        """
        if self.tensor_parallel > 1:
            if (problem := _tensor_parallel_problem(config, self, device)) is not None:
                raise ValueError(problem)
            from transformers.distributed import DistributedConfig  # older releases have none

            if device.index is not None:
                # Where transformers looks for the GPU; Slurm may show a task none but its own.
                os.environ["LOCAL_RANK"] = str(device.index)
            return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=self.tensor_parallel)}
        found: dict[str, Any] = {}
        if self.quantization is not None:
            found["quantization_config"] = _of_bitsandbytes(self.quantization)
        if self.device_map is not None:
            found["device_map"] = self.device_map
            if self.max_memory:
                found["max_memory"] = dict(self.max_memory)
        elif quantization_of(config, self) is not None:
            found["device_map"] = {"": device}  # quantised weights are not moved afterwards
        return found


WHOLE = Placement()


def _of_bitsandbytes(quantization: str) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # The matrix products of 4 bits run in the dtype of what stands around them.
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization)


def quantization_of(
    config: PretrainedConfig, placement: Placement, gguf_file: str | None = None
) -> str | None:
    """By what a model is quantised: what is asked for, or the folder's own method; None where it is not."""
    if gguf_file is not None:
        return "gguf"
    if placement.quantization is not None:
        return placement.quantization
    own = getattr(config, "quantization_config", None)
    if own is None:
        return None
    method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", None)
    return str(getattr(method, "value", method) or "unnamed")


def _tensor_parallel_problem(
    config: PretrainedConfig, placement: Placement, device: torch.device
) -> str | None:
    """Why transformers' plan cannot divide a model among the ranks of this job, for a message."""
    ranks = placement.tensor_parallel
    here = dist.get_world_size() if dist.is_initialized() else 1
    if here != ranks:
        return f"it was to be divided among {ranks} ranks, and there are {here}"
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        return f"transformers has no tensor-parallel plan for its type, {text.model_type}"
    if (method := quantization_of(config, placement)) is not None:
        return f"it is quantised by {method}, and tensor_parallel takes weights as they are trained"
    for name in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(text, name, None)
        if isinstance(number, int) and number % ranks:
            return f"its {name}={number} cannot be divided among {ranks} ranks"
    accelerator = torch.accelerator.current_accelerator()
    found = "cpu" if accelerator is None else accelerator.type
    if found != device.type:
        return f"transformers divides it on {found}, and launch.device asks for {device.type}"
    return None


def is_placed(model: PreTrainedModel) -> bool:
    """Whether a model is already where it belongs."""
    is_divided = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return is_divided or getattr(model, "hf_device_map", None) is not None


def where(model: PreTrainedModel) -> str:
    """For people: how many parts of a model lie on which device."""
    places = [str(place) for place in getattr(model, "hf_device_map", {}).values()]
    return ", ".join(f"{places.count(place)} on {place}" for place in dict.fromkeys(places))


def resident_head(head: nn.Linear) -> nn.Linear:
    """The head; or one with the same weight in memory, where accelerate has that only during a call.

    Args:
        head: Of a model whose layers may lie on the host or the disk.
    """
    hook = getattr(head, "_hf_hook", None)
    if head.weight.device.type != "meta" or hook is None:
        return head
    hook.pre_forward(head)
    here = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    for name, value in head.named_parameters():
        setattr(here, name, nn.Parameter(value.detach().clone(), requires_grad=False))
    hook.post_forward(head, None)
    return here


class HeadPart(NamedTuple):
    """What this rank holds of a linear head.

    Attributes:
        weight: [rows, H].
        bias: [rows] or None.
        shard: Which rows of the whole head these are; None for all of them.
    """

    weight: Tensor
    bias: Tensor | None
    shard: VocabularyShard | None


def head_part(head: nn.Linear) -> HeadPart:
    """The rows of a head on this rank."""
    weight, bias = head.weight, head.bias
    if not isinstance(weight, DTensor):
        return HeadPart(weight, bias, None)
    group = weight.device_mesh.get_group()
    # As torch.chunk divides: all ranks hold as many rows, but for the last ones.
    step = -(-weight.shape[0] // dist.get_world_size(group))
    start = min(dist.get_rank(group) * step, weight.shape[0])
    own_bias = bias.to_local() if isinstance(bias, DTensor) else bias
    return HeadPart(weight.to_local(), own_bias, VocabularyShard(group=group, start=start))


def check_head_part(head: nn.Linear, vocabulary_size: int, name: str) -> None:
    """Refuses a head of which a rank holds padding alone.

    Args:
        head: Of the model.
        vocabulary_size: The true one.
        name: How the model is named in messages.

    Raises:
        ModelError: It is so, on any rank.
    """
    weight = head.weight
    if not isinstance(weight, DTensor):
        return
    ranks = weight.device_mesh.size()
    step = -(-weight.shape[0] // ranks)
    if (ranks - 1) * step >= vocabulary_size:
        raise ModelError(
            f"The last of {ranks} ranks would hold none of the {vocabulary_size:,} ids of {name}, whose head "
            f"has {weight.shape[0]:,} rows; set teacher.tensor_parallel to fewer ranks."
        )


def whole(weight: Tensor) -> Tensor:
    """A parameter as it is saved, gathered from all ranks where it is divided."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
