"""Where a run begins: at a checkpoint that fits it, or at the start; everything else is refused in words."""

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparsekd.kernels.objective import MIXTURE_DIVERGENCES, Objective
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.trees import differing
from sparsekd.logit_store.typed_json import one_line
from sparsekd.trainer.config.schedule import learning_rate
from sparsekd.trainer.config.schema import Config, ScheduleConfig
from sparsekd.trainer.data.skipping import check_left_out
from sparsekd.trainer.run.errors import CheckpointError
from sparsekd.trainer.run.folder import CHECKPOINTS_NAME
from sparsekd.trainer.run.ranks import Ranks, on_first
from sparsekd.trainer.run.stop import StopWatch
from sparsekd.trainer.run.tracking import METRICS_NAME
from sparsekd.trainer.state.checkpoint import newest_verified, published, verify
from sparsekd.trainer.state.record import Commit, read_commit

_MOST_TOLD = 20
_OF_ROWS = re.compile(r"data\.(mixture\.[^ ]+\.)?(turns|streams) ")


@dataclass(frozen=True)
class Start:
    """Where a run begins, and what to tell about it; `allowed` are the changes that train.allow let pass."""

    checkpoint: Path | None
    commit: Commit | None
    remarks: list[str]
    allowed: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.commit.step if self.commit is not None else 0

    def begun(self) -> dict[str, Any]:
        """What starts.jsonl says of it."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        return {
            "step": self.step,
            "checkpoint": checkpoint,
            "allowed": list(self.allowed),
            "remarks": self.remarks,
        }


def settings_of(
    config: Config,
    objective: Objective,
    *,
    impl: str,
    student_content: str | None,
    order: Mapping[str, int | str],
    router_coefficient: float = 0.0,
) -> dict[str, Any]:
    """The settings that a checkpoint remembers, in four kinds.

    `numbers` must stay the same; `course` may change as long as the learning rates of the steps taken do not;
    `bits` change nothing but the order of sums; `places` change nothing.

    Args:
        config: The configuration.
        objective: As it was resolved for the store.
        impl: Of the loss, resolved.
        student_content: What `student.path` holds (see `models.weights.content_of`); None without one.
        order: Of the data, as it is recorded.
        router_coefficient: Weight of the load-balancing loss.
    """
    student, engine, optimizer = config.student, config.engine, asdict(config.optimizer)
    rate = optimizer.pop("learning_rate")
    wanted = asdict(objective)
    if objective.divergence not in MIXTURE_DIVERGENCES:
        # Not read, so it may change; and checkpoints from before there was one stay good.
        del wanted["mixture"]
    numbers: dict[str, Any] = {
        "objective": wanted,
        "optimizer": optimizer,
        "student": {"content": student_content, "config": student.config},
        "train": {"seed": config.train.seed, "global_batch_rows": config.train.global_batch_rows},
        "data": dict(order),
        "engine": {"dtype": engine.dtype, "zero_stage": engine.zero_stage, "deepspeed": engine.deepspeed},
    }
    if router_coefficient:
        numbers["student"]["router_loss"] = router_coefficient
        # Of which the balance is taken: not only the order of sums.
        numbers["train"]["micro_batch_rows"] = config.train.micro_batch_rows
    bits = {
        "objective": {
            "impl": impl,
            "chunk_positions": config.objective.chunk_positions,
            "memory_gib": config.objective.memory_gib,
        },
        "student": {
            "attention": student.attention,
            "activation_checkpointing": student.activation_checkpointing,
        },
        "train": {"micro_batch_rows": config.train.micro_batch_rows},
        "engine": {
            "offload": engine.offload,
            "reduce_bucket_size": engine.reduce_bucket_size,
            "prefetch_bucket_size": engine.prefetch_bucket_size,
        },
    }
    course = {
        "schedule": asdict(config.schedule),
        "steps": config.train.steps,
        "learning_rate": rate,
    }
    places = {"student": {"path": student.path, "revision": student.revision}}
    recorded: dict[str, Any] = _as_recorded(
        {"numbers": numbers, "bits": bits, "course": course, "places": places}
    )
    return recorded


def _as_recorded(value: Any) -> Any:
    """A value as it comes back from a record, so that it is compared with its like.

    JSON has text for keys, no infinity (which some models' configurations hold), and a record 64 bits.
    """
    if isinstance(value, dict):
        return {str(key): _as_recorded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_recorded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, int) and abs(value) >= 2**63 else value


def store_kind(manifest: Manifest) -> str:
    """A short name for what rows of a store are: equal for stores whose rows may follow one another."""
    teacher = manifest.teacher
    tokenizer = asdict(manifest.tokenizer)
    tokenizer.pop("name")  # for people
    kind = {
        "target": manifest.target,
        "outcomes": manifest.outcomes,
        "sequence_length": manifest.sequence_length,
        "tokenizer": tokenizer,
        "record": asdict(manifest.record),
        "teacher": teacher and [teacher.weights_digest, teacher.dtype, teacher.logits_dtype],
    }
    return digest_of(kind)


def digest_of(settings: dict[str, Any]) -> str:
    """A short name for settings: equal settings have equal digests."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def choose_start(
    folder: Path, config: Config, now: Commit, here: Ranks, watch: StopWatch | None = None
) -> Start:
    """Finds the checkpoint to go on from, and checks that this run may.

    Args:
        folder: The run folder.
        config: The configuration; `train.resume` decides.
        now: What a checkpoint of this run would record, as this process was started.
        here: This rank.
        watch: What asks this rank to stop.

    Raises:
        StopAsked: `watch` was asked while files were read.
        CheckpointError: `never` on a folder with a run in it, no checkpoint that is whole, or one of another
            store, other settings or another engine.
    """
    checkpoints = folder / CHECKPOINTS_NAME
    found: Path | None = None
    problems: list[str] = []
    if config.train.resume == "auto":
        found, problems = newest_verified(checkpoints, here, watch)
    elif config.train.resume != "never":
        found = Path(config.train.resume)
        problem = verify(found, here, watch)
        problems = [] if problem is None else [problem]
    return on_first(here, lambda: _chosen(folder, config, now, found, problems))


