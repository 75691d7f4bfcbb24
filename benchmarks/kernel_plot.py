"""The kernel benchmark's picture: time over the floor's against peak memory, one panel per case."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kernel_measure import Result
from kernel_peers import FLOOR, OURS, TEACHER_PRODUCT
from kernel_report import GIB, table_title

COLUMNS = 4
MARKS = "osD^v<>PXhd8p"
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#555555")


def draw(results: Sequence[Result], path: Path, subtitle: str) -> None:
    """Write the picture, if there is anything to show.

    One legend serves all panels, so that no label can lie on another.
    """
    # Imported on use: the tests of the tables do without it.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [(result, floor) for result in results if (floor := result.row(FLOOR)) is not None]
    if not shown:
        return
    names = list(
        dict.fromkeys(
            row.name
            for result, _ in shown
            for row in result.rows
            if row.times and row.peak and row.name not in (FLOOR, TEACHER_PRODUCT)
        )
    )
    looks = {
        name: {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)], "s": 60}
        for number, name in enumerate(name for name in names if name != OURS)
    }
    looks[OURS] = {"color": "#d62728", "marker": "*", "s": 220}

    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.5 * rows + 1.6), squeeze=False)
    handles = {}
    for axis, (result, floor) in zip(axes.flat, shown, strict=False):
        points = []
        for row in result.rows:
            if row.name in looks and row.times and row.peak:
                points.append((row.median / floor.median, row.peak / GIB))
                handles[row.name] = axis.scatter(
                    *points[-1],
                    alpha=0.85,
                    linewidths=0.6,
                    edgecolors="white",
                    zorder=4 if row.name == OURS else 3,
                    **looks[row.name],
                )
        axis.axvline(1.0, color="#999999", linestyle="--", linewidth=1)
        _scale(axis.xaxis, axis.set_xscale, axis.set_xlim, [1.0, *(point[0] for point in points)])
        _scale(axis.yaxis, axis.set_yscale, axis.set_ylim, [point[1] for point in points])
        axis.tick_params(labelsize=8, which="both")
        axis.grid(True, which="both", color="#eeeeee", zorder=0)
        axis.set_title(table_title(result).replace(", ", "\n", 1), fontsize=9)
        axis.set_xlabel("time / floor", fontsize=9)
        axis.set_ylabel("peak memory, GiB", fontsize=9)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    order = [name for name in [OURS, *names] if name in handles]
    order = list(dict.fromkeys(order))
    figure.suptitle(f"Left and low is better; dashed: the floor. {subtitle}", fontsize=10)
    figure.legend(
        [handles[name] for name in order],
        order,
        loc="lower center",
        ncols=min(4, len(order)),
        fontsize=9,
        frameon=False,
    )
    bottom = (0.35 + 0.22 * math.ceil(len(order) / 4)) / (3.5 * rows + 1.6)
    figure.tight_layout(rect=(0, bottom, 1, 0.99))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _scale(
    axis: Any, set_scale: Callable[..., Any], set_limits: Callable[..., Any], values: list[float]
) -> None:
    """An axis with room around the values, in plain numbers: logarithmic where they span much."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = min(values), max(values)
    if high > 6 * low:
        set_scale("log")
        room = (high / low) ** 0.08
        set_limits(low / room, high * room)
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
    else:
        room = 0.1 * (high - low) or 0.1 * high
        set_limits(low - room, high + room)
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
