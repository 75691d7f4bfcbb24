"""What is wrong with records that a teacher does not confirm: named from numbers alone.

Records that somebody else captured differ from what the teacher says now in ways that have names. Each is an
explanation: where the records stand (at their position, one late, one early, or made with one more token in
front of each document), and what was done to their values (nothing; a constant added at each position, as
top-p, top-k and min-p do, which renormalise on a subset; a factor beside it, as another temperature does).
The simplest explanation that leaves little is the fault. Two more are looked for: values that are the
teacher's under other ids, and ids of the text itself that deviate alone, as penalties for repetition have it.

Shapes: N positions, K entries of a record.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

CLEAN = 0.1
"""Nats by which entries may deviate on average without a name for it: another dtype, other kernels, rounding.
Measured on SmolLM2-135M against float32, 636 positions of 3 to 20 entries: bfloat16 0.03 to 0.04, weights
rounded to 8 bits 0.07 to 0.08, to 4 bits 0.83, which is another teacher."""

FLOOR = 0.005
"""Less is not looked into."""

CLIPPED = 1.0
"""Larger deviations count as this many nats, so that a few wild ones do not hide what the many say."""

EXPLAINED = 0.5
"""Share of the deviation that a fault may leave unexplained. Rounding leaves 0.8 and more with any of them,
another position 0.66; a fault in records of bfloat16 leaves 0.04 of a shift, 0.37 of T = 1.05."""

NEARLY = 1.25
"""A simpler explanation is taken where it leaves at most so many times what the best one does, and 0.02."""

HIGHEST = 6.0
"""Temperatures beyond, or below its inverse, are no fault but a flat line through what has no relation."""

LEAST_ENTRIES = 3
"""Fewer entries of a position fit any constant and any factor."""

LEAST_POSITIONS = 20
"""Fewer say nothing."""

IMPROBABLE = 3.0
"""Nats a token by which the text is less probable to the teacher than its records say: other ids. Another
teacher of the same text is within one or two."""

ALIGNMENTS = {
    "here": "",
    "before": "stand one position late (they fit the position before)",
    "after": "stand one position early (they fit the position after)",
    "doubled": "were made with one more token in front of each document (a doubled beginning-of-text token)",
    "doubled_before": "stand one position late from the start of each document, which had one more token in "
    "front (a doubled beginning-of-text token)",
}
"""Where a record may stand, simplest first, in words."""


@dataclass(frozen=True)
class Evidence:
    """Stored entries beside what the teacher says of the same ids, log-probabilities at temperature 1.

    NaN where there is no entry, or no such position in the document.

    Attributes:
        stored: [N, K], of the records.
        here: [N, K], the teacher's, at the record's position.
        before: [N, K], at the position before.
        after: [N, K], at the position after.
        doubled: [N, K], at the record's position with one more token in front of the document.
        doubled_before: [N, K], the same at the position before, which may be that token.
        ranked: [N, K], the teacher's largest at the record's position, descending.
        seen: bool [N, K], the id is in the document, up to the record's position.
        true_stored: [N], of the next token, as the record has it.
        true_here: [N], of the next token, as the teacher has it.
        relative: the stored values have no normaliser: they sum to 1 over their list.
    """

    stored: Values
    here: Values
    before: Values
    after: Values
    doubled: Values
    doubled_before: Values
    ranked: Values
    seen: NDArray[np.bool_]
    true_stored: Values
    true_here: Values
    relative: bool = False


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        fault: what the records do, in words that follow "the records"; empty where nothing is wrong.
        deviation: nats by which an entry deviates on average, each at most `CLIPPED`; NaN without any.
        unexplained: what is left of that with the fault.
        known: whether the deviation has a name.
    """

    fault: str
    deviation: float
    unexplained: float
    known: bool


@dataclass(frozen=True)
class _Fit:
    """How far values are from an explanation.

    Attributes:
        misfit: nats, the mean of what is left, clipped.
        constant: nats, the mean over positions of what was added.
        factor: by which differences within a position were multiplied.
    """

    misfit: float
    constant: float = 0.0
    factor: float = 1.0


def judge(evidence: Evidence) -> Finding:
    """Returns what is wrong, the simplest explanation first."""
    fits = {
        (alignment, kind): fit
        for kind in ("as they are", "constant", "factor")
        for alignment in ALIGNMENTS
        if (fit := _fit(evidence, alignment, kind)) is not None
    }
    plain = fits.get(("here", "as they are"))
    if plain is None:
        return Finding("", math.nan, math.nan, known=False)
    deviation = plain.misfit
    if deviation <= FLOOR:
        return Finding("", deviation, deviation, known=True)
    named = [(_words(*which, fit), fit.misfit) for which, fit in fits.items()]
    named = [(said, misfit) for said, misfit in [*named, _other_ids(evidence), _penalty(evidence)] if said]
    best = min((misfit for _, misfit in named), default=math.inf)
    if best <= EXPLAINED * deviation:
        enough = min(NEARLY * best + 0.02, EXPLAINED * deviation)
        said, misfit = next((said, misfit) for said, misfit in named if misfit <= enough)
        return Finding(said, deviation, misfit, known=True)
    if deviation <= CLEAN:
        return Finding("", deviation, deviation, known=True)
    lower = float(np.nanmean(evidence.true_stored - evidence.true_here))
    if lower > IMPROBABLE:
        said = (
            f"speak of a text that is {lower:.1f} nats a token less probable to this teacher: the ids of the "
            "text are another tokenizer's, or another revision's"
        )
        return Finding(said, deviation, deviation, known=True)
    entries = evidence.stored.shape[1]
    few = f" ({entries} entries tell little)" if entries < LEAST_ENTRIES else ""
    return Finding(
        f"fit neither this teacher nor a fault that has a name{few}: another teacher, or another revision",
        deviation,
        deviation,
        known=False,
    )


