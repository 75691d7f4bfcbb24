"""The few numbers of a position through which every objective sees the student, and the way back from them.

An objective is a plain function of `Statistics`. Its gradient with respect to them, made by autograd,
becomes the gradient of every logit by one identity (docs/losses.md, 8), so a new objective needs no new
kernel.

N positions, K support entries, V vocabulary, S the support (ids in use), T temperature.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Sufficient statistics of the student's logits z at N positions; u = z / T (docs/losses.md, 3).

    Attributes:
        support: [N, K], u at the support ids; -inf at padding.
        rest_t: [N], logsumexp of u over the vocabulary outside the support; -inf where nothing is outside.
        rest_1: [N], the same of z.
        label: [N], z at the label, read before anything is punched out; 0 where the label is ignored.
        mean: [N], mean of z over the true vocabulary; 0 where no label smoothing asks for it.
    """

    support: Tensor
    rest_t: Tensor
    rest_1: Tensor
    label: Tensor
    mean: Tensor

    def where(self, rows: Tensor) -> "Statistics":
        """These at some rows, bool [N], and 0 at the others, whose values and gradients go nowhere."""
        return Statistics(
            *(torch.where(rows if value.ndim == 1 else rows[:, None], value, 0.0) for value in self)
        )


class LogitGradient(NamedTuple):
    """The gradient of one scalar for every logit, as a few numbers per position (docs/losses.md, 8).

    dz_v = rest_t * exp(u_v - lse_t) + rest_1 * exp(z_v - lse_1) + uniform    for v outside the support,
    dz_v = support_v                                                          for v in it,
    and `label` is added at the label, in or out of the support.

    Attributes:
        rest_t: [N]; rest_1: [N]; uniform: [N]; support: [N, K], 0 at padding; label: [N].
    """

    rest_t: Tensor
    rest_1: Tensor
    uniform: Tensor
    support: Tensor
    label: Tensor

    def scaled(self, factor: float) -> "LogitGradient":
        """The same gradient times a number."""
        return self if factor == 1.0 else LogitGradient(*(value * factor for value in self))


def logit_gradient(
    gradients: Statistics, support_ids: Tensor, *, temperature: float, vocabulary_size: int
) -> LogitGradient:
    """The identity: from gradients of the statistics to gradients of the logits (docs/losses.md, 8).

    Args:
        gradients: d loss / d statistics, shapes of `Statistics`.
        support_ids: int64 [N, K], -1 at padding.
        temperature: T.
        vocabulary_size: V, the true one.
    """
    uniform = gradients.mean / vocabulary_size
    support = gradients.support / temperature + uniform[:, None]
    return LogitGradient(
        rest_t=gradients.rest_t / temperature,
        rest_1=gradients.rest_1,
        uniform=uniform,
        support=torch.where(support_ids >= 0, support, 0.0),
        label=gradients.label,
    )
