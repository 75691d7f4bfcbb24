"""The elementwise work of the `torch` implementation: any device, in the memory of the logits.

The support's logits are read, then replaced by -inf ("punched out"), so that the sums over all the others are
direct and never 1 minus something. The logits become their powers, and the powers their gradient.

C positions, W columns of the block, K support entries, T temperature.
"""

import math

import torch
from torch import Tensor

from sparsekd.kernels.blocks import Implementation, Rest, assess
from sparsekd.kernels.gemm import prepare_operand, transform_logits
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.partial import Reading, RestSums
from sparsekd.kernels.statistics import LogitGradient


class TorchBlock:
    """A `Block` [C, W] by torch operations."""

    def __init__(
        self,
        products: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        labels: Tensor,
        objective: Objective,
        head: HeadTransform,
    ) -> None:
        logits, self._slope = transform_logits(products, bias, head)
        self._scale, self._temperature = head.scale, objective.temperature
        self._columns, self._present = ids.clamp_min(0), ids >= 0
        self._label_column, self._labelled = labels.clamp_min(0)[:, None], labels >= 0
        support = torch.where(self._present, logits.gather(1, self._columns), -math.inf)
        label = torch.where(self._labelled, logits.gather(1, self._label_column)[:, 0], -math.inf)
        self.reading = Reading(support, label)
        self._total = torch.zeros_like(label)
        if objective.label_smoothing:
            self._total = logits.sum(1) - torch.where(self._present, support, 0.0).sum(1)
        # The minimum with -inf punches out; the minimum with +inf, at padding, changes nothing.
        punch = torch.where(self._present, -math.inf, math.inf).to(logits.dtype)
        self._logits = logits.scatter_reduce_(1, self._columns, punch, "amin")
        self._powers: tuple[Tensor, Tensor] | None = None  # at T and at 1, one tensor where T is 1
        self._shift = torch.zeros_like(label)  # what was subtracted from z before exp
        self._some = torch.zeros_like(self._labelled)  # where anything is outside the support

    def rest_sums(self) -> RestSums:
        """One pass; the powers stay for the gradient."""
        maximum = self._logits.amax(1)
        powers_t, powers_1 = self._make_powers(maximum)
        sum_1 = powers_1.sum(1)
        sum_t = sum_1 if powers_t is powers_1 else powers_t.sum(1)
        return RestSums(maximum, sum_t, sum_1, self._total)

    def gradient(self, rest: Rest, gradient: LogitGradient, out: Tensor | None) -> Tensor:
        """The identity of docs/losses.md, 8, from powers that are there or, in a second pass, made anew."""
        powers_t, powers_1 = self._powers or self._make_powers(rest.maximum)
        gradient = gradient.scaled(self._scale)
        by_t, by_1 = (
            torch.where(self._some, factor * torch.where(self._some, shift - log_sum, 0.0).exp(), 0.0)[
                :, None
            ]
            for factor, shift, log_sum in (
                (gradient.rest_t, self._shift / self._temperature, rest.t),
                (gradient.rest_1, self._shift, rest.one),
            )
        )
        if powers_t is powers_1:
            dense = powers_1.mul_(by_t + by_1)
        else:
            dense = powers_1.mul_(by_1).addcmul_(powers_t, by_t)
        dense.add_(gradient.uniform[:, None])
        # Support entries are exactly the uniform part so far (exp(-inf) = 0): the rest of theirs is added.
        inside = torch.where(self._present, gradient.support - gradient.uniform[:, None], 0.0)
        dense.scatter_add_(1, self._columns, inside)
        label = torch.where(self._labelled, gradient.label, 0.0)[:, None]
        dense.scatter_add_(1, self._label_column, label)
        if self._slope is not None:
            dense.mul_(self._slope)
        return dense if out is None else out.copy_(dense)

    def _make_powers(self, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """exp((z - maximum) / T) and exp(z - maximum) in the memory of z; T != 1 takes as much again."""
        self._some = maximum > -math.inf
        self._shift = torch.where(self._some, maximum, 0.0)
        shifted = self._logits.sub_(self._shift[:, None])
        powers_t = None if self._temperature == 1.0 else (shifted / self._temperature).exp_()
        powers_1 = shifted.exp_()
        self._powers = (powers_1 if powers_t is None else powers_t, powers_1)
        return self._powers


TORCH = Implementation(block=TorchBlock, assess=assess, prepare=prepare_operand)
