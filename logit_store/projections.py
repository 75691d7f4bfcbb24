"""The matrices by which hidden states were made narrower; each is a small file of the store.

A file holds the mean, float32 [H], and the matrix, float32 [H, d], little-endian, one behind the other. What
is stored of a hidden state x is (x - mean) @ matrix; the manifest has the file's sha256.

Shapes: H numbers of a hidden state, d of what is stored.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.manifest import FeatureSpec, Manifest
from sparsekd.logit_store.places.files import explained, make_folder, publish_bytes, read_range, size_of
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.layout import PROJECTIONS_FOLDER


@dataclass(frozen=True)
class Projection:
    """From a hidden state to what is stored of it.

    Attributes:
        mean: float32 [H], subtracted first; 0 for a seeded matrix.
        matrix: float32 [H, d], with orthonormal columns.
    """

    mean: NDArray[np.float32]
    matrix: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """Returns the content of the file."""
        return self.mean.astype("<f4").tobytes() + np.ascontiguousarray(self.matrix, "<f4").tobytes()


def projection_name(spec: FeatureSpec) -> str:
    """Returns the name of a layer's file, relative to the store."""
    return f"{PROJECTIONS_FOLDER}/{spec.plane}.f32"


def digest_of(content: bytes) -> str:
    """Returns the sha256 (hex) that the manifest has of a file's content."""
    return hashlib.sha256(content).hexdigest()


def projected(manifest: Manifest) -> list[FeatureSpec]:
    """Returns the features that have a file."""
    return [spec for spec in manifest.features if spec.projection != "none"]


def write_projections(path: StorePath, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Puts the files of a manifest into a store; those that are there stay.

    Args:
        path: of the store.
        manifest: of the store.
        contents: content by name of the plane.

    Raises:
        StoreError: one is missing, or is not the one in the manifest.
    """
    for spec in projected(manifest):
        content = contents.get(spec.plane)
        if content is None or digest_of(content) != spec.projection_digest:
            found = (
                "none was given" if content is None else f"one of digest {digest_of(content)[:12]} was given"
            )
            raise StoreError(
                f"The manifest of {path} asks for a projection of {spec.plane} of digest "
                f"{str(spec.projection_digest)[:12]}, but {found} was given: give that one."
            )
        make_folder(path / PROJECTIONS_FOLDER)
        publish_bytes(path / PROJECTIONS_FOLDER / f"{spec.plane}.f32", content)


def read_projection(path: StorePath, spec: FeatureSpec) -> bytes:
    """Returns the content of a layer's file.

    Raises:
        DamagedStoreError: it is missing, or not the one in the manifest.
    """
    place = path / PROJECTIONS_FOLDER / f"{spec.plane}.f32"
    size = 4 * spec.source_width * (1 + spec.width)
    with explained(place):
        found = size_of(place)
        content = read_range(place, 0, size) if found == size else b""
    # The length, too: of an empty file the manifest may have the right digest.
    if found != size or digest_of(content) != spec.projection_digest:
        raise DamagedStoreError(
            f"{place} is not the projection that the manifest names ({found:,} bytes, expected {size:,}): "
            "restore it from a copy."
        )
    return content


def projection_of(path: StorePath, spec: FeatureSpec) -> Projection:
    """Returns a layer's projection; raises as `read_projection`, and where it holds NaN or an infinity."""
    numbers = np.frombuffer(read_projection(path, spec), "<f4").astype(np.float32)
    if not np.isfinite(numbers).all():
        raise DamagedStoreError(
            f"The projection of {spec.plane} in {path} holds numbers that are not finite: whoever made the "
            "store made it wrongly; capture again."
        )
    return Projection(
        mean=numbers[: spec.source_width],
        matrix=numbers[spec.source_width :].reshape(spec.source_width, spec.width),
    )


def projections_of(path: StorePath, manifest: Manifest) -> dict[str, bytes]:
    """Returns the contents of all files of a store by the name of the plane; raises as `read_projection`."""
    return {spec.plane: read_projection(path, spec) for spec in projected(manifest)}
