"""What must hold of every row, checked when it is written and again when it is read.

Shapes: L positions of a row, S segments, k head entries, n draws, G grid temperatures, V vocabulary.
"""

import math

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import InvalidRowError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import NO_ID, PADDING_DOCUMENT, Row, TeacherRecord

LOGPROB_TOLERANCE = 1e-6
"""Nats by which a log-probability may rise along the head, or exceed 0: rounding of float32 logits."""

ENTROPY_TOLERANCE = 1e-3
"""Nats by which an entropy may leave [0, log V]: sums of float32 terms."""


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
    ):
        _shape(getattr(record, name), dtype, shape, name, where)
    _check_head(record, manifest, where)
    _check_tail(record, manifest, where)
    _check_distinct(record, where)
    _check_values(record, manifest, lasts, mass_tolerance, where)


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
    _in_vocabulary(ids, manifest, "head_ids", where)
    # Comparisons with NaN are false, so each test asks for what must hold.
    _all_hold(values[:, :1] <= LOGPROB_TOLERANCE, values, "head_logprobs", "expected 0 or below", where)
    before, after = values[:, :-1], values[:, 1:]
    descending = after <= before + np.float32(LOGPROB_TOLERANCE)
    _all_hold(
        descending, after, "head_logprobs", "above the entry before it, expected descending", where, shift=1
    )
    tied = after == before
    if tied.any():
        in_order = ~tied | (ids[:, 1:] > ids[:, :-1])
        _all_hold(in_order, ids[:, 1:], "head_ids", "expected ascending among equal values", where, shift=1)


def _check_tail(record: TeacherRecord, manifest: Manifest, where: str) -> None:
    ids, counts = record.tail_ids, record.tail_counts
    spec = manifest.record
    if spec.n == 0:
        return
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


def _check_distinct(record: TeacherRecord, where: str) -> None:
    parts = [part for part in (record.head_ids, record.tail_ids) if part.shape[1]]
    together = np.sort(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1), axis=1)
    twice = together[:, 1:] == together[:, :-1]
    if record.tail_ids.size:
        twice &= together[:, 1:] != NO_ID
    _all_hold(~twice, together[:, 1:], "head_ids and tail_ids", "the id is there twice", where)


def _check_values(
    record: TeacherRecord, manifest: Manifest, lasts: NDArray[np.int64], mass_tolerance: float, where: str
) -> None:
    spec = manifest.record
    _all_hold(record.log_rest < np.inf, record.log_rest, "log_rest", "expected finite, or -inf", where)
    # float32 sums of up to a few thousand terms in [0, 1] are good to about 1e-6, far below the tolerance.
    mass = np.exp(record.head_logprobs).sum(axis=1)
    if 1.0 in spec.temperatures:
        mass = mass + np.exp(record.log_rest[:, spec.temperatures.index(1.0)])
    _all_hold(mass <= 1 + mass_tolerance, mass, "probability of head and rest", "expected at most 1", where)
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
