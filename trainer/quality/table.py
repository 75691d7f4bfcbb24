"""The result in words and as an aligned table, for the console and the page."""

from collections.abc import Sequence

from sparsekd.trainer.quality.result import EXACT, LOWER_BOUND, UPPER_BOUND, Evaluation, Figure, ModelResult
from sparsekd.trainer.run.console import size_text

# (key, heading, what it means) in the order of the table.
FIGURES = (
    ("loss", "loss", "nats per token; lower is better"),
    ("perplexity", "perplexity", "exp of the loss"),
    ("kl", "KL to teacher", "KL(teacher || model) in nats per token"),
    ("agreement", "agreement", "share of positions where the most likely token is the teacher's"),
    ("acceptance", "acceptance", "sum of min(p, q): how often a drafted token would be kept"),
    (
        "calibration_error",
        "calibration error",
        "gap between confidence and accuracy of the most likely token",
    ),
)
_FORMATS = {
    "loss": "{:.4f}",
    "perplexity": "{:.2f}",
    "kl": "{:.4f}",
    "agreement": "{:.1%}",
    "acceptance": "{:.1%}",
    "calibration_error": "{:.2%}",
}
_MARKS = {EXACT: "", LOWER_BOUND: ">= ", UPPER_BOUND: "<= "}
UNKNOWN = "-"


def figure_text(name: str, figure: Figure | None) -> str:
    """A figure with its mark: nothing for exact, ~ for an estimate, >= and <= for bounds."""
    if figure is None:
        return UNKNOWN
    return _MARKS.get(figure.kind, "~ ") + _FORMATS[name].format(figure.value)


def sizes_of(model: ModelResult) -> tuple[str, str, str]:
    """Parameters, bytes of the weights, and speed of a model, for people."""
    if model.parameters is None or model.weight_bytes is None or model.tokens_per_second is None:
        return UNKNOWN, UNKNOWN, UNKNOWN
    return (
        _count_text(model.parameters),
        size_text(model.weight_bytes),
        f"{model.tokens_per_second:,.0f}",
    )


def result_table(evaluation: Evaluation) -> str:
    """One line for each model, aligned, with a legend of the marks in use."""
    heading = ["model", *(title for _, title, _ in FIGURES), "parameters", "weights", "tokens/s"]
    lines = [heading]
    used = set()
    for model in evaluation.models:
        figures = [figure_text(name, model.figures.get(name)) for name, _, _ in FIGURES]
        used |= {figure.kind for figure in model.figures.values()}
        lines.append([model.name, *figures, *sizes_of(model)])
    legend = marks_legend(used)
    return "\n".join([*aligned(lines), *([legend] if legend else [])])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def marks_legend(kinds: set[str]) -> str:
    """What the marks say, for those in use; empty when every figure is exact."""
    parts = []
    if kinds - {EXACT, LOWER_BOUND, UPPER_BOUND}:
        parts.append("~ unbiased estimate from the stored draws")
    if LOWER_BOUND in kinds:
        parts.append(">= lower bound (what stands outside the head is known as one outcome)")
    if UPPER_BOUND in kinds:
        parts.append("<= upper bound (what stands outside the head is known as one outcome)")
    return "; ".join(parts) + ("; evaluate.teacher=load makes all exact" if parts else "")


def headline(evaluation: Evaluation) -> str:
    """The one sentence: who is ahead, by how much, how sure."""
    student = evaluation.model("student")
    baseline = evaluation.model("baseline")
    margin = evaluation.margin
    assert student is not None
    loss = student.figures["loss"].value
    if baseline is None or margin is None:
        return f"{student.name} has a held-out loss of {loss:.4f} nats per token."
    place = "ahead of" if margin.value >= 0 else "behind"
    sentence = f"{student.name} is {abs(margin.value):.4f} nats per token {place} {baseline.name}"
    if margin.low is None or margin.high is None:
        return f"{sentence} (one document only, so no interval)."
    low, high = sorted((abs(margin.low), abs(margin.high)))
    if margin.low <= 0 <= margin.high:
        sentence += (
            f", but the 95 % interval of the margin, {margin.low:+.4f} to {margin.high:+.4f}, holds 0: "
            "no difference is shown"
        )
    else:
        sentence += f" (95 % interval {low:.4f} to {high:.4f})"
    won = round(margin.wins * margin.documents)
    sentence += f"; it is better on {won} of {margin.documents} held-out documents"
    if evaluation.gap_closed is not None and margin.value > 0:
        teacher = evaluation.model("teacher")
        bound = teacher is not None and teacher.figures["loss"].kind == LOWER_BOUND
        sentence += (
            f", and closes {'at least ' if bound else ''}{evaluation.gap_closed:.0%} of {baseline.name}'s "
            "distance to the teacher"
        )
    return sentence + "."


def _count_text(value: float) -> str:
    for unit in ("", " k", " M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} B"
