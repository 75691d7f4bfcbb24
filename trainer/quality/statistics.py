"""Sums over positions and documents: calibration, the paired bootstrap, and losses by category.

Numpy only, float64 sums. Shapes: N positions, D documents, C categories.
"""

import numpy as np
from numpy.typing import NDArray

from sparsekd.trainer.quality.result import Margin, ReliabilityBin

CALIBRATION_BINS = 15
"""Equal-width bins of the expected calibration error (Guo et al. 2017, arXiv 1706.04599, use 15)."""

# Resamples whose counts exist at one time; it bounds memory and does not change the result.
_RESAMPLES_AT_ONCE = 256


def reliability(confidence: NDArray[np.float32], hit: NDArray[np.bool_]) -> list[ReliabilityBin]:
    """Returns `CALIBRATION_BINS` bins over [0, 1], from confidence [N] and hit [N]."""
    bins = np.minimum((confidence.astype(np.float64) * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    confidences = np.bincount(bins, weights=confidence, minlength=CALIBRATION_BINS)
    hits = np.bincount(bins, weights=hit, minlength=CALIBRATION_BINS)
    return [
        ReliabilityBin(int(count), float(total / max(count, 1)), float(right / max(count, 1)))
        for count, total, right in zip(counts, confidences, hits, strict=True)
    ]


def calibration_error(bins: list[ReliabilityBin]) -> float:
    """Expected calibration error: mean over positions of |accuracy - confidence| of their bin."""
    total = sum(item.count for item in bins)
    return sum(item.count * abs(item.accuracy - item.confidence) for item in bins) / max(total, 1)


def sums_by_document(values: NDArray[np.float32], document_of: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of values [N] by document [D], documents in ascending order of their number."""
    _, index = np.unique(document_of, return_inverse=True)
    return np.bincount(index, weights=values).astype(np.float64)


def paired_bootstrap(
    student: NDArray[np.float64],
    baseline: NDArray[np.float64],
    tokens: NDArray[np.int64],
    *,
    samples: int,
    seed: int,
) -> Margin:
    """The margin between two models and its 95 % interval, by resampling documents.

    Both models are summed over the same resampled documents, so that what makes a document hard cancels. The
    statistic is a ratio of sums: nats over tokens. Interval: percentiles (Efron 1979; Koehn 2004 for pairs).

    Args:
        student: float64 [D], sum of nats of each document.
        baseline: float64 [D].
        tokens: int64 [D], counted tokens of each document, at least 1.
        samples: resamples.
        seed: of the resampling.
    """
    documents = len(tokens)
    difference = baseline - student
    interval: tuple[float, float] | None = None
    if documents >= 2:
        generator = np.random.default_rng(seed)
        columns = np.stack([difference, tokens.astype(np.float64)], axis=-1)
        equal = np.full(documents, 1 / documents)
        parts = []
        for start in range(0, samples, _RESAMPLES_AT_ONCE):
            size = min(_RESAMPLES_AT_ONCE, samples - start)
            counts = generator.multinomial(documents, equal, size=size)
            sums = counts @ columns
            parts.append(sums[:, 0] / sums[:, 1])
        low, high = np.quantile(np.concatenate(parts), [0.025, 0.975])
        interval = (float(low), float(high))
    return Margin(
        value=float(difference.sum() / tokens.sum()),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        wins=float((difference > 0).mean()),
        documents=documents,
        samples=samples,
    )


def deciles(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Category 0 to 9 of each of the values [N]: ten groups of nearly equal size, in ascending order."""
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks * 10 // max(len(values), 1)


def means_by_category(
    values: NDArray[np.float32], category_of: NDArray[np.int64], categories: int
) -> list[float | None]:
    """Mean of values [N] in each category [C]; None where there is no position."""
    counts = np.bincount(category_of, minlength=categories)
    sums = np.bincount(category_of, weights=values, minlength=categories)
    return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
