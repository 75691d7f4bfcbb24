"""What an implementation does to a block of logits, and the objective in between.

Whatever the cut of the vocabulary (kernels/partial.py), a block is read and summed, the objective turns that
into a few numbers per position, and the block turns these into the gradient of its logits.

C positions of a block, K support entries, V vocabulary (true), T temperature.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparsekd.kernels.divergence import differentiate, top_agreement
from sparsekd.kernels.inputs import Positions
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.partial import Reading, RestSums
from sparsekd.kernels.statistics import LogitGradient, Statistics


class Rest(NamedTuple):
    """The logits outside the support over the whole vocabulary, [C] each; -inf where nothing is outside.

    Attributes:
        t: logsumexp of u; one: logsumexp of z; maximum: the largest z.
    """

    t: Tensor
    one: Tensor
    maximum: Tensor


class Block(Protocol):
    """One block of raw products hidden @ weight.T [C, columns], which it uses up.

    Made of (products, bias, ids, labels, objective, head): ids int64 [C, K] and labels int64 [C] count from
    the block's first column, negative where there is none in it.
    """

    reading: Reading
    """Read before the support is punched out."""

    def rest_sums(self) -> RestSums:
        """One pass over what remains."""

    def gradient(self, rest: Rest, gradient: LogitGradient, out: Tensor | None) -> Tensor:
        """d loss / d product [C, columns] (docs/losses.md, 8), in `out` where given, else where z was."""


class Assessment(NamedTuple):
    """The objective at C positions: weighted sum, parts per position, and the gradient of every logit."""

    loss: Tensor
    kd: Tensor
    ce: Tensor
    agreement: Tensor
    rest: Rest
    gradient: LogitGradient | None


class Implementation(NamedTuple):
    """How the elementwise work is done.

    Attributes:
        block: makes a `Block`.
        assess: as `assess` below.
        prepare: an operand as the products take it.
    """

    block: Callable[[Tensor, Tensor | None, Tensor, Tensor, Objective, HeadTransform], Block]
    assess: Callable[..., Assessment]
    prepare: Callable[[Tensor], Tensor]


def make_statistics(
    reading: Reading, sums: RestSums, positions: Positions, *, temperature: float, vocabulary_size: int
) -> Statistics:
    """The statistics of docs/losses.md, 3, from the reading and the sums over the whole vocabulary."""
    shift = torch.where(sums.maximum > -torch.inf, sums.maximum, 0.0)
    inside = torch.where(positions.ids >= 0, reading.support, 0.0).sum(1)
    return Statistics(
        support=reading.support / temperature,
        rest_t=sums.sum_t.log() + shift / temperature,
        rest_1=sums.sum_1.log() + shift,
        label=torch.where(positions.labels >= 0, reading.label, 0.0),
        mean=(sums.total + inside) / vocabulary_size,
    )


def assess(
    reading: Reading,
    sums: RestSums,
    positions: Positions,
    objective: Objective,
    *,
    vocabulary_size: int,
    needs_gradient: bool,
) -> Assessment:
    """The objective at C positions by plain torch functions, whatever it is (kernels/divergence.py).

    What does not count comes out as 0, whatever stands in its record and, where nothing of it counts, its
    logits.
    """
    kept = positions.kept
    statistics = make_statistics(
        reading, sums, positions, temperature=objective.temperature, vocabulary_size=vocabulary_size
    )
    agreement = top_agreement(statistics, sums.maximum, positions.targets, objective.temperature)
    statistics = statistics.where(kept)
    loss, kd, ce, gradient = differentiate(
        statistics,
        positions,
        objective,
        vocabulary_size=vocabulary_size,
        needs_gradient=needs_gradient,
    )
    ce, agreement = torch.where(kept, ce, 0.0), torch.where(positions.recorded, agreement, 0.0)
    return Assessment(
        loss, kd, ce, agreement, Rest(statistics.rest_t, statistics.rest_1, sums.maximum), gradient
    )
