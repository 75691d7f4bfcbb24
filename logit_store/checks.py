"""What must hold of every row, checked when it is written and again when it is read.

Shapes: L positions of a row, S segments, k head entries, n draws, G grid temperatures, V vocabulary.
"""

import math

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.frequency import mass_of
from sparsekd.logit_store.errors import InvalidRowError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import NO_ID, PADDING_DOCUMENT, Row, TeacherRecord

LOGPROB_TOLERANCE = 1e-6
"""Nats by which a log-probability may rise along the head, or exceed 0: rounding of float32 logits."""

MASS_TOLERANCE = 5e-4
"""By how much probabilities of a position may sum to more than 1: rounding of float32 sums over a vocabulary,
and of log R to a half, which raises R by at most 1.8e-4."""

ENTROPY_TOLERANCE = 1e-3
"""Nats by which an entropy may leave [0, log V]: sums of float32 terms."""

_BLOCK_POSITIONS = 4096
"""Positions looked at together, which bounds what a check takes beside the row (0.51 ms a row of 4,096 at
k = 64; 0.57 in blocks of 1,024, 0.66 of 512)."""


def check_row(row: Row, manifest: Manifest, *, mass_tolerance: float, where: str) -> None:
    """Raises InvalidRowError, naming `where`, position and value, when a row breaks a rule.

    Args:
        row: to be checked.
        manifest: of its store.
        mass_tolerance: by how much probabilities may sum to more than 1.
        where: the row's place, which begins the message.
    """
    length = manifest.sequence_length
    _shape(row.token_ids, np.int32, (length,), "token_ids", where)
    _shape(row.loss_mask, np.bool_, (length,), "loss_mask", where)
    segments = row.segment_starts.size
    _shape(row.segment_starts, np.int32, (segments,), "segment_starts", where)
    _shape(row.segment_documents, np.int64, (segments,), "segment_documents", where)
    _in_vocabulary(row.token_ids, manifest, "token_ids", where)
    lasts = _check_segments(row, where)
    if row.teacher is None:
        if manifest.teacher is not None:
            raise InvalidRowError(f"{where} has no teacher record, but the manifest names a teacher.")
        return
    if manifest.teacher is None:
        raise InvalidRowError(f"{where} has a teacher record, but the manifest names no teacher.")
    record = row.teacher
    spec = manifest.record
    grid = len(spec.temperatures)
    for name, dtype, shape in (
        ("head_ids", np.int32, (length, spec.k)),
        ("head_logprobs", np.float32, (length, spec.k)),
        ("tail_ids", np.int32, (length, spec.n)),
        ("tail_counts", np.int32, (length, spec.n)),
        ("log_rest", np.float32, (length, grid)),
        ("rest_entropy", np.float32, (length,)),
        ("true_logprob", np.float32, (length,)),
        ("entropy", np.float32, (length,)),
        ("tail_logprobs", np.float32, (length, spec.n if spec.tail_logprobs else 0)),
    ):
        _shape(getattr(record, name), dtype, shape, name, where)
    _all_hold(record.log_rest < np.inf, record.log_rest, "log_rest", "expected finite, or -inf", where)
    if not (spec.k and _head_is_plainly_right(record, manifest, mass_tolerance)):
        _check_head(record, manifest, where)
        _check_mass(record, manifest, mass_tolerance, where)
    if spec.n:
        _check_tail(record, manifest, where)
    if spec.n and spec.k:
        _check_distinct(record, where)
    _check_values(record, manifest, lasts, where)


def _head_is_plainly_right(record: TeacherRecord, manifest: Manifest, mass_tolerance: float) -> bool:
    """Returns True where the rules of the head hold and nothing is unusual; False asks for a closer look.

    A closer look costs three times as much. This one passes over all entries of a block of positions at once,
    blind to where positions begin.
    """
    entries, size = manifest.record.k, manifest.tokenizer.vocabulary_size
    rest = _log_rest_at_one(record, manifest)
    for start in range(0, len(record.head_ids), _BLOCK_POSITIONS):
        block = slice(start, start + _BLOCK_POSITIONS)
        ids = np.ascontiguousarray(record.head_ids[block])
        values = np.ascontiguousarray(record.head_logprobs[block])
        flat, flat_ids = values.reshape(-1), ids.reshape(-1)
        right = flat[1:] == flat[:-1]
        right &= flat_ids[1:] > flat_ids[:-1]
        right |= flat[1:] < flat[:-1]
        right[entries - 1 :: entries] = True
        if not (ids.min() >= 0 and ids.max() < size and values[:, 0].max() <= 0 and right.all()):
            return False
        mass = np.einsum("ij->i", np.exp(values))
        if rest is not None:
            mass += np.exp(np.minimum(rest[block], 1))
        if not mass.max() <= 1 + mass_tolerance:
            return False
        if manifest.record.n == 0 and entries > 1:
            ascending = np.sort(ids, axis=1).reshape(-1)
            if (ascending[1:] == ascending[:-1]).any():
                return False
    return True


