"""The `torch` implementation of the teacher's record: any device, any dtype, a chunk of logits at a time.

A product wants many rows, as it reads the whole weight each time; what is made of their logits wants few, as
it reads them a dozen times and they stay in the cache. So a chunk of logits is made at once, and its record
in slices. Neither a row's largest entries nor its draws need an order of the row: both are looked for in the
few parts of it that can hold them.

N positions, C positions of a slice, V vocabulary (true), k head, n draws, G grid temperatures.
"""

import torch
from torch import Tensor

from sparsekd.kernels.gemm import (
    plain_precision,
    prepare_operand,
    transform_logits,
    wide_dtype,
    wide_product,
)
from sparsekd.kernels.teacher_memory import PART, torch_slice
from sparsekd.kernels.teacher_record import (
    SumsOfRest,
    TeacherInputs,
    TeacherStatistics,
    coalesce_draws,
    sums_of_rest,
    whole_entropy,
)
from sparsekd.kernels.teacher_shard import own_columns, slice_of_shard


def torch_statistics(inputs: TeacherInputs) -> TeacherStatistics:
    """The record of N positions."""
    hidden, whole = inputs.hidden, inputs.head.vocabulary_size
    size = own_columns(inputs.shard, inputs.weight.shape[0], whole)
    record = _one_slice if inputs.shard is None else slice_of_shard
    count, dtype = hidden.shape[0], wide_dtype(hidden.dtype)
    chunk = min(inputs.chunk_positions, max(count, 1))
    step = torch_slice(chunk, inputs.uniforms.shape[1], whole, on_cpu=not hidden.is_cuda)
    bias = None if inputs.bias is None else inputs.bias[:size].to(dtype)
    sums = sums_of_rest(inputs.temperatures, inputs.draw_temperature)
    slices = []
    with plain_precision(hidden.device, hidden.dtype):
        matrix = prepare_operand(inputs.weight[:size])
        # Kept for all chunks: the system gives large memory page by page, dearer than a pass over it.
        room = torch.empty(chunk, size, dtype=dtype, device=hidden.device)
        scratch = torch.empty(2, step, size, dtype=dtype, device=hidden.device)
        # One empty chunk where there are no positions, so that shapes and dtypes come out all the same.
        for start in range(0, max(count, 1), chunk):
            length = min(chunk, count - start)
            rows = hidden[start : start + length]
            products = wide_product(prepare_operand(rows), matrix.T, out=room[:length])
            for first in range(0, max(length, 1), step):
                logits, _ = transform_logits(products[first : first + step], bias, inputs.head)
                here = slice(start + first, start + min(first + step, length))
                slices.append(
                    record(logits, inputs.labels[here], inputs.uniforms[here], inputs, sums, scratch)
                )
    return TeacherStatistics(*(torch.cat(parts) for parts in zip(*slices, strict=True)))


def _one_slice(
    logits: Tensor,
    labels: Tensor,
    uniforms: Tensor,
    inputs: TeacherInputs,
    sums: SumsOfRest,
    scratch: Tensor,
) -> TeacherStatistics:
    """The record of C positions; uses up `logits` [C, V], and `scratch` [2, C or more, V]."""
    powers, products = scratch[:, : logits.shape[0]]
    normaliser = _logsumexp(logits, powers)
    true_logprob = (logits.gather(1, labels.clamp_min(0)[:, None]) - normaliser)[:, 0]
    head_ids = top_ids(logits, normaliser, inputs.k)
    head_logprobs = logits.gather(1, head_ids) - normaliser
    rest = logits.scatter_(1, head_ids, -torch.inf)
    maximum = rest.amax(1, keepdim=True)
    reference = torch.where(maximum > -torch.inf, maximum, 0.0)  # an empty rest has no largest entry
    # Now the largest of each rest is 0; NaN stays. What is outside is held finite: 0 times -inf is NaN.
    rest.sub_(reference + 0.0 * normaliser).clamp_(min=torch.finfo(rest.dtype).min)
    offset = (reference - normaliser)[:, 0]
    log_sums, entropies = {}, {}
    tail = coalesce_draws(uniforms.int()[:, :0])
    for index, temperature in enumerate(sums.temperatures):
        if sums.squares[index]:
            powers.square_()
        else:
            torch.div(rest, temperature, out=powers).exp_()
        total = powers.sum(1)
        some = total != 0  # NaN is no empty rest
        log_total = torch.where(some, total, 1.0).log()
        log_sums[temperature] = torch.where(some, log_total + offset / temperature, -torch.inf)
        if index in sums.entropies:
            # -sum p log p = log total - sum of powers * rest / T / total.
            weighted = torch.mul(powers, rest, out=products).sum(1) / temperature
            entropies[temperature] = torch.where(
                some, log_total - weighted / torch.where(some, total, 1.0), 0.0
            )
        if index == sums.drawn:
            tail = draw_tail(powers, uniforms)
    tail_ids, tail_counts = tail
    tail_logprobs = rest.gather(1, tail_ids.clamp_min(0).long()) + offset[:, None]
    log_rest = [log_sums[temperature] for temperature in inputs.temperatures]
    drawn_at = inputs.draw_temperature
    return TeacherStatistics(
        head_ids=head_ids.int(),
        head_logprobs=head_logprobs.float(),
        tail_ids=tail_ids,
        tail_counts=tail_counts,
        log_rest=torch.stack(log_rest, 1).float() if log_rest else rest.new_empty(rest.shape[0], 0).float(),
        rest_entropy=entropies[1.0].float(),
        true_logprob=torch.where(labels >= 0, true_logprob, 0.0).float(),
        entropy=whole_entropy(head_logprobs, log_sums[drawn_at], entropies[drawn_at], drawn_at).float(),
        tail_logprobs=torch.where(tail_ids >= 0, tail_logprobs, -torch.inf).float(),
    )


