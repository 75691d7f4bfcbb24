"""Do records speak of the labels that belong to them? Found from a store alone, without a teacher.

Shapes: M recorded positions, k head entries, n draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import (
    IGNORED_LABEL,
    NO_ID,
    PADDING_DOCUMENT,
    RECORD_NAMES,
    Row,
    TeacherRecord,
    document_of_position,
    labels_at_records,
)

MIN_POSITIONS = 100
"""Fewer say nothing about alignment."""

LOGPROB_TOLERANCE = 0.05
"""Nats by which a true token's log-probability may differ between its two planes, beyond the errors that the
codec states; a shift makes it nats."""

INCONSISTENT_SHARE = 0.01
"""Share of positions beyond that tolerance that raises the alarm."""

BLOCK_RECORDS = 4096
"""Records that are compared at once, which bounds the arrays that it takes."""

STANDARD_ERRORS = 3.0
"""Distance of two shares that counts as a difference."""


@dataclass(frozen=True)
class AlignmentCheck:
    """Do the records speak of the tokens that follow them? Compared with the same records moved by one.

    Attributes:
        positions: compared; those with a record whose two neighbours are in the same document (for targets
            other than the next token: whose neighbouring records have labels).
        found: share of positions whose true token is among the stored ids.
        found_late: that share if the records stood one position too late (they would fit the token itself).
        found_early: that share if they stood one position too early (they would fit the token after next).
        mean_logprob: mean log-probability, in nats, of the true tokens that are in the head; NaN if none is.
        mean_logprob_shifted: the larger of the means that the two shifted copies give for head entries.
        inconsistent: share of positions where the true token's own plane contradicts the head.
    """

    positions: int
    found: float
    found_late: float
    found_early: float
    mean_logprob: float
    mean_logprob_shifted: float
    inconsistent: float

    @property
    def verdict(self) -> str:
        """Returns `aligned`, `misaligned`, or `undecided` where the numbers do not tell."""
        if self.positions < MIN_POSITIONS:
            return "undecided"
        shifted = max(self.found_late, self.found_early)
        variance = self.found * (1 - self.found) + shifted * (1 - shifted)
        margin = STANDARD_ERRORS * math.sqrt(variance / self.positions)
        if self.inconsistent > INCONSISTENT_SHARE or shifted > self.found + margin:
            return "misaligned"
        return "aligned" if self.found > shifted + margin else "undecided"

    def text(self) -> str:
        """Returns the finding in words."""
        meaning = {
            "aligned": "the records describe the tokens that follow them",
            "misaligned": "the records do NOT describe the tokens that follow them; do not train on them",
            "undecided": "too few positions, or too weak a teacher, to tell from the ids",
        }[self.verdict]
        return "\n".join(
            [
                f"{self.verdict}: {meaning} ({self.positions:,} positions)",
                f"  true token among the stored ids   {self.found:7.2%}",
                f"  the same, records one late        {self.found_late:7.2%}",
                f"  the same, records one early       {self.found_early:7.2%}",
                f"  its mean log-probability          {self.mean_logprob:7.3f} nats in the head "
                f"({self.mean_logprob_shifted:.3f} shifted)",
                f"  its own plane contradicts         {self.inconsistent:7.2%}",
            ]
        )


class Alignment:
    """Sums over rows for `AlignmentCheck`."""

    def __init__(self) -> None:
        self.positions = 0
        self.inconsistent = 0
        self.found = np.zeros(3, np.int64)  # aligned, late, early
        self.in_head = np.zeros(3, np.int64)
        self.logprob = np.zeros(3)

    def add(self, row: Row, manifest: Manifest) -> None:
        """Adds a row that has a teacher record."""
        assert row.teacher is not None
        here, labels = _neighbouring_labels(row, manifest.target)
        self.positions += len(here)
        for start in range(0, len(here), BLOCK_RECORDS):
            block = slice(start, start + BLOCK_RECORDS)
            some = here[block]
            record = TeacherRecord(**{name: getattr(row.teacher, name)[some] for name in RECORD_NAMES})
            self._add_records(record, [which[block] for which in labels], manifest)

    def include(self, other: "Alignment") -> None:
        """Adds the sums over other rows."""
        self.positions += other.positions
        self.inconsistent += other.inconsistent
        self.found += other.found
        self.in_head += other.in_head
        self.logprob += other.logprob

    def _add_records(
        self, record: TeacherRecord, tokens: Sequence[NDArray[np.int64]], manifest: Manifest
    ) -> None:
        """Adds records [M]; `tokens` are the labels that fit them as they stand, one late, one early, [M]."""
        head, tail, values = record.head_ids, record.tail_ids, record.head_logprobs
        for which, labels in enumerate(tokens):
            token = labels[:, None]
            is_head = head == token
            in_head = is_head.any(axis=1)
            self.found[which] += int((in_head | (tail == token).any(axis=1)).sum())
            self.in_head[which] += int(in_head.sum())
            stored = np.where(is_head, values, 0).sum(axis=1, dtype=np.float64)
            self.logprob[which] += float(stored[in_head].sum())
            if which == 0:
                true = record.true_logprob
                # A true token outside the head is at most as likely as the head's last entry.
                last = np.where(head == NO_ID, 0, values).min(axis=1, initial=0)
                errors = codec_of(manifest).errors(record, manifest)
                # A store without a head has no such errors.
                of_head = errors.get("head_logprobs", values)
                # No bound for an entry that was stored as -inf; it must not reach the others of its position.
                of_true = np.where(is_head, of_head, 0).sum(axis=1)
                slack = np.where(in_head, of_true, of_head.max(axis=1, initial=0))
                slack += errors["true_logprob"] + LOGPROB_TOLERANCE
                wrong = np.where(in_head, np.abs(true - stored), true - last) > slack
                self.inconsistent += int(wrong.sum())

    def result(self) -> AlignmentCheck | None:
        if not self.positions:
            return None
        means = [
            float(total / count) if count else math.nan
            for total, count in zip(self.logprob, self.in_head, strict=True)
        ]
        found = self.found / self.positions
        return AlignmentCheck(
            positions=self.positions,
            found=float(found[0]),
            found_late=float(found[1]),
            found_early=float(found[2]),
            mean_logprob=means[0],
            mean_logprob_shifted=max(means[1], means[2]),
            inconsistent=self.inconsistent / self.positions,
        )


def _neighbouring_labels(
    row: Row, target: str
) -> tuple[NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Returns which records are compared, and the labels that fit them as they stand, one late, one early.

    For `next_token` a record that stands a position late would fit the token itself, one that stands early
    the token after next; all three are in one document. Other targets have labels at records alone: there it
    is the labels of the neighbouring records.
    """
    assert row.recorded is not None
    if target == "next_token":
        documents, length = document_of_position(row), len(row.token_ids)
        places = np.flatnonzero(row.recorded)
        ahead = np.minimum(places + 2, length - 1)
        same = (documents[places] == documents[ahead]) & (documents[places] != PADDING_DOCUMENT)
        here = np.flatnonzero(same & (places + 2 < length))
        at = places[here]
        tokens = row.token_ids.astype(np.int64)
        return here, (tokens[at + 1], tokens[at], tokens[at + 2])
    labels = labels_at_records(row, target)
    inner = np.arange(1, max(len(labels) - 1, 1))
    known = labels != IGNORED_LABEL
    here = inner[known[inner - 1] & known[inner] & known[inner + 1]] if len(labels) > 2 else inner[:0]
    return here, (labels[here], labels[here - 1], labels[here + 1])
