"""The verb `capture`: a frozen teacher over a token store, by any number of ranks, into a logit store.

The unit of work is one shard, cut as the token store is cut. The first rank lists what is committed, and
what is missing is dealt round robin. No state exists outside the store: a killed run is started again with
the same command, on as many ranks as there are then. Several jobs may work on one store; those of a Slurm
array begin with a share of the units each, and then help with what the others have not done.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from sparsekd.launch.env import array_share
from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.manifest import (
    MANIFEST_NAME,
    CodecSpec,
    FeatureSpec,
    Manifest,
    TeacherIdentity,
    read_manifest,
)
from sparsekd.logit_store.places.files import exists
from sparsekd.logit_store.places.paths import StorePath, store_path
from sparsekd.logit_store.projections import Projection, projections_of
from sparsekd.logit_store.protocol.background import BackgroundWriter
from sparsekd.logit_store.protocol.layout import INDEX_NAME, commit_file
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.recover import adopt_orphans
from sparsekd.logit_store.protocol.writer import committed_shards, create_store, seal
from sparsekd.logit_store.row import Row, TeacherRecord
from sparsekd.logit_store.spacing import evenly
from sparsekd.logit_store.tools.inspect import RULE_NOTES
from sparsekd.trainer.config.feature_requests import feature_requests, request_of
from sparsekd.trainer.config.record import record_spec
from sparsekd.trainer.config.schema import Config, StoreConfig, TeacherConfig, require
from sparsekd.trainer.data.used_ids import UsedIds
from sparsekd.trainer.models.causal_lm import AUTO_ATTENTION, attention_of
from sparsekd.trainer.models.opened import OpenModel
from sparsekd.trainer.run.console import Interval, readable_seconds
from sparsekd.trainer.run.errors import ConfigError, DataError, Stopped
from sparsekd.trainer.run.lost import lost_ranks_named
from sparsekd.trainer.run.ranks import Ranks, broadcast_object, gather, on_first, ranks, together
from sparsekd.trainer.run.stop import StopRequest, StopWatch, watched
from sparsekd.trainer.run.waiting import patiently
from sparsekd.trainer.teacher.features import make_features, read_projections
from sparsekd.trainer.teacher.model import check_teacher_tokenizer, load_teacher
from sparsekd.trainer.teacher.records import recorded_rows
from sparsekd.trainer.teacher.settings import resolved_settings
from sparsekd.trainer.teacher.weights import teacher_identity, teacher_name

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
        UserError: Another rank met such a problem, or died.
        Stopped: It was asked to stop; every unit that was begun is written.
    """
    path = store_path(require(config.store.path, "store.path", "as the folder of the logit store"))
    tokens_path = store_path(
        require(config.store.tokens, "store.tokens", "as the tokens that the teacher sees")
    )
    teacher_path = require(config.teacher.path, "teacher.path", "as the model whose logits are kept")
    if path.resolve() == tokens_path.resolve():
        raise ConfigError(f"store.path and store.tokens are both {path}; name a new folder as store.path.")
    with (
        watched(os.environ) as watch,
        ranks(config.launch, timeout_minutes=config.engine.timeout_minutes, watch=watch) as place,
        lost_ranks_named(place, "captures what is missing"),
    ):
        tokens = together(place, lambda: open_store(tokens_path))
        vocabulary_size = tokens.manifest.tokenizer.vocabulary_size
        settings = together(place, lambda: resolved_settings(config.teacher, place.device, vocabulary_size))
        config = replace(config, teacher=settings)
        if not (place.is_first and sys.stderr.isatty()):
            disable_progress_bar()  # of transformers: one bar for each rank, and none of use in a log
        if place.is_first:
            _announce(config, teacher_path, tokens, place)
        teacher = together(place, lambda: _checked_teacher(config, teacher_path, tokens, place))
        identity = on_first(
            place,
            patiently(place, lambda: _identity(config, teacher_path, teacher, place), watch),
        )
        manifest = broadcast_object(
            together(place, lambda: _create(config, path, teacher_path, tokens, teacher, identity, place))
        )
        projections = together(place, lambda: read_projections(path, manifest))
        stopped = _work(config.teacher, path, manifest, tokens, teacher, projections, place, watch)
        if stopped is None:
            together(place, patiently(place, lambda: _finish(path, tokens, place), watch))
    if stopped is not None:
        raise Stopped(f"{path} was asked to stop ({stopped}); every unit that was begun is written")


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


