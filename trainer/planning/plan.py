"""`plan`: how large, how long, how much memory and money, before any is spent.

Torch-free: it answers at once. What a teacher says of some rows is measured elsewhere and given to it.

Shapes: C positions of a chunk, N positions of a micro-batch, H hidden, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any

from sparsekd.kernels import memory
from sparsekd.logit_store.tools.inspect import RULE_NOTES, TARGET_NOTES
from sparsekd.trainer.config.loss_memory import cut_text, loss_memory
from sparsekd.trainer.config.schema import Config, StoreConfig, StudentConfig, TrainConfig
from sparsekd.trainer.planning.measured import Measured
from sparsekd.trainer.planning.money import Work, money_lines, time_lines
from sparsekd.trainer.planning.store_size import Corpus, StoreSize, corpus_of, store_size, token_store
from sparsekd.trainer.run.console import readable_seconds, size_text
from sparsekd.trainer.run.errors import ConfigError
from sparsekd.trainer.state.room import checkpoint_size, most_kept

# Decoders with gated MLPs, and the sizes without which they cannot be counted: those for which transformers
# has a default that does not follow from the others. config.json holds them all.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COUNTED_MODEL_TYPES = {
    "llama": _SIZES,
    "mistral": (*_SIZES, "num_key_value_heads"),
    "qwen2": (*_SIZES, "num_key_value_heads"),
    "qwen3": (*_SIZES, "num_key_value_heads", "head_dim"),
}
RANKS_SHOWN = (1, 2, 8, 64)


def student_fields(student: StudentConfig) -> dict[str, Any]:
    """The student's sizes: student.config, or config.json where student.path is a folder; else nothing."""
    if student.path is None:
        return dict(student.config)
    place = Path(student.path, "config.json")
    return json.loads(place.read_text()) if place.is_file() else {}


def count_parameters(fields: dict[str, Any], vocabulary_size: int) -> int | None:
    """Parameters of a llama-like decoder, tied weights counted once; None when a size is missing.

    V H (twice when untied) + layers (H D (2 heads + 2 kv heads) + 3 H I + 2 H) + H, with D the head size and
    I the MLP's. Biases and norms of single heads, well below 1 %, are left out.
    """
    needed = COUNTED_MODEL_TYPES.get(fields.get("model_type", ""))
    if needed is None or any(name not in fields for name in needed):
        return None
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    grouped = fields.get("num_key_value_heads") or heads
    head_size = fields.get("head_dim") or hidden // heads
    vocabulary = fields.get("vocab_size") or vocabulary_size
    embeddings = vocabulary * hidden * (1 if fields.get("tie_word_embeddings") else 2)
    attention = hidden * head_size * (2 * heads + 2 * grouped)
    layer = attention + 3 * hidden * fields["intermediate_size"] + 2 * hidden
    return embeddings + fields["num_hidden_layers"] * layer + hidden


def model_state_bytes(parameters: int, *, stage: int, dtype: str, ranks: int) -> float:
    """Bytes of weights, gradients and optimizer states on one rank.

    Per parameter: 2 or 4 bytes of weights, 4 of float32 gradients, 12 of AdamW (master weight, two moments).
    ZeRO stage 1 divides the optimizer states by the ranks, stage 2 also the gradients, stage 3 also the
    weights (Rajbhandari et al. 2020, arXiv 1910.02054, section 3; they count 2 bytes for half-precision
    gradients, sparsekd accumulates in float32).
    """
    weights, gradients, optimizer = (2 if dtype == "bfloat16" else 4), 4, 12
    share = [
        optimizer / (ranks if stage >= 1 else 1),
        gradients / (ranks if stage >= 2 else 1),
        weights / (ranks if stage >= 3 else 1),
    ]
    return parameters * sum(share)


