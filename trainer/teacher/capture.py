"""The verb `capture`: a frozen teacher over a token store, by any number of workers, into a logit store.

The ranks of a job begin together: one of them learns who the teacher is and makes the store. From there on
each is a worker of its own (see `work`), as are those of every other job on this store. No state exists
outside of it: a killed capture is started again with the same command, on as many ranks as there are then.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
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
from sparsekd.logit_store.protocol.layout import INDEX_NAME
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.recover import adopt_orphans
from sparsekd.logit_store.protocol.writer import committed_shards, create_store, seal
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.spacing import evenly
from sparsekd.logit_store.tools.inspect import RULE_NOTES
from sparsekd.trainer.config.feature_requests import feature_requests, request_of
from sparsekd.trainer.config.record import record_spec
from sparsekd.trainer.config.schema import Config, StoreConfig, TeacherConfig, require
from sparsekd.trainer.data.used_ids import UsedIds
from sparsekd.trainer.models.causal_lm import AUTO_ATTENTION, attention_of
from sparsekd.trainer.models.opened import OpenModel
from sparsekd.trainer.models.placement import where
from sparsekd.trainer.run.errors import ConfigError, DataError, Stopped
from sparsekd.trainer.run.lost import lost_ranks_named
from sparsekd.trainer.run.ranks import Ranks, leave_together, on_first, ranks, together
from sparsekd.trainer.run.stop import StopRequest, StopWatch, watched
from sparsekd.trainer.run.waiting import patiently
from sparsekd.trainer.teacher.features import make_features, read_projections
from sparsekd.trainer.teacher.model import check_teacher_tokenizer, load_teacher
from sparsekd.trainer.teacher.records import recorded_rows
from sparsekd.trainer.teacher.replica import Leader, follow
from sparsekd.trainer.teacher.settings import resolved_settings
from sparsekd.trainer.teacher.summary import summary_of
from sparsekd.trainer.teacher.units import Shard, Unit, rows_of_unit, turns_of, units_of_tokens
from sparsekd.trainer.teacher.weights import teacher_identity, teacher_name
from sparsekd.trainer.teacher.work import Compute, Worker, leases_are_possible

# Rows that are read for the summary at the end, evenly spaced: a mean over more says nothing new.
SUMMARY_ROWS = 256

# Rows of each split from which `compact` learns what is frequent: a million tokens at the usual length.
FREQUENCY_ROWS = 1024


def run(config: Config, watch: StopWatch | None = None) -> None:
    """Writes the logit store of `teacher.path` over `store.tokens` to `store.path`.

    Args:
        config: The composed configuration.
        watch: What asks this process to stop; None for one of its own.

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
    with ExitStack() as stack:
        watch = watch or stack.enter_context(watched(os.environ))
        with (
            ranks(config.launch, timeout_minutes=config.engine.timeout_minutes, watch=watch) as place,
            lost_ranks_named(place, "captures what is missing"),
        ):
            begun = _begin(config, path, tokens_path, teacher_path, place, watch)
            if begun.settings.tensor_parallel > 1:
                stopped, was_sealed = _work_as_one(begun, path, watch)
        if begun.settings.tensor_parallel == 1:
            # No rank needs another one from here on: what befalls one costs the others nothing.
            stopped, was_sealed = _work(_worker(begun, path, watch), watch)
    if stopped is not None:
        raise Stopped(f"{path} was asked to stop ({stopped}); every unit that was begun is written")
    if was_sealed or (begun.was_sealed and place.is_first):
        _tell_end(path)
    elif place.is_first:
        print(f"capture: every unit of {path} is written, and another worker has sealed it", flush=True)


@dataclass(frozen=True)
class _Begun:
    """What a worker needs, once the ranks of its job have begun together."""

    settings: TeacherConfig
    place: Ranks
    tokens: LogitStore
    teacher: OpenModel
    manifest: Manifest
    projections: Mapping[str, Projection]
    array_share: tuple[int, int]
    """Which job of how many of a Slurm array this is."""
    was_sealed: bool
    """Whether there was nothing to do."""


