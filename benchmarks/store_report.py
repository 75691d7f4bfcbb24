"""The store benchmark's results in Markdown: targets beside what was found, tables by data set, fidelity."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from store_data import TOP_K, Case
from store_fidelity import DenseTeacher, Fidelity, Student
from store_layouts import RAGGED_MASS
from store_measure import Measured, Result

DEFAULT, PLAIN, RAGGED = "tkq8 (default)", "plain", f"compact, ragged to {RAGGED_MASS}"

# Name, data set, contestant, bytes per token at most.
SIZES = (
    ("default, text-like ids", "text", DEFAULT, 157),
    ("default, nearly uniform ids", "uniform", DEFAULT, 182),
    ("plain", "text", PLAIN, 222),
    ("compact, ragged", "text", RAGGED, 102),
    ("hybrid", "text", "tkq8, k=8, n=24", 70),
    ("hybrid, half the draws", "text", "tkq8, k=8, n=12", 54),
    ("draws alone", "text", "tkq8, k=0, n=50", 36),
    ("hybrid, with log-probabilities", "text", "tkq8, k=8, n=24 with log-probabilities", 85),
    ("hybrid, half the draws, with them", "text", "tkq8, k=8, n=12 with log-probabilities", 64),
    ("draws alone, with them", "text", "tkq8, k=0, n=50 with log-probabilities", 48),
)
# Name, contestant, kind of time, million tokens per CPU second at least.
SPEEDS = (
    ("random row: read, check, decode, default", DEFAULT, "reads", 1.0),
    ("random row: read, check, decode, plain", PLAIN, "reads", 2.5),
    ("check, encode, write, default", DEFAULT, "writes", 0.5),
    ("check, encode, write, plain", PLAIN, "writes", 1.2),
)
KL_MOST = (2e-5, 6e-5, 1e-4)
"""Mean, 99.9th percentile and largest KL of the default codec, nats."""

KL_HOT_MOST = 3e-5
"""Mean at the other temperatures of the grid."""

TARGET_VOCABULARY, TARGET_LENGTH = 128_256, 4096


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
    header: Sequence[str],
    picture: str,
) -> str:
    """The whole page.

    Args:
        sets: the data sets.
        budgets: fidelity, by teacher.
        sizes: data set -> case -> bytes per token of the default codec.
        header: what the numbers were made with.
        picture: file name.
    """
    lines = ["# The logit store against other layouts", "", *header, "", f"![sizes]({picture})", ""]
    lines += _targets(sets)
    for measured in sets:
        lines += _data_set(measured)
    lines += _lacks(sets)
    lines += ["## What a record of (k, n) is worth", "", *FIDELITY_STORY, ""]
    for budget in budgets:
        lines += _budget(budget, sizes)
    return "\n".join(lines)


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


def _table(head: Sequence[str], left: int) -> list[str]:
    """Two lines that begin a table whose first `left` columns are words."""
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * left + " ---: |" * (len(head) - left)]


def _million(rate: float) -> str:
    return "" if np.isnan(rate) else f"{rate / 1e6:.2f}"


def _nats(value: float) -> str:
    if value == 0 or value >= 0.01:
        return f"{value:.2g}"
    return f"{value:.1e}".replace("e-0", "e-")


def _data_set(measured: Measured) -> list[str]:
    data, facts = measured.data, measured.facts
    bits = int(np.ceil(np.log2(data.vocabulary)))
    tokens, rows = measured.results[0].tokens, len(data.rows_of(TOP_K)[1])
    draws = ", ".join(f"{count:.1f} at {case}" for case, count in facts.distinct.items())
    lines = [
        f"## {data.name.capitalize()}: V = {data.vocabulary:,}",
        "",
        f"{data.story[0].upper()}{data.story[1:]}; {rows} rows of {data.length:,} positions in files of "
        f"{tokens // data.length}. Teacher's entropy **{facts.entropy:.2f} nats** (its loss "
        f"{facts.loss:.2f}, {facts.head_mass:.1%} of the mass in {TOP_K.k} ids), static entropy of an id "
        f"**{facts.id_bits:.1f} bits** of {bits}, distinct draws per position **{draws}**. The yardstick, "
        f"zlib's crc32, ran at {measured.yardstick / 1e9:.1f} GB/s.",
        "",
        *_table(
            (
                "layout", "bytes/token", "entropy, nats", "id bits", "distinct draws", "KL mean", "p99.9",
                "max", "T 2, 4", "head alone", "sum > 1", "ids exact", "write", "read", "encode", "decode",
                "row, ms",
            ),
            1,
        ),
    ]  # fmt: skip
    for result in measured.results:
        lines.append("| " + " | ".join(_cells(result, measured)) + " |")
    return [*lines, ""]


def _cells(result: Result, measured: Measured) -> Iterator[str]:
    facts, errors = measured.facts, result.errors
    distinct = {
        case.__class__(case.k, case.n, kept): count
        for case, count in facts.distinct.items()
        for kept in (False, True)
    }
    yield f"**{result.name}**" if result.is_ours else result.name
    yield f"{result.bytes_per_token:.1f}"
    yield f"{facts.entropy:.2f}"
    yield f"{facts.id_bits:.1f}"
    yield f"{distinct[result.case]:.1f}" if result.case in distinct else ""
    if errors.kl.size:
        yield _nats(errors.kl.mean())
        yield _nats(float(np.quantile(errors.kl, 0.999)))
        yield _nats(errors.kl.max())
        yield _nats(errors.kl_hot.mean()) if errors.kl_hot.size else "unknown"
        yield _nats(errors.kl_head.mean())
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
    lines = [
        f"### {budget.teacher.story[0].upper()}{budget.teacher.story[1:]}",
        "",
        f"{len(budget.teacher.hidden):,} positions; KL(teacher || student), nats: {known}.",
        "",
        *_table(head, 2),
    ]
    for (case, mode), found in by_record.items():
        one = found[middle]
        cells = [str(case), mode]
        cells += [f"{of_set[case]:.0f}" for of_set in sizes.values()]
        cells += [f"{found[name].angle:.1f}" for name in names]
        cells += [f"{found[name].norm:.3f}" for name in names]
        cells += [f"{one.bias:.3f}", f"{one.noise:.3f}", f"{one.target_kl:.3f}"]
        cells.append("0" if mode == "sampled" else f"{one.target_kl:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


Finding = tuple[str, str, bool]  # target, found, whether it is met


def _targets(sets: Sequence[Measured]) -> list[str]:
    """The targets with what was found; they speak of k = 64, V = 128,256 and rows of 4,096."""
    at_scale = {
        measured.data.name: measured
        for measured in sets
        if (measured.data.vocabulary, measured.data.length) == (TARGET_VOCABULARY, TARGET_LENGTH)
    }
    lines = ["## Targets", "", "| target | found | met |", "| --- | ---: | --- |"]
    findings = [*_sizes(at_scale), *_errors(at_scale), *_speeds(at_scale)]
    lines += [f"| {target} | {found} | {'yes' if met else 'no'} |" for target, found, met in findings]
    if not findings:
        lines.append(f"| none: they are for V = {TARGET_VOCABULARY:,}, rows of {TARGET_LENGTH:,} | | |")
    exact = all(result.errors.exact_ids for measured in sets for result in measured.results if result.is_ours)
    lines.append(f"| ids and counts bit-exact, every codec and data set | | {'yes' if exact else 'no'} |")
    return [*lines, ""]


def _sizes(at_scale: dict[str, Measured]) -> Iterator[Finding]:
    for target, name, contestant, most in SIZES:
        if name in at_scale:
            found = at_scale[name].result(contestant).bytes_per_token
            yield f"{target}: at most {most} bytes/token", f"{found:.1f}", found <= most


def _errors(at_scale: dict[str, Measured]) -> Iterator[Finding]:
    for name, measured in at_scale.items():
        errors = measured.result(DEFAULT).errors
        found = (errors.kl.mean(), float(np.quantile(errors.kl, 0.999)), errors.kl.max())
        bounds = " / ".join(_nats(bound) for bound in KL_MOST)
        met = all(value <= bound for value, bound in zip(found, KL_MOST, strict=True))
        yield (
            f"default, {name}: KL mean / p99.9 / max at most {bounds}",
            " / ".join(_nats(value) for value in found),
            met,
        )
        hot = errors.kl_hot.mean()
        yield (
            f"default, {name}: KL at T 2 and 4, mean, at most {_nats(KL_HOT_MOST)}",
            _nats(hot),
            hot <= KL_HOT_MOST,
        )


def _speeds(at_scale: dict[str, Measured]) -> Iterator[Finding]:
    if "text" not in at_scale:
        return
    for target, contestant, kind, least in SPEEDS:
        result = at_scale["text"].result(contestant)
        best = result.best_rate(kind) / 1e6
        found = result.rate(kind) / 1e6
        yield (
            f"{target}: at least {least} M tokens/s of one core",
            f"{found:.2f} (best round {best:.2f})",
            found >= least,
        )
