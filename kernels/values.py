"""What a loss's arguments may hold: the checks that must read values from the device, and so wait for it.

For debugging and for records of unknown origin. Shapes, dtypes and devices are checked at every call
(`kernels/loss.py`), values only where asked for.

N positions, K stored entries, k head, n draws, V vocabulary (true).
"""

import math

import torch
from torch import Tensor

from sparsekd.kernels.targets import SparseTargets
from sparsekd.kernels.temperature import same_temperature

# By how much a position's probabilities may sum to more than 1. A codec that rounds log-probabilities to
# float16 moves each by at most 2^-11 of itself, and so their mass by at most 2^-11 of the entropy: no more
# than log(V) / 2048, 0.6 % for a vocabulary of 200,000. Raw logits, or log-probabilities of another
# temperature, are far beyond. One entry is mass as well: it may exceed log 1 by log1p of this.
MASS_TOLERANCE = 1e-2


def check_values(
    targets: SparseTargets | None,
    labels: Tensor,
    weights: Tensor,
    *,
    vocabulary_size: int,
    temperature: float,
) -> None:
    """Check the values of a record, labels and weights, of shapes and dtypes as `sparse_kd_loss` takes them.

    Positions of weight 0 are not looked at, nor the log-probability of a padded head id: no loss reads them.
    -inf is a legal log-probability and a legal log of the rest.

    Args:
        targets: the record, or None.
        labels: int64 [N]; negative is ignored.
        weights: float32 [N].
        vocabulary_size: V, the true one.
        temperature: T for which `targets.log_rest` stands.

    Raises:
        ValueError: naming the argument, the first position, what is there and what was expected.
    """
    good_weights = (weights >= 0) & (weights < math.inf)
    _all_hold(good_weights, "weights", weights, "a finite number >= 0")
    counted = weights > 0
    _all_hold(
        ~counted | (labels < vocabulary_size),
        "labels",
        labels,
        f"an id below {vocabulary_size}, the vocabulary size, or a negative number to ignore the position",
    )
    if targets is None:
        return
    rows = counted[:, None]
    ids, head_logprobs, tail_counts, log_rest, entropy = targets
    _all_hold(
        ~rows | ((ids >= -1) & (ids < vocabulary_size)),
        "targets.ids",
        ids,
        f"an id from 0 to {vocabulary_size - 1}, or -1 for padding",
    )
    _check_distinct(ids, counted)
    unread = ~rows | (ids[:, : targets.head_size] < 0)
    _all_hold(
        # False for NaN, as every comparison with it.
        unread | (head_logprobs <= math.log1p(MASS_TOLERANCE)),
        "targets.head_logprobs",
        head_logprobs,
        "a log-probability <= 0",
    )
    _all_hold(
        ~rows | ((tail_counts >= 0) & (tail_counts < math.inf)),
        "targets.tail_counts",
        tail_counts,
        "a count >= 0",
    )
    _all_hold(
        ~counted | (log_rest < math.inf),
        "targets.log_rest",
        log_rest,
        "a finite number, or -inf where the rest is empty",
    )
    _all_hold(~counted | torch.isfinite(entropy), "targets.entropy", entropy, "a finite number")
    _check_mass(targets, counted, unread, temperature)


def _check_distinct(ids: Tensor, counted: Tensor) -> None:
    """Raise for an id that stands twice at one position."""
    ordered = ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0) & counted[:, None]
    if bool(twice.any()):
        position, column = twice.nonzero()[0].tolist()
        raise ValueError(
            f"targets.ids at position {position} holds id {ordered[position, column].item()} twice, expected "
            "distinct ids in head and draws together, -1 for padding"
        )


def _check_mass(targets: SparseTargets, counted: Tensor, unread: Tensor, temperature: float) -> None:
    """Raise where the probabilities of the head, or of head and rest, sum to more than 1."""
    # At other temperatures the rest is not on the scale of the head's log-probabilities.
    with_rest = same_temperature(temperature, 1.0)
    mass = targets.head_logprobs.double().exp().masked_fill(unread, 0.0).sum(1)
    name = "the head, exp(targets.head_logprobs)"
    if with_rest:
        mass = mass + targets.log_rest.double().exp()
        name += ", and the rest, exp(targets.log_rest)"
    bad = counted & ~(mass <= 1 + MASS_TOLERANCE)
    if bool(bad.any()):
        position = int(bad.nonzero()[0])
        raise ValueError(
            f"the probability of {name}, at position {position} is {mass[position].item():.6g}, expected at "
            f"most 1 (tolerance {MASS_TOLERANCE:g})"
        )


def _all_hold(holds: Tensor, name: str, values: Tensor, expected: str) -> None:
    """Raise for the first False of `holds`, [N] or [N, columns] as `values`."""
    if bool(holds.all()):
        return
    place = (~holds).nonzero()[0].tolist()
    column = f", column {place[1]}" if len(place) > 1 else ""
    raise ValueError(
        f"{name} at position {place[0]}{column} is {values[tuple(place)].item()}, expected {expected}"
    )
