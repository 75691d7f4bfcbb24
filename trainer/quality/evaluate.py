"""`evaluate`: teacher, student and baseline side by side on held-out rows.

Models are loaded one after another, in one process. What the teacher's stored records cannot tell exactly is
marked as a bound or an estimate. With evaluate.teacher=load the teacher runs once, before the others, and
leaves its hidden states and its head behind, from which all its logits are made again.

Shapes: N counted positions, D documents.
"""

import math
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.trainer.config.places import evaluation_folder
from sparsekd.trainer.config.schema import Config, EvaluateConfig, TeacherConfig, require
from sparsekd.trainer.data.heldout import SPLIT, HeldOut, read_held_out
from sparsekd.trainer.data.used_ids import UsedIds
from sparsekd.trainer.models.opened import OpenModel, open_model
from sparsekd.trainer.models.source import judged_source, teacher_source
from sparsekd.trainer.models.tokenizers import check_tokenizer
from sparsekd.trainer.quality.result import (
    EXACT,
    LOWER_BOUND,
    RESULT_VERSION,
    Breakdown,
    Category,
    Documents,
    Evaluation,
    Figure,
    ModelResult,
    save_evaluation,
)
from sparsekd.trainer.quality.score import Scores, TeacherTrace, kinds, score
from sparsekd.trainer.quality.statistics import (
    calibration_error,
    deciles,
    means_by_category,
    paired_bootstrap,
    reliability,
    sums_by_document,
)
from sparsekd.trainer.quality.table import headline, result_table
from sparsekd.trainer.quality.worst import worst_tokens
from sparsekd.trainer.run.errors import ConfigError, ModelError
from sparsekd.trainer.run.ranks import Ranks, one_process
from sparsekd.trainer.run.versions import MODEL_PACKAGES, versions_of

TEACHER = "teacher"