def _checked_teacher(config: Config, path: str, tokens: LogitStore, place: Ranks) -> OpenModel:
    settings, used = config.teacher, UsedIds(tokens)
    if place.is_first and not check_teacher_tokenizer(settings, path, tokens, used=used):
        print(
            f"capture: {path} has no tokenizer files; that of {tokens.path} is taken for its own", flush=True
        )
    wanted = config.store.vocabulary_size
    teacher = load_teacher(settings, path, tokens, place.device, used=used, vocabulary_size=wanted)
    if place.is_first and settings.attention == AUTO_ATTENTION:
        print(f"capture: attention {attention_of(teacher.model)}, which transformers picks", flush=True)
    size, whole = teacher.transform.vocabulary_size, tokens.manifest.tokenizer.vocabulary_size
    if place.is_first and size < whole:
        print(
            f"capture: records speak of the first {size:,} of the tokenizer's {whole:,} ids; the text has "
            "none of the others",
            flush=True,
        )
    return teacher


def _identity(config: Config, teacher_path: str, teacher: OpenModel, place: Ranks) -> TeacherIdentity | None:
    """Who the teacher is, on the first rank, which reads all of its weights; None on the others."""
    if not place.is_first:
        return None
    return teacher_identity(
        replace(config.teacher, attention=attention_of(teacher.model)),
        teacher_path,
        device_type=place.device.type,
        threads=config.launch.threads_per_rank,
        revision=teacher.commit or config.teacher.revision,
    )


def _create(
    config: Config,
    path: StorePath,
    teacher_path: str,
    tokens: LogitStore,
    teacher: OpenModel,
    identity: TeacherIdentity | None,
    place: Ranks,
) -> Manifest | None:
    """Makes the store on the first rank; the others get the manifest from it."""
    if not place.is_first:
        return None
    features, files = _features(
        config.store, path, teacher, tokens, rows_at_once=config.teacher.micro_batch_rows
    )
    manifest = replace(
        tokens.manifest,
        dataset={**tokens.manifest.dataset, "token_store": tokens.digest},
        tokenizer=replace(tokens.manifest.tokenizer, vocabulary_size=teacher.transform.vocabulary_size),
        record=record_spec(config.store),
        teacher=identity,
        codec=_codec(config.store, tokens, teacher.transform.vocabulary_size),
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
    settings: StoreConfig, path: StorePath, teacher: OpenModel, tokens: LogitStore, *, rows_at_once: int
) -> tuple[tuple[FeatureSpec, ...], dict[str, bytes]]:
    """The features with the files of their projections: those of the store where one was begun.

    A projection is computed once: another machine's linear algebra gives other bits.
    """
    requests = feature_requests(settings.features)
    if not requests:
        return (), {}
    if exists(path / MANIFEST_NAME):
        manifest = read_manifest(path)
        if requests == [request_of(spec) for spec in manifest.features]:
            return manifest.features, projections_of(path, manifest)
    return make_features(requests, teacher, tokens, seed=settings.seed, rows_at_once=rows_at_once)


def _text(tokens: LogitStore, split: str, shard: int) -> list[Row]:
    """The rows of a unit without a teacher; none where there is no such unit."""
    if shard >= tokens.shards(split):
        return []
    return [tokens.read_text(split, index) for index in tokens.shard_rows(split, shard)]


def _units(tokens: LogitStore) -> list[Unit]:
    return [(split, shard) for split in tokens.manifest.splits for shard in range(tokens.shards(split))]


