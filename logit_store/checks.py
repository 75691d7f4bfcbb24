"""What must hold of every row, checked when it is written and again when it is read.

Each plane names the rule of its numbers (`RULES`); what ties planes to one another follows below.

Shapes: L positions of a row, S segments, M recorded positions, k head entries, n draws, G grid temperatures,
V outcomes.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.vectors import LARGEST_VALUE
from sparsekd.logit_store.errors import InvalidRowError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import Plane, Planes, place_count, planes_of
from sparsekd.logit_store.positions import rule_of_split
from sparsekd.logit_store.row import (
    IGNORED_LABEL,
    NO_ID,
    PADDING_DOCUMENT,
    Row,
    labels_at_records,
    planes_of_row,
    row_of_planes,
    run_lengths,
)

LOGPROB_TOLERANCE = 1e-6
"""Nats by which a log-probability may rise along the head, or exceed 0: rounding of float32 logits."""

IMPOSSIBLE_LOGPROB = -80.0
"""At this (at temperatures below 1, at this over T) or above it lies the head's first entry or log R, at each
temperature of the grid; e^-80 is near the smallest normal float32."""

MASS_TOLERANCE = 5e-4
"""By how much probabilities of a position may sum to more than 1: rounding of float32 sums over a vocabulary,
and of log R to a half, which raises R by at most 1.8e-4."""

ENTROPY_TOLERANCE = 1e-3
"""Nats by which an entropy may leave [0, log V]: sums of float32 terms."""

_BLOCK_POSITIONS = 4096
"""Positions looked at together, which bounds what a check takes beside the row (0.51 ms a row of 4,096 at
k = 64; 0.57 in blocks of 1,024, 0.66 of 512)."""


@dataclass(frozen=True)
class _Look:
    """What a check looks at.

    Attributes:
        planes: arrays of the row.
        manifest: of its store.
        split: of the row.
        where: the row's place, which begins every message.
        short_heads: whether heads may end before k entries.
    """

    planes: Planes
    manifest: Manifest
    split: str
    where: str
    short_heads: bool


def check_row(row: Row, manifest: Manifest, *, split: str, where: str, short_heads: bool = False) -> None:
    """Raises InvalidRowError, naming `where`, position and value, when a row breaks a rule.

    Args:
        row: to be checked.
        manifest: of its store.
        split: of the row.
        where: the row's place, which begins the message.
        short_heads: whether heads may end before k entries, with -1.
    """
    if row.teacher is None and manifest.teacher is not None:
        raise InvalidRowError(f"{where} has no teacher record, but the manifest names a teacher.")
    if row.teacher is not None and manifest.teacher is None:
        raise InvalidRowError(f"{where} has a teacher record, but the manifest names no teacher.")
    planes = planes_of_row(row)
    declared = {plane.name for plane in planes_of(manifest)}
    # What is not stored may stand in a row with no width, and as the recorded positions of the rule.
    strangers = [name for name in planes if name not in declared and name != "recorded" and planes[name].size]
    if strangers:
        raise InvalidRowError(f"{where} has {', '.join(strangers)}, which the manifest does not declare.")
    check_planes(planes, manifest, split=split, where=where, short_heads=short_heads)


def check_planes(
    planes: Planes,
    manifest: Manifest,
    *,
    split: str,
    where: str,
    short_heads: bool = False,
    only: Collection[str] | None = None,
) -> None:
    """Like `check_row`, for the arrays of a row by name.

    Args:
        planes: arrays of the row.
        manifest: of its store.
        split: of the row.
        where: the row's place.
        short_heads: whether heads may end before k entries.
        only: names of the planes that were decoded; rules between planes that are not all among them are
            left out. None for a whole row.
    """
    look = _Look(planes, manifest, split, where, short_heads)
    for plane in planes_of(manifest):
        if plane.name in planes:
            _check_shape(plane, look)
            if planes[plane.name].size:
                RULES[plane.rule](plane, look)
        elif only is None or plane.name in only:
            raise InvalidRowError(f"{where} has no {plane.name}, which the manifest asks for.")
    there = planes.keys()
    if {"loss_mask", "segment_starts", "segment_documents"} <= there:
        _check_text(look)
    if "recorded" not in there or not place_count("recorded", planes, manifest):
        return
    if {"head_ids", "head_logprobs", "log_rest"} <= there and not (
        manifest.record.k and not short_heads and _head_is_plainly_right(look)
    ):
        _check_head(look)
        _check_mass(look)
    if "log_rest" in there and ("head_logprobs" in there or not manifest.record.k):
        _check_not_empty(look)
    if manifest.record.n and {"tail_ids", "tail_counts", "log_rest"} <= there:
        _check_tail(look)
        if manifest.record.k and "head_ids" in there:
            _check_distinct(look)
    if only is None:
        _check_unlabelled(look)


def _check_shape(plane: Plane, look: _Look) -> None:
    array = look.planes[plane.name]
    count = place_count(plane.stands, look.planes, look.manifest)
    shape = (count, *plane.width(look.manifest))
    if array.dtype != plane.dtype or array.shape != shape:
        raise InvalidRowError(
            f"{look.where}: {plane.name} is {array.dtype} {list(array.shape)}, expected "
            f"{np.dtype(plane.dtype)} {list(shape)}."
        )


# The rules of single planes


def _any(plane: Plane, look: _Look) -> None:
    """Every value is one."""


def _in_range(plane: Plane, look: _Look, low: float, high: float, expected: str) -> None:
    """Comparisons with NaN are false, so the test asks for what must hold."""
    values = look.planes[plane.name]
    lowest, highest = values.min(), values.max()
    if not (lowest >= low and highest <= high):
        _all_hold((values >= low) & (values <= high), plane.name, expected, look)


def _token(plane: Plane, look: _Look) -> None:
    last = look.manifest.tokenizer.vocabulary_size - 1
    _in_range(plane, look, 0, last, f"expected from 0 to {last}, the tokenizer's vocabulary")


def _head_id(plane: Plane, look: _Look) -> None:
    last = look.manifest.outcome_count - 1
    if look.short_heads:
        _in_range(plane, look, NO_ID, last, f"expected from 0 to {last}, or -1 at the end")
    else:
        _in_range(plane, look, 0, last, f"expected from 0 to {last}, the teacher's outcomes")


def _tail_id(plane: Plane, look: _Look) -> None:
    last = look.manifest.outcome_count - 1
    _in_range(plane, look, NO_ID, last, f"expected from 0 to {last}, or -1 at the end")


def _label(plane: Plane, look: _Look) -> None:
    last = look.manifest.outcome_count - 1
    _in_range(plane, look, NO_ID, last, f"expected from 0 to {last}, or -1 for none")


def _count(plane: Plane, look: _Look) -> None:
    _in_range(plane, look, 0, look.manifest.record.n, f"expected from 0 to {look.manifest.record.n}")


def _logprob(plane: Plane, look: _Look) -> None:
    values = look.planes[plane.name]
    if not values.max() <= LOGPROB_TOLERANCE:  # it is NaN where any value is
        _all_hold(values <= LOGPROB_TOLERANCE, plane.name, "expected 0 or below", look)


def _log_mass(plane: Plane, look: _Look) -> None:
    values = look.planes[plane.name]
    if not values.max() < np.inf:  # it is NaN where any value is
        _all_hold(values < np.inf, plane.name, "expected finite, or -inf", look)


def _entropy(plane: Plane, look: _Look) -> None:
    highest = math.log(look.manifest.outcome_count)
    _in_range(
        plane,
        look,
        -ENTROPY_TOLERANCE,
        highest + ENTROPY_TOLERANCE,
        f"expected from 0 to log V = {highest:.3f}",
    )


def _weight(plane: Plane, look: _Look) -> None:
    _in_range(plane, look, 0, float(np.finfo(np.float32).max), "expected a finite number, 0 or more")


def _vector(plane: Plane, look: _Look) -> None:
    _in_range(plane, look, -LARGEST_VALUE, LARGEST_VALUE, f"expected a number within {LARGEST_VALUE:g}")


def _document(plane: Plane, look: _Look) -> None:
    documents = look.planes[plane.name]
    bad = np.flatnonzero(documents < PADDING_DOCUMENT)
    if bad.size:
        raise InvalidRowError(
            f"{look.where}: segment {bad[0]} has document {documents[bad[0]]}, expected 0 or more, or -1 for "
            "padding."
        )


def _starts(plane: Plane, look: _Look) -> None:
    starts, length = look.planes[plane.name], look.manifest.sequence_length
    what = "segment" if plane.stands == "segment" else "run of weights"
    if starts[0] != 0:
        raise InvalidRowError(f"{look.where}: the first {what} starts at {starts[0]}, expected 0.")
    bad = np.flatnonzero(starts[1:] <= starts[:-1])
    if bad.size:
        raise InvalidRowError(
            f"{look.where}: {what} {bad[0] + 1} starts at {starts[bad[0] + 1]}, not after the one before it "
            f"at {starts[bad[0]]}."
        )
    if starts[-1] >= length:
        raise InvalidRowError(
            f"{look.where}: the last {what} starts at {starts[-1]}, beyond the {length} positions."
        )


RULES: dict[str, Callable[[Plane, _Look], None]] = {
    "any": _any,
    "token": _token,
    "starts": _starts,
    "document": _document,
    "weight": _weight,
    "label": _label,
    "head_id": _head_id,
    "tail_id": _tail_id,
    "count": _count,
    "logprob": _logprob,
    "log_mass": _log_mass,
    "entropy": _entropy,
    "vector": _vector,
}


# What ties planes of the text together


def _check_text(look: _Look) -> None:
    planes, target = look.planes, look.manifest.target
    mask, starts = planes["loss_mask"], planes["segment_starts"]
    if not starts.size:
        raise InvalidRowError(f"{look.where} has no segment, expected at least one.")
    lengths = run_lengths(starts, len(mask))
    real = np.repeat(planes["segment_documents"] != PADDING_DOCUMENT, lengths)
    is_last = np.zeros(len(mask), np.bool_)
    is_last[starts + lengths - 1] = True
    _nowhere(mask & ~real, "the loss mask is True at padding", look)
    if target == "next_token":
        what = "the loss mask is True at the last position of a document, which has no next token"
        _nowhere(mask & is_last, what, look)
    elif target == "class":
        what = "the loss mask is True inside a document, whose class stands at its last position"
        _nowhere(mask & ~is_last, what, look)
    if {"weights", "weight_starts"} <= planes.keys() and planes["weights"].size:
        weights = np.repeat(planes["weights"], run_lengths(planes["weight_starts"], len(mask)))
        _nowhere(mask & (weights == 0), "the loss mask is True where the weight is 0", look)
    if "recorded" in planes:
        _check_recorded(planes["recorded"], mask, real, look)


def _check_recorded(
    recorded: NDArray[np.bool_], mask: NDArray[np.bool_], real: NDArray[np.bool_], look: _Look
) -> None:
    """Checks where records stand against the manifest's rule."""
    rule = rule_of_split(look.manifest, look.split)
    _nowhere(recorded & ~real, "a record stands at padding", look)
    if rule != "all":
        what = f"a record stands where the loss does not count, against the rule {rule}"
        _nowhere(recorded & ~mask, what, look)
    if rule != "sampled":
        _nowhere(mask & ~recorded, f"no record stands where the loss counts, against the rule {rule}", look)


