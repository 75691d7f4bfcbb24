"""The record of a checkpoint, COMMIT.json: signed, typed, and naming every file that loading needs.

A record may be old, damaged or a stranger's: it is bounded before it is read, and whatever is wrong with it
is one sentence, after which an older checkpoint is taken.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.json_text import read_signed_json, signed_digest, signed_json
from sparsekd.logit_store.typed_json import Count, Matching, Range, Sha256, read_bounded, require, typed
from sparsekd.trainer.config.schema import ScheduleConfig
from sparsekd.trainer.run.errors import CheckpointError

COMMIT_NAME = "COMMIT.json"
ENGINE_FOLDER = "engine"
"""The part of a checkpoint that DeepSpeed writes and reads (its "tag")."""

RECORD_VERSION = 2
RECORD_BYTES = 16 << 20
"""Bytes of a record at most; a file takes about 120, and each rank has two."""

_LARGEST_STEP = 99_999_999  # a folder's name has eight digits
_FILE_NAME = re.compile(rf"{ENGINE_FOLDER}(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)+")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its length and the crc32 of its bytes."""

    bytes: Count
    crc32: Annotated[int, Range(0, 2**32 - 1)]


@dataclass(frozen=True)
class Commit:
    """What a checkpoint's record says: where the run stood, and under which settings."""

    step: Annotated[int, Range(0, _LARGEST_STEP)]
    rows_consumed: Count
    tokens: Count
    sums: tuple[tuple[float, ...], ...]  # of each rank: running sums of the metrics since their last line
    world_size: Count
    threads_per_rank: Count
    store_digest: Sha256
    settings: dict[str, Any]  # those that decide the numbers; see `resume.settings_of`
    config_digest: Sha256
    versions: dict[str, str]
    files: dict[str, FileRecord]  # by their names in the checkpoint
    skipped_rows: tuple[Count, ...] = ()  # damaged rows left out so far
    heldout_loss: float | None = None  # where it was measured at this step
    store_kind: str = ""  # what the store's rows are (`resume.store_kind`); unknown in older records


@dataclass(frozen=True)
class _Course:
    """Settings that decide the learning rate of each step."""

    schedule: ScheduleConfig
    steps: Annotated[int, Range(1, 2**63 - 1)]
    learning_rate: float


@dataclass(frozen=True)
class _Settings:
    numbers: dict[str, Any]
    bits: dict[str, Any]
    course: _Course
    places: dict[str, Any]


@dataclass(frozen=True)
class _Shape:
    """Settings that decide which files DeepSpeed writes, and how far a step goes in the data."""

    dtype: Annotated[str, Matching("bfloat16|float32", "bfloat16 or float32")]
    zero_stage: Annotated[int, Range(0, 3)]
    global_batch_rows: Annotated[int, Range(1, 2**31)]


def step_name(step: int) -> str:
    """Name of a published checkpoint's folder."""
    return f"step-{step:08d}"


def engine_files(world_size: int, *, zero_stage: int, dtype: str) -> Iterator[str]:
    """The files, by their names in a checkpoint, that DeepSpeed 0.19 writes and needs for loading.

    Weights and DeepSpeed's counters are in one file, under stage 3 in one of each rank; from stage 1 on each
    rank has its part of the optimizer's state and of the float32 weights.

    Args:
        world_size: Ranks that saved.
        zero_stage: 0 to 3.
        dtype: Of forward and backward, "bfloat16" or "float32".
    """
    kind = "bf16_zero" if dtype == "bfloat16" else "zero"
    if zero_stage < 3:
        yield f"{ENGINE_FOLDER}/mp_rank_00_model_states.pt"
    for rank in range(world_size):
        if zero_stage == 3:
            yield f"{ENGINE_FOLDER}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        if zero_stage > 0:
            yield f"{ENGINE_FOLDER}/{kind}_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def is_loaded(name: str) -> bool:
    """Whether loading or exporting may take a file for one of the engine's: both look by pattern."""
    return name.endswith("_states.pt")


