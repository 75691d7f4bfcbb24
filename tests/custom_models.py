"""A model folder whose class is in no library: its code lies beside its weights, as some on the Hub do."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

CODE = {
    "configuration_halved.py": """
from transformers import LlamaConfig


class HalvedConfig(LlamaConfig):
    model_type = "halved_llama"
""",
    "modeling_halved.py": """
from transformers import LlamaForCausalLM

from .configuration_halved import HalvedConfig
from .halving import halve


class HalvedForCausalLM(LlamaForCausalLM):
    config_class = HalvedConfig

    def __init__(self, config):
        super().__init__(config)
        # Plain Llama code would load the weights and give other logits.
        halve(self.model)
""",
    "halving.py": """
def halve(decoder):
    decoder.norm.variance_epsilon *= 0.5
    decoder.layers[0].self_attn.scaling *= 0.5
""",
}

EXPERTS = {
    "configuration_listed.py": """
from transformers import LlamaConfig


class ListedConfig(LlamaConfig):
    model_type = "listed_llama"
""",
    "modeling_listed.py": """
import torch
from torch import nn
from transformers import LlamaForCausalLM

from .configuration_listed import ListedConfig


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.expert_count, bias=False)
        self.experts = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.expert_count)
        )

    def forward(self, states):
        strength, chosen = self.gate(states).softmax(-1).max(-1)
        made = torch.zeros_like(states)
        for index in chosen.unique().tolist():
            routed = chosen == index
            made[routed] = self.experts[index](states[routed]) * strength[routed, None]
        return made


class ListedForCausalLM(LlamaForCausalLM):
    config_class = ListedConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Experts(config)
        self.post_init()
""",
}
"""A mixture of experts that are modules of a list, of which a token passes one."""


def write_listed_experts(folder: Path, fields: dict[str, Any], *, count: int) -> Path:
    """Writes a small mixture of so many experts, with weights of seed 0; returns its folder."""
    folder.mkdir()
    for name, text in EXPERTS.items():
        (folder / name).write_text(text)
    auto_map = {
        "AutoConfig": "configuration_listed.ListedConfig",
        "AutoModelForCausalLM": "modeling_listed.ListedForCausalLM",
    }
    settings = {"auto_map": auto_map, "model_type": "listed_llama", "architectures": ["ListedForCausalLM"]}
    settings |= LlamaConfig(**fields, expert_count=count).to_diff_dict() | settings
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def write_custom_model(folder: Path, fields: dict[str, Any]) -> Path:
    """Writes a small model of a class of its own, with weights of seed 0; returns its folder."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(folder)
    for name, text in CODE.items():
        (folder / name).write_text(text)
    place = folder / "config.json"
    auto_map = {
        "AutoConfig": "configuration_halved.HalvedConfig",
        "AutoModelForCausalLM": "modeling_halved.HalvedForCausalLM",
    }
    settings = json.loads(place.read_text()) | {"auto_map": auto_map, "model_type": "halved_llama"}
    place.write_text(json.dumps(settings | {"architectures": ["HalvedForCausalLM"]}))
    return folder