def _nowhere(broken: NDArray[np.bool_], what: str, look: _Look) -> None:
    """Raises for the first position of `broken` [L]."""
    if broken.any():
        raise InvalidRowError(f"{look.where}, position {int(broken.argmax())}: {what}.")


# What ties planes of the record together


def _head_is_plainly_right(look: _Look) -> bool:
    """Returns True where the rules of the head hold and nothing is unusual; False asks for a closer look.

    A closer look costs three times as much.
    """
    rest = _log_rest_at_one(look)
    all_ids, all_values = look.planes["head_ids"], look.planes["head_logprobs"]
    for start in range(0, len(all_ids), _BLOCK_POSITIONS):
        block = slice(start, start + _BLOCK_POSITIONS)
        ids, values = np.ascontiguousarray(all_ids[block]), np.ascontiguousarray(all_values[block])
        right = _to_the_one_before(np.equal, values)
        right &= _to_the_one_before(np.greater, ids)
        right |= _to_the_one_before(np.less, values)
        if not right.all():
            return False
        mass = np.einsum("ij->i", np.exp(values))
        if rest is not None:
            mass += np.exp(np.minimum(rest[block], 1))
        if not mass.max() <= 1 + MASS_TOLERANCE:
            return False
        if look.manifest.record.n == 0 and look.manifest.record.k > 1:
            ascending = np.sort(ids, axis=1).reshape(-1)
            if (ascending[1:] == ascending[:-1]).any():
                return False
    return True


