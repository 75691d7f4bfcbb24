"""Figures of merit at one position, from a model's dense logits and what is known of the teacher.

What is known is either the dense teacher, and then every figure is exact, or a stored record: an exact head,
the mass of the rest, and draws from the rest. `evaluate` says of each figure which of the three it is.

Shapes: N positions, V vocabulary, k head entries, n draws. p is the teacher, q the model; all logarithms are
natural and everything is at temperature 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class OwnScores(NamedTuple):
    """What a model says by itself about the true next tokens; every tensor is [N]."""

    loss: Tensor  # float32, nats: -log q(true token)
    top_ids: Tensor  # int64
    confidence: Tensor  # float32, q of the top id
    hit: Tensor  # bool, the top id is the true token
    entropy: Tensor  # float32, nats


def own_scores(log_q: Tensor, labels: Tensor) -> OwnScores:
    """Scores of one model against the text.

    Args:
        log_q: float [N, V], log-probabilities.
        labels: int64 [N], the true next tokens, each below V.
    """
    top_logprobs, top_ids = log_q.max(-1)
    return OwnScores(
        loss=-log_q.gather(-1, labels[:, None])[:, 0],
        top_ids=top_ids,
        confidence=top_logprobs.exp(),
        hit=top_ids == labels,
        entropy=_weighted(log_q, -log_q),
    )


def dense_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), [N, V] -> [N], exact."""
    return _weighted(log_p, log_p - log_q)


def dense_acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v min(p_v, q_v), [N, V] -> [N], exact.

    The probability that speculative decoding keeps a token which the model drafts and the teacher checks
    (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6).
    """
    return torch.minimum(log_p, log_q).exp().sum(-1)


def bucket_kl(log_q: Tensor, head_ids: Tensor, head_logprobs: Tensor, log_rest: Tensor) -> Tensor:
    """KL over the head and one outcome for all the rest: a lower bound of KL(p || q), [N].

    Merging outcomes never raises a divergence (data processing inequality).

    Args:
        log_q: float [N, V].
        head_ids: int64 [N, k].
        head_logprobs: float [N, k], full-vocabulary log-probabilities of p.
        log_rest: float [N], log of the rest's mass at temperature 1; -inf where the rest is empty.
    """
    head = _weighted(head_logprobs, head_logprobs - log_q.gather(-1, head_ids))
    # An empty rest adds 0; its logarithm is replaced before the product, not after.
    present = log_rest > -torch.inf
    log_mass = torch.where(present, log_rest, 0.0)
    log_q_rest = torch.where(present, _log_rest(log_q, head_ids), 0.0)
    return head + torch.where(present, log_mass.exp() * (log_mass - log_q_rest), 0.0)


def sampled_kl(
    log_q: Tensor,
    head_ids: Tensor,
    head_logprobs: Tensor,
    tail_ids: Tensor,
    tail_counts: Tensor,
    log_rest: Tensor,
    entropy: Tensor,
) -> Tensor:
    """-entropy - sum_head p log q - R sum_draws (count / n) log q: an unbiased estimate of KL(p || q), [N].

    A single position may be negative.

    Args:
        log_q: float [N, V].
        head_ids: int64 [N, k].
        head_logprobs: float [N, k].
        tail_ids: int64 [N, n], drawn from the rest of p at temperature 1; -1 is padding.
        tail_counts: float [N, n], how often each was drawn; they sum to n, or to 0 where the rest is empty.
        log_rest: float [N].
        entropy: float [N], of p at temperature 1.
    """
    head = _weighted(head_logprobs, log_q.gather(-1, head_ids))
    # An id that was not drawn has share 0, and 0 times -inf would be NaN.
    drawn = torch.where(tail_counts > 0, log_q.gather(-1, tail_ids.clamp_min(0)), 0.0)
    share = tail_counts / tail_counts.sum(-1, keepdim=True).clamp_min(1.0)
    return -entropy - head - log_rest.exp() * (share * drawn).sum(-1)


def bucket_acceptance(log_q: Tensor, head_ids: Tensor, head_logprobs: Tensor, log_rest: Tensor) -> Tensor:
    """sum_head min(p, q) + min(p of the rest, q of the rest): an upper bound of sum_v min(p_v, q_v), [N].

    A minimum of two sums is at least the sum of the minima.
    """
    head = torch.minimum(head_logprobs, log_q.gather(-1, head_ids)).exp().sum(-1)
    return head + torch.minimum(log_rest, _log_rest(log_q, head_ids)).exp()


def _weighted(log_p: Tensor, values: Tensor) -> Tensor:
    """sum_v p_v values_v, [N, J] -> [N]; where p_v is 0 the value, which may be infinite, is not read."""
    return (log_p.exp() * torch.where(log_p > -torch.inf, values, 0.0)).sum(-1)


def _log_rest(log_q: Tensor, head_ids: Tensor) -> Tensor:
    """log of the mass of q outside the head, summed directly; -inf where the head is the whole vocabulary."""
    return log_q.scatter(-1, head_ids, -torch.inf).logsumexp(-1)
