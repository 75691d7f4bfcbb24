"""Models that do not fit one device as they are saved: of fewer bits, over several devices, host and disk.

transformers, accelerate and bitsandbytes do the work. What is here says it to them, and gives the head's
weight to those who multiply by it themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Placement:
    """How the weights of a model are laid out; by default whole on one device, as they are saved.

    Attributes:
        quantization: `int8` or `nf4`, of bitsandbytes; None for the folder's own, or none.
        device_map: How accelerate divides the layers among all devices that it sees; None for one device.
        max_memory: That each device, by its number, and `cpu` may hold of them, such as "70GiB".
    """

    quantization: str | None = None
    device_map: str | None = None
    max_memory: Mapping[str | int, str] = field(default_factory=dict)

    def arguments(self, config: PretrainedConfig, device: torch.device) -> dict[str, Any]:
        """What `from_pretrained` is told.

        Args:
            config: The model's.
            device: Where it goes, unless it is divided.

        Raises:
            ImportError: bitsandbytes is needed and not installed.
        """
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


def is_placed(model: PreTrainedModel) -> bool:
    """Whether a model is already where it belongs."""
    return getattr(model, "hf_device_map", None) is not None


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
