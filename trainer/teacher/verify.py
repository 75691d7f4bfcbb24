"""`store verify PATH --teacher`: run the teacher again on random rows and compare with what is stored.

What sparsekd captured is made again, as it was made, and compared plane by plane. Of what was imported
nobody knows how it was made: what the teacher says of the same ids is compared. Either way a deviation is
named where it has a name (`faults.judge`).

Shapes: L positions of a row, k head entries.
"""

import math
import secrets
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.manifest import TeacherIdentity
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import Row, TeacherRecord, records_at
from sparsekd.trainer.config.schema import Config, LaunchConfig, TeacherConfig, require
from sparsekd.trainer.data.inputs import real_length
from sparsekd.trainer.models.opened import OpenModel
from sparsekd.trainer.models.source import teacher_source
from sparsekd.trainer.models.weights import files_digest
from sparsekd.trainer.run.errors import ConfigError, DataError
from sparsekd.trainer.run.ranks import ranks
from sparsekd.trainer.teacher.deviation import deviation_of
from sparsekd.trainer.teacher.evidence import evidence_of
from sparsekd.trainer.teacher.faults import Finding, judge
from sparsekd.trainer.teacher.features import read_projections
from sparsekd.trainer.teacher.model import check_teacher_tokenizer, load_teacher
from sparsekd.trainer.teacher.records import recorded_rows
from sparsekd.trainer.teacher.settings import resolved_settings
from sparsekd.trainer.teacher.units import micro_batches, rows_sorted
from sparsekd.trainer.teacher.verify_features import add_features, check_features, record_of_features
from sparsekd.trainer.teacher.weights import engine_settings

# Rows that are run again in each split.
ROWS = 8

# Nats by which a plane may deviate, largest and mean. On the machine and with the settings of the capture the
# deviation is 0; other kernels round hidden states differently. float32: a hundred roundings of logits of
# size 10 to 100. bfloat16: hidden states have 8 bits, so logits of size 20 move by up to a few times 0.08.
LARGEST = {"float32": 2e-3, "bfloat16": 0.5}
MEAN = {"float32": 1e-4, "bfloat16": 0.02}

_HEAD = "head_logprobs"
VALUE_PLANES = (_HEAD, "log_rest", "true_logprob", "rest_entropy", "entropy")


