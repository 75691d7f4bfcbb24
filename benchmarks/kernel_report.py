"""The kernel benchmark's results in Markdown: tables by equal work, and the targets beside what was found."""

from collections.abc import Sequence

from kernel_cases import DRAWS, TABLES
from kernel_measure import Result, Row
from kernel_peers import FLOOR, OURS
from page import table

GIB = 2**30
NUMBERS = {
    "A": ("error dH", "error dW"),
    "B": ("error dH", "error dW"),
    "C": ("error dH", "error dW"),
    "D": ("error head", "error log R"),
}
LESSONS = {
    "A": "All rows compute the same loss: forward KL over the K head entries and one bucket for the rest, "
    "half and half with cross-entropy; `ours, CE alone` is the same code with kd_weight 0.",
    "B": "All rows compute the mean cross-entropy.",
    "C": "The live peers read the teacher's hidden states and make one product more than the floor has; "
    "their second line takes off its time as measured in the same rounds. They compute the dense forward KL, "
    "ours the one over head and rest; each error is against its own loss.",
    "D": f"Ours makes the whole record of the store: head, log R at T 1, 2 and 4, {DRAWS} draws, entropies, "
    "the true token's log-probability. `eager, less` makes less: topk, logsumexp and multinomial.",
}


def markdown(results: Sequence[Result], header: Sequence[str], left_out: Sequence[str], picture: str) -> str:
    """The whole page."""
    lines = ["# The loss kernel against its floor and its peers", "", *header, ""]
    lines += [f"![time against memory]({picture})", ""] if results else []
    lines += _targets(results)
    for letter, story in TABLES.items():
        of_table = [result for result in results if result.setting.table == letter]
        if not of_table:
            continue
        lines += [f"## {letter}. {story[0].upper()}{story[1:]}", "", LESSONS[letter], ""]
        for result in of_table:
            lines += _case(result)
    if left_out:
        lines += ["## Left out: the time budget was used up", "", *(f"- {title}" for title in left_out), ""]
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.3g} MiB"


def _case(result: Result) -> list[str]:
    """The table of one case."""
    setting, floor, ours = result.setting, result.row(FLOOR), result.row(OURS)
    lines = [f"### {table_title(result)}", ""]
    if floor is not None:
        products = 1 if setting.table == "D" else 3
        work = 2 * products * setting.positions * setting.vocabulary * setting.hidden
        rate = work / floor.median / 1e9
        pace = f"{rate:.0f} TFLOP/s" if rate >= 10 else f"{rate:.2g} TFLOP/s"
        clocks = f"; clocks and temperature after the rounds: {result.clocks}" if result.clocks else ""
        lines += [f"The floor runs at {pace}{clocks}.", ""]
    names = NUMBERS[setting.table]
    head = ["contestant", "median ms", "p20 to p80", "/ floor", "/ ours", "peak memory", *names, "note"]
    rows = []
    for row in result.rows:
        rows.append(_cells(row, floor, ours))
        second = subtracted(row, result)
        if second is not None:
            cells = [f"{row.name}, less {row.subtract}", f"{second:.4g}", ""]
            cells += [_ratio(second, floor), _ratio(second, ours), "", "", "", "a difference of two medians"]
            rows.append(cells)
    if setting.dtype_name != "float32":
        for truth, once in result.rounding.items():
            for how, errors in (
                ("rounded once", once),
                ("also dlogits rounded", result.rounding_inside[truth]),
            ):
                cells = [f"exact {truth}, {how}", *[""] * 5, *(f"{error:.2g}" for error in errors)]
                rows.append([*cells, "no timing"])
    return [*lines, *table(head, rows, words=(0, len(head) - 1))]


def table_title(result: Result) -> str:
    """A case in a heading."""
    return f"{result.setting.table}: {result.setting.title}"


def subtracted(row: Row, result: Result) -> float | None:
    """The median less that of the row named in `subtract`."""
    other = result.row(row.subtract) if row.subtract else None
    return row.median - other.median if other is not None and row.times else None


def _ratio(time: float, other: Row | None) -> str:
    return "" if other is None else f"{time / other.median:.2f}"


