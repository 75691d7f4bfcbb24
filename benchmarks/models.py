"""Tries every causal language model type of the installed transformers, small and with random weights.

For each: is the head what we take it for, do documents that share a row stay apart, does a step of training
give finite gradients, and can the student be exported and loaded again.

    .venv/bin/python benchmarks/models.py
"""

import contextlib
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The folder is no package, and PYTHONSAFEPATH keeps a script's folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

import torch
from page import command_line, made_by, processor, running_code, table
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.logit_store.errors import first_line
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows, write_synthetic_tokenizer
from sparsekd.trainer.config.checks import resolved_objective
from sparsekd.trainer.config.schema import ObjectiveConfig
from sparsekd.trainer.data.batches import micro_batch, rest_formula_of
from sparsekd.trainer.data.sources import Records, SourceRow
from sparsekd.trainer.models.causal_lm import ModelSource, head_transform, model_of
from sparsekd.trainer.models.opened import prove
from sparsekd.trainer.models.twin import check_exportable, shrunk
from sparsekd.trainer.run.errors import ModelError
from sparsekd.trainer.student.head import LossSettings, Student

VOCABULARY = 300
LENGTH = 64
SECONDS = 120
MOST_PARAMETERS = 40_000_000
SMOKE = ("llama", "mamba", "bert")

PACKED, ALONE, REFUSED, NOT_TRIED = "packed", "packing=none", "refused", "not tried"

