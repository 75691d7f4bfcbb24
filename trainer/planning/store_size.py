"""How large a store becomes: its text measured on rows that are there; its records on some that a teacher has
made, or on made-up ones of the same number, as hidden states are. Torch-free.

Shapes: L tokens of a row, M recorded positions of a row, F positions of a row with hidden states.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.manifest import (
    MANIFEST_NAME,
    CodecSpec,
    FeatureSpec,
    Manifest,
    RecordSpec,
    TeacherIdentity,
    TokenizerIdentity,
)
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.places.files import exists
from sparsekd.logit_store.places.paths import StorePath, store_path
from sparsekd.logit_store.planes import Plane, names_of, planes_of
from sparsekd.logit_store.positions import SAMPLED_SPLIT, recorded_positions
from sparsekd.logit_store.projections import projected
from sparsekd.logit_store.protocol.index import DIGEST_BYTES, ROW_ENTRY
from sparsekd.logit_store.protocol.message import row_message, shard_footer, shard_header
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import Row, document_of_position, take_records, weight_runs
from sparsekd.logit_store.spacing import evenly
from sparsekd.logit_store.synthetic import synthetic_rows
from sparsekd.logit_store.synthetic_text import can_be_text_like, text_like_rows
from sparsekd.trainer.config.corpus import is_weighted
from sparsekd.trainer.config.feature_requests import FeatureRequest, feature_requests
from sparsekd.trainer.config.record import record_spec
from sparsekd.trainer.config.schema import Config, CorpusConfig, PlanConfig, StoreConfig, TeacherConfig
from sparsekd.trainer.planning.measured import Measured
from sparsekd.trainer.run.errors import ConfigError

# A longer row costs no less per position, but makes the plan slow.
ESTIMATE_POSITIONS = 1024

# Rows whose text is measured, evenly spaced over all splits.
TEXT_ROWS = 32

# Of a commit record, which is JSON, for each row of its shard.
_COMMIT_BYTES = 40


@dataclass(frozen=True)
class Corpus:
    """What will be captured: all splits together.

    Attributes:
        tokens: positions, padding included, because it is stored as well.
        real: those that are no padding.
        recorded: positions that get a record, by the rule of store.positions; expected ones where it samples.
        rows: packed rows.
        shards: shards of all splits.
        train_rows: rows of the training split.
        sequence_length: positions of a row.
        vocabulary_size: true vocabulary.
        manifest: of a token store with rows as those of `sample`.
        sample: some rows of tokens, each with its split.
        source: where these numbers are from, for people.
    """

    tokens: int
    real: int
    recorded: int
    rows: int
    shards: int
    train_rows: int
    sequence_length: int
    vocabulary_size: int
    manifest: Manifest
    sample: Sequence[tuple[str, Row]]
    source: str


@dataclass(frozen=True)
class StoreSize:
    """Estimated bytes of a store.

    Attributes:
        planes: bytes per token of each plane, in stored order.
        of_records: bytes of one recorded position, hidden states that stand there included; 0 without any.
        around: bytes per token around the planes: the batches of rows and their entries in records and index.
        files: bytes of what does not grow with the rows: beginnings and ends of shards, projections.
        total: bytes of the whole store, but for `MANIFEST.json`, `INDEX.json` and the tokenizer.
    """

    planes: dict[str, float]
    of_records: float
    around: float
    files: int
    total: float


def corpus_of(config: Config) -> Corpus:
    """Counts from the token store, or from plan.tokens and plan.vocabulary_size where there is none yet.

    Raises:
        ConfigError: Neither is given.
        StoreError: The token store cannot be read.
    """
    if (place := token_store(config.store)) is not None:
        return _counted(config.store, place)
    for name in ("tokens", "vocabulary_size"):
        if getattr(config.plan, name) is None:
            raise ConfigError(
                f"There is no token store to count (store.tokens={config.store.tokens}) and plan.{name} is "
                "not set: give store.tokens=FOLDER, or plan.tokens=... and plan.vocabulary_size=..."
            )
    assert config.plan.tokens is not None and config.plan.vocabulary_size is not None
    length, per_shard = config.corpus.sequence_length, config.store.rows_per_shard
    rows = math.ceil(config.plan.tokens / length)
    heldout = round(rows * config.corpus.heldout_fraction)
    tokens = rows * length
    manifest = _made_up_tokens(config.corpus, config.store, int(config.plan.vocabulary_size))
    return Corpus(
        tokens=tokens,
        real=tokens,
        recorded=_recorded(
            config.store, real=tokens, counted=tokens, counted_in_train=(rows - heldout) * length
        ),
        rows=rows,
        shards=math.ceil((rows - heldout) / per_shard) + math.ceil(heldout / per_shard),
        train_rows=rows - heldout,
        sequence_length=length,
        vocabulary_size=manifest.tokenizer.vocabulary_size,
        manifest=manifest,
        sample=[(SAMPLED_SPLIT, _weighted(row, manifest)) for row in _made_up_rows(manifest, 1)],
        source="from plan.tokens, as if every token counted: prompts and padding take no record",
    )


def token_store(settings: StoreConfig) -> StorePath | None:
    """Where the token store is, here or at an address; None where there is none yet."""
    if settings.tokens is None:
        return None
    place = store_path(settings.tokens)
    return place if exists(place / MANIFEST_NAME) else None


def _counted(settings: StoreConfig, tokens: StorePath) -> Corpus:
    store = open_store(tokens)
    manifest = store.manifest
    rows = {split: store.rows(split) for split in manifest.splits}
    counts = {split: store.index(split).counts for split in manifest.splits}
    real = sum(count.tokens - count.tokens_padding for count in counts.values())
    return Corpus(
        tokens=sum(rows.values()) * manifest.sequence_length,
        real=real,
        recorded=_recorded(
            settings,
            real=real,
            counted=sum(count.tokens_counted for count in counts.values()),
            counted_in_train=counts[SAMPLED_SPLIT].tokens_counted if SAMPLED_SPLIT in counts else 0,
        ),
        rows=sum(rows.values()),
        shards=sum(store.shards(split) for split in manifest.splits),
        train_rows=rows.get("train", 0),
        sequence_length=manifest.sequence_length,
        vocabulary_size=manifest.tokenizer.vocabulary_size,
        manifest=replace(manifest, record=_no_record(), teacher=None, features=()),
        sample=list(_sample(store)),
        source=f"counted in {tokens}",
    )


def _sample(store: LogitStore) -> Iterator[tuple[str, Row]]:
    """Rows of the text, evenly spaced over all splits, one split after another."""
    places = np.array(evenly(sum(map(store.rows, store.manifest.splits)), TEXT_ROWS))
    for split in store.manifest.splits:
        count = store.rows(split)
        for index in places[(places >= 0) & (places < count)]:
            yield split, store.read_text(split, int(index))
        places = places - count


def _recorded(settings: StoreConfig, *, real: int, counted: int, counted_in_train: int) -> int:
    """Positions with a record, of those that are no padding, those that count, and those of the split that is
    sampled."""
    if not _captures(settings):
        return 0
    if settings.positions == "sampled":
        return counted - counted_in_train + round(settings.share * counted_in_train)
    return real if settings.positions == "all" else counted


def _captures(settings: StoreConfig) -> bool:
    return settings.k + settings.n > 0 or bool(settings.features)


def _no_record() -> RecordSpec:
    return RecordSpec(k=0, n=0, temperatures=(), draw_temperature=1.0, seed=0)


def _made_up_tokens(corpus: CorpusConfig, settings: StoreConfig, vocabulary_size: int) -> Manifest:
    """The manifest of what `prepare` would write, but of rows short enough to be made here."""
    return Manifest(
        format_version=FORMAT_VERSION,
        target="next_token",
        sequence_length=min(corpus.sequence_length, ESTIMATE_POSITIONS),
        rows_per_shard=settings.rows_per_shard,
        splits=(SAMPLED_SPLIT, "heldout"),
        dataset={},
        tokenizer=TokenizerIdentity("plan", vocabulary_size, "", None, None),
        record=_no_record(),
        teacher=None,
        codec=CodecSpec(settings.codec, {}),
        planes=("weights",) if is_weighted(corpus) else (),
    )


def _made_up_rows(manifest: Manifest, count: int) -> list[Row]:
    """Rows with the statistics of text under a small teacher, or where the vocabulary is too small, of noise.

    A large one is more certain, and its draws are of fewer different ids: it takes up to 4 % less.
    """
    if can_be_text_like(manifest):
        return text_like_rows(manifest, count, 0, teacher="small")
    return synthetic_rows(manifest, count, 0)


def _weighted(row: Row, manifest: Manifest) -> Row:
    """The row with another weight for each document, where its manifest has weights."""
    if "weights" not in manifest.planes:
        return row
    numbers = np.unique(document_of_position(row), return_inverse=True)[1].reshape(-1)
    weights = np.random.default_rng(0).uniform(0.5, 2, int(numbers.max()) + 1).astype(np.float32)
    return replace(row, optional=weight_runs(weights[numbers]))


def store_manifest(config: Config, corpus: Corpus, measured: Measured | None = None) -> Manifest:
    """The manifest of the store that `capture` would write of rows as those of the sample.

    Args:
        config: The composed configuration.
        corpus: What will be captured.
        measured: Some rows' records, whose manifest has what only a teacher tells.

    Raises:
        ConfigError: An entry of store.features has another form, or keeps hidden states of unknown width.
        StoreError: The settings contradict one another.
    """
    spec = config.store
    codec = CodecSpec(spec.codec, {"mass": spec.mass} if spec.codec == "compact" else {})
    if not _captures(spec):
        return replace(corpus.manifest, codec=codec)
    size = teacher_hidden_size(config.teacher, config.plan)
    features = tuple(_feature(request, size) for request in feature_requests(spec.features))
    if measured is not None:
        return replace(measured.manifest, features=features)
    return replace(
        corpus.manifest,
        record=record_spec(replace(spec, temperatures=sorted(spec.temperatures))),
        teacher=TeacherIdentity("plan", None, "", "", "", "", {}),
        codec=codec,
        features=features,
    )


def teacher_hidden_size(teacher: TeacherConfig, plan: PlanConfig) -> int | None:
    """Width of the teacher's hidden states: of the folder teacher.path, else plan.teacher_hidden_size."""
    if teacher.path is not None and (place := Path(teacher.path, "config.json")).is_file():
        fields = json.loads(place.read_text())
        if isinstance(found := fields.get("hidden_size"), int):
            return found
    return plan.teacher_hidden_size


