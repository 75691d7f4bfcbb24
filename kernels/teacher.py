"""What the store keeps of a teacher: head, draws, log R_T, entropies, true-token log-probability.

N positions, C positions of a chunk, V vocabulary (true), H hidden, k head, n draws, G grid temperatures.
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
from sparsekd.kernels.objective import HeadTransform


class TeacherStatistics(NamedTuple):
    """The record of N positions (docs/losses.md, 7).

    Attributes:
        head_ids: int32 [N, k], by descending log-probability, ties by ascending id.
        head_logprobs: float32 [N, k], of the full vocabulary at temperature 1.
        tail_ids: int32 [N, n], distinct drawn ids, ascending; -1 pads.
        tail_counts: int32 [N, n], draws of that id; 0 pads; a position sums to n, or to 0 without a rest.
        log_rest: float32 [N, G], log of the sum of exp(l_v / T) outside the head; -inf where that is empty.
        rest_entropy: float32 [N], nats, of the rest renormalised at temperature 1; 0 where it is empty.
        true_logprob: float32 [N], of the label; 0 where there is none.
        entropy: float32 [N], nats, of the whole distribution at the draw temperature.
    """

    head_ids: Tensor
    head_logprobs: Tensor
    tail_ids: Tensor
    tail_counts: Tensor
    log_rest: Tensor
    rest_entropy: Tensor
    true_logprob: Tensor
    entropy: Tensor


@torch.no_grad()
def teacher_statistics(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    labels: Tensor,
    head: HeadTransform,
    k: int,
    n: int,
    temperatures: Sequence[float],
    draw_temperature: float,
    uniforms: Tensor,
    chunk_positions: int,
) -> TeacherStatistics:
    """The teacher's record of N positions, from float32 logits, a chunk at a time.

    Args:
        hidden: [N, H], bfloat16, float32 or float64.
        weight: [V, H], dtype of `hidden`; rows from head.vocabulary_size on are padding.
        bias: [V], dtype of `hidden`, or None.
        labels: int64 [N], the true next token; -100 where there is none.
        head: softcap, scale and true vocabulary size.
        k: entries of the exact head, 0 to the vocabulary size.
        n: draws with replacement from the rest.
        temperatures: the grid of log R_T.
        draw_temperature: temperature of the draws and of `entropy`.
        uniforms: float64 [N, n] in [0, 1), one per draw; they decide the draws and nothing else does.
        chunk_positions: positions whose logits exist at one time.

    Raises:
        ValueError: an argument of the wrong shape, dtype or value.
    """
    _check(hidden, weight, bias, labels, head, k, n, uniforms, chunk_positions)
    count, size = hidden.shape[0], head.vocabulary_size
    bias = None if bias is None else bias[:size].to(wide_dtype(hidden.dtype))
    chunks = []
    with plain_precision(hidden.device, hidden.dtype):
        matrix = prepare_operand(weight[:size])
        # One empty chunk where there are no positions, so that shapes and dtypes come out all the same.
        for start in range(0, max(count, 1), chunk_positions):
            rows = slice(start, min(start + chunk_positions, count))
            products = wide_product(prepare_operand(hidden[rows]), matrix.T)
            logits, _ = transform_logits(products, bias, head)
            chunks.append(_one_chunk(logits, labels[rows], k, temperatures, draw_temperature, uniforms[rows]))
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
    entropy = _entropy(logprobs, draw_temperature)
    head_ids = top_ids(logprobs, k)
    head_logprobs = logprobs.gather(1, head_ids)
    rest = logprobs.scatter_(1, head_ids, -torch.inf)
    # Summed directly over the rest, never as 1 minus the head.
    log_rest = [_at(rest, temperature).logsumexp(1) for temperature in temperatures]
    tail_ids, tail_counts = draw_tail(rest, draw_temperature, uniforms)
    return TeacherStatistics(
        head_ids=head_ids.int(),
        head_logprobs=head_logprobs.float(),
        tail_ids=tail_ids,
        tail_counts=tail_counts,
        log_rest=torch.stack(log_rest, 1).float() if log_rest else rest.new_empty(rest.shape[0], 0).float(),
        rest_entropy=_entropy(rest, 1.0).float(),
        true_logprob=torch.where(labels >= 0, true_logprob, 0.0).float(),
        entropy=entropy.float(),
    )


def _at(logprobs: Tensor, temperature: float) -> Tensor:
    """logprobs / temperature, without a pass over memory at 1."""
    return logprobs if temperature == 1.0 else logprobs / temperature


def _entropy(logprobs: Tensor, temperature: float) -> Tensor:
    """Entropy in nats of softmax(logprobs / temperature), [C]; -inf is probability 0, all -inf gives 0."""
    scaled = _at(logprobs, temperature)
    total = scaled.logsumexp(1, keepdim=True)
    scaled = scaled - torch.where(total > -torch.inf, total, 0.0)
    probabilities = scaled.exp()
    # 0 * -inf is NaN: the factor is masked, not the product.
    return 0.0 - (probabilities * torch.where(scaled > -torch.inf, scaled, 0.0)).sum(1)


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


def draw_tail(rest: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws with replacement from softmax(rest / temperature) by inverse CDF, coalesced.

    Args:
        rest: [C, V] log-probabilities, -inf outside the rest; a row of nothing but -inf gives no draws.
        temperature: of the draws.
        uniforms: float64 [C, n] in [0, 1).

    Returns:
        (ids int32 [C, n] distinct, ascending, padded with -1; counts int32 [C, n] padded with 0).
    """
    count, n = uniforms.shape
    ids = torch.full((count, n), -1, dtype=torch.int32, device=rest.device)
    counts = torch.zeros(count, n, dtype=torch.int32, device=rest.device)
    if n == 0 or count == 0:
        return ids, counts
    maximum = rest.amax(1, keepdim=True)
    some = maximum[:, 0] > -torch.inf
    # float64: in float32 a cumulative sum over 10^5 entries loses those below its 10^-7.
    shifted = (rest - torch.where(maximum > -torch.inf, maximum, 0.0)).double()
    cumulative = shifted.div_(temperature).exp_().cumsum_(1)
    total = cumulative[:, -1:].contiguous()
    # The first id whose cumulative sum exceeds the point has probability > 0. A point that rounds up to the
    # total itself has none such; it belongs to the last id of probability > 0.
    last = torch.searchsorted(cumulative, total)
    drawn = torch.searchsorted(cumulative, uniforms * total, right=True)
    drawn = torch.minimum(drawn, last).sort(dim=1).values

    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = is_new.cumsum(1) - 1
    ids.scatter_(1, place, drawn.int())
    counts.scatter_add_(1, place, torch.ones_like(counts))
    return torch.where(some[:, None], ids, -1), torch.where(some[:, None], counts, 0)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head: HeadTransform,
    k: int,
    n: int,
    uniforms: Tensor,
    chunk_positions: int,
) -> None:
    count, rows, size = hidden.shape[0], weight.shape[0], head.vocabulary_size

    def expect(good: bool, argument: str, found: object, expected: str) -> None:
        if not good:
            raise ValueError(f"{argument} is {found}, expected {expected}")

    expect(weight.dtype == hidden.dtype, "weight's dtype", weight.dtype, f"{hidden.dtype} as hidden")
    expect(
        weight.shape[1] == hidden.shape[1], "weight's shape", tuple(weight.shape), f"[V, {hidden.shape[1]}]"
    )
    expect(0 < size <= rows, "head.vocabulary_size", size, f"a number from 1 to the weight's {rows} rows")
    expect(
        bias is None or bias.shape == (rows,), "bias", bias is not None and tuple(bias.shape), f"({rows},)"
    )
    expect(labels.shape == (count,), "labels' shape", tuple(labels.shape), f"({count},)")
    expect(labels.dtype == torch.int64, "labels' dtype", labels.dtype, "torch.int64")
    expect(0 <= k <= size, "k", k, f"a number from 0 to the vocabulary size {size}")
    expect(uniforms.shape == (count, n), "uniforms' shape", tuple(uniforms.shape), f"({count}, {n})")
    expect(uniforms.dtype == torch.float64, "uniforms' dtype", uniforms.dtype, "torch.float64")
    expect(chunk_positions > 0, "chunk_positions", chunk_positions, "a number > 0")
