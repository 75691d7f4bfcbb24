"""Rows with a record at every position, so that a record's number is its position."""

from typing import Any

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import PADDING_DOCUMENT, Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows


def whole_manifest(**overrides: Any) -> Manifest:
    """A manifest of the rule `all`."""
    return synthetic_manifest(positions="all", **overrides)


def whole_rows(manifest: Manifest, count: int, seed: int, make: Any = synthetic_rows) -> list[Row]:
    """Rows of a whole manifest that have no padding."""
    found: list[Row] = []
    while len(found) < count:
        rows = make(manifest, 4, seed)
        found += [row for row in rows if (row.segment_documents != PADDING_DOCUMENT).all()]
        seed += 1_000_003
    return found[:count]


def whole_row(manifest: Manifest, seed: int = 0) -> Row:
    return whole_rows(manifest, 1, seed)[0]
