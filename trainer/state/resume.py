"""Where a run begins: at a checkpoint that fits it, or at the start; everything else is refused in words."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsekd.kernels.objective import MIXTURE_DIVERGENCES, Objective
from sparsekd.logit_store.typed_json import one_line
from sparsekd.trainer.config.schedule import learning_rate
from sparsekd.trainer.config.schema import Config, ScheduleConfig
from sparsekd.trainer.run.errors import CheckpointError
from sparsekd.trainer.run.folder import CHECKPOINTS_NAME
from sparsekd.trainer.run.ranks import Ranks, broadcast_object
from sparsekd.trainer.run.tracking import METRICS_NAME
from sparsekd.trainer.state.checkpoint import newest_verified, published, verify
from sparsekd.trainer.state.record import Commit, read_commit

_MOST_TOLD = 20


@dataclass(frozen=True)
class Start:
    """Where a run begins, and what to tell about it."""

    checkpoint: Path | None
    commit: Commit | None
    remarks: list[str]

    @property
    def step(self) -> int:
        return self.commit.step if self.commit is not None else 0


def settings_of(config: Config, objective: Objective, *, impl: str) -> dict[str, Any]:
    """The settings that a checkpoint remembers, in three kinds.

    `numbers` must stay the same; `course` may change as long as the learning rates of the steps taken do not;
    `bits` change nothing but the order of sums.
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
        "student": {"path": student.path, "revision": student.revision, "config": student.config},
        "train": {"seed": config.train.seed, "global_batch_rows": config.train.global_batch_rows},
        "engine": {"dtype": engine.dtype, "zero_stage": engine.zero_stage, "deepspeed": engine.deepspeed},
    }
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
    recorded: dict[str, Any] = _as_recorded({"numbers": numbers, "bits": bits, "course": course})
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


def digest_of(settings: dict[str, Any]) -> str:
    """A short name for settings: equal settings have equal digests."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def choose_start(folder: Path, config: Config, now: Commit, here: Ranks) -> Start:
    """Finds the checkpoint to go on from, and checks that this run may.

    Args:
        folder: The run folder.
        config: The configuration; `train.resume` decides.
        now: What a checkpoint of this run would record, as this process was started.
        here: This rank.

    Raises:
        CheckpointError: `never` on a folder with a run in it, no checkpoint that is whole, or one of another
            store, other settings or another engine.
    """
    checkpoints = folder / CHECKPOINTS_NAME
    if config.train.resume == "never":
        _refuse_used(folder)
        return Start(None, None, [])
    if config.train.resume == "auto":
        found, problems = newest_verified(checkpoints, here)
        if found is None and problems:
            raise CheckpointError(
                f"None of the {len(problems)} checkpoints in {checkpoints} is whole ({problems[0]}); restore "
                "one, or begin anew under another run.name."
            )
        remarks = [f"A newer checkpoint is damaged and passed over: {problem}." for problem in problems]
    else:
        found, remarks = Path(config.train.resume), []
        problem = verify(found, here)
        if problem is not None:
            raise CheckpointError(f"train.resume={found} cannot be used: {problem}.")
        _refuse_older(found, checkpoints)
    if found is None:
        return Start(None, None, remarks)
    commit = broadcast_object(read_commit(found))
    check_fits(commit, now, found)
    changes = _bit_changes(commit, now)
    if changes:
        remarks.append(f"Equal up to rounding, not bit for bit, to a run without the stop: {_told(changes)}.")
    return Start(found, commit, remarks)


def check_fits(commit: Commit, now: Commit, place: Path) -> None:
    """Checks that a run as it is started now may go on from a checkpoint.

    Raises:
        CheckpointError: naming what changed, both values, and what to do.
    """
    if len(commit.sums) != len(now.sums):
        raise CheckpointError(
            f"{place} was written by another version of sparsekd: it carries {len(commit.sums)} running sums "
            f"of the metrics, this version has {len(now.sums)}; go on with the version that wrote it, or "
            "begin anew under another run.name."
        )
    if commit.store_digest != now.store_digest:
        raise CheckpointError(
            f"{place} was trained on another store (digest {commit.store_digest[:12]}, store.path now has "
            f"{now.store_digest[:12]}); give the store it began with, or another run.name to begin anew."
        )
    changed = _differences(commit.settings["numbers"], now.settings["numbers"])
    if changed:
        raise CheckpointError(
            f"{place} was trained with other settings: {_told(changed)}; set them back, or begin anew "
            "under another run.name."
        )
    if commit.step > now.settings["course"]["steps"]:
        raise CheckpointError(
            f"{place} is at step {commit.step}, beyond train.steps={now.settings['course']['steps']}; "
            "raise train.steps."
        )
    step = first_other_rate(commit.settings["course"], now.settings["course"], commit.step)
    if step is not None:
        old, new = (_rate(step, settings["course"]) for settings in (commit.settings, now.settings))
        course = _differences(commit.settings["course"], now.settings["course"])
        raise CheckpointError(
            f"{place} was trained along another learning rate: {old:.4g} in step {step}, now {new:.4g} "
            f"({_told(course)}); the schedule may change only ahead of step {commit.step} "
            "(constant can be prolonged, and wsd before its decay); set it back, or begin anew under "
            "another run.name."
        )


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
    if broadcast_object(used):
        raise CheckpointError(
            f"train.resume=never, but {folder} already holds a run; choose another run.name, remove the "
            "folder, or use train.resume=auto to go on."
        )


def _refuse_older(found: Path, checkpoints: Path) -> None:
    newest = broadcast_object([path.name for path in published(checkpoints)][-1:])
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


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key old -> new` for every leaf that differs; an empty section is like none."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict | None) and isinstance(after, dict | None):
            found += _differences(before or {}, after or {}, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} {before} -> {after}")
    return found


def _told(changes: list[str]) -> str:
    """Changes as part of a sentence, which a record of any content does not make endless."""
    more = f"; and {len(changes) - _MOST_TOLD} more" if len(changes) > _MOST_TOLD else ""
    return "; ".join(map(one_line, changes[:_MOST_TOLD])) + more