def _fit(evidence: Evidence, alignment: str, kind: str) -> _Fit | None:
    """Returns how far the stored values are from the teacher's; None where too little can be compared."""
    stored, said = evidence.stored, getattr(evidence, alignment)
    both = np.isfinite(stored) & np.isfinite(said)
    some = both.sum(axis=1) >= (1 if kind == "as they are" and not evidence.relative else LEAST_ENTRIES)
    if some.sum() < LEAST_POSITIONS:
        return None
    stored, said, both = stored[some], said[some], both[some]
    if kind == "as they are":
        if evidence.relative:
            said = said - _log_sum(said, both)[:, None]
        return _Fit(_mean(stored - said, both))
    if evidence.relative and kind == "constant":  # which a list that sums to 1 says nothing of
        return None
    middle_stored, middle_said = _middle(stored, both), _middle(said, both)
    from_stored, from_said = stored - middle_stored[:, None], said - middle_said[:, None]
    factor = 1.0
    if kind == "factor":
        power = float((from_said[both] ** 2).sum())
        factor = float((from_stored[both] * from_said[both]).sum()) / power if power else 1.0
    # The sums of what is left are 0 at each position.
    left = from_stored - factor * from_said
    # Two numbers of K entries are used up, so that less is left of noise: it is made up for.
    entries = both.sum() / len(both)
    spare = math.sqrt(entries / (entries - 1))
    return _Fit(spare * _mean(left, both), float((middle_stored - factor * middle_said).mean()), factor)


def _words(alignment: str, kind: str, fit: _Fit) -> str:
    """Returns an explanation in words; empty where it is none."""
    where = ALIGNMENTS[alignment]
    if kind == "as they are":
        return where
    if kind == "constant":
        if fit.constant <= 0:
            return ""
        what = (
            f"are renormalised on a subset of the vocabulary, {math.exp(-fit.constant):.0%} of the mass, as "
            "top-p, top-k and min-p leave it (processed logits)"
        )
    elif 1 / HIGHEST < fit.factor < HIGHEST:
        what = f"are at another temperature, about {1 / fit.factor:.2f}"
    else:
        return ""
    return f"{where}, and {what}" if where else what


def _other_ids(evidence: Evidence) -> tuple[str, float]:
    """The stored values are the teacher's, entry by entry of the ranking, but of other ids."""
    stored = -np.sort(-np.where(np.isfinite(evidence.stored), evidence.stored, -np.inf), axis=1)
    ranked, both = evidence.ranked, np.isfinite(stored) & np.isfinite(evidence.ranked)
    if evidence.relative:
        ranked = ranked - _log_sum(ranked, both)[:, None]
    misfit = _mean(stored - ranked, both) if both.any() else math.inf
    # Rankings of different teachers are not far apart either: only equal values will do.
    if misfit > CLEAN:
        return "", math.inf
    return (
        "have the teacher's values under other ids: the ids are another tokenizer's, or another revision's",
        misfit,
    )


def _penalty(evidence: Evidence) -> tuple[str, float]:
    """Ids that the text has not had deviate by a constant of the position alone, the others do not."""
    both = np.isfinite(evidence.stored) & np.isfinite(evidence.here)
    fresh = both & ~evidence.seen
    some = fresh.sum(axis=1) >= LEAST_ENTRIES
    difference = (evidence.stored - evidence.here)[some]
    fresh, again = fresh[some], (both & evidence.seen)[some]
    if some.sum() < LEAST_POSITIONS or not again.any():
        return "", math.inf
    left = difference - _middle(difference, fresh)[:, None]
    misfit = _mean(left, fresh)
    lower = float(left[again].mean())
    if _mean(left, again) < max(2 * misfit, CLEAN):
        return "", math.inf
    return (
        f"have ids that the text has had {'lower' if lower < 0 else 'higher'} than the others, by "
        f"{abs(lower):.2g} nats: a penalty for repetition, presence or frequency (processed logits)",
        misfit,
    )


def _mean(left: Values, both: NDArray[np.bool_]) -> float:
    return float(np.minimum(np.abs(left[both]), CLIPPED).mean())


def _middle(values: Values, both: NDArray[np.bool_]) -> Values:
    """Returns the mean of the entries of each position, [N]."""
    return np.where(both, values, 0).sum(axis=1) / np.maximum(both.sum(axis=1), 1)


def _log_sum(values: Values, both: NDArray[np.bool_]) -> Values:
    """Returns the log of the sum of the entries' exponentials, [N]."""
    top = np.where(both, values, -np.inf).max(axis=1)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return top + np.log(np.where(both, np.exp(values - top[:, None]), 0).sum(axis=1))
