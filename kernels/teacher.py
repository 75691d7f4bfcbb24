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
    return TeacherStatistics(
        head_ids=head_ids.int(),
        head_logprobs=head_logprobs.float(),
        tail_ids=drawn.tail_ids,
        tail_counts=drawn.tail_counts,
        log_rest=torch.stack(log_rest, 1).float() if log_rest else rest.new_empty(rest.shape[0], 0).float(),
        rest_entropy=masses[1.0].entropy.float(),
        true_logprob=torch.where(labels >= 0, true_logprob, 0.0).float(),
        entropy=_whole_entropy(head_logprobs, drawn, draw_temperature).float(),
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
    some = total > 0
    log_total = torch.where(some, total, 1.0).log()
    log_sum = torch.where(some, log_total + torch.where(some, maximum, 0.0) / temperature, -torch.inf)
    ids, counts = draw_tail(powers, uniforms)
    entropy = torch.zeros_like(total)
    if wants_entropy:
        # -sum p log p = log total - sum powers * scaled / total; 0 * -inf is NaN: the factor is held finite.
        weighted = powers.mul_(scaled.clamp_min(torch.finfo(rest.dtype).min)).sum(1)
        entropy = torch.where(some, log_total - weighted / torch.where(some, total, 1.0), 0.0)
    return _RestMass(log_sum, entropy, ids, counts)


def _whole_entropy(head_logprobs: Tensor, rest: _RestMass, temperature: float) -> Tensor:
    """Entropy in nats of the whole distribution at T, [C]: that of its parts, plus the rest's own."""
    parts = torch.cat([head_logprobs / temperature, rest.log_sum[:, None]], dim=1)
    logs = parts - parts.logsumexp(1, keepdim=True)
    probabilities = logs.exp()
    own = torch.where(logs > -torch.inf, logs, 0.0)
    return 0.0 - (probabilities * own).sum(1) + probabilities[:, -1] * rest.entropy


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
    count, n = uniforms.shape
    ids = torch.full((count, n), -1, dtype=torch.int32, device=powers.device)
    counts = torch.zeros(count, n, dtype=torch.int32, device=powers.device)
    if n == 0 or count == 0:
        return ids, counts
    # float64: in float32 a cumulative sum over 10^5 entries loses those below its 10^-7.
    cumulative = powers.cumsum(1, dtype=torch.float64)
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
    some = total > 0
    return torch.where(some, ids, -1), torch.where(some, counts, 0)


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