def _feature(request: FeatureRequest, size: int | None) -> FeatureSpec:
    if request.width is None and size is None:
        raise ConfigError(
            f"store.features keeps the hidden states of layer {request.layer} whole, but their width is "
            "unknown: give teacher.path=FOLDER, or plan.teacher_hidden_size=..."
        )
    whole = request.width is None
    width = request.width or size or 1
    return FeatureSpec(
        layer=request.layer,
        width=width,
        source_width=size or width + 1,
        projection=request.projection,
        projection_digest=None if whole else "",
        kept=1.0,
        kind=request.kind,
        positions=request.positions,
    )


def store_size(config: Config, corpus: Corpus, measured: Measured | None = None) -> StoreSize:
    """Estimates the store that `capture` would write, or without records and hidden states, `prepare`.

    The codec itself says what a plane takes. Text is that of the sample's rows; where records stand in them
    follows from the rule. Records are those that were measured, or made up, as many as the corpus has in a
    row on the mean. Hidden states are normal numbers, which hardly compress: those of large models, with
    their few large numbers, take less as int8.

    Raises:
        ConfigError: As `store_manifest`.
        StoreError: As `store_manifest`.
    """
    manifest = store_manifest(config, corpus, measured)
    found = _of_text(corpus, manifest)
    of_records = 0.0
    if manifest.teacher is not None:
        per_token = corpus.recorded / corpus.tokens
        each = _of_measured(measured) if measured is not None else {}
        each = each or _of_records(manifest, corpus.recorded / corpus.rows)
        found |= {name: size * per_token for name, size in each.items()}
        of_records = sum(each.values())
    for plane, spec in zip(_features(manifest), manifest.features, strict=True):
        count = corpus.recorded if spec.positions == "recorded" else corpus.real
        size = _of_feature(plane, spec, manifest, count / corpus.rows)
        found[plane.name] = size * count / corpus.tokens
        of_records += size if spec.positions == "recorded" else 0
    planes = {name: found[name] for name in names_of(planes_of(manifest))}
    row_bytes = {name: round(size * corpus.sequence_length) for name, size in planes.items()}
    around = _around_row(list(row_bytes.values())) / corpus.sequence_length
    files = _files(corpus, manifest)
    total = (sum(planes.values()) + around) * corpus.tokens + files
    return StoreSize(planes, of_records, around, files, total)