def _begin(
    config: Config,
    path: StorePath,
    tokens_path: StorePath,
    teacher_path: str,
    place: Ranks,
    watch: StopWatch,
) -> _Begun:
    """Loads the teacher, and makes the store where it is not there; all ranks of the job together."""
    share = together(place, _array_share)
    watch.end_time = on_first(place, lambda: watch.end_time)  # which one rank asks Slurm for
    tokens = together(place, lambda: open_store(tokens_path))
    vocabulary_size = tokens.manifest.tokenizer.vocabulary_size
    settings = together(place, lambda: resolved_settings(config.teacher, place.device, vocabulary_size))
    config = replace(config, teacher=settings)
    if settings.tensor_parallel not in (1, place.world_size):
        leave_together(place, _other_ranks(settings.tensor_parallel, place.world_size))
    if not (place.is_first and sys.stderr.isatty()):
        disable_progress_bar()  # of transformers: one bar for each rank, and none of use in a log
    if place.is_first:
        _announce(config, path, teacher_path, tokens, place)
    # Those of a divided teacher would wait in its probe for a first rank that has found something: all look.
    used = UsedIds(tokens, looks=place.is_first or settings.tensor_parallel > 1)
    # Apart from its loading, in which they wait for one another, too.
    together(place, lambda: _check_tokenizer(settings, teacher_path, used, place))
    teacher = together(place, lambda: _loaded_teacher(config, teacher_path, used, place))
    identity = on_first(
        place,
        patiently(place, lambda: _identity(config, teacher_path, teacher, place), watch),
    )
    manifest, was_sealed = on_first(
        place, lambda: _create(config, path, teacher_path, tokens, teacher, identity)
    )
    projections = together(place, lambda: read_projections(path, manifest))
    return _Begun(settings, place, tokens, teacher, manifest, projections, share, was_sealed)


def _array_share() -> tuple[int, int]:
    try:
        return array_share(os.environ)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _work(worker: Worker, watch: StopWatch) -> tuple[StopRequest | None, bool]:
    """Works until the store is sealed; why it was stopped before, and whether this worker sealed it."""
    stopped = worker.work()
    if stopped is not None:
        return stopped, False
    was_sealed = worker.seal()
    return (watch.request if was_sealed is None else None), bool(was_sealed)


def _work_as_one(begun: _Begun, path: StorePath, watch: StopWatch) -> tuple[StopRequest | None, bool]:
    """`_work` of all ranks together, which are one replica: the first is its worker."""
    units = _units(begun, path)
    compute = partial(_rows_of_unit, begun)
    if not begun.place.is_first:
        return follow(begun.place, units, compute, watch), False
    leader = Leader(begun.place, units, compute, watch)
    try:
        stopped, was_sealed = _work(_worker(begun, path, watch, leader.compute), watch)
    except BaseException:
        leader.fail()
        raise
    leader.end(stopped)
    return stopped, was_sealed


def _units(begun: _Begun, path: StorePath) -> dict[Shard, list[Unit]]:
    return units_of_tokens(begun.tokens, _unit_rows(begun.settings, path, begun.manifest))


def _rows_of_unit(begun: _Begun, unit: Unit) -> list[Row]:
    return captured_rows(
        begun.settings,
        begun.manifest,
        begun.tokens,
        begun.teacher,
        begun.projections,
        (unit.split, unit.shard),
        unit.rows,
    )


def _worker(begun: _Begun, path: StorePath, watch: StopWatch, compute: Compute | None = None) -> Worker:
    """This rank's worker, with its share of all workers that are known to be.

    Args:
        compute: Gives the rows of a unit, where all ranks together are one worker.
    """
    place = begun.place
    job, jobs = begun.array_share
    number, workers = (place.rank, place.world_size) if compute is None else (0, 1)
    units = _units(begun, path)
    return Worker(
        path,
        begun.manifest,
        units,
        turns_of(list(units), job * workers + number, jobs * workers),
        compute or partial(_rows_of_unit, begun),
        watch,
        environment=os.environ,
        is_first=place.is_first,
    )