def run(config: Config, measured: Measured | None = None) -> None:
    """Prints the plan.

    Args:
        config: The composed configuration.
        measured: Some rows of these tokens that the teacher has recorded; None to estimate.
    """
    corpus = corpus_of(config)
    size = store_size(config, corpus, measured)
    works = _works(config, corpus, measured)
    keys = {
        works[0].name: "plan.teacher_tokens_per_second=..., or --probe",
        works[1].name: "plan.student_tokens_per_second=...",
    }
    records = "estimated on text-like rows" if measured is None else "of records as they were measured"
    for title, lines in (
        ("corpus", _corpus_lines(config.train, corpus)),
        ("measured", _measured_lines(measured, size)),
        ("time", time_lines(works, keys)),
        ("money", money_lines(config.plan, works)),
        (f"store, {records}", _store_lines(config.store, corpus, size)),
        ("student", _student_lines(config, corpus)),
        ("loss of one micro-batch", _loss_lines(config, corpus)),
    ):
        if not lines:
            continue
        print(title)
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            print(f"  {name:<{width}}  {value}")
    if token_store(config.store) is None:
        print("next: sparsekd prepare corpus.paths=[...] store.tokens=FOLDER")
    else:
        path, teacher = config.store.path or "STORE", config.teacher.path or "MODEL"
        print(
            "next: torchrun --nproc-per-node RANKS --no-python sparsekd capture "
            f"store.tokens={config.store.tokens} store.path={path} teacher.path={teacher}",
            flush=True,
        )


def _works(config: Config, corpus: Corpus, measured: Measured | None) -> list[Work]:
    """The teacher pass and the trainings."""
    plan, train = config.plan, config.train
    each = plan.teacher_tokens_per_second or (measured.tokens_per_second if measured is not None else None)
    trainings = "training" if plan.trainings == 1 else f"{plan.trainings} trainings"
    trained = train.steps * train.global_batch_rows * corpus.sequence_length * plan.trainings
    return [
        Work("teacher pass", corpus.tokens, each and each * plan.workers, plan.workers),
        Work(trainings, trained, plan.student_tokens_per_second, plan.student_devices),
    ]


def _corpus_lines(train: TrainConfig, corpus: Corpus) -> list[tuple[str, str]]:
    batch = train.global_batch_rows
    read = train.steps * batch
    return [
        ("tokens", f"{corpus.tokens:,} ({corpus.source})"),
        ("rows", f"{corpus.rows:,} of {corpus.sequence_length:,} tokens"),
        ("vocabulary", f"{corpus.vocabulary_size:,}"),
        (
            "training",
            f"{train.steps:,} steps of {batch:,} rows read {read * corpus.sequence_length:,} tokens: "
            f"{read / max(corpus.train_rows, 1):.2f} times the training rows",
        ),
    ]


def _measured_lines(measured: Measured | None, size: StoreSize) -> list[tuple[str, str]]:
    """What the teacher said of some rows, and how fast."""
    if measured is None:
        return []
    record, speed = measured.manifest.record, measured.tokens_per_second
    share = measured.encode_seconds / measured.pass_seconds
    lines = [
        (
            "speed",
            f"{speed:,.0f} tokens/s on one {measured.where}, over {len(measured.rows)} rows, after "
            f"{readable_seconds(measured.loading_seconds)} of loading; store.features are left out",
        ),
        ("encoding", f"{share:.1%} of that time, beside it"),
        ("writing", f"{size_text((sum(size.planes.values()) + size.around) * speed)}/s of each worker"),
    ]
    if measured.loss is None or measured.tail is None:
        return [*lines, ("teacher", "no position of these rows counts in the loss")]
    lines += [
        ("teacher", f"{measured.loss:.3f} nats per token"),
        ("tail", f"{measured.tail:.4f} of the probability lies outside the {record.k} largest, on the mean"),
    ]
    if measured.noise is not None:
        lines.append(
            (
                "draws",
                f"{record.n} of them know a tail's part of the loss at one position to {measured.noise:.4f} "
                "nats for each nat by which log p - log q spreads there; batches average it out",
            )
        )
    return lines