def _of_text(corpus: Corpus, manifest: Manifest) -> dict[str, float]:
    """Bytes per token of the planes of the text, and of where records stand."""
    bare = replace(manifest, record=_no_record(), teacher=None, features=())
    codec = codec_of(manifest)
    sizes = dict.fromkeys(names_of(planes_of(bare)), 0)
    tells = [plane for plane in planes_of(manifest) if plane.coding == "recorded"]
    for split, row in corpus.sample:
        stored = codec.encode(row, bare)
        for plane in tells:
            recorded = recorded_positions(row, manifest, split)
            arrays = {"recorded": recorded, "loss_mask": row.loss_mask}
            stored |= codec.codings[plane.coding].encode(arrays, (plane,), manifest)
        for name, content in stored.items():
            sizes[name] = sizes.get(name, 0) + len(content)
    return {name: size / (len(corpus.sample) * manifest.sequence_length) for name, size in sizes.items()}


def _of_measured(measured: Measured) -> dict[str, float]:
    """Bytes of each plane of a record that a teacher has made; nothing where it has made none."""
    sizes = dict.fromkeys((plane.name for plane in _record_planes(measured.manifest)), 0)
    codec, records = codec_of(measured.manifest), 0
    for _, row in measured.rows:
        stored = codec.encode(row, measured.manifest)
        sizes = {name: size + len(stored[name]) for name, size in sizes.items()}
        records += 0 if row.recorded is None else int(np.count_nonzero(row.recorded))
    return {name: size / records for name, size in sizes.items()} if records else {}