def run(config: Config, store_path: str | Path, *, seed: int | None = None) -> None:
    """Prints the largest deviation of each plane, with the teacher run as the manifest says it was captured.

    Args:
        config: The teacher's place; its settings where the manifest does not name them.
        store_path: The store.
        seed: Of the choice of rows; None takes a fresh one, so that each call looks at other rows.

    Raises:
        DataError: A plane deviates by more than rounding; names the row and position, whether the teacher's
            files are those of the manifest, and the fault where it has a name. Or the records are draws
            alone, which no teacher says again.
        ModelError: The teacher cannot be loaded or does not fit.
        StoreError: The store cannot be read, or has no teacher's records.
    """
    path = require(config.teacher.path, "teacher.path", "to run it again")
    store = open_store(store_path)
    identity = store.manifest.teacher
    if identity is None:
        raise DataError(f"{store_path} is a token store: it holds nothing of a teacher to verify.")
    if store.manifest.record.rest != "exact":  # imported
        _verify_imported(config, path, store)
        return
    if identity.dtype not in LARGEST:
        raise DataError(
            f"{store_path} was captured in {identity.dtype}; teachers run in {' or '.join(LARGEST)} only."
        )
    if seed is None:
        seed = secrets.randbits(32)
    settings, launch = as_captured(config.teacher, config.launch, identity)
    with ranks(launch, timeout_minutes=config.engine.timeout_minutes) as place:
        settings = runnable(settings, place.device, store.manifest.tokenizer.vocabulary_size)
        check_teacher_tokenizer(settings, path, store)
        same_files = files_digest(teacher_source(settings, path), key="teacher") == identity.weights_digest
        if not same_files:
            print(f"verify: the files of {path} are not those of the manifest ({identity.name})", flush=True)
        teacher = load_teacher(settings, path, store, place.device)
        projections = read_projections(store.path, store.manifest)
        stored: list[tuple[str, int, Row, TeacherRecord]] = []
        headed: list[tuple[str, int, Row, TeacherRecord]] = []
        features = {spec.plane: np.zeros(2) for spec in store.manifest.features}
        codec = codec_of(store.manifest)
        for split in store.manifest.splits:
            for index in _random_rows(store, split, seed):
                group, offset = _micro_batch(store, split, index, settings)
                again = list(
                    recorded_rows(
                        teacher,
                        group,
                        store.manifest,
                        split,
                        projections=projections,
                        micro_batch_rows=settings.micro_batch_rows,
                        sort_rows=0,  # the group is a micro-batch in its order
                        chunk_positions=settings.chunk_positions,
                        impl=settings.impl,
                    )
                )[offset]
                # What the codec rounds is rounded here, too: on the machine of the capture nothing deviates.
                rounded = codec.decode(codec.encode(again, store.manifest), store.manifest)
                stored.append((split, index, *_both_recorded(group[offset], rounded)))
                add_features(features, group[offset], rounded)
                by_head = record_of_features(teacher, group[offset], store.manifest, settings)
                if by_head is not None:
                    headed.append((split, index, group[offset], by_head))
    record = store.manifest.record
    planes = [plane for plane in VALUE_PLANES if record.k or plane != _HEAD]
    deviations = [deviation_of(plane, stored, store.manifest) for plane in planes]
    shares = []
    if record.k:
        shares.append(f"head ids equal at {_equal_share(stored, 'head_ids'):.2%} of positions")
    if record.n:
        shares.append(f"draws equal at {_equal_share(stored, 'tail_ids', 'tail_counts'):.2%} of positions")
    rows = f"{len(stored)} random rows (seed {seed})"
    print(f"verify: the teacher ran again on {rows}; {', '.join(shares)}")
    for found in deviations:
        print(
            f"verify: {found.plane:14} largest deviation {found.largest:.3g} nats (split {found.split}, row "
            f"{found.row}, position {found.position}), mean {found.mean:.3g}",
            flush=True,
        )
    check_features(features, headed, store, identity.name)
    for found in deviations:
        bounds = LARGEST[settings.dtype], MEAN[settings.dtype]
        if not (found.largest <= bounds[0] and found.mean <= bounds[1]):
            files = (
                "its files are those of the manifest" if same_files else "its files are not the manifest's"
            )
            name = _fault(teacher, [row for _, _, row, _ in stored], store)
            fault = f"; the records {name.fault}" if name and name.fault else ""
            raise DataError(
                f"{store_path} does not hold this teacher's records: {found.plane} of split {found.split}, "
                f"row {found.row}, position {found.position} deviates by {found.largest:.3g} nats (mean "
                f"{found.mean:.3g}; in {settings.dtype} at most {bounds[0]:g} and {bounds[1]:g} are "
                f"rounding), and {files}{fault}; give the teacher {identity.name} as teacher.path, or "
                "capture again."
            )
    print(f"next: sparsekd train store.path={store_path} student.path=STUDENT", flush=True)


def _verify_imported(config: Config, path: str, store: LogitStore) -> None:
    """Prints how far imported records are from the teacher's log-probabilities of the same ids.

    Raises:
        DataError: They are not this teacher's; names the fault where it has a name.
        ModelError: The teacher cannot be loaded or does not fit.
    """
    if store.manifest.record.k == 0:
        raise DataError(
            f"{store.path} holds draws alone (record.rest is counts), and a teacher does not say them again; "
            f"sparsekd store verify {store.path} without --teacher compares them with the text."
        )
    seed = secrets.randbits(32)
    with ranks(config.launch, timeout_minutes=config.engine.timeout_minutes) as place:
        settings = runnable(config.teacher, place.device, store.manifest.tokenizer.vocabulary_size)
        check_teacher_tokenizer(settings, path, store)
        teacher = load_teacher(settings, path, store, place.device)
        rows = [
            store.read_row(split, index)
            for split in store.manifest.splits
            for index in _random_rows(store, split, seed)
        ]
        found = _fault(teacher, rows, store)
    if found is None or math.isnan(found.deviation):
        raise DataError(
            f"{store.path} has too few records in {len(rows)} rows (seed {seed}) to compare with a teacher: "
            "import more, or verify without --teacher."
        )
    print(
        f"verify: the teacher ran on {len(rows)} random rows (seed {seed}); its log-probabilities of the "
        f"listed ids, in {settings.dtype}, are {found.deviation:.2g} nats from the records' on average",
        flush=True,
    )
    if found.fault:
        left = f", which leaves {found.unexplained:.2g}" if found.known else ""
        raise DataError(
            f"{store.path} does not hold this teacher's records as they should be: they deviate by "
            f"{found.deviation:.2g} nats on average, and the records {found.fault}{left}; mend the source "
            "and import it again, or name the teacher that made it as teacher.path."
        )
    print(f"next: sparsekd train store.path={store.path} student.path=STUDENT", flush=True)