def _logsumexp(logits: Tensor, scratch: Tensor) -> Tensor:
    """torch.logsumexp over V, [C, 1], without memory of its own; uses up `scratch`, both [C, V].

    NaN where the largest entry is no finite number: such a row is no distribution, and every plane says so.
    """
    maximum = logits.amax(1, keepdim=True)
    return torch.sub(logits, maximum, out=scratch).exp_().sum(1, keepdim=True).log_().add_(maximum)


def top_ids(logits: Tensor, normaliser: Tensor, k: int) -> Tensor:
    """Ids of the k most likely entries of each row, descending, ties by ascending id: int64 [C, k].

    Ranked after normalisation: two logits may round to one log-probability, and the tie rule is of those.
    `torch.topk` leaves the order of equal values open, and which of them it takes at the edge. So it is asked
    for one more; rows whose edge is tied are sorted whole.

    Args:
        logits: [C, V].
        normaliser: [C, 1], their logsumexp.
        k: 0 to V.
    """
    size = logits.shape[1]
    if k == 0:
        return torch.empty(logits.shape[0], 0, dtype=torch.int64, device=logits.device)
    candidates = _largest_parts(logits, k + 1)
    top, places = (logits.gather(1, candidates) - normaliser).topk(min(k + 1, size), dim=1)
    edge_tied = top[:, k - 1] == top[:, k] if k < size else torch.zeros_like(top[:, 0], dtype=torch.bool)
    ids = candidates.gather(1, places[:, :k]).sort(dim=1).values
    values = logits.gather(1, ids) - normaliser
    ids = ids.gather(1, values.sort(dim=1, descending=True, stable=True).indices)
    tied = edge_tied.nonzero()[:, 0]
    if tied.numel():
        whole = logits[tied] - normaliser[tied]
        ids[tied] = whole.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return ids


def _largest_parts(logits: Tensor, number: int) -> Tensor:
    """Columns among which are the `number` largest entries of each row, or others of equal value.

    The parts with the largest maxima: an entry of another part is no larger than `number` of theirs.

    Args:
        logits: [C, V].
        number: 1 or more.

    Returns:
        int64 [C, M].
    """
    count, size = logits.shape
    parts = size // PART
    columns = torch.arange(size, device=logits.device)
    if 2 * number > parts:
        return columns.expand(count, size)
    maxima = logits[:, : parts * PART].unflatten(1, (parts, PART)).amax(2)
    chosen = maxima.topk(number, dim=1).indices[:, :, None] * PART + columns[:PART]
    return torch.cat([chosen.flatten(1), columns[parts * PART :].expand(count, -1)], dim=1)


def draw_tail(powers: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws with replacement from powers / their sum by inverse CDF, coalesced.

    A draw finds its part by the parts' cumulative sums, and its entry by those inside of the part; where the
    parts of all draws are no less than the row, by those of the row.

    Args:
        powers: [C, V] unnormalised probabilities, the largest of a row 1; a row of zeros gives no draws.
        uniforms: float64 [C, n] in [0, 1).

    Returns:
        (ids int32 [C, n] distinct, ascending, padded with -1; counts int32 [C, n] padded with 0).
    """
    if uniforms.numel() == 0:
        return coalesce_draws(uniforms.int())
    size = powers.shape[1]
    if uniforms.shape[1] * PART >= size:
        cumulative = powers.to(torch.float64, copy=True).cumsum_(1)
        drawn = _first_above(cumulative, uniforms * cumulative[:, -1:])
        return coalesce_draws(torch.where(cumulative[:, -1:] > 0, drawn, -1))
    whole = size // PART * PART
    masses = torch.cat(
        [powers[:, :whole].unflatten(1, (size // PART, PART)).sum(2), powers[:, whole:].sum(1, keepdim=True)],
        dim=1,
    )
    # float64: in float32 a cumulative sum over 10^5 entries loses those below its 10^-7.
    cumulative = masses.double().cumsum_(1)
    points = uniforms * cumulative[:, -1:]
    part = _first_above(cumulative, points)  # (C, n)
    before = torch.where(part > 0, cumulative.gather(1, (part - 1).clamp_min(0)), 0.0)
    columns = part[:, :, None] * PART + torch.arange(PART, device=powers.device)  # (C, n, PART)
    entries = powers.gather(1, columns.clamp_max(size - 1).flatten(1)).view(columns.shape)
    inside = torch.where(columns < size, entries, 0.0).double().cumsum_(2)
    drawn = part * PART + _first_above(inside, (points - before)[:, :, None])[:, :, 0]
    return coalesce_draws(torch.where(cumulative[:, -1:] > 0, drawn, -1))


def _first_above(cumulative: Tensor, points: Tensor) -> Tensor:
    """Index of the first sum that exceeds a point: its own summand is above 0.

    A point that rounds up to the total has none such; it belongs to the last summand above 0.

    Args:
        cumulative: float64 [..., S], sums of what is 0 or more.
        points: float64 [..., n].

    Returns:
        int64 [..., n].
    """
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, points.contiguous(), right=True), last)
