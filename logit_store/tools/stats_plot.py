"""The picture of `store stats`: four panels, written as a PNG. Matplotlib is imported when it is drawn."""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places.files import TEMPORARY_PREFIX, explained
from sparsekd.logit_store.tools.spread import Spread
from sparsekd.logit_store.tools.stats import SplitStats, StoreStats

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
INK, SOFT = "#222222", "#8a8a8a"
LOWEST_MASS = 1e-6
POINTS = 400
"""Points of a curve."""

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.9,
}


def plot_stats(stats: StoreStats, place: Path) -> None:
    """Draws a store's statistics; an older picture of that name is replaced by a whole new one.

    Args:
        stats: what `store_stats` found.
        place: of the picture, a name that ends in .png.

    Raises:
        StoreError: matplotlib is missing, there is nothing to draw, or the file cannot be written.
    """
    if place.suffix != ".png":
        raise StoreError(f"{place} does not end in .png, which is the one kind of picture that is drawn.")
    if not stats.splits:
        raise StoreError(f"{stats.store.path} is a token store: there is no teacher's record to draw.")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise StoreError(
            "matplotlib draws the picture and is not installed: pip install matplotlib, or leave --plot "
            "away; the text needs nothing more."
        ) from error
    split, shown = next(iter(stats.splits.items()))
    with matplotlib.rc_context(STYLE):
        spaces = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, hspace=0.06, wspace=0.04)
        figure = Figure(figsize=(11, 7.4), layout=spaces)
        FigureCanvasAgg(figure)
        ((mass, sure), (overlap, size)) = figure.subplots(2, 2)
        record = stats.store.manifest.record
        figure.suptitle(
            f"{stats.store.path.name}: k = {record.k}, n = {record.n}, codec "
            f"{stats.store.manifest.codec.name}; {shown.positions:,} positions of {split}",
            x=0.012,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        _mass_panel(mass, shown, record.temperatures)
        _sure_panel(sure, shown, record.draw_temperature)
        _overlap_panel(overlap, shown, record.k, record.n)
        _size_panel(size, stats)
        # Beside its place, then by one rename: never half a picture.
        temporary = place.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{place.name}")
        with explained(place):
            try:
                figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
                os.replace(temporary, place)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)


def _mass_panel(axes: Any, stats: SplitStats, temperatures: tuple[float, ...]) -> None:
    """Share of positions whose tail mass is at most x."""
    smallest = min(spread.percentile(1.0) for spread in stats.tail_mass)
    left = 10.0 ** np.floor(np.log10(min(max(smallest, LOWEST_MASS), 0.1)))
    points = np.logspace(np.log10(left), 0, POINTS)
    for number, (temperature, spread) in enumerate(zip(temperatures, stats.tail_mass, strict=True)):
        shares = spread.shares_below(points)
        shares[-1] = 1.0
        axes.plot(
            points,
            100 * shares,
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number % len(LINES)],
            label=f"T = {temperature:g} (mean {spread.mean:.3g})",
        )
    axes.set_xscale("log")
    axes.set_xlim(left, 1)
    axes.set_ylim(0, 101)
    axes.set_title("Mass outside the head")
    axes.set_xlabel("tail mass")
    axes.set_ylabel("positions with at most that, %")
    axes.legend(loc="upper left")


def _sure_panel(axes: Any, stats: SplitStats, draw_temperature: float) -> None:
    """Histograms of entropy and loss over one axis of nats."""
    top = max(stats.entropy.percentile(97.0), stats.teacher_nll.percentile(97.0))
    top = top if np.isfinite(top) and top > 0 else 1.0
    edges = np.linspace(0, top, 41)
    for number, (name, spread) in enumerate(
        [
            (f"teacher's entropy, T = {draw_temperature:g}", stats.entropy),
            ("teacher's loss on the true token", stats.teacher_nll),
        ]
    ):
        axes.stairs(
            100 * _histogram(spread, edges),
            edges,
            color=COLOURS[number],
            fill=number == 0,
            alpha=0.35 if number == 0 else 1.0,
            linewidth=1.9,
            label=f"{name} (mean {spread.mean:.3g})",
        )
    if not stats.entropy.count:
        axes.text(0.5, 0.5, "unknown: draws alone", ha="center", transform=axes.transAxes)
    axes.set_xlim(0, top)
    axes.set_ylim(0, 1.28 * axes.dataLim.ymax or 1.0)  # room for the legend
    axes.set_title("How sure the teacher was, and how right")
    axes.set_xlabel("nats")
    axes.set_ylabel("positions, %")
    axes.legend(loc="upper right")


def _overlap_panel(axes: Any, stats: SplitStats, k: int, n: int) -> None:
    """Histogram of the share of stored ids that the position before stores too."""
    edges = np.linspace(0, 1, 21)
    if stats.overlap.count:
        axes.stairs(
            100 * _histogram(stats.overlap, edges), 100 * edges, fill=True, color=COLOURS[2], alpha=0.6
        )
        mean = 100 * stats.overlap.mean
        axes.axvline(mean, color=INK, linewidth=1.2)
        right = mean < 60
        axes.annotate(
            f"mean {mean:.0f} %",
            (mean, 0.94),
            xycoords=("data", "axes fraction"),
            xytext=(6 if right else -6, 0),
            textcoords="offset points",
            ha="left" if right else "right",
        )
    else:
        axes.text(0.5, 0.5, "no position has one before it", ha="center", transform=axes.transAxes)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.15 * max(axes.dataLim.ymax, 1.0))  # room for the mean
    axes.set_title("Ids shared with the position before")
    stored = " and ".join(
        text for text in (f"{k} of the head" * (k > 0), f"up to {n} drawn" * (n > 0)) if text
    )
    axes.set_xlabel(f"share of the stored ids ({stored}), %")
    axes.set_ylabel("positions, %")


def _size_panel(axes: Any, stats: StoreStats) -> None:
    """Bytes per token of each plane, as bars."""
    indices = [stats.store.index(split) for split in stats.store.manifest.splits]
    tokens = max(sum(index.counts.tokens for index in indices), 1)
    whole = sum(index.file_bytes for index in indices)
    planes = {name: sum(index.plane_bytes[name] for index in indices) for name in indices[0].plane_bytes}
    planes["container"] = whole - sum(planes.values())
    names = sorted(planes, key=lambda name: planes[name])
    values = np.array([planes[name] / tokens for name in names])
    axes.barh(names, values, color=COLOURS[0], alpha=0.75, height=0.7)
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:.2f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center", size=9
        )
    axes.set_xlim(0, values.max() * 1.14)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.set_title(f"Bytes per token: {whole / tokens:.1f} in all")
    axes.set_xlabel("bytes per token")


def _histogram(spread: Spread, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the share of the values between neighbouring edges; the largest edge belongs to the last
    one."""
    below = spread.shares_below(np.append(edges[:-1], np.nextafter(edges[-1], np.inf) * 1.02))
    return np.diff(below)