# Another dtype or device moves a teacher's loss by hundredths of a nat; another model is far off.
_OTHER_TEACHER = 0.25
_CONTEXT_EDGES = (16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class _Outcome:
    """One model's result, and its loss at each counted position."""

    result: ModelResult
    loss: NDArray[np.float32]  # (N,)
    scores: Scores | None  # None for a teacher that is known by its records alone


def run(config: Config) -> None:
    """Judges every model of evaluate.models, writes `evaluation.json` and prints a table.

    Raises:
        ConfigError: No models are named, the student or baseline is not among them, or ranks are several.
        DataError: The store has nothing held out.
        ModelError: A model cannot be loaded, does not fit the store, or the teacher is not the store's.
    """
    transformers_logging.disable_progress_bar()
    evaluate = config.evaluate
    require(evaluate.models, "evaluate.models", "to know what to compare")
    for key, name in (("student", evaluate.student), ("baseline", evaluate.baseline)):
        if name is not None and name not in evaluate.models:
            raise ConfigError(
                f"evaluate.{key}={name} is not one of evaluate.models: {', '.join(evaluate.models)}."
            )
    if TEACHER in evaluate.models:
        raise ConfigError(
            f"evaluate.models names a model {TEACHER!r}; the teacher is given by teacher.path instead."
        )
    store = open_store(require(config.store.path, "store.path", "for its held-out rows"))
    with one_process(config.launch, timeout_minutes=config.engine.timeout_minutes, what="evaluate") as job:
        evaluation = _evaluate(config, store, job)
    folder = evaluation_folder(config)
    place = save_evaluation(evaluation, folder)
    print(result_table(evaluation))
    print(headline(evaluation))
    print(f"written: {place}")
    print(
        f"next: sparsekd report report.evaluation={folder} report.path={folder.parent}/report.html",
        flush=True,
    )


def _evaluate(config: Config, store: LogitStore, job: Ranks) -> Evaluation:
    evaluate = config.evaluate
    held = read_held_out(store, evaluate.rows)
    print(
        f"held out: {held.rows} rows, {len(held.row):,} counted tokens in "
        f"{len(np.unique(held.document)):,} documents",
        flush=True,
    )
    outcomes: list[_Outcome] = []
    trace = None
    deviation = None
    batch, used = evaluate.micro_batch_rows, UsedIds(store)
    folder = evaluation_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as scratch:
        if evaluate.teacher == "load":
            outcome, trace = _run_teacher(config, store, held, job, Path(scratch))
            deviation = _deviation(held, outcome.loss, config.teacher)
            outcomes.append(outcome)
        elif held.teacher is not None:
            outcomes.append(_stored_teacher(held, store))
        for name in _in_order(evaluate):
            print(f"{name}: {evaluate.models[name]}", flush=True)
            source = judged_source(config.student, name, evaluate.models[name])
            check_tokenizer(
                source,
                store=store,
                used=used,
                remedy="name a model that was trained on this store",
            )
            judged = open_model(
                source,
                "student",
                store,
                dtype=evaluate.dtype,
                device=job.device,
                used=used,
                compared=trace is not None or store.manifest.teacher is not None,
            )
            scores = score(judged, store, rows=held.rows, batch=batch, teacher=trace)
            outcomes.append(_outcome(evaluate, name, judged, scores, store, runs=trace is not None))
            del judged
        return _assemble(config, store, held, outcomes, deviation, job)


def _run_teacher(
    config: Config, store: LogitStore, held: HeldOut, job: Ranks, scratch: Path
) -> tuple[_Outcome, TeacherTrace]:
    """Runs the teacher once; its hidden states go to a file, and the model itself goes."""
    path = require(config.teacher.path, "teacher.path", "by evaluate.teacher=load")
    print(f"{TEACHER}: {path}", flush=True)
    source = teacher_source(config.teacher, path)
    judged = open_model(source, TEACHER, store, dtype=config.evaluate.dtype, device=job.device, compared=True)
    width = judged.head.weight.shape[1]
    hidden = torch.from_file(
        str(scratch / "teacher-hidden"),
        shared=True,
        size=len(held.row) * width,
        dtype=judged.head.weight.dtype,
    ).view(-1, width)
    batch = config.evaluate.micro_batch_rows
    scores = score(judged, store, rows=held.rows, batch=batch, teacher=None, keep=hidden)
    trace = TeacherTrace(hidden, judged.head, judged.transform)
    return _loaded_teacher(path, judged, scores), trace


def _in_order(evaluate: EvaluateConfig) -> list[str]:
    """Student, baseline, then the others as they were named."""
    first = [name for name in (evaluate.student, evaluate.baseline) if name is not None]
    return [*first, *(name for name in evaluate.models if name not in first)]


def _deviation(held: HeldOut, loss: NDArray[np.float32], teacher: TeacherConfig) -> float | None:
    """Mean |loaded - stored| of the teacher's loss; a large one is another teacher."""
    if held.teacher is None:
        return None
    deviation = float(np.abs(loss.astype(np.float64) - held.teacher.loss).mean())
    print(
        f"teacher: loaded and stored losses differ by {deviation:.2g} nats per token on average", flush=True
    )
    if deviation > _OTHER_TEACHER:
        raise ModelError(
            f"teacher.path={teacher.path} gives losses that differ from the store's records by "
            f"{deviation:.2f} nats per token on average (rounding is below {_OTHER_TEACHER}): it is not the "
            "teacher that was captured; name that one, or use evaluate.teacher=store."
        )
    return deviation


def _teacher_figures(loss: float, calibration: float | None, kind: str = EXACT) -> dict[str, Figure]:
    """A teacher agrees with itself by definition; of its loss `kind` says how far it can be trusted."""
    found = {"loss": Figure(loss, kind), "perplexity": Figure(math.exp(loss), kind)}
    found |= {"kl": Figure(0.0, EXACT), "agreement": Figure(1.0, EXACT)}
    if calibration is not None:
        found["calibration_error"] = Figure(calibration, EXACT)
    return found | {"acceptance": Figure(1.0, EXACT)}


def _stored_teacher(held: HeldOut, store: LogitStore) -> _Outcome:
    stored, identity = held.teacher, store.manifest.teacher
    assert stored is not None and identity is not None
    rest = store.manifest.record.rest
    bins = []
    # Without a normaliser the head's probabilities are relative to it: no confidence of the teacher.
    if rest != "unknown" and stored.confidence is not None and stored.hit is not None:
        bins = reliability(stored.confidence, stored.hit)
    calibration = calibration_error(bins) if bins else None
    return _Outcome(
        ModelResult(
            name=TEACHER,
            role=TEACHER,
            path=None,
            # A label that the source did not list is worth no more than its record says.
            figures=_teacher_figures(
                _mean(stored.loss), calibration, EXACT if rest == "exact" else LOWER_BOUND
            ),
            parameters=None,
            weight_bytes=None,
            tokens_per_second=None,
            reliability=bins,
        ),
        stored.loss,
        None,
    )


def _loaded_teacher(path: str, judged: OpenModel, scores: Scores) -> _Outcome:
    calibration = calibration_error(reliability(scores.confidence, scores.hit))
    figures = _teacher_figures(_mean(scores.loss), calibration)
    return _of_model(TEACHER, TEACHER, path, figures, judged, scores)


def _outcome(
    evaluate: EvaluateConfig, name: str, judged: OpenModel, scores: Scores, store: LogitStore, *, runs: bool
) -> _Outcome:
    roles = {evaluate.baseline: "baseline", evaluate.student: "student"}
    loss = _mean(scores.loss)
    figures = {"loss": Figure(loss, EXACT), "perplexity": Figure(math.exp(loss), EXACT)}
    for figure, kind in kinds(store.manifest.record, teacher_runs=runs).items():
        values = getattr(scores, figure)
        if values is not None:
            figures[figure] = Figure(_mean(values), kind)
    calibration = calibration_error(reliability(scores.confidence, scores.hit))
    figures["calibration_error"] = Figure(calibration, EXACT)
    return _of_model(name, roles.get(name, "other"), evaluate.models[name], figures, judged, scores)


def _of_model(
    name: str, role: str, path: str, figures: dict[str, Figure], judged: OpenModel, scores: Scores
) -> _Outcome:
    """The outcome of a model that ran."""
    result = ModelResult(
        name=name,
        role=role,
        path=path,
        figures=figures,
        parameters=judged.model.num_parameters(),
        weight_bytes=judged.weight_bytes,
        tokens_per_second=scores.tokens_per_second,
        reliability=reliability(scores.confidence, scores.hit),
    )
    return _Outcome(result, scores.loss, scores)


def _assemble(
    config: Config,
    store: LogitStore,
    held: HeldOut,
    outcomes: list[_Outcome],
    deviation: float | None,
    job: Ranks,
) -> Evaluation:
    evaluate = config.evaluate
    by_name = {outcome.result.name: outcome for outcome in outcomes}
    losses = {name: outcome.loss for name, outcome in by_name.items()}
    numbers, tokens = np.unique(held.document, return_counts=True)
    sums = {name: sums_by_document(loss, held.document) for name, loss in losses.items()}
    margin, gap_closed = None, None
    if evaluate.baseline is not None:
        margin = paired_bootstrap(
            sums[evaluate.student],
            sums[evaluate.baseline],
            tokens,
            samples=evaluate.bootstrap_samples,
            seed=evaluate.seed,
        )
        if TEACHER in losses:
            distance = _mean(losses[evaluate.baseline]) - _mean(losses[TEACHER])
            gap_closed = margin.value / distance if distance > 0 else None
    teacher = by_name.get(TEACHER)
    student = by_name[evaluate.student].scores
    assert student is not None
    return Evaluation(
        format_version=RESULT_VERSION,
        store=_store_facts(store, held, len(numbers)),
        settings={
            "teacher": evaluate.teacher,
            "dtype": evaluate.dtype,
            "device": job.device.type,
            "threads": config.launch.threads_per_rank,
            "micro_batch_rows": evaluate.micro_batch_rows,
            "bootstrap_samples": evaluate.bootstrap_samples,
            "seed": evaluate.seed,
        },
        versions={"python": platform.python_version(), **versions_of(MODEL_PACKAGES)},
        models=[outcome.result for outcome in outcomes],
        margin=margin,
        gap_closed=gap_closed,
        breakdowns=_breakdowns(held, teacher, losses),
        documents=Documents(
            numbers=numbers.tolist(),
            tokens=tokens.tolist(),
            nats={name: values.tolist() for name, values in sums.items()},
        ),
        worst_tokens=worst_tokens(store, held, losses, student=evaluate.student, guesses=student.top_ids),
        teacher_deviation=deviation,
    )


def _store_facts(store: LogitStore, held: HeldOut, documents: int) -> dict:
    manifest = store.manifest
    record, teacher = manifest.record, manifest.teacher
    return {
        "path": str(store.path),
        "digest": store.digest,
        "split": SPLIT,
        "rows": held.rows,
        "tokens": held.tokens,
        "counted": len(held.row),
        "documents": documents,
        "sequence_length": manifest.sequence_length,
        "record": {
            "k": record.k,
            "n": record.n,
            "temperatures": list(record.temperatures),
            "draw_temperature": record.draw_temperature,
            "seed": record.seed,
        },
        "tokenizer": {
            "name": manifest.tokenizer.name,
            "vocabulary_size": manifest.tokenizer.vocabulary_size,
            "digest": manifest.tokenizer.digest,
        },
        "teacher": None
        if teacher is None
        else {
            "name": teacher.name,
            "revision": teacher.revision,
            "weights_digest": teacher.weights_digest,
            "dtype": teacher.dtype,
            "engine": teacher.engine,
        },
    }


def _breakdowns(
    held: HeldOut, teacher: _Outcome | None, losses: dict[str, NDArray[np.float32]]
) -> list[Breakdown]:
    found = []
    entropy = None
    if teacher is not None and teacher.scores is not None:
        entropy = teacher.scores.entropy
    elif held.teacher is not None:
        entropy = held.teacher.entropy
    if entropy is not None:
        group = deciles(entropy)
        means = means_by_category(entropy, group, 10)
        labels = ["-" if mean is None else f"{mean:.1f}" for mean in means]
        found.append(
            _breakdown("entropy", "teacher's entropy (mean of each tenth, nats)", labels, group, losses)
        )
    group = np.searchsorted(_CONTEXT_EDGES, held.context, side="right")
    edges = (0, *_CONTEXT_EDGES)
    labels = [f"{max(low, 1)}-{high - 1}" for low, high in zip(edges, _CONTEXT_EDGES, strict=False)]
    labels = [*labels, f"{_CONTEXT_EDGES[-1]}+"][: int(group.max()) + 1]
    found.append(_breakdown("context", "tokens of the document seen so far", labels, group, losses))
    return found


def _breakdown(
    name: str,
    title: str,
    labels: list[str],
    group: NDArray[np.int64],
    losses: dict[str, NDArray[np.float32]],
) -> Breakdown:
    counts = np.bincount(group, minlength=len(labels))
    means = {model: means_by_category(loss, group, len(labels)) for model, loss in losses.items()}
    return Breakdown(
        name,
        title,
        [
            Category(label, int(counts[index]), {model: values[index] for model, values in means.items()})
            for index, label in enumerate(labels)
        ],
    )


def _mean(values: NDArray) -> float:
    return float(values.astype(np.float64).mean())