def _log_rest_at_one(record: TeacherRecord, manifest: Manifest) -> NDArray[np.float32] | None:
    """Returns log R at temperature 1, [L], or None where 1 is not on the grid."""
    grid = manifest.record.temperatures
    return record.log_rest[:, grid.index(1.0)] if 1.0 in grid else None


def _check_segments(row: Row, where: str) -> NDArray[np.int64]:
    """Checks segments and loss mask; returns the last position of each segment, int64 [S]."""
    starts, documents = row.segment_starts, row.segment_documents
    length = len(row.token_ids)
    if starts.size == 0 or starts[0] != 0:
        raise InvalidRowError(f"{where}: the first segment starts at {starts[:1].tolist()}, expected 0.")
    bad = np.flatnonzero(starts[1:] <= starts[:-1])
    if bad.size:
        raise InvalidRowError(
            f"{where}: segment {bad[0] + 1} starts at {starts[bad[0] + 1]}, not after the one before it at "
            f"{starts[bad[0]]}."
        )
    if starts[-1] >= length:
        raise InvalidRowError(
            f"{where}: the last segment starts at {starts[-1]}, beyond the {length} positions."
        )
    bad = np.flatnonzero(documents < PADDING_DOCUMENT)
    if bad.size:
        raise InvalidRowError(
            f"{where}: segment {bad[0]} has document {documents[bad[0]]}, expected 0 or more, or -1 for "
            "padding."
        )
    lasts = np.append(starts[1:].astype(np.int64), length) - 1
    bad = np.flatnonzero(row.loss_mask[lasts])
    if bad.size:
        raise InvalidRowError(
            f"{where}, position {lasts[bad[0]]}: the loss mask is True at the last position of a document, "
            "which has no next token."
        )
    for segment in np.flatnonzero(documents == PADDING_DOCUMENT):
        inside = np.flatnonzero(row.loss_mask[starts[segment] : lasts[segment] + 1])
        if inside.size:
            raise InvalidRowError(
                f"{where}, position {starts[segment] + inside[0]}: the loss mask is True at padding."
            )
    return lasts


def _check_head(record: TeacherRecord, manifest: Manifest, where: str) -> None:
    ids, values = record.head_ids, record.head_logprobs
    if manifest.record.k == 0:
        return
    if mass_of(manifest) is not None and ids.min() < 0:
        _check_short_heads(ids, values, manifest, where)
    else:
        _in_vocabulary(ids, manifest, "head_ids", where)
    # Comparisons with NaN are false, so each test asks for what must hold.
    _all_hold(values[:, :1] <= LOGPROB_TOLERANCE, values, "head_logprobs", "expected 0 or below", where)
    before, after = values[:, :-1], values[:, 1:]
    descending = after <= before + np.float32(LOGPROB_TOLERANCE)
    _all_hold(
        descending, after, "head_logprobs", "above the entry before it, expected descending", where, shift=1
    )
    in_order = (after != before) | (ids[:, 1:] > ids[:, :-1]) | (ids[:, 1:] == NO_ID)
    _all_hold(in_order, ids[:, 1:], "head_ids", "expected ascending among equal values", where, shift=1)
    _check_distinct(record, where)


def _check_short_heads(
    ids: NDArray[np.int32], values: NDArray[np.float32], manifest: Manifest, where: str
) -> None:
    """Checks heads that may end with -1, of a codec that cuts them short."""
    size = manifest.tokenizer.vocabulary_size
    unused = ids == NO_ID
    inside = unused | ((ids >= 0) & (ids < size))
    _all_hold(inside, ids, "head_ids", f"expected from 0 to {size - 1}, or -1 at the end", where)
    _all_hold(
        unused[:, 1:] | ~unused[:, :-1], ids[:, 1:], "head_ids", "expected -1 behind a -1", where, shift=1
    )
    _all_hold(
        ~unused | np.isneginf(values), values, "head_logprobs", "expected -inf where the id is -1", where
    )


