"""A model folder whose class is in no library: its code lies beside its weights, as some on the Hub do."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