def _record_planes(manifest: Manifest) -> list[Plane]:
    """The planes of the teacher's distribution, hidden states not among them."""
    return [
        plane for plane in planes_of(manifest) if plane.stands == "recorded" and plane.coding != "vectors"
    ]


def _of_records(manifest: Manifest, per_row: float) -> dict[str, float]:
    """Bytes of each plane of a record, where a row has so many: few in a row share the beginnings of frames
    with few."""
    record = replace(manifest.record, positions="all", share=1.0)
    if record.k + record.n == 0:
        # Of hidden states alone: a manifest without them has at least a head, which is left out below.
        record = replace(record, k=1)
    everywhere = replace(
        manifest,
        target="next_token",
        outcomes=None,
        planes=(),
        features=(),
        sequence_length=ESTIMATE_POSITIONS,
        tokenizer=replace(manifest.tokenizer, vocabulary_size=manifest.outcome_count),
        record=record,
    )
    [row] = _made_up_rows(everywhere, 1)
    assert row.teacher is not None and row.recorded is not None
    there = np.flatnonzero(row.recorded)
    count = _in_row(per_row, len(there))
    kept = np.zeros(len(there), np.bool_)
    kept[evenly(len(there), count)] = True
    recorded = np.zeros_like(row.recorded)
    recorded[there[kept]] = True
    part = replace(row, teacher=take_records(row.teacher, kept), recorded=recorded)
    stored = codec_of(everywhere).encode(part, everywhere)
    return {plane.name: len(stored[plane.name]) / count for plane in _record_planes(manifest)}


def _features(manifest: Manifest) -> list[Plane]:
    return [plane for plane in planes_of(manifest) if plane.coding == "vectors"]


def _of_feature(plane: Plane, spec: FeatureSpec, manifest: Manifest, per_row: float) -> float:
    """Bytes of a vector, where a row has so many."""
    count = _in_row(per_row, ESTIMATE_POSITIONS)
    values: NDArray[np.float32] = np.random.default_rng(0).standard_normal((count, spec.width), np.float32)
    stored = codec_of(manifest).codings[plane.coding].encode({plane.name: values}, (plane,), manifest)
    return len(stored[plane.name]) / count


def _in_row(per_row: float, most: int) -> int:
    return min(max(round(per_row), 1), most)


def _around_row(sizes: list[int]) -> int:
    """Bytes of a row around planes of these sizes: its batch, and its entries in footer, record and index."""
    footer_block = 24
    message = row_message(0, [bytes(size) for size in sizes])
    return len(message) - sum(sizes) + footer_block + _COMMIT_BYTES + ROW_ENTRY.itemsize


def _files(corpus: Corpus, manifest: Manifest) -> int:
    ends = len(shard_header(manifest, SAMPLED_SPLIT, 0)) + len(shard_footer(manifest, SAMPLED_SPLIT, 0, []))
    of_shard = ends + DIGEST_BYTES + 1000  # a commit record without its lists
    matrices = sum(4 * spec.source_width * (spec.width + 1) for spec in projected(manifest))
    return corpus.shards * of_shard + matrices