def _to_the_one_before(compare: np.ufunc, array: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns how each entry of [M, E] compares to the one before it in its position; True for the first.

    All entries are passed over at once, blind to where positions begin: in short runs numpy takes longer.
    """
    flat = array.reshape(-1)
    found = np.empty(flat.shape, np.bool_)
    compare(flat[1:], flat[:-1], out=found[1:])
    found[:: array.shape[1]] = True
    return found.reshape(array.shape)


def _log_rest_at_one(look: _Look) -> NDArray[np.float32] | None:
    """Returns log R at temperature 1, [M], or None where 1 is not on the grid."""
    grid = look.manifest.record.temperatures
    return look.planes["log_rest"][:, grid.index(1.0)] if 1.0 in grid else None


def _check_head(look: _Look) -> None:
    ids, values = look.planes["head_ids"], look.planes["head_logprobs"]
    if not ids.size:
        return
    unused = ids == NO_ID
    if unused.any():
        behind = unused[:, 1:] | ~unused[:, :-1]
        _all_hold(behind, "head_ids", "expected -1 behind a -1", look, shift=1)
        masked = ~unused | np.isneginf(values)
        _all_hold(masked, "head_logprobs", "expected -inf where the id is -1", look)
    before, after = values[:, :-1], values[:, 1:]
    descending = after <= before + np.float32(LOGPROB_TOLERANCE)
    _all_hold(descending, "head_logprobs", "above the entry before it, expected descending", look, shift=1)
    in_order = (after != before) | (ids[:, 1:] > ids[:, :-1]) | unused[:, 1:]
    _all_hold(in_order, "head_ids", "expected ascending among equal values", look, shift=1)
    _check_distinct(look)


def _check_tail(look: _Look) -> None:
    ids, counts, spec = look.planes["tail_ids"], look.planes["tail_counts"], look.manifest.record
    unused = ids == NO_ID
    # Read without sign, -1 is above every id, so that one comparison also finds an id behind a -1.
    ascending = _to_the_one_before(np.greater, ids.view(np.uint32)) | unused
    _all_hold(ascending, "tail_ids", "expected ascending ids, then only -1", look)
    matching = (counts > 0) != unused
    _all_hold(matching, "tail_counts", "expected above 0 where there is an id, else 0", look)
    total = np.einsum("ij->i", counts, dtype=np.int64, casting="safe")
    empty = np.isneginf(look.planes["log_rest"][:, spec.temperatures.index(spec.draw_temperature)])
    expected = np.where(empty, 0, spec.n)
    bad = np.flatnonzero(total != expected)
    if bad.size:
        rest = "empty" if empty[bad[0]] else "not empty"
        raise InvalidRowError(
            f"{look.where}, position {_position(bad[0], look)}: tail_counts sum to {total[bad[0]]}, expected "
            f"{expected[bad[0]]}, because the rest is {rest}."
        )
    if spec.tail_logprobs and "tail_logprobs" in look.planes:
        masked = ~unused | np.isneginf(look.planes["tail_logprobs"])
        _all_hold(masked, "tail_logprobs", "expected -inf where there is no id", look)


def _check_distinct(look: _Look) -> None:
    parts = [look.planes[name] for name in ("head_ids", "tail_ids") if name in look.planes]
    together = np.concatenate(parts, axis=1)
    together.sort(axis=1)
    flat = together.reshape(-1)
    # Blind to where positions begin, and so fast; a closer look tells.
    suspect = flat[1:] == flat[:-1]
    suspect &= flat[1:] != NO_ID
    if not suspect.any():
        return
    twice = (together[:, 1:] == together[:, :-1]) & (together[:, 1:] != NO_ID)
    if twice.any():
        record, column = np.argwhere(twice)[0]
        raise InvalidRowError(
            f"{look.where}, position {_position(record, look)}: head_ids and tail_ids hold "
            f"{together[record, column + 1]} twice."
        )


def _check_mass(look: _Look) -> None:
    # float32 sums of up to a few thousand terms in [0, 1] are good to about 1e-6, far below the tolerance.
    mass = np.exp(look.planes["head_logprobs"]).sum(axis=1)
    rest = _log_rest_at_one(look)
    if rest is not None:
        with np.errstate(over="ignore"):
            mass = mass + np.exp(rest)
    bad = np.flatnonzero(~(mass <= 1 + MASS_TOLERANCE))
    if bad.size:
        raise InvalidRowError(
            f"{look.where}, position {_position(bad[0], look)}: the probabilities of head and rest sum to "
            f"{mass[bad[0]]}, expected at most 1."
        )


def _check_not_empty(look: _Look) -> None:
    """Checks that something is possible at each temperature, since every loss divides by what is.

    Where probabilities sum to 1, the likeliest of V outcomes has at least -log V, far above the limit.
    """
    most = look.planes["log_rest"]
    temperatures = np.asarray(look.manifest.record.temperatures, np.float32)
    lowest = IMPOSSIBLE_LOGPROB / np.minimum(temperatures, 1)
    if look.manifest.record.k:
        first = look.planes["head_logprobs"][:, 0]
        if first.min() >= IMPOSSIBLE_LOGPROB:  # then it is far enough up at every temperature
            return
        most = np.maximum(most, first[:, None] / temperatures)
    bad = np.flatnonzero((most < lowest).any(axis=1))
    if bad.size:
        column = int((most[bad[0]] < lowest).argmax())
        raise InvalidRowError(
            f"{look.where}, position {_position(bad[0], look)}: nothing is possible at temperature "
            f"{temperatures[column]:g}: neither head nor rest reach a log-probability of {lowest[column]:g}."
        )


def _check_unlabelled(look: _Look) -> None:
    """Checks that a record that speaks of no label has none's log-probability."""
    if not look.manifest.has_labels and rule_of_split(look.manifest, look.split) != "all":
        return  # counted positions have a next token
    true = look.planes["true_logprob"]
    labels = labels_at_records(row_of_planes(look.planes), look.manifest.target)
    bad = np.flatnonzero((labels == IGNORED_LABEL) & (true != 0))
    if bad.size:
        raise InvalidRowError(
            f"{look.where}, position {_position(bad[0], look)}: true_logprob is {true[bad[0]]}, expected 0, "
            "because the position has no label."
        )


def _position(record: int, look: _Look) -> int:
    """Returns the position in the row of a record."""
    return int(np.flatnonzero(look.planes["recorded"])[record])


def _all_hold(holds: NDArray[np.bool_], name: str, rule: str, look: _Look, shift: int = 0) -> None:
    """Raises for the first False of `holds`, which is along the first axis of a plane.

    Args:
        holds: [M] or [M, columns], or along another set of places.
        name: of the plane.
        rule: what was expected.
        look: what is looked at.
        shift: of the columns of `holds` against those of the plane.
    """
    if holds.all():
        return
    place = np.argwhere(~holds)[0]
    column = f"[{place[1] + shift}]" if len(place) > 1 else ""
    value = look.planes[name][(place[0], *(place[1:] + shift))]
    stands = next(plane.stands for plane in planes_of(look.manifest) if plane.name == name)
    if stands == "recorded":
        at = f"position {_position(place[0], look)}"
    else:
        at = f"{'position' if stands == 'position' else stands + ' place'} {place[0]}"
    raise InvalidRowError(f"{look.where}, {at}: {name}{column} is {value}, {rule}.")
