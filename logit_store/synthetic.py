"""Synthetic rows, for tests and benchmarks: a made-up teacher whose record is right in every part.

Shapes: L positions of a row, V vocabulary, k head entries, n draws, G grid temperatures,
C positions of a chunk.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.ragged import log_sum_exp
from sparsekd.logit_store.manifest import (
    CodecSpec,
    Manifest,
    RecordSpec,
    TeacherIdentity,
    TokenizerIdentity,
)
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.places.tokenizer_folder import digest_of_files
from sparsekd.logit_store.positions import recorded_positions
from sparsekd.logit_store.row import (
    NO_ID,
    PADDING_DOCUMENT,
    Row,
    TeacherRecord,
    is_real,
    segment_lasts,
    segment_lengths,
    take_records,
    weights_of_positions,
)

_SHARPNESS = 3.0
"""Standard deviation of the made-up logits: at V = 1,000 an entropy of about 3 nats."""

_CHUNK_VALUES = 1 << 22
"""Float64 probabilities held at once."""

MASK_TOKEN = 1
"""Id that the inputs hold where a token is masked."""


def synthetic_manifest(*, vocabulary_size: int = 300, **overrides: Any) -> Manifest:
    """Returns a small valid manifest.

    Args:
        vocabulary_size: of the made-up tokenizer, whose files `write_synthetic_tokenizer` writes.
        **overrides: fields of Manifest; those of its record may stand among them.
    """
    own = {field.name for field in dataclasses.fields(RecordSpec)}
    fields = own & overrides.keys()
    record = RecordSpec(k=4, n=6, temperatures=(1.0, 2.0, 4.0), draw_temperature=1.0, seed=7)
    record = dataclasses.replace(record, **{name: overrides.pop(name) for name in fields})
    has_teacher = record.k + record.n > 0
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        target=overrides.pop("target", "next_token"),
        outcomes=overrides.pop("outcomes", None),
        sequence_length=16,
        rows_per_shard=3,
        splits=("train", "heldout"),
        dataset={"name": "synthetic", "sources": [{"name": "noise", "sha256": "0" * 64}]},
        tokenizer=TokenizerIdentity(
            name="synthetic",
            vocabulary_size=vocabulary_size,
            digest=digest_of_files(_tokenizer_content(vocabulary_size).items()),
            chat_template_digest=None,
            eos_token_id=0,
        ),
        record=record,
        teacher=TeacherIdentity(
            name="synthetic",
            revision=None,
            weights_digest="0" * 64,
            dtype="float64",
            logits_dtype="float64",
            engine="numpy",
            versions={},
        )
        if has_teacher
        else None,
        codec=CodecSpec("exact", {}),
    )
    return dataclasses.replace(manifest, **overrides)


def write_synthetic_tokenizer(folder: Path, vocabulary_size: int) -> Path:
    """Writes the tokenizer of `synthetic_manifest`, which spells id 17 as `w17`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _tokenizer_content(vocabulary_size).items():
        (folder / name).write_bytes(content)
    return folder


def synthetic_rows(manifest: Manifest, count: int, seed: int, split: str = "train") -> list[Row]:
    """Returns random valid rows of several documents, some with padding, some with a masked prompt.

    Each label is drawn from the teacher's distribution where its record stands (for `next_token` at the
    position before it), so that the rows are aligned as those of a good teacher are.

    Args:
        manifest: of the store, with any target and rule.
        count: number of rows.
        seed: of the rows.
        split: that they are for, on which it depends where records stand.
    """
    return [_row(manifest, split, np.random.default_rng([seed, index])) for index in range(count)]


def _tokenizer_content(vocabulary_size: int) -> dict[str, bytes]:
    description: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {f"w{number}": number for number in range(vocabulary_size)},
            "unk_token": "w0",
        },
    }
    return {"tokenizer.json": json.dumps(description).encode()}


