"""`evaluation.json`: what `evaluate` found and `report` draws, as plain data. No torch here.

The file holds one `Evaluation` as JSON: its fields are the keys, nested dataclasses are objects. Losses are
in nats per token, at temperature 1, over the counted positions of held-out rows.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.run.files import write_whole

RESULT_VERSION = 1
RESULT_NAME = "evaluation.json"

EXACT, ESTIMATE, LOWER_BOUND, UPPER_BOUND = "exact", "estimate", "lower bound", "upper bound"


@dataclass(frozen=True)
class ReliabilityBin:
    """Positions whose top-1 confidence falls in one bin.

    Attributes:
        count: positions.
        confidence: their mean confidence, 0 when there is none.
        accuracy: share of them whose top id is the true token, 0 when there is none.
    """

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Margin:
    """How far the student is ahead of the baseline.

    Attributes:
        value: baseline's loss - student's loss, nats per token; above 0 the student is better.
        low: 2.5 % quantile of the paired bootstrap; None with fewer than 2 documents.
        high: 97.5 % quantile.
        wins: share of the documents on which the student's loss is lower.
        documents: number of documents, which are what is resampled.
        samples: resamples.
    """

    value: float
    low: float | None
    high: float | None
    wins: float
    documents: int
    samples: int


@dataclass(frozen=True)
class Figure:
    """A number and how far it can be trusted: `exact`, `estimate` (unbiased, from draws) or a bound."""

    value: float
    kind: str


@dataclass(frozen=True)
class ModelResult:
    """One model, the teacher included.

    Attributes:
        name: as in evaluate.models; "teacher" for the teacher.
        role: teacher, student, baseline or other.
        path: folder or hub name; None for a teacher that is known by its records alone.
        figures: loss, perplexity, kl, agreement, calibration_error, acceptance; a missing key could not be
            had from what is stored.
        parameters: tied weights counted once; None where the model was not loaded.
        weight_bytes: of the weights in the dtype in which they are saved; None where it was not loaded.
        tokens_per_second: forward pass and logits, in this process; None where it was not loaded.
        reliability: bins of the calibration plot; empty where unknown.
    """

    name: str
    role: str
    path: str | None
    figures: dict[str, Figure]
    parameters: int | None
    weight_bytes: int | None
    tokens_per_second: float | None
    reliability: list[ReliabilityBin]


@dataclass(frozen=True)
class Category:
    """One bar of a breakdown: positions and each model's mean loss on them (None without positions)."""

    label: str
    tokens: int
    losses: dict[str, float | None]


@dataclass(frozen=True)
class Breakdown:
    """Losses by category, such as by the teacher's entropy."""

    name: str
    title: str
    categories: list[Category]


@dataclass(frozen=True)
class Documents:
    """Sums over each held-out document: what the bootstrap resamples."""

    numbers: list[int]
    tokens: list[int]
    nats: dict[str, list[float]]


@dataclass(frozen=True)
class WorstToken:
    """A position on which the student falls far behind the teacher.

    Attributes:
        document: number in the corpus.
        row: held-out row.
        position: in the row; the record at it speaks of the next token.
        context: decoded text before the true token.
        token: the true token, decoded.
        guess: the student's most likely token, decoded.
        probabilities: of the true token, by model, the teacher included where it is known.
    """

    document: int
    row: int
    position: int
    context: str
    token: str
    guess: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Everything that `evaluate` found.

    Attributes:
        format_version: `RESULT_VERSION`.
        store: path, digest, split, rows, tokens (all positions), counted, documents, and the manifest's
            record, teacher, tokenizer and dataset.
        settings: teacher mode, dtype, device, threads, rows at a time, resamples, seed.
        versions: package -> version.
        models: the teacher first, then the student, the baseline and the others.
        margin: baseline - student; None without a baseline.
        gap_closed: share of the baseline's distance to the teacher that the student is ahead; None where
            there is no baseline, no teacher, or no distance.
        breakdowns: losses by category.
        documents: sums by document.
        worst_tokens: the student's worst positions, one of each document at most.
        teacher_deviation: mean |loaded - stored| of the teacher's loss in nats per token; None where either
            is missing.
    """

    format_version: int
    store: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    models: list[ModelResult]
    margin: Margin | None
    gap_closed: float | None
    breakdowns: list[Breakdown]
    documents: Documents
    worst_tokens: list[WorstToken]
    teacher_deviation: float | None

    def model(self, role: str) -> ModelResult | None:
        """The first model of that role, or None."""
        return next((model for model in self.models if model.role == role), None)


def save_evaluation(evaluation: Evaluation, folder: Path) -> Path:
    """Writes `evaluation.json` into `folder` by rename and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / RESULT_NAME
    write_whole(place, json.dumps(asdict(evaluation), indent=1, sort_keys=True) + "\n")
    return place


def load_evaluation(folder: Path) -> Evaluation:
    """Reads what `save_evaluation` wrote.

    Raises:
        DataError: There is no result, it is damaged, or it is of another version.
    """
    place = folder / RESULT_NAME
    if not place.is_file():
        raise DataError(f"There is no {RESULT_NAME} in {folder}: run `sparsekd evaluate` first.")
    try:
        raw = json.loads(place.read_text(encoding="utf-8"))
        if raw["format_version"] != RESULT_VERSION:
            raise DataError(
                f"{place} has format version {raw['format_version']}, expected {RESULT_VERSION}: "
                "run `sparsekd evaluate` again."
            )
        return Evaluation(
            **{
                **raw,
                "models": [_model(item) for item in raw["models"]],
                "margin": None if raw["margin"] is None else Margin(**raw["margin"]),
                "breakdowns": [
                    Breakdown(
                        item["name"], item["title"], [Category(**entry) for entry in item["categories"]]
                    )
                    for item in raw["breakdowns"]
                ],
                "documents": Documents(**raw["documents"]),
                "worst_tokens": [WorstToken(**item) for item in raw["worst_tokens"]],
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} cannot be read ({error!r}): run `sparsekd evaluate` again.") from error


def _model(raw: dict[str, Any]) -> ModelResult:
    return ModelResult(
        **{
            **raw,
            "figures": {name: Figure(**item) for name, item in raw["figures"].items()},
            "reliability": [ReliabilityBin(**item) for item in raw["reliability"]],
        }
    )
