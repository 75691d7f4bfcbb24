"""The verb `capture`: a frozen teacher over a token store, by any number of ranks, into a logit store.

The unit of work is one shard, cut as the token store is cut. The first rank lists what is committed, and
what is missing is dealt round robin. No state exists outside the store: a killed run is started again with
the same command, on as many ranks as there are then.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.manifest import (
    MANIFEST_NAME,
    CodecSpec,
    FeatureSpec,
    Manifest,
    RecordSpec,
    read_manifest,
)
from sparsekd.logit_store.places.files import exists
from sparsekd.logit_store.places.paths import StorePath, store_path
from sparsekd.logit_store.projections import Projection, projections_of
from sparsekd.logit_store.protocol.background import BackgroundWriter
from sparsekd.logit_store.protocol.layout import INDEX_NAME
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.recover import adopt_orphans
from sparsekd.logit_store.protocol.writer import committed_shards, create_store, seal
from sparsekd.logit_store.row import Row, TeacherRecord
from sparsekd.logit_store.tools.inspect import RULE_NOTES, evenly
from sparsekd.trainer.config.feature_requests import feature_requests, request_of
from sparsekd.trainer.config.schema import Config, TeacherConfig, require
from sparsekd.trainer.run.errors import ConfigError, DataError
from sparsekd.trainer.run.ranks import Ranks, broadcast_object, ranks, together
from sparsekd.trainer.teacher.features import make_features, read_projections
from sparsekd.trainer.teacher.model import Teacher, check_teacher_tokenizer, load_teacher
from sparsekd.trainer.teacher.records import recorded_rows
from sparsekd.trainer.teacher.settings import resolved_settings
from sparsekd.trainer.teacher.weights import teacher_identity, teacher_name

SECONDS_BETWEEN_LINES = 5.0

# Rows that are read for the summary at the end, evenly spaced: a mean over more says nothing new.
SUMMARY_ROWS = 256

# Rows of each split from which `compact` learns what is frequent: a million tokens at the usual length.
FREQUENCY_ROWS = 1024

Unit = tuple[str, int]  # split, shard


def run(config: Config) -> None:
    """Writes the logit store of `teacher.path` over `store.tokens` to `store.path`.

    Raises:
        ConfigError: A needed key is missing, or two keys contradict each other.
        ModelError: The teacher cannot be loaded or does not fit the tokens.
        DataError: The store is sealed and lacks files.
        StoreError: A store cannot be read or written, or is another than this run would write.
        UserError: Another rank met such a problem.
    """
    path = store_path(require(config.store.path, "store.path", "as the folder of the logit store"))
    tokens_path = store_path(
        require(config.store.tokens, "store.tokens", "as the tokens that the teacher sees")
    )
    teacher_path = require(config.teacher.path, "teacher.path", "as the model whose logits are kept")
    if path.resolve() == tokens_path.resolve():
        raise ConfigError(f"store.path and store.tokens are both {path}; name a new folder as store.path.")
    with ranks(config.launch, timeout_minutes=config.engine.timeout_minutes) as place:
        tokens = together(place, lambda: open_store(tokens_path))
        vocabulary_size = tokens.manifest.tokenizer.vocabulary_size
        settings = together(place, lambda: resolved_settings(config.teacher, place.device, vocabulary_size))
        config = replace(config, teacher=settings)
        if not (place.is_first and sys.stderr.isatty()):
            disable_progress_bar()  # of transformers: one bar for each rank, and none of use in a log
        if place.is_first:
            _announce(config, teacher_path, tokens, place)
        teacher = together(place, lambda: _checked_teacher(config, teacher_path, tokens, place))
        manifest = broadcast_object(
            together(place, lambda: _create(config, path, teacher_path, tokens, teacher, place))
        )
        projections = together(place, lambda: read_projections(path, manifest))
        _work(config, path, manifest, tokens, teacher, projections, place)
        together(place, lambda: _finish(path, tokens, place))


def _announce(config: Config, teacher_path: str, tokens: LogitStore, place: Ranks) -> None:
    shards = sum(tokens.shards(split) for split in tokens.manifest.splits)
    positions = sum(tokens.tokens(split)[0] for split in tokens.manifest.splits)
    print(
        f"capture: teacher {teacher_name(teacher_path)} in {config.teacher.dtype} on {place.world_size} x "
        f"{place.device.type}; {positions:,} positions in {shards:,} units; k={config.store.k}, "
        f"n={config.store.n}, impl {config.teacher.impl}",
        flush=True,
    )
    rule = RULE_NOTES[config.store.positions].format(share=config.store.share)
    print(f"capture: records stand {rule}", flush=True)
    if config.store.positions == "sampled":
        print(
            "capture: at equal bytes, fewer draws everywhere beat full records at fewer positions "
            "(docs/losses.md): lower store.k and store.n before store.share",
            flush=True,
        )


def _checked_teacher(config: Config, path: str, tokens: LogitStore, place: Ranks) -> Teacher:
    if place.is_first and not check_teacher_tokenizer(config.teacher, path, tokens):
        print(
            f"capture: {path} has no tokenizer files; that of {tokens.path} is taken for its own", flush=True
        )
    return load_teacher(config.teacher, path, tokens, place.device)


def _create(
    config: Config, path: StorePath, teacher_path: str, tokens: LogitStore, teacher: Teacher, place: Ranks
) -> Manifest | None:
    """Makes the store on the first rank; the others get the manifest from it."""
    if not place.is_first:
        return None
    record = RecordSpec(
        k=config.store.k,
        n=config.store.n,
        temperatures=tuple(config.store.temperatures),
        draw_temperature=config.store.draw_temperature,
        seed=config.store.seed,
        tail_logprobs=config.store.tail_logprobs,
        positions=config.store.positions,
        share=config.store.share,
    )
    identity = teacher_identity(
        config.teacher,
        teacher_path,
        device_type=place.device.type,
        threads=config.launch.threads_per_rank,
        revision=teacher.revision,
    )
    features, files = _features(config, path, teacher, tokens)
    manifest = replace(
        tokens.manifest,
        dataset={**tokens.manifest.dataset, "token_store": tokens.digest},
        record=record,
        teacher=identity,
        codec=_codec(config, tokens),
        features=features,
    )
    create_store(path, manifest, tokens.tokenizer_path, files)
    if exists(path / INDEX_NAME):
        # Nothing of a sealed store is moved: what it lacks is damage, and must come back to the byte.
        if missing := missing_units(path, _units(tokens)):
            raise DataError(
                f"{path} is sealed, but {len(missing)} of its units lack a file (the first is split "
                f"{missing[0][0]}, shard {missing[0][1]:06d}): run `sparsekd store verify {path} --repair "
                f"teacher.path={teacher_path} store.tokens={tokens.path}`."
            )
        return manifest
    adopted, refused = adopt_orphans(path, manifest, partial(_text, tokens))
    if adopted or refused:
        print(
            f"capture: of a killed run, {adopted} units were whole and are kept, {refused} were not and are "
            "in quarantine/",
            flush=True,
        )
    return manifest


def _features(
    config: Config, path: StorePath, teacher: Teacher, tokens: LogitStore
) -> tuple[tuple[FeatureSpec, ...], dict[str, bytes]]:
    """The features with the files of their projections: those of the store where one was begun.

    A projection is computed once: another machine's linear algebra gives other bits.
    """
    requests = feature_requests(config.store.features)
    if not requests:
        return (), {}
    if exists(path / MANIFEST_NAME):
        manifest = read_manifest(path)
        if requests == [request_of(spec) for spec in manifest.features]:
            return manifest.features, projections_of(path, manifest)
    return make_features(
        requests, teacher, tokens, seed=config.store.seed, rows_at_once=config.teacher.micro_batch_rows
    )


def _text(tokens: LogitStore, split: str, shard: int) -> list[Row]:
    """The rows of a unit without a teacher; none where there is no such unit."""
    if shard >= tokens.shards(split):
        return []
    return [tokens.read_text(split, index) for index in tokens.shard_rows(split, shard)]


def _units(tokens: LogitStore) -> list[Unit]:
    return [(split, shard) for split in tokens.manifest.splits for shard in range(tokens.shards(split))]


def _codec(config: Config, tokens: LogitStore) -> CodecSpec:
    """The codec with its parameters: `compact` numbers ids by how often they occur in the tokens."""
    if config.store.codec != "compact":
        return CodecSpec(config.store.codec, {})
    counts = np.zeros(tokens.manifest.tokenizer.vocabulary_size, np.int64)
    for split in tokens.manifest.splits:
        for index in evenly(tokens.rows(split), FREQUENCY_ROWS):
            counts += np.bincount(tokens.read_text(split, index).token_ids, minlength=len(counts))
    return CodecSpec("compact", compact_parameters(counts, mass=config.store.mass))


def _work(
    config: Config,
    path: StorePath,
    manifest: Manifest,
    tokens: LogitStore,
    teacher: Teacher,
    projections: Mapping[str, Projection],
    place: Ranks,
) -> None:
    """Writes all units that are missing, each while the next is computed.

    Ranks meet after each round, so that a failure ends all of them; one of the writing thread is raised by
    the next unit that is handed to it.
    """
    units = _units(tokens)
    missing: list[Unit] = broadcast_object(missing_units(path, units) if place.is_first else None)
    done_before = len(units) - len(missing)
    if place.is_first and done_before:
        print(f"capture: {done_before} of {len(units)} units are finished already", flush=True)
    started = last_line = time.monotonic()
    positions = 0
    with BackgroundWriter(path, manifest) as writer:
        for first in range(0, len(missing), place.world_size):
            turn = missing[first : first + place.world_size]
            unit = turn[place.rank] if place.rank < len(turn) else None
            work = partial(_capture_unit, config.teacher, manifest, tokens, teacher, projections, writer)
            together(place, partial(work, unit))
            positions += sum(len(tokens.shard_rows(*unit)) for unit in turn) * manifest.sequence_length
            now = time.monotonic()
            finished = first + len(turn)
            if place.is_first and (now - last_line >= SECONDS_BETWEEN_LINES or finished == len(missing)):
                last_line = now
                speed = positions / (now - started)
                left = (now - started) / finished * (len(missing) - finished)
                print(
                    f"capture: {done_before + finished}/{len(units)} units, {speed:,.0f} tokens/s, "
                    f"{readable_seconds(left)} left",
                    flush=True,
                )
        together(place, writer.close)


def missing_units(path: StorePath, units: list[Unit]) -> list[Unit]:
    """The units, in order, that have no commit record yet."""
    committed = {split: committed_shards(path, split) for split in {split for split, _ in units}}
    return [(split, shard) for split, shard in units if shard not in committed[split]]


def _capture_unit(
    config: TeacherConfig,
    manifest: Manifest,
    tokens: LogitStore,
    teacher: Teacher,
    projections: Mapping[str, Projection],
    writer: BackgroundWriter,
    unit: Unit | None,
) -> None:
    """Hands one unit to the writer; None where the last round has fewer units than ranks."""
    if unit is not None:
        writer.put(*unit, captured_rows(config, manifest, tokens, teacher, projections, unit))


def captured_rows(
    config: TeacherConfig,
    manifest: Manifest,
    tokens: LogitStore,
    teacher: Teacher,
    projections: Mapping[str, Projection],
    unit: Unit,
) -> list[Row]:
    """The rows of one unit, with the teacher's records."""
    split, shard = unit
    rows = recorded_rows(
        teacher,
        [tokens.read_text(split, index) for index in tokens.shard_rows(split, shard)],
        manifest,
        split,
        projections=projections,
        micro_batch_rows=config.micro_batch_rows,
        chunk_positions=config.chunk_positions,
        impl=config.impl,
    )
    return list(rows)


