"""`plan`: how large, how long and how much memory, before money is spent. Torch-free: it answers at once.

Shapes: L tokens of a row, k head entries, n draws, G grid temperatures, C positions of a chunk, N positions
of a micro-batch, H hidden, V vocabulary.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsekd.kernels import memory
from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.manifest import CodecSpec, Manifest, RecordSpec, TeacherIdentity, TokenizerIdentity
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.planes import names_of, planes_of
from sparsekd.logit_store.positions import SAMPLED_SPLIT
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_rows
from sparsekd.logit_store.synthetic_text import can_be_text_like, text_like_rows
from sparsekd.logit_store.tools.inspect import RULE_NOTES
from sparsekd.trainer.config import Config
from sparsekd.trainer.errors import ConfigError
from sparsekd.trainer.loss_memory import cut_text, loss_memory

# Decoders with gated MLPs, and the sizes without which they cannot be counted: those for which transformers
# has a default that does not follow from the others. config.json holds them all.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COUNTED_MODEL_TYPES = {
    "llama": _SIZES,
    "mistral": (*_SIZES, "num_key_value_heads"),
    "qwen2": (*_SIZES, "num_key_value_heads"),
    "qwen3": (*_SIZES, "num_key_value_heads", "head_dim"),
}
ESTIMATE_POSITIONS = 1024

RANKS_SHOWN = (1, 2, 8, 64)


@dataclass(frozen=True)
class Corpus:
    """What will be captured: all splits together.

    Attributes:
        tokens: positions, padding included, because it is stored as well.
        recorded: positions that get a record, by the rule of store.positions; expected ones where it samples.
        rows: packed rows.
        shards: shards of all splits, which are the units of work of `capture`.
        train_rows: rows of the training split.
        sequence_length: positions of a row.
        vocabulary_size: true vocabulary.
        source: where these numbers are from, for people.
    """

    tokens: int
    recorded: int
    rows: int
    shards: int
    train_rows: int
    sequence_length: int
    vocabulary_size: int
    source: str


def corpus_of(config: Config) -> Corpus:
    """Counts from the token store, or from plan.tokens and plan.vocabulary_size where there is none yet.

    Raises:
        ConfigError: Neither is given.
    """
    per_shard = config.store.rows_per_shard
    if config.store.tokens is not None and Path(config.store.tokens).is_dir():
        store = open_store(config.store.tokens)
        manifest = store.manifest
        rows = {split: store.rows(split) for split in manifest.splits}
        total = sum(rows.values())
        counts = {split: store.index(split).counts for split in manifest.splits}
        return Corpus(
            tokens=total * manifest.sequence_length,
            recorded=_recorded(
                config,
                real=sum(count.tokens - count.tokens_padding for count in counts.values()),
                counted=sum(count.tokens_counted for count in counts.values()),
                counted_in_train=counts[SAMPLED_SPLIT].tokens_counted,
            ),
            rows=total,
            shards=sum(store.shards(split) for split in manifest.splits),
            train_rows=rows["train"],
            sequence_length=manifest.sequence_length,
            vocabulary_size=manifest.tokenizer.vocabulary_size,
            source=f"counted in {config.store.tokens}",
        )
    for name in ("tokens", "vocabulary_size"):
        if getattr(config.plan, name) is None:
            raise ConfigError(
                f"There is no token store to count (store.tokens={config.store.tokens}) and plan.{name} is "
                "not set: give store.tokens=FOLDER, or plan.tokens=... and plan.vocabulary_size=..."
            )
    length = config.corpus.sequence_length
    rows_needed = math.ceil(_number(config.plan.tokens) / length)
    heldout = round(rows_needed * config.corpus.heldout_fraction)
    tokens = rows_needed * length
    return Corpus(
        tokens=tokens,
        recorded=_recorded(
            config, real=tokens, counted=tokens, counted_in_train=(rows_needed - heldout) * length
        ),
        rows=rows_needed,
        shards=math.ceil((rows_needed - heldout) / per_shard) + math.ceil(heldout / per_shard),
        train_rows=rows_needed - heldout,
        sequence_length=length,
        vocabulary_size=int(_number(config.plan.vocabulary_size)),
        source="from plan.tokens, as if every token counted: prompts and padding take no record",
    )


def _recorded(config: Config, *, real: int, counted: int, counted_in_train: int) -> int:
    """Positions with a record, of those that are no padding, those that count, and those of the split that is
    sampled."""
    spec = config.store
    if spec.k + spec.n == 0:
        return 0
    if spec.positions == "sampled":
        return counted - counted_in_train + round(spec.share * counted_in_train)
    return real if spec.positions == "all" else counted


def bytes_per_token(config: Config, corpus: Corpus) -> dict[str, float]:
    """Bytes that each plane of the store takes per position of the corpus, estimated.

    The codec itself says so: it encodes a row with the statistics of text under a good teacher. A weak
    teacher is less certain, and its draws are of more different ids. What stands at recorded positions alone
    is taken from a row that is recorded everywhere, times the corpus's share of recorded positions.
    """
    manifest = _manifest(config, corpus)
    make = text_like_rows if can_be_text_like(manifest) else synthetic_rows

    def stored(manifest: Manifest) -> tuple[Row, dict[str, bytes]]:
        row = make(manifest, 1, 0)[0]
        return row, codec_of(manifest).encode(row, manifest)

    _, planes = stored(manifest)
    found = {name: len(plane) / manifest.sequence_length for name, plane in planes.items()}
    if manifest.teacher is not None:
        everywhere = replace(manifest.record, positions="all", share=1.0)
        row, planes = stored(replace(manifest, record=everywhere))
        assert row.teacher is not None
        per_record = corpus.recorded / corpus.tokens / len(row.teacher.entropy)
        found |= {name: len(planes[name]) * per_record for name in _record_planes(manifest)}
    return found


def _record_planes(manifest: Manifest) -> tuple[str, ...]:
    return names_of(plane for plane in planes_of(manifest) if plane.stands == "recorded")


def _manifest(config: Config, corpus: Corpus) -> Manifest:
    """The manifest of a store of short rows, which the estimate encodes."""
    spec = config.store
    captured = spec.k + spec.n > 0
    # A longer row costs no less per position, but makes the plan slow.
    length = min(corpus.sequence_length, ESTIMATE_POSITIONS)
    size = corpus.vocabulary_size
    return Manifest(
        format_version=FORMAT_VERSION,
        target="next_token",
        sequence_length=length,
        rows_per_shard=spec.rows_per_shard,
        splits=("train", "heldout"),
        dataset={},
        tokenizer=TokenizerIdentity("plan", size, "", None, None),
        record=RecordSpec(
            spec.k,
            spec.n,
            tuple(sorted(spec.temperatures)),
            spec.draw_temperature,
            spec.seed,
            tail_logprobs=spec.tail_logprobs,
            positions=spec.positions if captured else "counted",
            share=spec.share if captured else 1.0,
        ),
        teacher=TeacherIdentity("plan", None, "", "", "", "", {}) if captured else None,
        codec=CodecSpec(spec.codec, {"mass": spec.mass} if spec.codec == "compact" else {}),
    )


def student_fields(config: Config) -> dict[str, Any]:
    """The student's sizes: student.config, or config.json where student.path is a folder; else nothing."""
    if config.student.path is None:
        return dict(config.student.config)
    place = Path(config.student.path, "config.json")
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


