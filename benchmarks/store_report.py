"""The store benchmark's page: targets, a table for each data set, fidelity of records."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from page import table
from store_data import TOP_K, Case
from store_errors import nats
from store_fidelity import DenseTeacher, Fidelity, Student
from store_measure import Measured, Result


@dataclass(frozen=True)
class Budget:
    """Fidelity on one teacher, with the bytes of each case on each data set."""

    teacher: DenseTeacher
    students: Sequence[Student]
    found: Sequence[Fidelity]


def markdown(
    sets: Sequence[Measured],
    budgets: Sequence[Budget],
    sizes: dict[str, dict[Case, float]],
    targets: Sequence[str],
    header: Sequence[str],
    picture: str,
) -> str:
    """The whole page.

    Args:
        sets: the data sets.
        budgets: fidelity, by teacher.
        sizes: data set -> case -> bytes per token of the default codec.
        targets: their table.
        header: what the numbers were made with.
        picture: file name.
    """
    lines = ["# The logit store against other layouts", "", *header, "", f"![sizes]({picture})", ""]
    lines += ["## Targets", "", *targets]
    for measured in sets:
        lines += _data_set(measured)
    lines += _lacks(sets)
    lines += ["## What a record of (k, n) is worth", "", *FIDELITY_STORY, ""]
    for budget in budgets:
        lines += _budget(budget, sizes)
    return "\n".join(lines)


COLUMNS = (
    "layout", "bytes/token", "distinct draws", "KL mean", "p99.9", "max", "T 2, 4",
    "head alone", "sum > 1", "ids exact", "write", "read", "encode", "decode", "row, ms",
)  # fmt: skip
FIDELITY_STORY = (
    "Full distillation has the teacher's whole distribution p as its target. Below: the gradient of a linear "
    "map in front of the head (logits z = W A x + b, gradient in A), as a mean over one batch, for each "
    "record and three students: two whose map is the teacher's with noise, and a blank one (A = 0).",
    "",
    "- angle (degrees) and norm: against full distillation's gradient.",
    "- bias, noise: what of the difference stays when draws are averaged away, and what draws add (root mean "
    "square), both over the full gradient's norm, at the student in the middle. Noise falls with the square "
    "root of the batch; bias never does.",
    "- KL: nats of the target that the record stands for from the full teacher, KL(target || p), mean over "
    "positions: of one record, and of the mean of all records that could have been drawn. The target of "
    "`tail_bucket` is p on the head, and the rest's mass in the student's own shape (the divergence over "
    "head and one bucket has that gradient); of `sampled`: p on the head, and the rest's mass on the draws; "
    "of `renormalized`: p on the head, brought to sum 1 like the student's.",
    "- bytes: the default codec, everything included.",
)


def _million(rate: float) -> str:
    return "" if np.isnan(rate) else f"{rate / 1e6:.2f}"


def _data_set(measured: Measured) -> list[str]:
    data, facts = measured.data, measured.facts
    bits = int(np.ceil(np.log2(data.vocabulary)))
    tokens, rows = measured.results[0].tokens, len(data.rows_of(TOP_K)[1])
    draws = ", ".join(f"{count:.1f} at {case}" for case, count in facts.distinct.items())
    return [
        f"## {data.name.capitalize()}: V = {data.vocabulary:,}",
        "",
        f"{data.story[0].upper()}{data.story[1:]}; {rows} rows of {data.length:,} positions in files of "
        f"{tokens // data.length}. Teacher's entropy **{facts.entropy:.2f} nats** (its loss "
        f"{facts.loss:.2f}, {facts.head_mass:.1%} of the mass in {TOP_K.k} ids), static entropy of an id "
        f"**{facts.id_bits:.1f} bits** of {bits}, distinct draws per position **{draws}**. The yardstick, "
        f"zlib's crc32, ran at {measured.yardstick / 1e9:.1f} GB/s.",
        "",
        *table(COLUMNS, (list(_cells(result, measured)) for result in measured.results), words=[0]),
    ]


def _cells(result: Result, measured: Measured) -> Iterator[str]:
    facts, errors = measured.facts, result.errors
    drawn = replace(result.case, tail_logprobs=False)
    yield f"**{result.name}**" if result.is_ours else result.name
    yield f"{result.bytes_per_token:.1f}"
    yield f"{facts.distinct[drawn]:.1f}" if drawn in facts.distinct else ""
    if errors.kl.size:
        yield nats(errors.kl.mean())
        yield nats(float(np.quantile(errors.kl, 0.999)))
        yield nats(errors.kl.max())
        yield nats(errors.kl_hot.mean()) if errors.kl_hot.size else "unknown"
        yield nats(errors.kl_head.mean())
        yield f"{errors.overfull:.1%}"
    else:
        yield from ("no head", "", "", "", "", "")
    yield "yes" if errors.exact_ids else "**no**"
    for kind in ("writes", "reads", "encodes", "decodes"):
        yield _million(result.rate(kind))
    latencies = sorted(result.latencies)
    yield f"{1e3 * statistics.median(latencies):.1f} ({1e3 * latencies[int(0.95 * len(latencies))]:.1f})"


def _lacks(sets: Sequence[Measured]) -> list[str]:
    lines = ["## What the layouts do not carry", ""]
    for result in sets[0].results:
        if not result.is_ours:
            lines.append(f"- {result.name}: {result.lacks}.")
    return [
        *lines,
        "- sparsekd's codecs: nothing of the record is left out. Token ids, loss mask, document boundaries, "
        "log R at three temperatures, both entropies, the true token's log-probability, the checksums of "
        "rows and planes and the commit record are in every size above.",
        "",
    ]


def _budget(budget: Budget, sizes: dict[str, dict[Case, float]]) -> list[str]:
    names = [student.name for student in budget.students]
    middle = names[len(names) // 2]
    by_record: dict[tuple[Case, str], dict[str, Fidelity]] = {}
    for found in budget.found:
        by_record.setdefault((found.case, found.mode), {})[found.student] = found
    known = ", ".join(f"{student.name} is {student.kl:.2f}" for student in budget.students)
    head = ["record", "target"]
    head += [f"bytes, {name}" for name in sizes]
    head += [f"angle, {name}" for name in names] + [f"norm, {name}" for name in names]
    head += ["bias", "noise", "KL, one record", "KL, their mean"]
    rows = []
    for (case, mode), of_student in by_record.items():
        one = of_student[middle]
        cells = [str(case), mode]
        cells += [f"{of_set[case]:.0f}" for of_set in sizes.values()]
        cells += [f"{of_student[name].angle:.1f}" for name in names]
        cells += [f"{of_student[name].norm:.3f}" for name in names]
        cells += [f"{one.bias:.3f}", f"{one.noise:.3f}", f"{one.target_kl:.3f}"]
        rows.append([*cells, "0" if mode == "sampled" else f"{one.target_kl:.3f}"])
    return [
        f"### {budget.teacher.story[0].upper()}{budget.teacher.story[1:]}",
        "",
        f"{len(budget.teacher.hidden):,} positions; KL(teacher || student), nats: {known}.",
        "",
        *table(head, rows, words=(0, 1)),
    ]
