"""The report's plots as inline SVG whose colours the page sets, so that they read in light and in dark.

Matplotlib draws with stand-in colours; each is replaced by a CSS variable. Models are told apart by colour
and by line style or hatching (colours: Okabe and Ito's colour-blind safe palette, in the page).
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sparsekd.trainer.quality.result import Breakdown, Documents, Margin, ModelResult
from sparsekd.trainer.report.curves import Curve

_INK, _GRID, _PAGE = "#0a0b0c", "#0d0e0f", "#101112"
# Role -> (stand-in colour, CSS variable, line style, marker).
_ROLES = {
    "teacher": ("#1a0001", "--teacher", (0, (1, 1.5)), "^"),
    "student": ("#1a0002", "--student", "-", "o"),
    "baseline": ("#1a0003", "--baseline", (0, (5, 2)), "s"),
    "other": ("#1a0004", "--other", (0, (5, 2, 1, 2)), "D"),
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "axes.unicode_minus": False,
}


def loss_curves(curves: Sequence[Curve]) -> str:
    """Cross-entropy of each run against tokens: training as a line, held out as points."""
    with _plot("curves", height=3.4) as (figure, axes, svg):
        held = [curve for curve in curves if curve.heldout_tokens]
        for curve in curves:
            colour, _, style, marker = _ROLES[curve.role]
            axes.plot(
                curve.train_tokens,
                curve.train_loss,
                color=colour,
                linestyle=style,
                alpha=0.55 if held else 1.0,
                linewidth=1.3,
                label=f"{curve.name}, training",
            )
            if curve.heldout_tokens:
                axes.plot(
                    curve.heldout_tokens,
                    curve.heldout_loss,
                    color=colour,
                    linestyle=style,
                    marker=marker,
                    markersize=5,
                    label=f"{curve.name}, held out",
                )
        axes.set_xlabel("tokens seen")
        axes.set_ylabel("cross-entropy, nats per token")
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        _zoom_on_the_end(axes, curves)
        axes.legend(loc="upper right")
        figure.set_layout_engine("constrained")
    return svg()


def calibration(models: Sequence[ModelResult]) -> str:
    """Accuracy against confidence, with the diagonal of perfect calibration."""
    with _plot("calibration", width=4.6, height=4.2) as (figure, axes, svg):
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, label="perfectly calibrated")
        for model in models:
            colour, _, style, marker = _ROLES[model.role]
            bins = [item for item in model.reliability if item.count]
            total = sum(item.count for item in bins)
            axes.plot(
                [item.confidence for item in bins],
                [item.accuracy for item in bins],
                color=colour,
                linestyle=style,
                linewidth=1.2,
                label=model.name,
            )
            axes.scatter(
                [item.confidence for item in bins],
                [item.accuracy for item in bins],
                s=[8 + 240 * item.count / total for item in bins],
                color=colour,
                marker=marker,
                alpha=0.75,
                linewidths=0,
                clip_on=False,
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.set_xlabel("confidence in the most likely token")
        axes.set_ylabel("how often it is the true token")
        axes.legend(loc="upper left")
        figure.set_layout_engine("constrained")
    return svg()


def document_margins(documents: Documents, margin: Margin, *, student: str, baseline: str) -> str:
    """Histogram of baseline - student over documents, each weighted by its tokens."""
    tokens = np.array(documents.tokens, dtype=float)
    values = (np.array(documents.nats[baseline]) - np.array(documents.nats[student])) / tokens
    with _plot("documents", width=4.6, height=4.2) as (figure, axes, svg):
        # Short documents have wild means; the middle 98 % of tokens says what is typical.
        low, high = _weighted_range(values, tokens)
        edges = np.linspace(min(low, 0.0), max(high, 0.0), 31)
        clipped = np.clip(values, edges[0], edges[-1])
        behind = clipped < 0
        for part, role in ((~behind, "student"), (behind, "baseline")):
            colour = _ROLES[role][0]
            axes.hist(clipped[part], bins=edges, weights=tokens[part] / tokens.sum(), color=colour, alpha=0.8)
        axes.axvline(0, color=_INK, linewidth=0.9)
        if margin.low is not None and margin.high is not None:
            axes.axvspan(margin.low, margin.high, color=_INK, alpha=0.18, linewidth=0)
        axes.axvline(margin.value, color=_INK, linewidth=1.4, linestyle=(0, (4, 2)))
        axes.annotate(
            f"mean {margin.value:+.3f}",
            (margin.value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, -10),
            textcoords="offset points",
        )
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(f"margin of {student} in a document, nats per token")
        axes.set_ylabel("share of held-out tokens")
        figure.set_layout_engine("constrained")
    return svg()


def breakdown_bars(breakdown: Breakdown, models: Sequence[ModelResult]) -> str:
    """Mean loss above the teacher's (plain loss where there is none) by category, a bar for each model."""
    teacher = next((model.name for model in models if model.role == "teacher"), None)
    shown = [model for model in models if model.role != "teacher"] if teacher else list(models)
    places = np.arange(len(breakdown.categories))
    width = 0.8 / max(len(shown), 1)
    with _plot(breakdown.name, height=3.2) as (figure, axes, svg):
        for index, model in enumerate(shown):
            colour = _ROLES[model.role][0]
            heights = [
                _above(category.losses[model.name], category.losses[teacher] if teacher else 0.0)
                for category in breakdown.categories
            ]
            axes.bar(
                places + (index - (len(shown) - 1) / 2) * width,
                heights,
                width * 0.92,
                color=colour,
                label=model.name,
                hatch="" if model.role == "student" else "///",
                edgecolor=_PAGE,
                linewidth=0,
            )
        axes.axhline(0, color=_INK, linewidth=0.8)
        axes.set_xticks(places, [category.label for category in breakdown.categories])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(breakdown.title)
        axes.set_ylabel("loss above the teacher's, nats" if teacher else "loss, nats per token")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(shown), borderaxespad=0.2)
        figure.set_layout_engine("constrained")
    return svg()