def checkpoint_bytes(parameters: int, dtype: str) -> int:
    """Bytes of one checkpoint: master weights and two moments in float32, and the weights of the module."""
    return parameters * (12 + (2 if dtype == "bfloat16" else 4))


def run(config: Config) -> None:
    """Prints the plan."""
    corpus = corpus_of(config)
    planes = bytes_per_token(config, corpus)
    for title, lines in (
        ("corpus", _corpus_lines(config, corpus)),
        ("store, estimated on text-like rows", _store_lines(config, corpus, planes)),
        ("student", _student_lines(config, corpus)),
        ("loss of one micro-batch", _loss_lines(config, corpus)),
    ):
        print(title)
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            print(f"  {name:<{width}}  {value}")
    if config.store.tokens is None or not Path(config.store.tokens).is_dir():
        print("next: sparsekd prepare corpus.paths=[...] store.tokens=FOLDER")
    else:
        path = config.store.path or "STORE"
        print(
            "next: torchrun --nproc-per-node RANKS --no-python sparsekd capture "
            f"store.tokens={config.store.tokens} store.path={path} teacher.path=MODEL",
            flush=True,
        )


def _corpus_lines(config: Config, corpus: Corpus) -> list[tuple[str, str]]:
    batch = config.train.global_batch_rows
    read = config.train.steps * batch
    lines = [
        ("tokens", f"{corpus.tokens:,} ({corpus.source})"),
        ("rows", f"{corpus.rows:,} of {corpus.sequence_length:,} tokens"),
        ("vocabulary", f"{corpus.vocabulary_size:,}"),
        (
            "training",
            f"{config.train.steps:,} steps of {batch:,} rows read {read * corpus.sequence_length:,} tokens: "
            f"{read / max(corpus.train_rows, 1):.2f} times the training rows",
        ),
    ]
    speed = config.plan.teacher_tokens_per_second
    if speed is None:
        lines.append(("teacher pass", "hours unknown; give plan.teacher_tokens_per_second=..."))
    else:
        lines.append(("teacher pass", f"{corpus.tokens / speed / 3600:.2f} hours at {speed:,.0f} tokens/s"))
    return lines