def _cells(row: Row, floor: Row | None, ours: Row | None) -> list[str]:
    if not row.times:
        return [row.name, *[""] * 7, row.reason or "not run"]
    errors = [f"{error:.2g}" for error in row.errors] or ["", ""]
    return [
        f"**{row.name}**" if row.name == OURS else row.name,
        f"{row.median:.4g}",
        f"{row.quantile(0.2):.4g} to {row.quantile(0.8):.4g}",
        _ratio(row.median, floor),
        _ratio(row.median, ours),
        "" if row.peak is None else size(row.peak),
        *errors,
        row.note,
    ]


def _targets(results: Sequence[Result]) -> list[str]:
    """The targets, each with what was found where it applies."""
    rows: list[list[str]] = []
    for target, find in TARGETS.items():
        found = [line for result in results for line in find(result)]
        rows += [[target, case, value, "yes" if met else "no"] for case, value, met in found]
        if not found:
            rows.append([target, "none in this run", "", ""])
    return ["## Targets", "", *table(("target", "case", "found", "met"), rows, words=range(4))]


Finding = tuple[str, str, bool]  # case, value, whether the target is met


def _near_floor(hidden: int, most: float, result: Result) -> list[Finding]:
    setting, floor, ours = result.setting, result.row(FLOOR), result.row(OURS)
    if setting.table != "A" or setting.hidden != hidden or floor is None or ours is None:
        return []
    ratio = ours.median / floor.median
    return [(setting.title, f"{ratio:.3f}", ratio <= most)]


def _kd_for_free(result: Result) -> list[Finding]:
    ours, alone = result.row(OURS), result.row("ours, CE alone")
    if result.setting.table != "A" or ours is None or alone is None:
        return []
    ratio = ours.median / alone.median
    return [(result.setting.title, f"{100 * (ratio - 1):+.1f} %", ratio <= 1.02)]


def _peak_memory(result: Result) -> list[Finding]:
    setting, ours = result.setting, result.row(OURS)
    if setting.table != "A" or setting.shape != "8192 x 128256 x 4096" or ours is None or ours.peak is None:
        return []
    return [(setting.title, size(ours.peak), ours.peak <= 3.1 * GIB)]


def _beside_eager(result: Result) -> list[Finding]:
    setting, ours = result.setting, result.row(OURS)
    if setting.table != "A" or setting.vocabulary < 32000 or ours is None or ours.peak is None:
        return []
    found = []
    for name in ("eager, scattered p", "eager, gathered q"):
        eager = result.row(name)
        if eager is not None and eager.peak:
            time, memory = ours.median / eager.median, ours.peak / eager.peak
            found.append(
                (
                    f"{setting.title}, {name}",
                    f"time {time:.2f}, memory {memory:.2f}",
                    time <= 1 and memory < 1,
                )
            )
    return found


def _rounding(inside: bool, result: Result) -> list[Finding]:
    setting, ours = result.setting, result.row(OURS)
    limits = (result.rounding_inside if inside else result.rounding).get("kd_ce")
    if (
        setting.table != "A"
        or setting.dtype_name != "bfloat16"
        or ours is None
        or not ours.errors
        or not limits
    ):
        return []
    ratios = [error / limit for error, limit in zip(ours.errors, limits, strict=True)]
    return [(setting.title, f"dH {ratios[0]:.2f}, dW {ratios[1]:.2f}", max(ratios) <= 1.2)]


def _record_near_floor(result: Result) -> list[Finding]:
    floor, ours = result.row(FLOOR), result.row(OURS)
    at_scale = result.setting.table == "D" and result.setting.shape == "8192 x 128256 x 4096"
    if not at_scale or floor is None or ours is None:
        return []
    ratio = ours.median / floor.median
    return [(result.setting.title, f"{ratio:.2f}", ratio <= 1.5)]


TARGETS = {
    "H = 4096: at most 1.12 of the three products": lambda result: _near_floor(4096, 1.12, result),
    "H = 2048: at most 1.22 of the three products": lambda result: _near_floor(2048, 1.22, result),
    "distillation within 2 % of cross-entropy alone": _kd_for_free,
    "8192 x 128256 x 4096: peak at most 3.1 GiB": _peak_memory,
    "V >= 32000: not slower than eager, less memory": _beside_eager,
    "bfloat16 gradient: error at most 1.2 of an exact one rounded once": lambda result: _rounding(
        False, result
    ),
    "the same, where the logits' gradient is rounded too": lambda result: _rounding(True, result),
    "8192 x 128256 x 4096: teacher's record at most 1.5 of its one product": _record_near_floor,
}
