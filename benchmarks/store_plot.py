"""The store benchmark's picture: above, size against error of each layout; below, size of a record against
the angle of its gradient."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from store_data import DRAWN, TOP_K, Case
from store_fidelity import Fidelity
from store_measure import Measured
from store_report import Budget

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vXP"
OURS = "#D62728"
EXACT_PLACE = 1e-8
"""Where an error of 0 is drawn on a logarithmic axis."""

KINDS = {
    "head and draws (sampled)": (OURS, "*"),
    "draws alone (sampled)": (COLOURS[0], "o"),
    "head and bucket (tail_bucket)": (COLOURS[2], "s"),
    "head alone (renormalized)": (COLOURS[6], "X"),
}
BESIDE = {  # where a label stands: of our codecs in the upper panels, of records in the lower ones
    "tkq8 (default)": (-3, 9, "left"),
    "plain": (8, -3, "left"),
    "compact": (-2, -15, "center"),
    "compact, ragged": (-3, 9, "right"),
    "fp16": (9, -2, "left"),
    "exact": (0, 10, "center"),
    "k=8, n=24": (4, -16, "center"),
    "k=8, n=12": (-2, 9, "center"),
    "above": (4, 6, "left"),
    "below": (-4, -11, "right"),
}
LEAST_ANGLE = 0.06
ANGLES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def draw(
    sets: Sequence[Measured],
    budgets: Sequence[Budget],
    sizes: dict[str, dict[Case, float]],
    path: Path,
    note: str,
) -> None:
    """Writes the picture."""
    # Imported on use: the tables do without it.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = max(len(sets), *(len(budget.students) for budget in budgets))
    rows = 1 + len(budgets)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.9 * columns, 4.7 * rows), squeeze=False)
    for axis in axes.flat:
        axis.grid(True, color="#ececec", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    handles: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for axis, measured in zip(axes[0], sets, strict=False):
        handles |= _sizes(axis, measured)
    axes[0][0].set_ylabel("mean KL of decoded head and rest, nats", fontsize=9)
    unused = list(axes[0][len(sets) :])
    highest = max(found.angle for budget in budgets for found in budget.found)
    for line, budget, size_set in zip(axes[1:], budgets, sizes, strict=True):
        for axis, student in zip(line, budget.students, strict=False):
            chosen = [found for found in budget.found if found.student == student.name]
            kinds |= _angles(axis, chosen, sizes[size_set], highest)
            axis.set_title(
                f"{budget.teacher.name} teacher, student {student.kl:.2f} nats from it"
                + (" (blank)" if student.name == "blank" else ""),
                fontsize=10,
                loc="left",
            )
            axis.set_xlabel(f"bytes per token, default codec, {size_set} ids", fontsize=9)
        line[0].set_ylabel("angle to full distillation's gradient, degrees", fontsize=9)
        unused.extend(line[len(budget.students) :])
    for axis in unused:
        axis.set_axis_off()
    figure.suptitle(f"Left and low is better. {note}", fontsize=11, x=0.012, ha="left")
    height = 4.7 * rows
    figure.tight_layout(rect=(0, 0.45 / height, 1, 1 - 0.1 / height), h_pad=4.6)
    legend: dict[str, Any] = {"loc": "upper center", "fontsize": 9, "frameon": False}
    middle = axes[0][0].get_position().y0 - 0.36 / height
    figure.legend(list(handles.values()), list(handles), bbox_to_anchor=(0.5, middle), ncols=4, **legend)
    figure.legend(list(kinds.values()), list(kinds), bbox_to_anchor=(0.5, 0.42 / height), ncols=4, **legend)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _sizes(axis: Any, measured: Measured) -> dict[str, Any]:
    """Size against error; ours with their names beside them, so that one colour is enough for them."""
    handles, number = {}, 0
    for result in measured.results:
        if not result.errors.kl.size:
            continue
        at = (result.bytes_per_token, max(result.errors.kl.mean(), EXACT_PLACE))
        if result.is_ours:
            # The same errors: with more bytes or fewer, or read in part.
            if result.case not in (TOP_K, *DRAWN) or "planes of" in result.name:
                continue
            handles["sparsekd"] = axis.scatter(
                *at, s=130, marker="*", color=OURS, zorder=4, edgecolors="white", linewidths=0.6
            )
            _label(axis, result.name.replace("tkq8, ", "").removesuffix(" to 0.99"), at)
        else:
            look = {"marker": MARKS[number % len(MARKS)], "color": COLOURS[number % len(COLOURS)]}
            # Arrow, Parquet and Megatron-LM have the same values: their errors are equal.
            handles[result.name] = axis.scatter(
                *at, s=52, zorder=3, edgecolors="white", linewidths=0.6, **look
            )
            number += 1
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(30, 700)
    axis.set_ylim(EXACT_PLACE / 3, 1)
    ticks = [50, 75, 100, 150, 200, 300, 500]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    places = [10.0**power for power in range(-8, 1, 2)]
    axis.set_yticks(places, ["0", *(f"$10^{{{power}}}$" for power in range(-6, 1, 2))])
    axis.set_yticks([], minor=True)
    axis.set_title(
        f"{measured.data.name}: V = {measured.data.vocabulary:,}, {measured.facts.id_bits:.1f} bits an id, "
        f"{measured.facts.entropy:.2f} nats",
        fontsize=10,
        loc="left",
    )
    axis.set_xlabel("bytes per token, everything included", fontsize=9)
    return handles


def _label(axis: Any, text: str, at: tuple[float, float], place: str | None = None) -> None:
    right, up, side = BESIDE.get(place or text, BESIDE["above"])
    axis.annotate(
        text, at, xytext=(right, up), textcoords="offset points", ha=side, fontsize=7.5, color="#333333"
    )


def _angles(axis: Any, found: Sequence[Fidelity], sizes: dict[Case, float], highest: float) -> dict[str, Any]:
    """Size of a record against the angle of its gradient; a line joins records of one kind."""
    handles, places_of = {}, _label_places(found, sizes)
    for kind, (colour, mark) in KINDS.items():
        chosen = sorted((one for one in found if _kind(one) == kind), key=lambda one: sizes[one.case])
        places = [(sizes[one.case], max(one.angle, LEAST_ANGLE)) for one in chosen]
        axis.plot(*zip(*places, strict=True), color=colour, linewidth=1, alpha=0.45, zorder=2)
        handles[kind] = axis.scatter(
            *zip(*places, strict=True),
            s=110 if mark == "*" else 46,
            marker=mark,
            color=colour,
            zorder=3,
            edgecolors="white",
            linewidths=0.6,
        )
        for one, at in zip(chosen, places, strict=True):
            if one.case.k and one.case.n:
                _label(axis, f"{one.case.k}, {one.case.n}", at, places_of[kind])
            elif one in (chosen[0], chosen[-1]):  # those between follow from the line
                name = f"k={one.case.k}" if one.case.k else f"n={one.case.n}"
                _label(axis, name, at, places_of[kind])
    axis.set_yscale("log")
    axis.set_ylim(LEAST_ANGLE / 1.2, highest * 1.8)
    axis.set_yticks(ANGLES, [f"{angle:g}" for angle in ANGLES])
    axis.set_yticks([], minor=True)
    axis.set_xlim(0, max(sizes.values()) * 1.12)
    return handles


def _label_places(found: Sequence[Fidelity], sizes: dict[Case, float]) -> dict[str, str]:
    """Which side of its line each kind's labels stand on: away from the line that is near."""
    hybrid, drawn, bucket, alone = KINDS
    lines = {
        kind: sorted((sizes[one.case], one.angle) for one in found if _kind(one) == kind) for kind in KINDS
    }
    buckets, hybrids = np.array(lines[bucket]).T, np.array(lines[hybrid]).T
    higher = float(np.mean(np.log(hybrids[1]) - np.interp(hybrids[0], buckets[0], np.log(buckets[1])))) > 0
    far = buckets[1].min() > 2 * hybrids[1].max()  # only the line of draws alone is near, from below
    return {
        hybrid: "above" if higher or far else "below",
        bucket: "below" if higher else "above",
        drawn: "below",
        alone: "above",
    }


def _kind(one: Fidelity) -> str:
    names = list(KINDS)
    if one.mode == "sampled":
        return names[0] if one.case.k else names[1]
    return names[2] if one.mode == "tail_bucket" else names[3]