def _store_lines(config: Config, corpus: Corpus, planes: dict[str, float]) -> list[tuple[str, str]]:
    total = sum(planes.values())
    lines = [("record", f"k={config.store.k}, n={config.store.n}, codec {config.store.codec}")]
    if corpus.recorded:
        of_records = sum(planes[name] for name in _record_planes(_manifest(config, corpus)))
        rule = RULE_NOTES[config.store.positions].format(share=config.store.share)
        lines += [
            ("records", f"{corpus.recorded:,} of {corpus.tokens:,} positions, {rule}"),
            ("a record", f"{of_records * corpus.tokens / corpus.recorded:8.2f} bytes"),
        ]
    lines += [(name, f"{width:8.2f} bytes per token") for name, width in planes.items()]
    lines += [
        ("all planes", f"{total:8.2f} bytes per token"),
        ("size", f"{_size(total * corpus.tokens)} in {corpus.shards:,} shards"),
    ]
    return lines


def _student_lines(config: Config, corpus: Corpus) -> list[tuple[str, str]]:
    parameters = count_parameters(student_fields(config), corpus.vocabulary_size)
    if parameters is None:
        return [
            (
                "parameters",
                "not counted: needs student.config (or a folder as student.path) of type "
                + ", ".join(COUNTED_MODEL_TYPES),
            )
        ]
    engine = config.engine
    ranks = ", ".join(
        f"{_size(model_state_bytes(parameters, stage=engine.zero_stage, dtype=engine.dtype, ranks=ranks))} "
        f"on {ranks}"
        for ranks in RANKS_SHOWN
    )
    weights = 2 if engine.dtype == "bfloat16" else 4
    each = checkpoint_bytes(parameters, engine.dtype)
    kept = config.train.keep_checkpoints
    return [
        ("parameters", f"about {parameters:,}"),
        ("states per rank", f"{ranks} ranks (ZeRO {engine.zero_stage})"),
        ("", f"{weights} + 4 + 12 bytes: weights, float32 gradients, AdamW; without activations"),
        ("checkpoints", f"about {_size(each)} each, {_size(each * kept)} for the {kept} that are kept"),
    ]


def _loss_lines(config: Config, corpus: Corpus) -> list[tuple[str, str]]:
    vocabulary = corpus.vocabulary_size
    positions = config.train.micro_batch_rows * corpus.sequence_length
    lines = [
        (
            "dense",
            f"{_size(memory.dense_bytes(positions, vocabulary))} = 12 N V, N = {positions:,} positions: "
            "student, teacher and one gradient",
        )
    ]
    fields = student_fields(config)
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
        lines.append((impl, f"{_size(plan.peak_bytes)} on a {where}, {cut_text(plan)}"))
    lines.append(("", f"H = {hidden:,}, {config.engine.dtype}; gradients of head and hidden states included"))
    return lines


def _number(value: float | None) -> float:
    assert value is not None
    return value


def _size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