def row_frame(manifest: Manifest, random: np.random.Generator) -> tuple[Row, NDArray[np.bool_]]:
    """Returns a row of several documents whose tokens are all 0, and where a next token exists, bool [L]."""
    length = manifest.sequence_length
    wanted = min(int(random.integers(1, 5)), length)
    later = np.sort(random.permutation(np.arange(1, length))[: wanted - 1])
    starts = np.concatenate([[0], later]).astype(np.int32)
    documents = np.sort(random.choice(1000, len(starts), replace=False)).astype(np.int64)
    if len(starts) > 1 and random.random() < 0.5:
        documents[-1] = PADDING_DOCUMENT
    plain = Row(np.zeros(length, np.int32), np.zeros(length, np.bool_), starts, documents, None)
    ends = starts + segment_lengths(plain)
    followed = np.repeat(documents != PADDING_DOCUMENT, segment_lengths(plain))
    followed[ends - 1] = False
    mask = followed.copy()
    if random.random() < 0.3:
        mask[: (ends[0] - starts[0]) // 2] = False  # a prompt: it has next tokens, but they do not count
    return dataclasses.replace(plain, loss_mask=mask), followed


def _row(manifest: Manifest, split: str, random: np.random.Generator) -> Row:
    plain, followed = row_frame(manifest, random)
    plain = dataclasses.replace(plain, optional=_optional(plain, manifest, random))
    length = manifest.sequence_length
    if manifest.target == "masked_token":
        followed = is_real(plain) & (random.random(length) < 0.3)
        plain = dataclasses.replace(plain, loss_mask=_weighted(plain, followed))
    elif manifest.target == "class":
        followed = np.zeros(length, np.bool_)
        followed[segment_lasts(plain)] = True
        followed &= is_real(plain)
        plain = dataclasses.replace(plain, loss_mask=_weighted(plain, followed))
    if manifest.teacher is None:
        first, drawn = random.integers(0, manifest.outcome_count, (2, length)).astype(np.int32)
        record = None
    else:
        first = random.integers(0, manifest.outcome_count, length).astype(np.int32)
        drawn, record = _teach(manifest, followed, random)
    if manifest.target == "next_token":
        row = dataclasses.replace(plain, token_ids=np.append(first[:1], drawn[:-1]))
    else:
        tokens = random.integers(0, manifest.tokenizer.vocabulary_size, length).astype(np.int32)
        if manifest.target == "masked_token":
            tokens[plain.loss_mask] = MASK_TOKEN
        optional = {**plain.optional, "labels": drawn[plain.loss_mask]}
        row = dataclasses.replace(plain, token_ids=tokens, optional=optional)
    if record is None:
        return row
    row = with_records(row, record, manifest, split)
    return dataclasses.replace(row, optional={**row.optional, **_features(row, manifest, random)})


def _features(row: Row, manifest: Manifest, random: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Returns made-up hidden states with a few large numbers, as trained models have."""
    assert row.recorded is not None
    found = {}
    for spec in manifest.features:
        there = is_real(row) if spec.positions == "all" else row.recorded
        values = random.standard_normal((int(there.sum()), spec.width)) * random.uniform(0.1, 4)
        values[:, 0] *= 50
        found[spec.plane] = values.astype(np.float32)
    return found


def with_records(row: Row, record: TeacherRecord, manifest: Manifest, split: str) -> Row:
    """Returns the row with those of the records, given for all L positions, that the rule asks for."""
    recorded = recorded_positions(row, manifest, split)
    return dataclasses.replace(row, teacher=take_records(record, recorded), recorded=recorded)


def _optional(row: Row, manifest: Manifest, random: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Returns the optional planes of a row; every third row has weights of 1, which are not there."""
    planes: dict[str, NDArray[Any]] = {}
    length = manifest.sequence_length
    if "weights" in manifest.planes:
        runs = 0 if random.random() < 0.3 else min(int(random.integers(1, 4)), length)
        starts = np.sort(random.permutation(np.arange(1, length))[: max(runs - 1, 0)])
        planes["weight_starts"] = np.append(np.zeros(min(runs, 1)), starts).astype(np.int32)
        planes["weights"] = random.choice([0.5, 1.0, 2.5], len(planes["weight_starts"])).astype(np.float32)
    if "token_types" in manifest.planes:
        planes["token_types"] = (np.arange(length) >= random.integers(length)).astype(np.uint8)
    return planes


def _weighted(row: Row, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns the mask without positions of weight 0."""
    return mask & (weights_of_positions(row) > 0)


def _teach(
    manifest: Manifest, followed: NDArray[np.bool_], random: np.random.Generator
) -> tuple[NDArray[np.int32], TeacherRecord]:
    """Returns the outcome drawn at each position [L] and the records of a made-up teacher, for all L
    positions; `followed` [L]: there is a label."""
    length, size = manifest.sequence_length, manifest.outcome_count
    chunk = max(1, _CHUNK_VALUES // size)
    drawn = np.empty(length, np.int32)
    parts: list[dict[str, NDArray[Any]]] = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        logits = random.standard_normal((stop - start, size)) * _SHARPNESS
        logprobs = logits - log_sum_exp(logits)[:, None]
        drawn[start:stop] = _draw(logprobs, random.random((stop - start, 1)))[:, 0]
        parts.append(_record(manifest, logprobs, drawn[start:stop], followed[start:stop], random))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return drawn, TeacherRecord(**joined)


def _record(
    manifest: Manifest,
    logprobs: NDArray[np.float64],
    next_tokens: NDArray[np.int32],
    followed: NDArray[np.bool_],
    random: np.random.Generator,
) -> dict[str, NDArray[Any]]:
    """Returns the fields of TeacherRecord for log-probabilities [C, V], in float64 until stored."""
    spec = manifest.record
    # The order is that of the stored float32 values, whose ties go by id; a stable sort keeps ids ascending.
    order = np.argsort(-logprobs.astype(np.float32), axis=1, kind="stable")[:, : spec.k]
    rest = logprobs.copy()
    np.put_along_axis(rest, order, -np.inf, axis=1)
    empty = np.isneginf(rest).all(axis=1)
    log_rest = np.stack([log_sum_exp(rest / temperature) for temperature in spec.temperatures], axis=1)
    at_draw = logprobs / spec.draw_temperature
    at_draw -= log_sum_exp(at_draw)[:, None]
    rest_at_one = rest - np.where(empty, 0, log_sum_exp(rest))[:, None]
    ids = np.full((len(logprobs), spec.n), NO_ID, np.int32)
    counts = np.zeros((len(logprobs), spec.n), np.int32)
    if spec.n:
        draws = _draw(rest / spec.draw_temperature, random.random((len(logprobs), spec.n)))
        for position in np.flatnonzero(~empty):
            distinct, times = np.unique(draws[position], return_counts=True)
            ids[position, : len(distinct)] = distinct
            counts[position, : len(distinct)] = times
    true = np.take_along_axis(logprobs, next_tokens[:, None], axis=1)[:, 0]
    drawn = np.take_along_axis(logprobs, np.maximum(ids, 0), axis=1)
    kept = np.where(ids == NO_ID, -np.inf, drawn).astype(np.float32)
    return {
        **({"tail_logprobs": kept} if spec.tail_logprobs else {}),
        "head_ids": order.astype(np.int32),
        "head_logprobs": np.take_along_axis(logprobs, order, axis=1).astype(np.float32),
        "tail_ids": ids,
        "tail_counts": counts,
        "log_rest": log_rest.astype(np.float32),
        "rest_entropy": _entropy(rest_at_one).astype(np.float32),
        "true_logprob": np.where(followed, true, 0).astype(np.float32),
        "entropy": _entropy(at_draw).astype(np.float32),
    }


def _entropy(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns -sum p log p over the last axis; 0 where every probability is 0."""
    probabilities = np.exp(logprobs)
    return -(probabilities * np.where(probabilities > 0, logprobs, 0)).sum(axis=-1)


def _draw(logits: NDArray[np.float64], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns ids [C, draws] by inverting the cumulative distribution of each row of logits [C, V]."""
    highest = logits.max(axis=1, keepdims=True)
    cumulative = np.cumsum(np.exp(logits - np.where(np.isneginf(highest), 0, highest)), axis=1)
    drawn = [
        np.searchsorted(line, share * line[-1], side="right")
        for line, share in zip(cumulative, uniforms, strict=True)
    ]
    return np.minimum(np.stack(drawn), logits.shape[1] - 1)
