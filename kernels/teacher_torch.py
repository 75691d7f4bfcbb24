"""The `torch` implementation of the teacher's record: any device, any dtype, a chunk of logits at a time.

N positions, C positions of a chunk, V vocabulary (true), k head, n draws, G grid temperatures.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.kernels.gemm import (
    plain_precision,
    prepare_operand,
    transform_logits,
    wide_dtype,
    wide_product,
)
from sparsekd.kernels.teacher_record import TeacherInputs, TeacherStatistics, coalesce_draws, whole_entropy


def torch_statistics(inputs: TeacherInputs) -> TeacherStatistics:
    """The record of N positions."""
    hidden, size = inputs.hidden, inputs.head.vocabulary_size
    count, chunk = hidden.shape[0], inputs.chunk_positions
    bias = None if inputs.bias is None else inputs.bias[:size].to(wide_dtype(hidden.dtype))
    chunks = []
    with plain_precision(hidden.device, hidden.dtype):
        matrix = prepare_operand(inputs.weight[:size])
        # One empty chunk where there are no positions, so that shapes and dtypes come out all the same.
        for start in range(0, max(count, 1), chunk):
            rows = slice(start, min(start + chunk, count))
            products = wide_product(prepare_operand(hidden[rows]), matrix.T)
            logits, _ = transform_logits(products, bias, inputs.head)
            chunks.append(
                _one_chunk(
                    logits,
                    inputs.labels[rows],
                    inputs.k,
                    inputs.temperatures,
                    inputs.draw_temperature,
                    inputs.uniforms[rows],
                )
            )
    return TeacherStatistics(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _one_chunk(
    logits: Tensor,
    labels: Tensor,
    k: int,
    temperatures: Sequence[float],
    draw_temperature: float,
    uniforms: Tensor,
) -> TeacherStatistics:
    """The record of C positions; uses up `logits` [C, V]."""
    # Ranked after normalisation: two logits may round to one log-probability, and the tie rule is of those.
    logprobs = logits.sub_(logits.logsumexp(1, keepdim=True))
    true_logprob = logprobs.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    head_ids = top_ids(logprobs, k)
    head_logprobs = logprobs.gather(1, head_ids)
    rest = logprobs.scatter_(1, head_ids, -torch.inf)
    maximum = rest.amax(1)
    some = maximum > -torch.inf
    rest.sub_(torch.where(some, maximum, 0.0)[:, None])  # now the largest of each rest is 0
    # The entropies are wanted at 1 and at the draw temperature, the mass at every temperature of the grid.
    masses = {
        temperature: _rest_mass(
            rest,
            maximum,
            temperature,
            wants_entropy=temperature in (1.0, draw_temperature),
            uniforms=uniforms if temperature == draw_temperature else uniforms[:, :0],
        )
        for temperature in dict.fromkeys((*temperatures, 1.0, draw_temperature))
    }
    log_rest = [masses[temperature].log_sum for temperature in temperatures]
    drawn = masses[draw_temperature]
    tail_columns = drawn.tail_ids.clamp_min(0).long()
    tail_logprobs = rest.gather(1, tail_columns) + torch.where(some, maximum, 0.0)[:, None]
    return TeacherStatistics(
        head_ids=head_ids.int(),
        head_logprobs=head_logprobs.float(),
        tail_ids=drawn.tail_ids,
        tail_counts=drawn.tail_counts,
        log_rest=torch.stack(log_rest, 1).float() if log_rest else rest.new_empty(rest.shape[0], 0).float(),
        rest_entropy=masses[1.0].entropy.float(),
        true_logprob=torch.where(labels >= 0, true_logprob, 0.0).float(),
        entropy=whole_entropy(head_logprobs, drawn.log_sum, drawn.entropy, draw_temperature).float(),
        tail_logprobs=torch.where(drawn.tail_ids >= 0, tail_logprobs, -torch.inf).float(),
    )


class _RestMass(NamedTuple):
    """The rest of C positions at one temperature."""

    log_sum: Tensor  # [C], log of the sum of exp(l / T); -inf where the rest is empty
    entropy: Tensor  # [C], nats, of the rest renormalised; 0 where it is empty or was not wanted
    tail_ids: Tensor  # int32 [C, n], see draw_tail; n = 0 where no draws are wanted
    tail_counts: Tensor  # int32 [C, n]


def _rest_mass(
    rest: Tensor, maximum: Tensor, temperature: float, *, wants_entropy: bool, uniforms: Tensor
) -> _RestMass:
    """Mass, entropy and draws of the rest at T in few passes over memory.

    Args:
        rest: [C, V] log-probabilities less their `maximum`, -inf outside the rest; kept as it is.
        maximum: [C], -inf where the rest is empty.
        temperature: T.
        wants_entropy: whether `entropy` is made; else it is 0.
        uniforms: float64 [C, n], n = 0 where no draws are wanted.
    """
    scaled = rest if temperature == 1.0 else rest / temperature
    powers = scaled.exp()
    total = powers.sum(1)
    some = total != 0  # NaN is no empty rest
    log_total = torch.where(some, total, 1.0).log()
    log_sum = torch.where(some, log_total + torch.where(some, maximum, 0.0) / temperature, -torch.inf)
    ids, counts = draw_tail(powers, uniforms)
    entropy = torch.zeros_like(total)
    if wants_entropy:
        # -sum p log p = log total - sum powers * scaled / total; 0 * -inf is NaN: the factor is held finite.
        weighted = powers.mul_(scaled.clamp_min(torch.finfo(rest.dtype).min)).sum(1)
        entropy = torch.where(some, log_total - weighted / torch.where(some, total, 1.0), 0.0)
    return _RestMass(log_sum, entropy, ids, counts)


def top_ids(values: Tensor, k: int) -> Tensor:
    """Ids of the k largest values of each row, descending, ties by ascending id: int64 [C, k] from [C, V].

    `torch.topk` leaves the order of equal values open, and which of them it takes at the edge. So it is asked
    for one more; rows whose edge is tied are sorted whole.
    """
    size = values.shape[1]
    if k == 0:
        return torch.empty(values.shape[0], 0, dtype=torch.int64, device=values.device)
    top, ids = values.topk(min(k + 1, size), dim=1)
    edge_tied = top[:, k - 1] == top[:, k] if k < size else torch.zeros_like(top[:, 0], dtype=torch.bool)
    ids = ids[:, :k].sort(dim=1).values
    order = values.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
    ids = ids.gather(1, order)
    tied = edge_tied.nonzero()[:, 0]
    if tied.numel():
        ids[tied] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return ids


def draw_tail(powers: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws with replacement from powers / their sum by inverse CDF, coalesced.

    Args:
        powers: [C, V] unnormalised probabilities, the largest of a row 1; a row of zeros gives no draws.
        uniforms: float64 [C, n] in [0, 1).

    Returns:
        (ids int32 [C, n] distinct, ascending, padded with -1; counts int32 [C, n] padded with 0).
    """
    if uniforms.numel() == 0:
        return coalesce_draws(uniforms.int())
    # float64: in float32 a cumulative sum over 10^5 entries loses those below its 10^-7.
    cumulative = powers.to(torch.float64, copy=True)
    cumulative.cumsum_(1)
    total = cumulative[:, -1:].contiguous()
    # The first id whose cumulative sum exceeds the point has probability > 0. A point that rounds up to the
    # total itself has none such; it belongs to the last id of probability > 0.
    last = torch.searchsorted(cumulative, total)
    drawn = torch.searchsorted(cumulative, uniforms * total, right=True)
    return coalesce_draws(torch.where(total > 0, torch.minimum(drawn, last), -1))