def _chosen(folder: Path, config: Config, now: Commit, found: Path | None, problems: list[str]) -> Start:
    """The start from what was found to be whole, and what is wrong with what was not."""
    checkpoints = folder / CHECKPOINTS_NAME
    if config.train.resume == "never":
        _refuse_used(folder)
    elif config.train.resume != "auto":
        if problems:
            raise CheckpointError(f"train.resume={found} cannot be used: {problems[0]}.")
        _refuse_older(Path(config.train.resume), checkpoints)
    elif found is None and problems:
        raise CheckpointError(
            f"None of the {len(problems)} checkpoints in {checkpoints} is whole ({problems[0]}); restore "
            "one, or begin anew under another run.name."
        )
    remarks = [f"A newer checkpoint is damaged and passed over: {problem}." for problem in problems]
    if found is None:
        return Start(None, None, remarks)
    commit = read_commit(found)
    allowed = check_fits(commit, now, found, allow=config.train.allow)
    if "store" not in allowed:
        check_left_out(commit.skipped_rows, most=config.train.skip_damaged_rows, checkpoint=found)
    if "objective" in allowed:  # sums of two objectives have no mean
        commit = replace(commit, sums=now.sums)
    if "store" in allowed:  # its rows have other numbers
        commit = replace(commit, skipped_rows=())
    remarks += [f"Changed here, as train.allow has it: {change}." for change in allowed.values()]
    changes = _bit_changes(commit, now)
    moved = _differences(commit.settings.get("places", {}), now.settings.get("places", {}))
    if moved:
        remarks.append(f"The student lies elsewhere, and is the same: {_told(moved)}.")
    if changes:
        remarks.append(f"Equal up to rounding, not bit for bit, to a run without the stop: {_told(changes)}.")
    return Start(found, commit, remarks, tuple(allowed.values()))


def check_fits(commit: Commit, now: Commit, place: Path, *, allow: Collection[str] = ()) -> dict[str, str]:
    """Checks that a run as it is started now may go on from a checkpoint.

    Args:
        commit: The checkpoint's record.
        now: What a checkpoint of this run would record, as this process was started.
        place: Of the checkpoint, for messages.
        allow: Kinds of changes that may pass: schedule, objective, store.

    Returns:
        The changes that passed because they are allowed, in words, by kind.

    Raises:
        CheckpointError: naming what changed, both values, and what to do.
    """
    allowed = {}
    other = next((sums for sums in commit.sums if len(sums) != len(now.sums[0])), None)
    if other is not None:
        raise CheckpointError(
            f"{place} was written by another version of sparsekd: it carries {len(other)} running sums of "
            f"the metrics, this version has {len(now.sums[0])}; go on with the version that wrote it, or "
            "begin anew under another run.name."
        )
    if commit.store_digest != now.store_digest:
        change = f"store digest {commit.store_digest[:12]} -> {now.store_digest[:12]}"
        if "store" not in allow:
            raise CheckpointError(
                f"{place} was trained on another store (digest {commit.store_digest[:12]}, store.path or "
                f"data.mixture now has {now.store_digest[:12]}); give what it began with, another run.name "
                "to begin anew, or train.allow=[store] to go on with other rows of the same teacher."
            )
        if commit.store_kind != now.store_kind:
            raise CheckpointError(
                f"{place} was trained on a store of another kind ({change}): train.allow=[store] allows "
                "other rows, but target, sequence length, tokenizer, records, the teacher's weights and the "
                "names of a mixture's sources must be the same; begin anew under another "
                "run.name, perhaps from an export (student.path)."
            )
        allowed["store"] = change
    _check_student(commit, now, place)
    changed = _differences(commit.settings["numbers"], now.settings["numbers"])
    of_objective = [text for text in changed if text.startswith("objective.")]
    if of_objective and "objective" in allow:
        allowed["objective"] = _told(of_objective)
        changed = [text for text in changed if text not in of_objective]
    if "store" in allowed:
        # They follow from how many rows the stores have.
        of_rows = [text for text in changed if _OF_ROWS.match(text)]
        allowed["store"] = _told([allowed["store"], *of_rows])
        changed = [text for text in changed if text not in of_rows]
    if changed:
        or_allow = ", or allow it by train.allow=[objective]" if changed == of_objective else ""
        raise CheckpointError(
            f"{place} was trained with other settings: {_told(changed)}; set them back, or begin anew "
            f"under another run.name{or_allow}."
        )
    if commit.step > now.settings["course"]["steps"]:
        raise CheckpointError(
            f"{place} is at step {commit.step}, beyond train.steps={now.settings['course']['steps']}; "
            "raise train.steps."
        )
    step = first_other_rate(commit.settings["course"], now.settings["course"], commit.step)
    if step is not None:
        old, new = (_rate(step, settings["course"]) for settings in (commit.settings, now.settings))
        course = _told(_differences(commit.settings["course"], now.settings["course"]))
        if "schedule" not in allow:
            raise CheckpointError(
                f"{place} was trained along another learning rate: {old:.4g} in step {step}, now {new:.4g} "
                f"({course}); the schedule may change only ahead of step {commit.step} "
                "(constant can be prolonged, and wsd before its decay); set it back, begin anew under "
                f"another run.name, or allow it from step {commit.step + 1} on by train.allow=[schedule]."
            )
        allowed["schedule"] = course
    return allowed