def _codec(settings: StoreConfig, tokens: LogitStore, vocabulary_size: int) -> CodecSpec:
    """The codec with its parameters: `compact` numbers ids by how often they occur in the tokens."""
    if settings.codec != "compact":
        return CodecSpec(settings.codec, {})
    counts = np.zeros(vocabulary_size, np.int64)
    for split in tokens.manifest.splits:
        for index in evenly(tokens.rows(split), FREQUENCY_ROWS):
            counts += np.bincount(tokens.read_text(split, index).token_ids, minlength=len(counts))
    return CodecSpec("compact", compact_parameters(counts, mass=settings.mass))


def _work(
    settings: TeacherConfig,
    path: StorePath,
    manifest: Manifest,
    tokens: LogitStore,
    teacher: OpenModel,
    projections: Mapping[str, Projection],
    place: Ranks,
    watch: StopWatch,
) -> StopRequest | None:
    """Writes all units that are missing, each while the next is computed.

    Ranks meet after each round, so that a failure ends all of them, or a request to stop; a failure of the
    writing thread is raised by the next unit that is handed to it.

    Returns:
        Why it was stopped, or None.
    """
    stopped: StopRequest | None = None
    units = _units(tokens)
    waiting = on_first(place, partial(_waiting, path, units))
    done_before = len(units) - len(waiting)
    if place.is_first and done_before:
        print(f"capture: {done_before} of {len(units)} units are finished already", flush=True)
    started, interval = time.monotonic(), Interval()
    positions = rounds = 0
    with BackgroundWriter(path, manifest) as writer:
        while turn := on_first(place, partial(_next, path, waiting, place.world_size)):
            if stopped is not None:
                break
            unit = turn[place.rank] if place.rank < len(turn) else None
            work = partial(_capture_unit, settings, manifest, tokens, teacher, projections, writer)
            asked = gather(place, partial(_after, partial(work, unit), watch))
            positions += sum(len(tokens.shard_rows(*unit)) for unit in turn) * manifest.sequence_length
            rounds += 1
            if place.is_first and (interval.is_over() or not waiting):
                seconds = time.monotonic() - started
                speed = positions / seconds
                left = seconds / rounds * -(-len(waiting) // place.world_size)
                print(
                    f"capture: {len(units) - len(waiting)}/{len(units)} units, {speed:,.0f} tokens/s, "
                    f"{readable_seconds(left)} left",
                    flush=True,
                )
            stopped = next((request for request in asked if request is not None), None)
        else:  # nothing is left to stop
            stopped = None
        together(place, writer.close)
    return stopped


def _after(work: Callable[[], None], watch: StopWatch) -> StopRequest | None:
    """What this rank was asked while it worked."""
    work()
    return watch.request


def _waiting(path: StorePath, units: list[Unit]) -> deque[Unit]:
    """The units that are missing, in the order in which this job takes them."""
    try:
        share = array_share(os.environ)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    missing = set(missing_units(path, units))
    return deque(unit for unit in shared_order(units, *share) if unit in missing)


def shared_order(units: list[Unit], job: int, jobs: int) -> list[Unit]:
    """The order in which one of several jobs takes the units: its own share, then the others', backwards.

    So jobs that run at one time meet at the last units only, also where one of them has died.
    """
    shares = [units[start::jobs] for start in range(jobs)]
    others = [unit for later in range(1, jobs) for unit in reversed(shares[(job + later) % jobs])]
    return [*shares[job], *others]


def _next(path: StorePath, waiting: deque[Unit], count: int) -> list[Unit]:
    """Takes the next units that nobody has committed meanwhile."""
    turn: list[Unit] = []
    while waiting and len(turn) < count:
        unit = waiting.popleft()
        if not exists(commit_file(path, *unit)):
            turn.append(unit)
    return turn


def missing_units(path: StorePath, units: list[Unit]) -> list[Unit]:
    """The units, in order, that have no commit record yet."""
    committed = {split: committed_shards(path, split) for split in {split for split, _ in units}}
    return [(split, shard) for split, shard in units if shard not in committed[split]]


def _capture_unit(
    config: TeacherConfig,
    manifest: Manifest,
    tokens: LogitStore,
    teacher: OpenModel,
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
    teacher: OpenModel,
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
    losses, tails = [], []
    chosen = evenly(store.rows(split), SUMMARY_ROWS)
    for index in chosen:
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
