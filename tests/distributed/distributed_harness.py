"""Jobs of several real processes on gloo with real DeepSpeed, and the tiny runs that they share.

ZeRO-3 runs here with every threshold at 0: above a tiny model's size they would keep it whole on each rank,
and hide every mistake from the second step on.
"""

import copy
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forked import ForkedJob, forked
from plain_training import student
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import narrowed
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.trainer.data.order import BatchShape, GlobalOrder, step_rows
from sparsekd.trainer.export.export import consolidated_weights

Values = dict[str, Any]

WORKER = Path(__file__).with_name("worker.py")
VOCABULARY = 97
TRAIN_ROWS, HELDOUT_ROWS = 22, 5
STEPS, LONG_STEPS = 4, 12
# The least, or nearly, for two rows of 32 positions and for one: where enough of them count it makes slices.
LITTLE_MEMORY, LITTLE_MEMORY_OF_ONE = 4.25e-5, 2.7e-5
TIMED_FIELDS = (
    *("tokens_per_second", "data_wait_share", "step_seconds", "peak_memory_gib"),
    *("seconds", "run_seconds"),
)


@dataclass(frozen=True)
class Workplace:
    """A folder with stores and run folders, and the way to start jobs on them."""

    root: Path

    @property
    def store(self) -> LogitStore:
        return open_store(self.root / "store")

    def run_values(self, name: str, **changes: Values) -> Values:
        """A run's configuration over the defaults, with changes by section."""
        values: Values = {
            "run": {"root": str(self.root / "runs"), "name": name},
            "store": {"path": str(self.root / "store")},
            "student": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "tie_word_embeddings": True,
                }
            },
            "objective": {"kd_weight": 0.75, "ce_weight": 0.25},
            # A large epsilon keeps AdamW's update smooth in the gradient, so that rounding stays rounding.
            "optimizer": {"learning_rate": 1e-2, "epsilon": 1e-3, "gradient_clipping": 0.3},
            "schedule": {"warmup_steps": 2},
            "engine": {
                "dtype": "float32",
                "persistence_threshold": 0,
                "max_live_parameters": 0,
                "max_reuse_distance": 0,
                "prefetch_bucket_size": 0,
            },
            "train": {
                "steps": 4,
                "global_batch_rows": 8,
                "micro_batch_rows": 2,
                "log_every": 1,
                "evaluate_every": 0,
                "evaluate_rows": 0,
                "checkpoint_every": 100,
            },
            "tracking": {"wandb": "disabled"},
            "launch": {"device": "cpu"},
        }
        for section, change in changes.items():
            values.setdefault(section, {}).update(copy.deepcopy(change))
        return values

    def start(self, runs: list[Values], *, ranks: int, worker: Path = WORKER) -> ForkedJob:
        """Starts a job in the background; its output goes to `output.txt`."""
        place = self.root / f"runs_{len(list(self.root.glob('runs_*.json')))}.json"
        place.write_text(json.dumps(runs))
        output = self.root / "output.txt"
        output.write_text("")
        return ForkedJob(forked([str(place)], [output] * ranks, worker))

    def run(
        self,
        runs: list[Values],
        *,
        ranks: int,
        timeout: float = 170,
        expected: int = 0,
        worker: Path = WORKER,
    ) -> str:
        """Runs a job to its end and returns its output; fails with that output, tracebacks and all."""
        job = self.start(runs, ranks=ranks, worker=worker)
        try:
            code = job.wait(timeout)
        except subprocess.TimeoutExpired:
            job.kill()
            code = None
        output = (self.root / "output.txt").read_text()
        ended = f"took longer than {timeout} s" if code is None else f"ended with {code}"
        failed = code is None or (code == 0) != (expected == 0)
        assert not failed, f"The job {ended}. Its output:\n{output[-8000:]}"
        return output

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def metrics(self, name: str, kind: str = "train") -> list[Values]:
        """The lines of metrics of one kind, without those fields that time decides."""
        lines = (self.folder(name) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [
            {key: value for key, value in record.items() if key not in TIMED_FIELDS}
            for record in records
            if record["kind"] == kind
        ]

    def weights(self, name: str, step: int) -> dict[str, torch.Tensor]:
        """The float32 weights in a checkpoint, by the names of the transformers model."""
        folder = self.folder(name) / "checkpoints" / f"step-{step:08d}"
        return consolidated_weights(folder)


def make_workplace(root: Path) -> Workplace:
    """Writes a logit store and a token store of the same tokens."""
    for name, record in (("store", {}), ("tokens", {"k": 0, "n": 0})):
        manifest = synthetic_manifest(
            vocabulary_size=VOCABULARY, sequence_length=32, rows_per_shard=8, **record
        )
        write_synthetic_store(root / name, manifest, {"train": TRAIN_ROWS, "heldout": HELDOUT_ROWS}, seed=3)
    masked_store(root / "padding", padding_rows(), tokenizer=root / "store-tokenizer")
    work = Workplace(root)
    config = work.run_values("")["student"]["config"]
    student(config, seed=0, vocabulary=VOCABULARY).float().save_pretrained(root / "pretrained")
    return work


def padding_rows() -> list[int]:
    """Rows of the store `padding` in which nothing counts: all of the first rank's in step 1, and more."""
    shape = BatchShape(global_rows=8, micro_rows=1, world_size=2)
    first = step_rows(0, shape, GlobalOrder(TRAIN_ROWS, 0))
    second = step_rows(8, shape, GlobalOrder(TRAIN_ROWS, 0))
    return [*first[:4], second[6]]


def masked_store(path: Path, masked: list[int], *, tokenizer: Path) -> None:
    """Writes the rows of the common store again, some of them without a position that counts."""
    manifest = synthetic_manifest(vocabulary_size=VOCABULARY, sequence_length=32, rows_per_shard=8)
    rows = synthetic_rows(manifest, TRAIN_ROWS, 3)
    for row in masked:
        rows[row] = narrowed(rows[row], np.zeros_like(rows[row].loss_mask))
    create_store(path, manifest, tokenizer)
    for shard in range(3):
        write_shard(path, manifest, "train", shard, rows[shard * 8 : shard * 8 + 8])
    seal(path, {"train": 3, "heldout": 0})


def all_runs(work: Workplace) -> dict[str, Values]:
    """The runs of the two-rank job that most tests share."""
    config = work.run_values("")["student"]["config"]
    untied = config | {"tie_word_embeddings": False, "vocab_size": 104}
    tokens = {"path": str(work.root / "tokens")}
    padding = {"store": {"path": str(work.root / "padding")}, "train": {"micro_batch_rows": 1}}
    experts = {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "router_aux_loss_coef": 0.5,
    }
    balanced = config | experts | {"output_router_logits": True}
    runs: dict[str, dict[str, Values]] = {
        "tied": {"train": {"evaluate_rows": HELDOUT_ROWS, "evaluate_every": 2, "checkpoint_every": 2}},
        "untied": {"student": {"config": untied}},
        # The same weights from a folder, with no configuration of their own.
        "pretrained": {"student": {"path": str(work.root / "pretrained"), "config": {}}},
        "accumulated": {"train": {"micro_batch_rows": 1}},
        "recomputed": {"student": {"activation_checkpointing": True}},
        # Where many positions count, too little memory for whole rows of logits: slices, and the weight is
        # read again in backward, while the other rank may have slabs.
        "slices": {"objective": {"memory_gib": LITTLE_MEMORY}},
        "slices_untied": {"student": {"config": untied}, "objective": {"memory_gib": LITTLE_MEMORY}},
        # Micro-batches of padding alone, in which one rank's head has nothing to do and the other's has.
        "padding": padding,
        "padding_slices": padding | {"objective": {"memory_gib": LITTLE_MEMORY_OF_ONE}},
        "tokens": {"store": tokens, "objective": {"kd_weight": 0.0, "ce_weight": 1.0}},
        # Mixtures of experts, whose load-balancing loss stands in the configuration, or in a key.
        "balanced": {"student": {"config": balanced}},
        "balanced_padding": padding | {"student": {"config": config | experts, "router_loss": 0.25}},
        "unbalanced": {"student": {"config": config | experts}},
        "stage_0": {"engine": {"zero_stage": 0}, "train": {"checkpoint_every": 2}},
        "stage_1": {"engine": {"zero_stage": 1}},
        "stage_2": {"engine": {"zero_stage": 2}, "train": {"checkpoint_every": 2}},
        "bfloat16_1": {"engine": {"zero_stage": 1, "dtype": "bfloat16"}},
        "bfloat16_2": {"engine": {"zero_stage": 2, "dtype": "bfloat16"}},
        "bfloat16_3": {"engine": {"zero_stage": 3, "dtype": "bfloat16"}},
    }
    values = {name: work.run_values(name, **changes) for name, changes in runs.items()}
    return values | {"straight": long_run(work, "straight")}


def long_run(work: Workplace, name: str) -> Values:
    """A run to be killed, with dropout; metrics, held-out losses and checkpoints come at different steps."""
    times = {
        "steps": LONG_STEPS,
        "log_every": 3,
        "evaluate_every": 4,
        "evaluate_rows": 3,
        "checkpoint_every": 2,
    }
    config = work.run_values("")["student"]["config"] | {"attention_dropout": 0.1}
    return work.run_values(name, train=times, student={"config": config})


def overrides_of(values: Values) -> list[str]:
    """A run's configuration as words for the command line."""

    def written(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}: {written(entry)}" for key, entry in value.items()) + "}"
        return value if isinstance(value, str) else json.dumps(value)

    return [
        f"{section}.{key}={written(value)}" for section, keys in values.items() for key, value in keys.items()
    ]
