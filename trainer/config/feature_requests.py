"""The entries of `store.features`, checked before anything heavy is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekd.logit_store.manifest import FeatureSpec
from sparsekd.logit_store.manifest_checks import FEATURE_KINDS, FEATURE_POSITIONS
from sparsekd.trainer.run.errors import ConfigError

_KEYS = ("layer", "width", "projection", "kind", "positions")


@dataclass(frozen=True)
class FeatureRequest:
    """One entry of `store.features`.

    Attributes:
        layer: How many layers the hidden states have passed.
        width: d; None keeps them whole.
        projection: "orthonormal" or "pca"; "none" without a width.
        kind: How a vector is stored.
        positions: Where.
    """

    layer: int
    width: int | None
    projection: str
    kind: str
    positions: str


def feature_requests(entries: Sequence[Any]) -> list[FeatureRequest]:
    """The entries of `store.features`, checked.

    Raises:
        ConfigError: An entry has another form; the message names it and what it may hold.
    """
    found = [_request(entry) for entry in entries]
    layers = [request.layer for request in found]
    if len(set(layers)) < len(layers):
        raise ConfigError(f"store.features names a layer twice: {layers}; keep one entry for each.")
    return found


def _request(entry: Any) -> FeatureRequest:
    shown = f"store.features has the entry {entry}"
    if not isinstance(entry, Mapping) or "layer" not in entry or not set(entry) <= set(_KEYS):
        raise ConfigError(
            f"{shown}, expected the form {{layer: 12, width: 128}}, with layer and any of "
            f"{', '.join(_KEYS[1:])}."
        )
    layer, width = entry["layer"], entry.get("width")
    numbers = [layer] if width is None else [layer, width]
    if not all(type(number) is int for number in numbers) or layer < 0 or (width is not None and width < 1):
        raise ConfigError(f"{shown}: layer is a whole number from 0, width one from 1 (or left away).")
    request = FeatureRequest(
        layer=layer,
        width=width,
        projection=entry.get("projection", "none" if width is None else "orthonormal"),
        kind=entry.get("kind", "int8"),
        positions=entry.get("positions", "all"),
    )
    legal = {
        "projection": ("none",) if width is None else ("orthonormal", "pca"),
        "kind": FEATURE_KINDS,
        "positions": FEATURE_POSITIONS,
    }
    for key, choices in legal.items():
        if getattr(request, key) not in choices:
            raise ConfigError(f"{shown}: {key} is one of {', '.join(choices)} here.")
    return request


def request_of(spec: FeatureSpec) -> FeatureRequest:
    """The request that a store's feature was made by."""
    return FeatureRequest(
        layer=spec.layer,
        width=None if spec.projection == "none" else spec.width,
        projection=spec.projection,
        kind=spec.kind,
        positions=spec.positions,
    )