def readable_seconds(seconds: float) -> str:
    """A duration for people: `45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _finish(path: StorePath, tokens: LogitStore, place: Ranks) -> None:
    if not place.is_first:
        return
    manifest = tokens.manifest
    seal(path, {split: tokens.shards(split) for split in manifest.splits})
    store = open_store(path)
    rows = sum(store.rows(split) for split in manifest.splits)
    size = sum(store.index(split).file_bytes for split in manifest.splits)
    positions = rows * manifest.sequence_length
    print(
        f"capture: {path} is sealed: {rows:,} rows, {positions:,} positions, {size:,} bytes, "
        f"{size / positions:.1f} bytes per token"
    )
    for split in manifest.splits:
        if store.rows(split):
            print(f"capture: {split:8} {_summary(store, split)}")
    print(
        f"next: sparsekd store inspect {path}   then: sparsekd train store.path={path} student.path=STUDENT",
        flush=True,
    )


def _summary(store: LogitStore, split: str) -> str:
    """Mean tail mass and teacher NLL of a split, over evenly spaced rows."""
    chosen = np.unique(np.linspace(0, store.rows(split) - 1, SUMMARY_ROWS).round().astype(int))
    losses, tails = [], []
    for index in chosen.tolist():
        row = store.read_row(split, index)
        record = row.teacher
        assert record is not None and row.recorded is not None  # capture wrote it
        counted = row.loss_mask[row.recorded]
        losses.append(-record.true_logprob[counted])
        tails.append(tail_mass(record, store.manifest.record.temperatures)[counted])
    loss, tail = np.concatenate(losses), np.concatenate(tails)
    if not len(loss):
        return f"no position with a loss in {len(chosen):,} rows"
    of = "" if len(chosen) == store.rows(split) else f" (over {len(chosen)} of {store.rows(split):,} rows)"
    return f"teacher {loss.mean():.3f} nats per token, mean tail mass {tail.mean():.4f}{of}"


def tail_mass(record: TeacherRecord, temperatures: Sequence[float]) -> NDArray[np.float64]:
    """Probability outside the head at temperature 1, float64 [M].

    Exact where the grid has temperature 1. Elsewhere 1 minus the head's mass, which knows a tail only down to
    the rounding of the head's float32 entries.
    """
    if 1.0 in temperatures:
        return np.exp(record.log_rest[:, list(temperatures).index(1.0)].astype(np.float64))
    return np.maximum(1.0 - np.exp(record.head_logprobs.astype(np.float64)).sum(axis=1), 0.0)
