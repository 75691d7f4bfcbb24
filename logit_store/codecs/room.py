"""What codings have in common: how they are called, and where decoded arrays go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.codecs.frames import PlaneError
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import Plane, Planes, place_count

Stored = Mapping[str, Any]
"""Buffers of stored bytes by the name of the plane."""


class Room:
    """The arrays of a row that is being decoded.

    Attributes:
        manifest: of the store.
        planes: what is decoded so far, by name.
    """

    def __init__(self, manifest: Manifest, reuse: dict[str, NDArray[Any]] | None) -> None:
        self.manifest = manifest
        self.planes: dict[str, NDArray[Any]] = {}
        self._reuse = reuse
        self._counts: dict[str, int] = {}

    def count(self, stands: str) -> int:
        """Returns the number of places at which planes of that set stand (see `planes`).

        Raises:
            PlaneError: what says where they are says more than a row can have.
        """
        if stands not in self._counts:
            count, most = place_count(stands, self.planes, self.manifest), self.manifest.sequence_length
            if not 0 <= count <= most:
                raise PlaneError("segment_starts", f"its segments have {count} positions, at most {most} fit")
            self._counts[stands] = count
        return self._counts[stands]

    def new(self, plane: Plane) -> NDArray[Any]:
        """Returns the array of a plane, not filled yet; it is among `planes` from now on.

        Where arrays are reused, its memory is that of an earlier row.
        """
        count, width = self.count(plane.stands), plane.width(self.manifest)
        array = None if self._reuse is None else self._reuse.get(plane.name)
        if array is None or len(array) < count:
            array = np.empty((count, *width), plane.dtype)
            if self._reuse is not None:
                self._reuse[plane.name] = array
        self.planes[plane.name] = array[:count]
        return self.planes[plane.name]

    def keep(self, plane: Plane, array: NDArray[Any]) -> None:
        """Enters an array that was made elsewhere."""
        self.planes[plane.name] = array


@dataclass(frozen=True)
class Coding:
    """How planes that belong together are stored.

    Attributes:
        encode: (arrays of a row, the planes of this coding, manifest) -> stored bytes by plane. Equal arrays
            give equal bytes.
        decode: (stored bytes, those of the planes that are wanted, room). Raises PlaneError, and allocates
            nothing that the manifest's shapes do not ask for.
    """

    encode: Callable[[Planes, tuple[Plane, ...], Manifest], dict[str, bytes]]
    decode: Callable[[Stored, tuple[Plane, ...], Room], None]