def _check_student(commit: Commit, now: Commit, place: Path) -> None:
    """Checks that `student.path` holds what the run began with, wherever it lies now."""
    then, today = (
        _as_mapping(_as_mapping(each.settings["numbers"]).get("student")) for each in (commit, now)
    )
    if then.get("path") is not None:
        raise CheckpointError(
            f"{place} was written by an older version of sparsekd, whose record does not say what "
            f"student.path={one_line(str(then['path']))} held: go on with that version, or begin anew under "
            "another run.name."
        )
    old, new = then.get("content"), today.get("content")
    if old is not None and new is not None and old != new:
        path = _as_mapping(now.settings.get("places", {}).get("student")).get("path")
        raise CheckpointError(
            f"{place} began with other weights than student.path={path} holds now (content "
            f"{one_line(str(old))[:12]} then, {str(new)[:12]} now); give the model it began with, or another "
            "run.name to begin anew."
        )


def _as_mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def first_other_rate(old: dict[str, Any], new: dict[str, Any], last_step: int) -> int | None:
    """The first step, up to `last_step`, for which two courses have different learning rates."""
    if old == new:
        return None
    steps = range(1, last_step + 1)
    return next((step for step in steps if _rate(step, old) != _rate(step, new)), None)


def _rate(step: int, course: dict[str, Any]) -> float:
    schedule = ScheduleConfig(**course["schedule"])
    return learning_rate(step, peak=course["learning_rate"], steps=course["steps"], schedule=schedule)


def _refuse_used(folder: Path) -> None:
    used = (folder / METRICS_NAME).exists() or bool(published(folder / CHECKPOINTS_NAME))
    if used:
        raise CheckpointError(
            f"train.resume=never, but {folder} already holds a run; choose another run.name, remove the "
            "folder, or use train.resume=auto to go on."
        )


def _refuse_older(found: Path, checkpoints: Path) -> None:
    newest = [path.name for path in published(checkpoints)][-1:]
    if newest and newest[0] > found.name:
        raise CheckpointError(
            f"train.resume={found} is older than {checkpoints / newest[0]}, which the next start would take "
            "again; use another run.name, or remove the newer checkpoints."
        )


def _bit_changes(commit: Commit, now: Commit) -> list[str]:
    then = {"world_size": commit.world_size, "threads_per_rank": commit.threads_per_rank}
    today = {"world_size": now.world_size, "threads_per_rank": now.threads_per_rank}
    return (
        _differences(then, today)
        + _differences(commit.settings["bits"], now.settings["bits"])
        + _differences(commit.versions, now.versions)
    )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key old -> new` for every leaf that differs; an empty section, and None, are like none."""
    nothing: tuple[Any, ...] = (None, {})
    return [
        f"{key} {before} -> {after}"
        for key, before, after in differing(old, new, absent=None, lists=False)
        if not (before in nothing and after in nothing)
    ]


def _told(changes: list[str]) -> str:
    """Changes as part of a sentence, which a record of any content does not make endless."""
    more = f"; and {len(changes) - _MOST_TOLD} more" if len(changes) > _MOST_TOLD else ""
    return "; ".join(map(one_line, changes[:_MOST_TOLD])) + more