def _unit_rows(settings: TeacherConfig, path: StorePath, manifest: Manifest) -> int:
    """Rows of a unit of this store: whole shards where no part of one can be kept."""
    return rows_of_unit(settings) if isinstance(path, Path) else manifest.rows_per_shard


def _announce(config: Config, path: StorePath, teacher_path: str, tokens: LogitStore, place: Ranks) -> None:
    unit_rows = _unit_rows(config.teacher, path, tokens.manifest)
    units = sum(map(len, units_of_tokens(tokens, unit_rows).values()))
    as_one = ", which hold it together" if config.teacher.tensor_parallel > 1 else ""
    positions = sum(tokens.tokens(split)[0] for split in tokens.manifest.splits)
    print(
        f"capture: teacher {teacher_name(teacher_path)} in {config.teacher.dtype} on {place.world_size} x "
        f"{place.device.type}{as_one}; {positions:,} positions in {units:,} units; k={config.store.k}, "
        f"n={config.store.n}, impl {config.teacher.impl}",
        flush=True,
    )
    if not leases_are_possible(path):
        print(
            f"capture: no unit can be claimed at {path}: each rank takes the shards of its share, by its "
            "number and its place in a Slurm array, and what others have left at the end",
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


def _other_ranks(wanted: int, found: int) -> ConfigError:
    return ConfigError(
        f"teacher.tensor_parallel={wanted} is one teacher of all ranks of a job, but this one has {found}: "
        f"start {wanted} ranks; more of the same are jobs of their own on the same store."
    )


def _check_tokenizer(settings: TeacherConfig, path: str, used: UsedIds, place: Ranks) -> None:
    if place.is_first and not check_teacher_tokenizer(settings, path, used.store, used=used):
        print(
            f"capture: {path} has no tokenizer files; that of {used.store.path} is taken for its own",
            flush=True,
        )


def _loaded_teacher(config: Config, path: str, used: UsedIds, place: Ranks) -> OpenModel:
    settings, tokens = config.teacher, used.store
    if settings.device_map is not None and place.device.type == "cuda" and len(place.on_this_machine) > 1:
        raise ConfigError(
            f"teacher.device_map={settings.device_map} takes all GPUs of a machine for one teacher, but "
            f"{len(place.on_this_machine)} ranks run on this one: start one on each machine."
        )
    wanted = config.store.vocabulary_size
    teacher = load_teacher(settings, path, tokens, place.device, used=used, vocabulary_size=wanted)
    if place.is_first and settings.device_map is not None:
        print(f"capture: of the teacher's parts {where(teacher.model)}", flush=True)
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
) -> tuple[Manifest, bool]:
    """Makes the store, or goes on with it; its manifest, and whether it is sealed."""
    features, files = _features(
        config.store, path, teacher, tokens, rows_at_once=config.teacher.micro_batch_rows
    )
    manifest = manifest_of(config.store, tokens, teacher, identity, features)
    create_store(path, manifest, tokens.tokenizer_path, files)
    if exists(path / INDEX_NAME):
        # Nothing of a sealed store is moved: what it lacks is damage, and must come back to the byte.
        if missing := _missing_shards(path, tokens):
            raise DataError(
                f"{path} is sealed, but {len(missing)} of its shards lack a file (the first is split "
                f"{missing[0][0]}, shard {missing[0][1]:06d}): run `sparsekd store verify {path} --repair "
                f"teacher.path={teacher_path} store.tokens={tokens.path}`."
            )
        seal(path, {split: tokens.shards(split) for split in manifest.splits})  # for its checks
        return manifest, True
    adopted, refused = adopt_orphans(path, manifest, partial(_text, tokens))
    if adopted or refused:
        print(
            f"capture: of a killed run, {adopted} shards were whole and are kept, {refused} were not and are "
            "in quarantine/",
            flush=True,
        )
    return manifest, False


