"""`store verify PATH --repair`: damaged shards, and only these, are captured again by their teacher."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

from sparsekd.logit_store.manifest import Manifest, TeacherIdentity
from sparsekd.logit_store.places.paths import store_path
from sparsekd.logit_store.projections import Projection
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.protocol.repair import repair_store
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.tools.verify import VerifyResult
from sparsekd.logit_store.trees import differing
from sparsekd.trainer.config.schema import Config, TeacherConfig, require
from sparsekd.trainer.models.opened import OpenModel
from sparsekd.trainer.models.source import teacher_source
from sparsekd.trainer.models.weights import files_digest
from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.run.ranks import Ranks, one_process
from sparsekd.trainer.teacher.capture import captured_rows
from sparsekd.trainer.teacher.features import read_projections
from sparsekd.trainer.teacher.model import check_teacher_tokenizer, load_teacher
from sparsekd.trainer.teacher.verify import as_captured, runnable
from sparsekd.trainer.teacher.weights import teacher_identity


def run(config: Config, found: VerifyResult, *, reseal: bool) -> None:
    """Repairs the shards that a verification found damaged.

    The teacher runs with the settings in the manifest. A shard that comes out to the byte as it was sealed is
    proof enough; one that does not is an error, unless `reseal` says to take it.

    Args:
        config: The teacher's place, and the token store.
        found: What `verify_store` found.
        reseal: Whether shards that come out different are taken, and the store gets another digest.

    Raises:
        ConfigError: A needed key is missing, or there is more than one rank.
        DataError: It is a token store, the tokens are others, or the teacher is.
        ModelError: The teacher cannot be loaded or does not fit.
        StoreError: What is damaged is no shard, or a shard comes out different.
    """
    if found.digest is None or len(found.problems) == 0 or not found.damaged:
        reason = "it is sound."
        if found.problems:
            reason = found.problems[0]
        elif not found.ok:
            reason = "its records do not describe the tokens that follow them: capture it to a new folder."
        raise DataError(f"{found.path} has no damaged shard that could be captured again; {reason}")
    store = open_store(found.path)
    identity = store.manifest.teacher
    if identity is None:
        raise DataError(
            f"{found.path} is a token store, and no teacher can make its rows: move the files of the damaged "
            "shards and INDEX.json away and run the `prepare` command that wrote it."
        )
    path = require(config.teacher.path, "teacher.path", "by store verify --repair, to run the teacher again")
    tokens = _tokens(config.store.tokens, store)
    settings, launch = as_captured(config.teacher, config.launch, identity)
    if files_digest(teacher_source(settings, path), key="teacher") != identity.weights_digest:
        raise DataError(
            f"The files of teacher.path={path} are not those that made {found.path} ({identity.name}, "
            f"weights {identity.weights_digest[:12]}): give that teacher, or capture the whole store with "
            "this one."
        )
    with one_process(
        launch, timeout_minutes=config.engine.timeout_minutes, what="store verify --repair"
    ) as place:
        settings = runnable(settings, place.device, store.manifest.tokenizer.vocabulary_size)
        check_teacher_tokenizer(settings, path, store)
        differing = _differences(settings, path, identity, place, launch.threads_per_rank)
        if differing:
            print(f"repair: not as at the capture: {'; '.join(differing)}", flush=True)
            if reseal:
                raise DataError(
                    f"--reseal would put records of another making under the manifest of {found.path} "
                    f"({'; '.join(differing)}): repair it as it was captured, or capture it again."
                )
        size = store.manifest.tokenizer.vocabulary_size
        teacher = load_teacher(settings, path, tokens, place.device, vocabulary_size=size)
        print(f"repair: {len(found.damaged)} shards are captured again", flush=True)
        projections = read_projections(store.path, store.manifest)
        again = partial(_again, settings, store.manifest, tokens, teacher, projections)
        result = repair_store(store.path, found.damaged, again, reseal=reseal)
    for name in result.quarantined:
        print(f"repair: kept {name}")
    digest = (
        f"sealed anew, digest {result.digest}" if result.resealed else f"digest {result.digest} as before"
    )
    print(f"repair: {len(result.repaired)} shards are sound again; {digest}")
    print(f"next: sparsekd store verify {found.path}", flush=True)


def _again(
    settings: TeacherConfig,
    manifest: Manifest,
    tokens: LogitStore,
    teacher: OpenModel,
    projections: Mapping[str, Projection],
    split: str,
    shard: int,
) -> list[Row]:
    print(f"repair: split {split}, shard {shard:06d}", flush=True)
    return captured_rows(settings, manifest, tokens, teacher, projections, (split, shard))


def _tokens(given: str | None, store: LogitStore) -> LogitStore:
    path = require(given, "store.tokens", "by store verify --repair, as the teacher's text")
    tokens = open_store(store_path(path))
    wanted = store.manifest.dataset.get("token_store")
    if tokens.digest != wanted:
        raise DataError(
            f"store.tokens={path} (digest {tokens.digest[:12]}) is not the token store that {store.path} was "
            f"captured from ({str(wanted)[:12]}): give that one."
        )
    return tokens


def _differences(
    settings: TeacherConfig, path: str, identity: TeacherIdentity, place: Ranks, threads: int
) -> list[str]:
    """What the manifest would say otherwise if the store were captured now; names are for people only."""
    now = asdict(
        teacher_identity(
            settings, path, device_type=place.device.type, threads=threads, revision=identity.revision
        )
    )
    changes = differing(asdict(identity), now, absent=None)
    return [f"{key} {before} -> {after}" for key, before, after in changes if key != "name"]