def commit_bytes(commit: Commit, place: Path) -> bytes:
    """Returns the text of a record, which reads back as it is.

    Args:
        commit: The record.
        place: Of the checkpoint, for messages.

    Raises:
        CheckpointError: It would not read back: files are missing, or it holds what no record can.
    """
    try:
        data = signed_json({**dataclasses.asdict(commit), "format_version": RECORD_VERSION})
        _parsed(data, place / COMMIT_NAME)
    except (StoreError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint of step {commit.step} would not be one that a run can go on from, and is not "
            f"published ({str(error).removesuffix('.')}); please report this."
        ) from error
    return data


def read_commit(checkpoint: Path) -> Commit:
    """Reads a checkpoint's record. That its files are as it says is for `checkpoint.verify` to find out.

    Raises:
        CheckpointError: There is none; it is damaged, of another version, or of another step than the
            folder's name says; or it does not name every file that loading needs.
    """
    place = checkpoint / COMMIT_NAME
    try:
        commit = _parsed(read_bounded(place, RECORD_BYTES), place)
        name = Path(os.path.abspath(checkpoint)).name
        if name != step_name(commit.step):
            raise CheckpointError(
                f"{place} is the record of step {commit.step}, expected that of a folder {name}: give a "
                f"checkpoint the name that it was published with ({step_name(commit.step)})."
            )
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint: it has no {COMMIT_NAME}; name a folder such as "
            f"runs/NAME/checkpoints/{step_name(200)}."
        ) from None
    except StoreError as error:
        raise CheckpointError(str(error)) from error
    return commit


def read_commit_digest(checkpoint: Path) -> str:
    """The digest that a checkpoint's record bears: the checkpoint's identity.

    Raises:
        CheckpointError: As `read_commit`.
    """
    read_commit(checkpoint)
    return signed_digest((checkpoint / COMMIT_NAME).read_bytes())


def _parsed(data: bytes, place: Path) -> Commit:
    content, _ = read_signed_json(place, data, RECORD_VERSION)
    commit = typed(Commit, content, str(place))
    # Records from before a student was known by its content have no places.
    settings = typed(_Settings, {"places": {}, **commit.settings}, f"{place} (settings)")
    engine, train = settings.numbers.get("engine"), settings.numbers.get("train")
    for name, section in (("engine", engine), ("train", train)):
        require(type(section) is dict, place, f"settings.numbers.{name}", "an object", section)
    assert isinstance(engine, dict) and isinstance(train, dict)
    named = {field.name: {**engine, **train}.get(field.name) for field in dataclasses.fields(_Shape)}
    shape = typed(_Shape, named, f"{place} (settings)")
    step = commit.step
    require(1 <= step <= settings.course.steps, place, "step", f"1 to {settings.course.steps}", step)
    rows = step * shape.global_batch_rows
    require(commit.rows_consumed == rows, place, "rows_consumed", f"{rows}", commit.rows_consumed)
    ranks = commit.world_size
    require(len(commit.sums) == ranks, place, "sums", f"those of {ranks} ranks", len(commit.sums))
    _require_files(commit.files, commit.world_size, shape, place)
    return commit


def _require_files(files: Mapping[str, FileRecord], world_size: int, shape: _Shape, place: Path) -> None:
    for name in files:
        inside = len(name) < 256 and _FILE_NAME.fullmatch(name) is not None
        require(inside, place, "a name of its files", f"one inside of {ENGINE_FOLDER}/", name)
    require(world_size > 0, place, "world_size", "1 or more", world_size)
    # Lazily, as the number of ranks may be any: it ends at the first that is missing.
    wanted = engine_files(world_size, zero_stage=shape.zero_stage, dtype=shape.dtype)
    missing = next((name for name in wanted if name not in files), None)
    words = f"all that {world_size} ranks write in stage {shape.zero_stage}, also {missing}"
    require(missing is None, place, "files", words, sorted(files)[:4])
