"""Trains tiny students for test_export.py; keeps beside each checkpoint what DeepSpeed says of the weights.

Called by torchrun with two ranks: `export_runs.py FOLDER STORE`.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from sparsekd.trainer.config.schema import Config, LaunchConfig
from sparsekd.trainer.run import ranks as joining
from sparsekd.trainer.run.ending import run_as_process
from sparsekd.trainer.state.record import Commit
from sparsekd.trainer.state.save import Saver
from sparsekd.trainer.student import train

# (name, ZeRO stage, dtype of the engine, tied)
CASES = (
    ("zero3-tied", 3, "bfloat16", True),
    ("zero3-untied", 3, "bfloat16", False),
    ("zero2-tied", 2, "bfloat16", True),
    ("zero1-untied", 1, "bfloat16", False),
    ("zero0-tied", 0, "float32", True),
)
STEPS = 3

_begin = Saver.begin


def begin(
    saver: Saver, engine: deepspeed.DeepSpeedEngine, commit: Commit, published: Callable[[Path, float], None]
) -> None:
    """Saves as the trainer does, after writing down the weights by DeepSpeed's own accessor."""
    model = engine.module.model
    weights = {
        name: (safe_get_full_fp32_param(parameter) if engine.zero_optimization() else parameter)
        .detach()
        .clone()
        for name, parameter in model.named_parameters()
    }
    if saver._here.is_first:
        torch.save(weights, saver._folder.parent / f"weights-{commit.step}.pt")
    _begin(saver, engine, commit, published)


def run_config(folder: Path, store: Path, name: str, stage: int, dtype: str, tied: bool) -> Config:
    config = Config()
    config.run.root, config.run.name = str(folder), name
    config.store.path = str(store)
    config.student.config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    config.engine.zero_stage, config.engine.dtype = stage, dtype
    config.engine.persistence_threshold = 0
    config.train.steps, config.train.checkpoint_every = STEPS, STEPS - 1
    config.train.global_batch_rows, config.train.micro_batch_rows = 2, 1
    config.train.log_every = 1
    config.schedule.warmup_steps = 1
    config.launch.device = "cpu"
    config.tracking.wandb = "disabled"
    return config


def custom_run_config(folder: Path, store: Path) -> Config:
    """A student of a class of its own, with generation defaults that transformers does not write."""
    config = run_config(folder, store, "custom", 3, "bfloat16", False)
    config.student.path, config.student.config = str(folder.parent / "custom-model"), {}
    config.student.trust_remote_code = True
    return config


def main(folder: Path, store: Path) -> None:
    Saver.begin = begin
    # DeepSpeed keeps the first process group it saw, so all runs of this process share one.
    with joining.ranks(LaunchConfig(device="cpu"), timeout_minutes=2) as here:
        joining.ranks = lambda *_, **__: nullcontext(here)
        for name, stage, dtype, tied in CASES:
            train.run(run_config(folder, store, name, stage, dtype, tied))
        train.run(custom_run_config(folder, store))


if __name__ == "__main__":
    run_as_process(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