@contextmanager
def _plot(name: str, *, width: float = 9.4, height: float) -> Iterator[tuple]:
    """A figure, its axes, and a function that gives the SVG after the block."""
    style: Any = {**_STYLE, "svg.hashsalt": f"sparsekd-{name}", "svg.id": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        stream = io.StringIO()
        yield figure, axes, lambda: _inline(stream.getvalue(), name)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})


def _inline(text: str, name: str) -> str:
    """An SVG element for a page: no prologue, no metadata, no fixed size, colours as CSS variables."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    # Ids must differ between the figures of one page.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    colours = {_INK: "--ink", _GRID: "--grid", _PAGE: "--page"}
    colours |= {stand_in: variable for stand_in, variable, _, _ in _ROLES.values()}
    for stand_in, variable in colours.items():
        text = text.replace(stand_in, f"var({variable})")
    return text


def _zoom_on_the_end(axes: Axes, curves: Sequence[Curve]) -> None:
    """The first steps fall from log V and would flatten what matters: show what follows the first tenth."""
    later = []
    for curve in curves:
        last = max(curve.train_tokens, default=0)
        pairs = zip(curve.train_tokens, curve.train_loss, strict=True)
        later += [loss for tokens, loss in pairs if tokens >= last / 10]
        later += curve.heldout_loss
    if later:
        span = max(later) - min(later)
        axes.set_ylim(min(later) - 0.05 * span - 1e-3, max(later) + 0.05 * span + 1e-3)


def _weighted_range(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    low = values[order][int(np.searchsorted(share, 0.01))]
    high = values[order][min(int(np.searchsorted(share, 0.99)), len(values) - 1)]
    return float(low), float(high)


def _above(loss: float | None, floor: float | None) -> float:
    return float("nan") if loss is None or floor is None else loss - floor


def _short(value: float) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
