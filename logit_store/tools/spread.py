"""How a quantity is spread over many positions, in fixed memory: its mean, and percentiles to one per cent.

Values are counted in bins whose borders grow by a constant factor, so a percentile is known to half a bin's
width relative to itself (Masson, Rim and Lee 2019, DDSketch, have the same idea).
"""

import math

import numpy as np
from numpy.typing import NDArray

GROWTH = 1.02
"""Ratio of neighbouring borders: a percentile is within 1 % of the true one."""

SMALLEST = 1e-12
"""Smaller values count as 0."""

LARGEST = 1e6

_BINS = math.ceil(math.log(LARGEST / SMALLEST) / math.log(GROWTH))


class Spread:
    """Counts of values that are 0 or more.

    Attributes:
        count: values so far; infinite ones are counted, but are not in the mean.
        infinite: of these, how many are infinite.
        minimum: inf when there is none.
        maximum: -inf when there is none.
    """

    def __init__(self) -> None:
        self.count = 0
        self.infinite = 0
        self.minimum, self.maximum = math.inf, -math.inf
        self._sum = 0.0
        self._zeros = 0
        self._bins = np.zeros(_BINS, np.int64)

    def add(self, values: NDArray[np.floating]) -> None:
        """Counts values of any shape; below 0 counts as 0 (rounding)."""
        flat = np.maximum(np.asarray(values, np.float64).ravel(), 0.0)
        if not flat.size:
            return
        finite = flat[np.isfinite(flat)]
        self.count += flat.size
        self.infinite += flat.size - finite.size
        self.minimum, self.maximum = min(self.minimum, flat.min()), max(self.maximum, flat.max())
        self._sum += float(finite.sum())
        positive = finite[finite >= SMALLEST]
        self._zeros += finite.size - positive.size
        places = (np.log(positive / SMALLEST) / math.log(GROWTH)).astype(np.int64)
        self._bins += np.bincount(np.clip(places, 0, _BINS - 1), minlength=_BINS)

    def include(self, other: "Spread") -> None:
        """Counts what another one has counted."""
        self.count += other.count
        self.infinite += other.infinite
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self._sum += other._sum
        self._zeros += other._zeros
        self._bins += other._bins

    @property
    def mean(self) -> float:
        """Returns the mean of the finite values; NaN when there is none."""
        finite = self.count - self.infinite
        return self._sum / finite if finite else math.nan

    def percentile(self, percent: float) -> float:
        """Returns the smallest value (to 1 %) that `percent` per cent of the values do not exceed; NaN
        without any."""
        if not self.count:
            return math.nan
        rank = max(1, math.ceil(percent / 100 * self.count))
        if rank <= self._zeros:
            return max(0.0, self.minimum)
        if rank > self.count - self.infinite:
            return math.inf
        place = int(np.searchsorted(np.cumsum(self._bins), rank - self._zeros))
        middle = SMALLEST * GROWTH ** (place + 0.5)
        return min(max(middle, self.minimum), self.maximum)

    def shares_below(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the share of all values that lie below each of the given ones, at a bin's resolution."""
        total = np.append(0, np.cumsum(self._bins)) + self._zeros
        safe = np.maximum(values, SMALLEST)
        places = np.clip(np.round(np.log(safe / SMALLEST) / math.log(GROWTH)).astype(np.int64), 0, _BINS)
        return np.where(values < SMALLEST, 0, total[places]) / max(self.count, 1)
