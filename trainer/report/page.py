"""The report's page as text, from what `evaluate` found: a template, plots, and the numbers between them.

The one module that needs jinja2 and matplotlib, which `pip install 'sparsekd[eval]'` brings.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sparsekd.trainer.quality.result import Evaluation, ModelResult
from sparsekd.trainer.quality.table import (
    FIGURES,
    figure_text,
    headline,
    marks_legend,
    sizes_of,
)
from sparsekd.trainer.report import figures
from sparsekd.trainer.report.continuations import Continuation
from sparsekd.trainer.report.curves import (
    Curve,
    differing_settings,
    read_curve,
    run_settings,
    run_versions,
)

# Differences that say nothing: where a run lies and what it is called.
_PLACES = ("run.name", "run.root", "store.tokens", "launch.", "tracking.", "report.", "evaluate.", "export.")
# Of a label in the strip of losses, per cent of the strip.
_LABEL_WIDTH = 15.0


@dataclass(frozen=True)
class Plot:
    """A figure of the page and the sentence that says what to see."""

    svg: Markup
    caption: str


def render(evaluation: Evaluation, runs: dict[str, Path], samples: list[Continuation], *, title: str) -> str:
    """The page as text.

    Args:
        evaluation: What `evaluate` found.
        runs: Name -> run folder whose curves are drawn.
        samples: Continuations, may be empty.
        title: Heading of the page.
    """
    template = resources.files("sparsekd.trainer.report").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    roles = {model.name: model.role for model in evaluation.models}
    curves = [read_curve(name, roles.get(name, "other"), path) for name, path in runs.items()]
    used = {figure.kind for model in evaluation.models for figure in model.figures.values()}
    return environment.from_string(template).render(
        title=title,
        headline=headline(evaluation),
        evaluation=evaluation,
        student=evaluation.model("student"),
        baseline=evaluation.model("baseline"),
        scale=_scale(evaluation),
        columns=FIGURES,
        figure_text=figure_text,
        sizes_of=sizes_of,
        best=_best(evaluation.models),
        legend=marks_legend(used),
        curves=_curves_plot(curves),
        calibration=_calibration_plot(evaluation),
        documents=_documents_plot(evaluation),
        breakdowns=[
            (item, Plot(Markup(figures.breakdown_bars(item, evaluation.models)), _breakdown_caption(item)))
            for item in evaluation.breakdowns
        ],
        samples=samples,
        roles=roles,
        run_facts=_run_facts(runs),
        differences=_differences(runs),
        percent=percent,
        visible=visible,
    )


def _scale(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Where each model's loss lies between the best and the worst, for the strip below the headline."""
    losses = [(model.figures["loss"].value, model) for model in evaluation.models]
    low, high = min(loss for loss, _ in losses), max(loss for loss, _ in losses)
    span = (high - low) or 1.0
    losses.sort(key=lambda pair: pair[0])
    places = [100 * (loss - low) / span for loss, _ in losses]
    return [
        {"name": model.name, "role": model.role, "loss": loss, "place": place, "label": label}
        for (loss, model), place, label in zip(losses, places, apart(places), strict=True)
    ]


def apart(places: list[float]) -> list[float]:
    """Places of labels, per cent, ascending: as near to their marks as a readable distance allows."""
    labels = list(places)
    for index in range(1, len(labels)):
        labels[index] = max(labels[index], labels[index - 1] + _LABEL_WIDTH)
    limit = 100.0
    for index in reversed(range(len(labels))):
        labels[index] = min(labels[index], limit)
        limit = labels[index] - _LABEL_WIDTH
    return labels


def _best(models: Iterable[ModelResult]) -> dict[str, str]:
    """The model with the best value of each figure, the teacher left out."""
    found = {}
    for name, _, _ in FIGURES:
        higher_is_better = name in ("agreement", "acceptance")
        values = [
            (model.figures[name].value, model.name)
            for model in models
            if model.role != "teacher" and name in model.figures
        ]
        if len(values) > 1:
            found[name] = (max if higher_is_better else min)(values)[1]
    return found


def _curves_plot(curves: list[Curve]) -> Plot | None:
    if not any(curve.train_tokens for curve in curves):
        return None
    caption = (
        "Cross-entropy with the true tokens while training: lines on training rows, marks on held-out rows. "
        "Lower is better; the curve that stays below uses its tokens better. The steep beginning is cut off."
    )
    return Plot(Markup(figures.loss_curves(curves)), caption)


def _calibration_plot(evaluation: Evaluation) -> Plot | None:
    models = [model for model in evaluation.models if model.reliability]
    if not models:
        return None
    caption = (
        "Points on the diagonal are honest: a confidence of 60 % is right six times in ten. Below it a model "
        "is too sure, above it too timid. The area of a mark is its share of the positions."
    )
    return Plot(Markup(figures.calibration(models)), caption)


def _documents_plot(evaluation: Evaluation) -> Plot | None:
    student, baseline = evaluation.model("student"), evaluation.model("baseline")
    if student is None or baseline is None or evaluation.margin is None:
        return None
    caption = (
        f"How far {student.name} is ahead of {baseline.name} in each held-out document. Right of 0 it is "
        "better. The band around the dashed mean is its 95 % interval; the outermost bars hold all beyond."
    )
    svg = figures.document_margins(
        evaluation.documents, evaluation.margin, student=student.name, baseline=baseline.name
    )
    return Plot(Markup(svg), caption)


def _breakdown_caption(breakdown: Any) -> str:
    if breakdown.name == "entropy":
        return (
            "Each group of bars is a tenth of the held-out positions, from those where the teacher is sure "
            "(left) to those where it is not. High bars on the left: easy tokens are not learned yet; on the "
            "right: the shape of the teacher's doubt is not."
        )
    return (
        "The same by how much of the document a model has seen. Bars that grow to the right: the student "
        "makes less of long context than the teacher."
    )


def _run_facts(runs: dict[str, Path]) -> list[tuple[str, str]]:
    return [
        (name, ", ".join(f"{package} {version}" for package, version in run_versions(folder).items()))
        for name, folder in runs.items()
    ]


def _differences(runs: dict[str, Path]) -> list[tuple[str, dict[str, Any]]]:
    settings = {name: run_settings(folder) for name, folder in runs.items()}
    if len(settings) < 2:
        return []
    return [
        (key, values)
        for key, values in differing_settings(settings)
        if not any(key == place or (place.endswith(".") and key.startswith(place)) for place in _PLACES)
    ]


def visible(token: str) -> str:
    """A token whose white space can be seen where it is nothing else, or ends in line breaks."""
    shown = token.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return shown if shown.strip() else shown.replace(" ", "\u2423") or "(nothing)"


def percent(probability: float) -> str:
    """A probability for the list of worst tokens: per cent, or a power of ten where that would be 0.0 %."""
    if probability >= 0.001:
        return f"{probability:.1%}"
    return "0" if probability <= 0 else f"1e{math.floor(math.log10(probability))}"