def _fault(teacher: OpenModel, rows: list[Row], store: LogitStore) -> Finding | None:
    """What is wrong with the records of some rows; None where nothing is found, or nothing can be."""
    if not store.manifest.record.k or store.manifest.target != "next_token":
        return None
    evidence = evidence_of(teacher, rows, store.manifest)
    return None if evidence is None else judge(evidence)


def as_captured(
    settings: TeacherConfig, launch: LaunchConfig, identity: TeacherIdentity
) -> tuple[TeacherConfig, LaunchConfig]:
    """The teacher's and the launch's settings, those of the manifest where it names them."""
    found = engine_settings(identity.engine)
    settings = replace(settings, dtype=identity.dtype, tensor_parallel=1)
    if "attention" in found:
        settings = replace(settings, attention=found["attention"])
    if "micro_batch_rows" in found:
        settings = replace(settings, micro_batch_rows=int(found["micro_batch_rows"]))
    # Stores of versions that sorted nothing do not name it.
    settings = replace(settings, sort_rows=int(found.get("sort_rows", 0)))
    if "chunk_positions" in found:
        settings = replace(settings, chunk_positions=int(found["chunk_positions"]))
    if found.get("quantization") in ("int8", "nf4"):  # another is the folder's own
        settings = replace(settings, quantization=found["quantization"])
    # Stores of versions that had no other implementation do not name it.
    settings = replace(settings, impl=found.get("impl", "torch"))
    if "threads" in found:
        launch = replace(launch, threads_per_rank=int(found["threads"]))
    return settings, launch


def runnable(settings: TeacherConfig, device: torch.device, vocabulary_size: int) -> TeacherConfig:
    """The settings, with the implementation of the capture where it runs here, else with `torch`."""
    try:
        return resolved_settings(settings, device, vocabulary_size)
    except ConfigError:
        print(
            f"verify: captured with impl {settings.impl}, verified with impl torch on {device.type}",
            flush=True,
        )
        return resolved_settings(replace(settings, impl="torch"), device, vocabulary_size)


def _both_recorded(stored: Row, again: Row) -> tuple[Row, TeacherRecord]:
    """The stored row and the teacher's records of now, at the positions that both have.

    `store subset` and imports leave records out that a capture makes.
    """
    assert stored.recorded is not None and again.recorded is not None
    both = stored.recorded & again.recorded
    return replace(stored, teacher=records_at(stored, both), recorded=both), records_at(again, both)


def _random_rows(store: LogitStore, split: str, seed: int) -> list[int]:
    """Up to ROWS different rows of a split, ascending."""
    count = store.rows(split)
    generator = np.random.Generator(np.random.Philox(seed))
    return sorted(generator.choice(count, size=min(ROWS, count), replace=False).tolist())


def _micro_batch(store: LogitStore, split: str, index: int, settings: TeacherConfig) -> tuple[list[Row], int]:
    """The rows with which capture ran row `index`, and its place among them: equal shapes give equal bits."""
    micro, sort = settings.micro_batch_rows, settings.sort_rows
    shard_rows = store.shard_rows(split, index // store.manifest.rows_per_shard)
    together = rows_sorted(micro, sort)
    first = index - (index - shard_rows.start) % together
    rows = [store.read_row(split, row) for row in range(first, min(first + together, shard_rows.stop))]
    groups = micro_batches([real_length(row) for row in rows], micro, sort)
    group = next(group for group in groups if index - first in group)
    return [rows[number] for number in group], group.index(index - first)


def _equal_share(stored: list[tuple[str, int, Row, TeacherRecord]], *planes: str) -> float:
    """Share of positions at which all `planes` are equal."""
    equal = [
        np.all(
            [(getattr(row.teacher, plane) == getattr(again, plane)).all(axis=1) for plane in planes], axis=0
        )
        for _, _, row, again in stored
    ]
    return float(np.concatenate(equal).mean())