# Sizes that neither follow from others nor are small by default.
HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {**HYBRID, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**HYBRID, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "llama4_text": {"intermediate_size_mlp": 64, "num_local_experts": 4, "head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "hidden_size": 64, "state_size": 8, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 4},
    "rwkv": {"hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 2},
    "xlstm": {"hidden_size": 64, "num_heads": 4, "num_hidden_layers": 2, "num_blocks": 2},
}


@dataclass(frozen=True)
class Outcome:
    """What became of one model type.

    Attributes:
        way: One of PACKED, ALONE, REFUSED, NOT_TRIED.
        attention: What transformers picks.
        step: Whether a step of training gave finite gradients; None where none was tried.
        exported: Whether it can be exported.
        why: Of a refusal, or of what failed; empty where all is well.
    """

    way: str
    attention: str = ""
    step: bool | None = None
    exported: bool | None = None
    why: str = ""


def small_config(model_type: str) -> PretrainedConfig:
    """A small configuration of a type, from its own defaults."""
    fields = FIELDS.get(model_type, {})
    config = AutoConfig.for_model(model_type, **fields)
    text = config.get_text_config()
    text.vocab_size = VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    return shrunk(config, widths=True) or config


def tried(model_type: str, store: LogitStore) -> Outcome:
    """Tries one type; whatever its code raises is told."""
    source = ModelSource(None, None, "auto", False, "student.path")
    try:
        config = small_config(model_type)
        with torch.device("meta"):
            size = model_of(config, source, dtype=torch.float32).num_parameters()
        if size > MOST_PARAMETERS:
            return Outcome(NOT_TRIED, why=f"{size:,} parameters where it was to be small")
        torch.manual_seed(0)
        model = model_of(config, source, dtype=torch.float32).eval()
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
    except TimeoutError:
        raise
    except Exception as error:  # of sizes that its authors never tried
        return Outcome(NOT_TRIED, why=f"{type(error).__name__}: {first_line(error)}")
    attention = str(model.config._attn_implementation)
    transform = head_transform(config, VOCABULARY)
    try:
        way = way_of(model, transform, store)
        settings = LossSettings(
            objective=resolved_objective(ObjectiveConfig(), store.manifest.record),
            transform=transform,
            impl="torch",
            chunk_positions=None,
            memory_budget=None,
        )
        step = trained(Student(model, settings), store, settings.objective)
    except TimeoutError:
        raise
    except Exception as error:  # ours or the model's own: the page says which
        return Outcome(REFUSED, attention, why=first_line(error))
    try:
        said = check_exportable(config, source, store, dtype=torch.float32)
    except ModelError as error:
        return Outcome(way, attention, step, False, first_line(error))
    return Outcome(way, attention, step, not said, said[0] if said else "")


def way_of(model: PreTrainedModel, transform: HeadTransform, store: LogitStore) -> str:
    """PACKED, or ALONE where documents of a row do not stay apart; raises ModelError where neither goes."""
    try:
        prove(model, transform, store, key="student", packed=True)
    except ModelError as error:
        if "a document of a packed row depends" not in str(error):
            raise
        prove(model, transform, store, key="student", packed=False)
        return ALONE
    return PACKED


def trained(student: Student, store: LogitStore, objective: Objective) -> bool:
    """One step; whether loss and gradients are finite, and some are not 0."""
    records = Records(rest_formula_of(objective, store.manifest), 1.0)
    batch = micro_batch([SourceRow(store.read_row("train", row), records) for row in range(2)])
    student.train()
    loss = student(batch).loss
    loss.backward()
    gradients = [value.grad for value in student.parameters() if value.grad is not None]
    total = math.fsum(float(gradient.double().norm()) for gradient in gradients)
    torch.optim.AdamW(student.parameters(), lr=1e-3).step()
    return math.isfinite(float(loss.detach())) and math.isfinite(total) and total > 0


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in what takes longer."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def made_store(folder: Path) -> LogitStore:
    """A small store of several documents a row."""
    manifest = synthetic_manifest(vocabulary_size=VOCABULARY, sequence_length=LENGTH, rows_per_shard=2)
    create_store(folder / "store", manifest, write_synthetic_tokenizer(folder / "tokenizer", VOCABULARY))
    write_shard(folder / "store", manifest, "train", 0, synthetic_rows(manifest, 2, seed=0))
    seal(folder / "store", {"train": 1, "heldout": 0})
    return open_store(folder / "store")


def markdown(outcomes: dict[str, Outcome], made: Sequence[str]) -> str:
    """The page: how it was made, and a line for each model type."""

    def word(value: bool | None) -> str:
        return "" if value is None else "yes" if value else "no"

    lines = ["# Model types that were tried", "", *made, ""]
    counts = {way: sum(each.way == way for each in outcomes.values()) for way in TITLES}
    lines += [", ".join(f"{counts[way]} {TITLES[way]}" for way in TITLES) + ".", ""]
    rows = [
        [name, each.way, each.attention, word(each.step), word(each.exported), cell(each.why)]
        for name, each in sorted(
            outcomes.items(), key=lambda item: (list(TITLES).index(item[1].way), item[0])
        )
    ]
    head = ("model type", "rows", "attention", "a step", "exported", "why not")
    return "\n".join([*lines, *table(head, rows, words=range(6))])


TITLES = {
    PACKED: "keep documents of a row apart",
    ALONE: "need a document a row (corpus.packing=none)",
    REFUSED: "are refused",
    NOT_TRIED: "could not be made small",
}


def cell(text: str, most: int = 160) -> str:
    """Text for a cell of a table."""
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def main(words: Sequence[str] | None = None) -> None:
    """Try every type, write the page, say where it is."""
    words = list(sys.argv[1:] if words is None else words)
    parser = command_line(__doc__, smoke="three types: does it run?")
    parser.add_argument("--types", nargs="+", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    arguments = parser.parse_args(words)
    names = SMOKE if arguments.smoke else arguments.types
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    code, begin = running_code(), time.monotonic()
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = made_store(Path(folder))
        for name in names:
            try:
                with at_most(SECONDS):
                    outcomes[name] = tried(name, store)
            except TimeoutError as error:
                outcomes[name] = Outcome(NOT_TRIED, why=str(error))
            print(f"{name}: {outcomes[name].way} {outcomes[name].why[:80]}", flush=True)
    minutes = (time.monotonic() - begin) / 60
    made = made_by(
        "models.py",
        words,
        code,
        cache="",
        machine=f"{processor()}, one thread, {minutes:.0f} minutes",
        packages=("torch", "transformers"),
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    page = arguments.out / "models.md"
    page.write_text(markdown(outcomes, made))
    print(f"{page.read_text()}\nWritten: {page}")


if __name__ == "__main__":
    main()