def _store_lines(store: StoreConfig, corpus: Corpus, size: StoreSize) -> list[tuple[str, str]]:
    target = corpus.manifest.target
    lines = [("record", f"k={store.k}, n={store.n}, codec {store.codec}")]
    if target != "next_token":
        lines.append(("label", TARGET_NOTES[target]))
    if corpus.recorded:
        rule = RULE_NOTES[store.positions].format(share=store.share)
        lines += [
            ("records", f"{corpus.recorded:,} of {corpus.tokens:,} positions, {rule}"),
            ("a record", f"{size.of_records:8.2f} bytes"),
        ]
    lines += [(name, f"{width:8.2f} bytes per token") for name, width in size.planes.items()]
    lines += [
        ("all planes", f"{sum(size.planes.values()):8.2f} bytes per token"),
        ("around them", f"{size.around:8.2f} bytes per token"),
        ("size", f"{size_text(size.total)} in {corpus.shards:,} shards, {2 * corpus.shards:,} files"),
    ]
    if store.features:
        lines.append(("", "hidden states as if they were normal numbers; large models' take less as int8"))
    return lines


def _student_lines(config: Config, corpus: Corpus) -> list[tuple[str, str]]:
    parameters = count_parameters(student_fields(config.student), corpus.vocabulary_size)
    if parameters is None:
        return [
            (
                "parameters",
                "not counted: needs student.config (or a folder as student.path) of type "
                + ", ".join(COUNTED_MODEL_TYPES),
            )
        ]
    engine = config.engine
    stage, dtype = engine.zero_stage, engine.dtype
    states = ", ".join(
        f"{size_text(model_state_bytes(parameters, stage=stage, dtype=dtype, ranks=ranks))} on {ranks}"
        for ranks in RANKS_SHOWN
    )
    weights = 2 if engine.dtype == "bfloat16" else 4
    sizes = {
        ranks: checkpoint_size(parameters, stage=stage, dtype=dtype, ranks=ranks) for ranks in RANKS_SHOWN
    }
    each, kept = sizes[1].total, most_kept(config.train)
    copies = ", ".join(f"{size_text(size.first)} on {ranks}" for ranks, size in sizes.items())
    return [
        ("parameters", f"about {parameters:,}"),
        ("states per rank", f"{states} ranks (ZeRO {stage})"),
        ("", f"{weights} + 4 + 12 bytes: weights, float32 gradients, AdamW; without activations"),
        (
            "checkpoints",
            f"about {size_text(each)} each, {size_text(each * kept)} for the {kept} that are kept at most, "
            f"{size_text(each)} more while the next one is written",
        ),
        ("their copy", f"{copies} ranks, in the first rank's host memory, from which they are written"),
    ]


def _loss_lines(config: Config, corpus: Corpus) -> list[tuple[str, str]]:
    vocabulary = corpus.vocabulary_size
    positions = config.train.micro_batch_rows * corpus.sequence_length
    lines = [
        (
            "dense",
            f"{size_text(memory.dense_bytes(positions, vocabulary))} = 12 N V, N = {positions:,} positions: "
            "student, teacher and one gradient",
        )
    ]
    fields = student_fields(config.student)
    hidden = fields.get("hidden_size") or config.plan.hidden_size
    if hidden is None:
        needed = "not counted: needs student.config.hidden_size or plan.hidden_size"
        return [*lines, ("torch, triton", needed)]
    for impl, where in (("torch", "CPU"), ("triton", "GPU")):
        try:
            plan = loss_memory(
                config,
                impl,
                sequence_length=corpus.sequence_length,
                vocabulary_size=vocabulary,
                hidden_size=hidden,
                softcap=fields.get("final_logit_softcapping") is not None,
                on_cpu=where == "CPU",
            )
        except ConfigError as error:
            lines.append((impl, f"does not run on a {where}: {error}"))
            continue
        lines.append((impl, f"{size_text(plan.peak_bytes)} on a {where}, {cut_text(plan)}"))
    lines.append(("", f"H = {hidden:,}, {config.engine.dtype}; gradients of head and hidden states included"))
    return lines
