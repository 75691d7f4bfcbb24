"""What must hold of a manifest, and what it may ask for at most: it may come from anybody."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.typed_json import short

if TYPE_CHECKING:
    from sparsekd.logit_store.manifest import Manifest

FORMAT_VERSION = 1
"""Major version of the format. A reader refuses a newer one."""

TARGETS = ("next_token", "masked_token", "class")
"""What a label is. `next_token`: the token that follows in the document; it is not stored. `masked_token`:
the token that belongs at the position, where the inputs hold the mask. `class`: one of the outcomes, one
label and one record for a document, at its last token."""

POSITION_RULES = ("counted", "all", "masked", "sampled")
"""Which positions have a record. `counted`: where the loss counts. `all`: every position but padding.
`masked`: the masked positions, which for `masked_token` are those that the loss counts. `sampled`: in the
split `train` each counted position with one probability, the share; other splits as `counted`."""

OPTIONAL_PLANES = ("weights", "token_types")
"""Planes that a manifest may declare: weights of documents or spans, and the segment numbers of pairs."""

FEATURE_KINDS = ("int8", "float16")
"""How a vector of hidden states is stored: int8 with a float16 scale, or float16."""

FEATURE_PROJECTIONS = ("none", "orthonormal", "pca")
"""How hidden states are made narrower: not at all, by a seeded orthonormal matrix, or along the directions of
largest variance on a probe of the rows."""

FEATURE_POSITIONS = ("all", "recorded")
"""Where hidden states are kept: at every position but padding, or where records stand."""

LARGEST_ROW_BYTES = 1 << 28
"""256 MiB: of one decoded row, all planes together."""

LARGEST_LENGTH = 1 << 20
LARGEST_VOCABULARY = 1 << 22
"""16 times the largest of today's; bounds the tables of `compact`."""

LARGEST_GRID = 64
LARGEST_ROWS_PER_SHARD = 1 << 16
LARGEST_SPLITS = 64
LARGEST_FEATURES = 64
LARGEST_WIDTH = 1 << 16
"""Bounds of a manifest, looked at before anything is allocated by it: it may come from anybody."""

RESTS = ("exact", "derived", "unknown", "counts")
"""What log R is: summed by the capture, 1 - the head's sum at temperature 1, not known at all, or, of records
that are draws alone, that of the whole distribution."""


def check_manifest(manifest: "Manifest") -> None:
    """Raises StoreError, naming the field, when a manifest contradicts itself or asks for too much."""
    vocabulary = manifest.tokenizer.vocabulary_size
    check_version(manifest.format_version)
    _one_of(manifest.target, TARGETS, "target")
    _within(manifest.sequence_length, 1, LARGEST_LENGTH, "sequence_length")
    _within(manifest.rows_per_shard, 1, LARGEST_ROWS_PER_SHARD, "rows_per_shard")
    names_are_plain = all(name.isidentifier() and len(name) <= 64 for name in manifest.splits)
    _require(
        names_are_plain,
        "splits",
        manifest.splits,
        "plain names of at most 64 letters, digits and underscores",
    )
    _distinct(manifest.splits, "splits", most=LARGEST_SPLITS, least=1)
    _within(vocabulary, 1, LARGEST_VOCABULARY, "tokenizer.vocabulary_size")
    if manifest.outcomes is not None:
        _require(manifest.target == "class", "outcomes", "a list", "null, because the target is no class")
        _distinct(manifest.outcomes, "outcomes", most=LARGEST_VOCABULARY, least=2)
    else:
        _require(manifest.target != "class", "outcomes", None, "the names of the classes")
    _distinct(manifest.planes, "planes", most=len(OPTIONAL_PLANES))
    for name in manifest.planes:
        _one_of(name, OPTIONAL_PLANES, "planes")
    _check_record(manifest)
    _check_features(manifest)
    size = decoded_row_bytes(manifest)
    if size > LARGEST_ROW_BYTES:
        raise StoreError(
            f"The manifest's rows of {manifest.sequence_length} positions (k={manifest.record.k}, "
            f"n={manifest.record.n}, {len(manifest.record.temperatures)} temperatures) take {size:,} bytes "
            f"decoded, expected at most {LARGEST_ROW_BYTES:,}: use shorter rows or a smaller record."
        )