def manifest_of(
    settings: StoreConfig,
    tokens: LogitStore,
    teacher: OpenModel,
    identity: TeacherIdentity | None,
    features: tuple[FeatureSpec, ...],
) -> Manifest:
    """The manifest of the store of this teacher's records over these tokens."""
    size = teacher.transform.vocabulary_size
    return replace(
        tokens.manifest,
        dataset={**tokens.manifest.dataset, "token_store": tokens.digest},
        tokenizer=replace(tokens.manifest.tokenizer, vocabulary_size=size),
        record=record_spec(settings),
        teacher=identity,
        codec=_codec(settings, tokens, size),
        features=features,
    )


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
    """The rows of a shard without a teacher; none where there is no such shard."""
    if shard >= tokens.shards(split):
        return []
    return [tokens.read_text(split, index) for index in tokens.shard_rows(split, shard)]


def _missing_shards(path: StorePath, tokens: LogitStore) -> list[Shard]:
    """The shards, in order, that are not there with their commit records."""
    missing: list[Shard] = []
    for split in tokens.manifest.splits:
        committed = committed_shards(path, split)
        missing += [(split, shard) for shard in range(tokens.shards(split)) if shard not in committed]
    return missing


def _codec(settings: StoreConfig, tokens: LogitStore, vocabulary_size: int) -> CodecSpec:
    """The codec with its parameters: `compact` numbers ids by how often they occur in the tokens."""
    if settings.codec != "compact":
        return CodecSpec(settings.codec, {})
    counts = np.zeros(vocabulary_size, np.int64)
    for split in tokens.manifest.splits:
        for index in evenly(tokens.rows(split), FREQUENCY_ROWS):
            counts += np.bincount(tokens.read_text(split, index).token_ids, minlength=len(counts))
    return CodecSpec("compact", compact_parameters(counts, mass=settings.mass))


def captured_rows(
    config: TeacherConfig,
    manifest: Manifest,
    tokens: LogitStore,
    teacher: OpenModel,
    projections: Mapping[str, Projection],
    shard: Shard,
    rows: range | None = None,
) -> list[Row]:
    """The rows of a shard with the teacher's records, or those of a unit of it, numbered from 0."""
    split, number = shard
    places = tokens.shard_rows(split, number)
    if rows is not None:
        places = places[rows.start : rows.stop]
    captured = recorded_rows(
        teacher,
        [tokens.read_text(split, index) for index in places],
        manifest,
        split,
        projections=projections,
        micro_batch_rows=config.micro_batch_rows,
        sort_rows=config.sort_rows,
        chunk_positions=config.chunk_positions,
        impl=config.impl,
    )
    return list(captured)


def _tell_end(path: StorePath) -> None:
    store = open_store(path)
    splits = store.manifest.splits
    rows = sum(store.rows(split) for split in splits)
    size = sum(store.index(split).file_bytes for split in splits)
    positions = rows * store.manifest.sequence_length
    print(
        f"capture: {path} is sealed: {rows:,} rows, {positions:,} positions, {size:,} bytes, "
        f"{size / positions:.1f} bytes per token"
    )
    for split in splits:
        if store.rows(split):
            print(f"capture: {split:8} {_summary(store, split)}")
    print(
        f"next: sparsekd store inspect {path}   then: sparsekd train store.path={path} student.path=STUDENT",
        flush=True,
    )


def _summary(store: LogitStore, split: str) -> str:
    """Mean tail mass and teacher NLL of a split, over evenly spaced rows."""
    chosen = evenly(store.rows(split), SUMMARY_ROWS)
    found = summary_of((store.read_row(split, index) for index in chosen), store.manifest.record)
    if found is None:
        return f"no position with a loss in {len(chosen):,} rows"
    of = "" if len(chosen) == store.rows(split) else f" (over {len(chosen)} of {store.rows(split):,} rows)"
    return f"teacher {found.loss:.3f} nats per token, mean tail mass {found.tail:.4f}{of}"
