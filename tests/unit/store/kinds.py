"""Manifests of every kind of store: codecs with their parameters, targets, rules and optional planes."""

from typing import Any

import numpy as np

from sparsekd.logit_store.codecs.codec import CODECS
from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.manifest import CodecSpec, FeatureSpec, Manifest
from sparsekd.logit_store.manifest_checks import OPTIONAL_PLANES
from sparsekd.logit_store.synthetic import synthetic_manifest

WITH_MASS = "compact with mass"
"""Heads that end where their probabilities reach 0.7; such stores have no draws."""

CODEC_KINDS = (*sorted(CODECS), WITH_MASS)

TARGETS_AND_RULES = (
    ("next_token", "counted"),
    ("next_token", "all"),
    ("next_token", "sampled"),
    ("masked_token", "counted"),
    ("masked_token", "all"),
    ("masked_token", "masked"),
    ("masked_token", "sampled"),
    ("class", "counted"),
    ("class", "sampled"),
)

CLASSES = ("against", "neutral", "for", "unclear", "other")
VOCABULARY = 300

FEATURES = (
    FeatureSpec(3, 5, 5, "none", None, 1.0, "int8", "all"),
    FeatureSpec(7, 4, 4, "none", None, 1.0, "float16", "recorded"),
)


def codec_of_kind(kind: str, vocabulary: int = VOCABULARY) -> CodecSpec:
    """`compact` has a table of ids that are not the lowest."""
    name, parameters = kind.split()[0], {}
    if name == "compact":
        mass = 0.7 if kind == WITH_MASS else None
        parameters = compact_parameters(np.arange(vocabulary) * 7 % 100, mass=mass, table_ids=40)
    return CodecSpec(name, parameters)


def manifest_of_kind(
    kind: str, target: str = "next_token", rule: str = "counted", *, planes: bool = False, **fields: Any
) -> Manifest:
    """A manifest with draws and their log-probabilities where the codec may have them; `planes` adds all that
    are optional, hidden states of two layers among them."""
    n = 0 if kind == WITH_MASS else fields.pop("n", 6)
    usual = {
        "codec": codec_of_kind(kind),
        "target": target,
        "outcomes": CLASSES if target == "class" else None,
        "positions": rule,
        "share": 0.5 if rule == "sampled" else 1.0,
        "planes": OPTIONAL_PLANES if planes else (),
        "features": FEATURES if planes else (),
        "vocabulary_size": VOCABULARY,
        "k": 3,
        "n": n,
        "tail_logprobs": n > 0,
    }
    return synthetic_manifest(**usual | fields)
