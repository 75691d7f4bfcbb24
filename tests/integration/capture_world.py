"""A token store of real text and tiny teachers for it, for the tests of `capture`."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.corpus.prepare import run as prepare

VOCABULARY = 280
LENGTH = 48
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
# Wide weights, so that logits spread over tens of nats, caps bend them and attention matters.
WIDE = {"initializer_range": 0.35, "max_position_embeddings": 64, "tie_word_embeddings": False}
TEACHERS = {
    # A head with more rows than the tokenizer has entries is normal.
    "llama": {"model_type": "llama", "vocab_size": VOCABULARY + 13},
    "gemma2": {
        "model_type": "gemma2",
        "vocab_size": VOCABULARY,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": None,
        "sliding_window": 8,
    },
    "granite": {"model_type": "granite", "vocab_size": VOCABULARY, "logits_scaling": 0.25},
}


def make_tokens(folder: Path) -> Path:
    """A token store of real text: short documents, long ones over several rows, both splits."""
    library = Path(json.__file__).parent
    (folder / "text").mkdir()
    for name in ("scanner.py", "tool.py"):
        shutil.copy(library / name, folder / "text" / name)
    for index, line in enumerate(sorted(set((library / "decoder.py").read_text().splitlines()))[-40:]):
        (folder / "text" / f"line{index:02d}.txt").write_text(line)
    config = Config()
    config.corpus.paths = [str(folder / "text")]
    config.corpus.train_vocabulary_size = VOCABULARY
    config.corpus.sequence_length = LENGTH
    config.corpus.heldout_fraction = 0.2
    config.store.tokens = str(folder / "store")
    config.store.rows_per_shard = 3
    prepare(config)
    return folder / "store"


def make_teacher(
    folder: Path, kind: str, *, seed: int = 0, tokenizer: Path | None = None, **changes: object
) -> Path:
    torch.manual_seed(seed)
    fields = SIZES | WIDE | TEACHERS[kind] | changes
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields, **special), dtype=torch.float32
    )
    model.save_pretrained(folder)
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def config_for(tokens: Path, teacher: Path, store: Path, **changes: object) -> Config:
    config = Config()
    config.store.tokens = str(tokens)
    config.store.path = str(store)
    config.store.k, config.store.n = 5, 7
    config.teacher.path = str(teacher)
    config.teacher.dtype = "float32"
    config.teacher.micro_batch_rows = 2
    config.teacher.chunk_positions = 37  # no divisor of anything
    config.launch.device = "cpu"
    for key, value in changes.items():
        group, name = key.split("__")
        setattr(getattr(config, group), name, value)
    return config


def files_of(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()
    }
