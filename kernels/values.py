"""What a loss's arguments may hold: the checks that must read values from the device, and so wait for it.

For debugging and for records of unknown origin. Shapes, dtypes and devices are checked at every call
(`kernels/loss.py`), values only where asked for.

N positions, K stored entries, k head, n draws, V vocabulary (true).
"""

import math

import torch
from torch import Tensor

from sparsekd.kernels.objective import Objective
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
    ce_weights: Tensor,
    kd_weights: Tensor,
    *,
    vocabulary_size: int,
    objective: Objective,
) -> None:
    """Check the values of a record, labels and weights, of shapes and dtypes as `sparse_kd_loss` takes them.

    Only labels that the cross-entropy counts and records that the distillation counts are looked at, and not
    the log-probability of a padded head id: no loss reads the others. -inf is a legal log-probability and a
    legal log of the rest.

    Args:
        targets: the record, or None.
        labels: int64 [N]; negative is ignored.
        ce_weights: float32 [N].
        kd_weights: float32 [N].
        vocabulary_size: V, the true one.
        objective: resolved; `targets.log_rest` stands for its temperature.

    Raises:
        ValueError: naming the argument, the first position, what is there and what was expected.
    """
    for name, weights in (("ce_weights", ce_weights), ("kd_weights", kd_weights)):
        _all_hold((weights >= 0) & (weights < math.inf), name, weights, "a finite number >= 0")
    _all_hold(
        (ce_weights == 0) | (labels < vocabulary_size),
        "labels",
        labels,
        f"an id below {vocabulary_size}, the vocabulary size, or a negative number to ignore the position",
    )
    if targets is None:
        return
    recorded = kd_weights > 0
    rows = recorded[:, None]
    ids, head_logprobs, tail_counts, log_rest, entropy = targets
    _all_hold(
        ~rows | ((ids >= -1) & (ids < vocabulary_size)),
        "targets.ids",
        ids,
        f"an id from 0 to {vocabulary_size - 1}, or -1 for padding",
    )
    _check_distinct(ids, recorded)
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
        ~recorded | (log_rest < math.inf),
        "targets.log_rest",
        log_rest,
        "a finite number, or -inf where the rest is empty",
    )
    _all_hold(~recorded | torch.isfinite(entropy), "targets.entropy", entropy, "a finite number")
    _check_presence(targets, recorded, objective)
    _check_mass(targets, recorded, unread, objective.temperature)


def _check_presence(targets: SparseTargets, recorded: Tensor, objective: Objective) -> None:
    """Raise for a record that counts and holds nothing of what the objective reads."""
    if objective.kd_weight == 0:
        return
    if objective.target_mode == "sampled":
        number = targets.tail_counts.sum(1)
        _all_hold(
            ~recorded | (number > 0) | (targets.log_rest == -math.inf),
            "the sum of targets.tail_counts",
            number,
            "at least one draw where targets.log_rest is not -inf, or kd_weights 0 there",
        )
        return
    number = (targets.ids[:, : targets.head_size] >= 0).sum(1)
    _all_hold(
        ~recorded | (number > 0),
        "the number of ids in the head of targets.ids",
        number,
        "at least 1, or kd_weights 0 there",
    )


def _check_distinct(ids: Tensor, recorded: Tensor) -> None:
    """Raise for an id that stands twice at one position."""
    ordered = ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0) & recorded[:, None]
    if bool(twice.any()):
        position, column = twice.nonzero()[0].tolist()
        raise ValueError(
            f"targets.ids at position {position} holds id {ordered[position, column].item()} twice, expected "
            "distinct ids in head and draws together, -1 for padding"
        )


def _check_mass(targets: SparseTargets, recorded: Tensor, unread: Tensor, temperature: float) -> None:
    """Raise where the probabilities of the head, or of head and rest, sum to more than 1."""
    # At other temperatures the rest is not on the scale of the head's log-probabilities.
    with_rest = same_temperature(temperature, 1.0)
    mass = targets.head_logprobs.double().exp().masked_fill(unread, 0.0).sum(1)
    name = "the head, exp(targets.head_logprobs)"
    if with_rest:
        mass = mass + targets.log_rest.double().exp()
        name += ", and the rest, exp(targets.log_rest)"
    bad = recorded & ~(mass <= 1 + MASS_TOLERANCE)
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