def _check_record(manifest: "Manifest") -> None:
    record, count = manifest.record, manifest.outcome_count
    _within(record.k, 0, count, "record.k")
    _within(record.n, 0, LARGEST_ROW_BYTES, "record.n")
    grid = record.temperatures
    _require(len(grid) <= LARGEST_GRID, "record.temperatures", len(grid), f"at most {LARGEST_GRID} of them")
    grid_is_ascending = all(low < high for low, high in itertools.pairwise(grid))
    grid_is_positive = all(value > 0 and math.isfinite(value) for value in grid)
    _require(grid_is_ascending and grid_is_positive, "record.temperatures", grid, "ascending and above 0")
    if manifest.teacher is None:
        _require(record.k == 0 and record.n == 0, "teacher", None, "an identity, because k or n is above 0")
    else:
        keeps = record.k + record.n > 0 or len(manifest.features) > 0
        _require(keeps, "record.k", record.k, "k or n above 0, or features, because there is a teacher")
        draw = record.draw_temperature
        _require(draw in grid, "record.draw_temperature", draw, f"one of the grid {short(list(grid))}")
    _require(0 <= record.seed < 2**63, "record.seed", record.seed, "from 0 to 2^63 - 1")
    _one_of(record.rest, RESTS, "record.rest")
    if record.rest == "counts":
        fits = record.k == 0 and record.n > 0 and grid == (1.0,)
        _require(fits, "record.rest", record.rest, "another unless k = 0, n > 0, grid [1.0]")
    elif record.rest != "exact":
        shape = (record.k > 0, record.n, grid)
        _require(
            shape == (True, 0, (1.0,)), "record.rest", record.rest, "exact unless k > 0, n = 0, grid [1.0]"
        )
    draws = record.n > 0 or not record.tail_logprobs
    _require(draws, "record.tail_logprobs", record.tail_logprobs, "false, because there are no draws")
    _one_of(record.positions, POSITION_RULES, "record.positions")
    _require(
        record.positions != "masked" or manifest.target == "masked_token",
        "record.positions",
        record.positions,
        f"another rule, because the target is {manifest.target}",
    )
    _require(
        record.positions != "all" or manifest.target != "class",
        "record.positions",
        record.positions,
        "counted or sampled, because a class has one record for a document",
    )
    if record.positions == "sampled":
        _require(0 < record.share < 1, "record.share", record.share, "above 0 and below 1, as sampled asks")
    else:
        _require(record.share == 1, "record.share", record.share, f"1, as the rule {record.positions} asks")


def _check_features(manifest: "Manifest") -> None:
    _distinct([spec.layer for spec in manifest.features], "features", most=LARGEST_FEATURES)
    has_teacher = manifest.teacher is not None
    _require(
        has_teacher or not manifest.features, "features", len(manifest.features), "none without a teacher"
    )
    for spec in manifest.features:
        name = f"features of layer {spec.layer}"
        _within(spec.layer, 0, 4096, "features.layer")
        _within(spec.source_width, 1, LARGEST_WIDTH, f"{name}: source_width")
        _within(spec.width, 1, spec.source_width, f"{name}: width")
        _one_of(spec.projection, FEATURE_PROJECTIONS, f"{name}: projection")
        _one_of(spec.kind, FEATURE_KINDS, f"{name}: kind")
        _one_of(spec.positions, FEATURE_POSITIONS, f"{name}: positions")
        whole = spec.projection == "none"
        _require(whole or spec.width < spec.source_width, f"{name}: width", spec.width, "below source_width")
        _require(not whole or spec.width == spec.source_width, f"{name}: width", spec.width, "source_width")
        _require(
            whole == (spec.projection_digest is None),
            f"{name}: projection_digest",
            spec.projection_digest,
            "one exactly where there is a projection",
        )
        _require(0 <= spec.kept <= 1, f"{name}: kept", spec.kept, "from 0 to 1")


def decoded_row_bytes(manifest: "Manifest") -> int:
    """Returns the most bytes that the arrays of one decoded row take (`planes` has their shapes)."""
    record = manifest.record
    # token ids, mask, segment starts and documents, recorded; weights and their starts; types; labels.
    position = 4 + 1 + 12 + 1 + 8 + 1 + 4
    if manifest.teacher is not None:
        drawn = 12 if record.tail_logprobs else 8
        position += 8 * record.k + drawn * record.n + 4 * len(record.temperatures) + 12
    position += sum(4 * spec.width for spec in manifest.features)
    return position * manifest.sequence_length


def check_version(version: object, where: str = "The manifest") -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise StoreError(
            f"{where} has {short(version)} as format_version, expected {FORMAT_VERSION}: restore it from a "
            "copy."
        )
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{where} has format version {version}, but this sparsekd reads versions up to {FORMAT_VERSION}: "
            "update sparsekd."
        )


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise StoreError(f"The manifest's {name} is {short(found)}, expected {expected}.")


def _within(value: int, low: int, high: int, name: str) -> None:
    _require(low <= value <= high, name, value, f"from {low} to {high}")


def _one_of(value: object, known: Sequence[str], name: str) -> None:
    _require(value in known, name, value, f"one of {', '.join(known)}")


def _distinct(values: Sequence[object], name: str, *, most: int, least: int = 0) -> None:
    _require(least <= len(values) <= most, name, len(values), f"from {least} to {most} entries")
    _require(len(set(values)) == len(values), name, values, "distinct entries")