def _check_tail(record: TeacherRecord, manifest: Manifest, where: str) -> None:
    ids, counts = record.tail_ids, record.tail_counts
    spec = manifest.record
    size = manifest.tokenizer.vocabulary_size
    if ids.min() < NO_ID or ids.max() >= size:
        _all_hold((ids >= NO_ID) & (ids < size), ids, "tail_ids", f"expected below {size}, or -1", where)
    # Read without sign, -1 is above every id, so that one comparison also finds an id behind a -1.
    unsigned = ids.view(np.uint32)
    ascending = (unsigned[:, 1:] > unsigned[:, :-1]) | (ids[:, 1:] == NO_ID)
    _all_hold(ascending, ids[:, 1:], "tail_ids", "expected ascending ids, then only -1", where, shift=1)
    matching = (counts > 0) == (ids != NO_ID)
    _all_hold(matching, counts, "tail_counts", "expected above 0 where there is an id, else 0", where)
    if counts.min() < 0:
        _all_hold(counts >= 0, counts, "tail_counts", "expected 0 or more", where)
    total = counts.sum(axis=1, dtype=np.int64)
    empty = np.isneginf(record.log_rest[:, spec.temperatures.index(spec.draw_temperature)])
    expected = np.where(empty, 0, spec.n)
    bad = np.flatnonzero(total != expected)
    if bad.size:
        rest = "empty" if empty[bad[0]] else "not empty"
        raise InvalidRowError(
            f"{where}, position {bad[0]}: tail_counts sum to {total[bad[0]]}, expected {expected[bad[0]]}, "
            f"because the rest is {rest}."
        )

    if spec.tail_logprobs:
        unused = ids == NO_ID
        _all_hold(
            np.where(unused, np.isneginf(record.tail_logprobs), record.tail_logprobs <= LOGPROB_TOLERANCE),
            record.tail_logprobs,
            "tail_logprobs",
            "expected 0 or below, and -inf where there is no id",
            where,
        )


def _check_distinct(record: TeacherRecord, where: str) -> None:
    together = np.concatenate([record.head_ids, record.tail_ids], axis=1)
    together.sort(axis=1)
    flat = together.reshape(-1)
    # Blind to where positions begin, and so fast; a closer look tells.
    if not (flat[1:] == flat[:-1]).any():
        return
    twice = (together[:, 1:] == together[:, :-1]) & (together[:, 1:] != NO_ID)
    _all_hold(~twice, together[:, 1:], "head_ids and tail_ids", "the id is there twice", where)


def _check_mass(record: TeacherRecord, manifest: Manifest, mass_tolerance: float, where: str) -> None:
    # float32 sums of up to a few thousand terms in [0, 1] are good to about 1e-6, far below the tolerance.
    mass = np.exp(record.head_logprobs).sum(axis=1)
    rest = _log_rest_at_one(record, manifest)
    if rest is not None:
        with np.errstate(over="ignore"):
            mass = mass + np.exp(rest)
    _all_hold(mass <= 1 + mass_tolerance, mass, "probability of head and rest", "expected at most 1", where)


def _check_values(record: TeacherRecord, manifest: Manifest, lasts: NDArray[np.int64], where: str) -> None:
    true = record.true_logprob
    _all_hold(true <= LOGPROB_TOLERANCE, true, "true_logprob", "expected 0 or below", where)
    bad = lasts[true[lasts] != 0]
    if bad.size:
        raise InvalidRowError(
            f"{where}, position {bad[0]}: true_logprob is {true[bad[0]]}, expected 0, because no token "
            "follows in the document."
        )
    highest = math.log(manifest.tokenizer.vocabulary_size)
    for name in ("rest_entropy", "entropy"):
        value = getattr(record, name)
        inside = (value >= -ENTROPY_TOLERANCE) & (value <= highest + ENTROPY_TOLERANCE)
        _all_hold(inside, value, name, f"expected from 0 to log V = {highest:.3f}", where)


def _shape(array: NDArray[np.generic], dtype: type, shape: tuple[int, ...], name: str, where: str) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise InvalidRowError(
            f"{where}: {name} is {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} {list(shape)}."
        )


def _in_vocabulary(ids: NDArray[np.int32], manifest: Manifest, name: str, where: str) -> None:
    size = manifest.tokenizer.vocabulary_size
    if ids.min() < 0 or ids.max() >= size:
        expected = f"expected from 0 to {size - 1}, the tokenizer's vocabulary"
        _all_hold((ids >= 0) & (ids < size), ids, name, expected, where)


def _all_hold(
    holds: NDArray[np.bool_], values: NDArray[np.generic], name: str, rule: str, where: str, shift: int = 0
) -> None:
    """Raises for the first False of `holds` [L] or [L, columns]; `shift` is added to the named column."""
    if holds.all():
        return
    place = np.argwhere(~holds)[0]
    column = f"[{place[1] + shift}]" if len(place) > 1 else ""
    raise InvalidRowError(f"{where}, position {place[0]}: {name}{column} is {values[tuple(place)]}, {rule}.")
