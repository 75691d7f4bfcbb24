"""The `torch` implementation of the teacher's record: any device, any dtype, a chunk of logits at a time.

A product wants many rows, as it reads the whole weight each time; what is made of their logits wants few, as
it reads them a dozen times and they stay in the cache. So a chunk of logits is made at once, and its record
in slices. Neither a row's largest entries nor its draws need an order of the row: both are looked for in the
few parts of it that can hold them.

N positions, C positions of a slice, V vocabulary (true; of a split head, this rank's part of it), k head,
n draws, G grid temperatures.
"""

import math

import torch
from torch import Tensor

from sparsekd.kernels.gemm import (
    plain_precision,
    prepare_operand,
    transform_logits,
    wide_dtype,
    wide_product,
)
from sparsekd.kernels.shard import VocabularyShard
from sparsekd.kernels.teacher_memory import PART, torch_slice
from sparsekd.kernels.teacher_record import (
    SumsOfRest,
    TeacherInputs,
    TeacherStatistics,
    coalesce_draws,
    first_above,
    sums_of_rest,
    whole_entropy,
)
from sparsekd.kernels.teacher_shard import (
    added,
    drawn_by_all,
    highest,
    own_columns,
    points_here,
    values_at,
    whole_head,
)


def torch_statistics(inputs: TeacherInputs) -> TeacherStatistics:
    """The record of N positions."""
    hidden, whole = inputs.hidden, inputs.head.vocabulary_size
    size = own_columns(inputs.shard, inputs.weight.shape[0], whole)
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
                    _one_slice(logits, inputs.labels[here], inputs.uniforms[here], inputs, sums, scratch)
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
    """The record of C positions; uses up `logits` [C, V], and `scratch` [2, C or more, V].

    The row is read as seldom as can be: its largest entries come first, and with them the largest of the
    rest, so that no powers but those of the rest are made: their sum and the head's is the normaliser.
    """
    rest, powers = scratch[:, : logits.shape[0]]
    shard = inputs.shard
    label_logits = values_at(logits, labels.clamp_min(0)[:, None], shard)[:, 0]
    columns, others, known = largest_ids(logits, min(inputs.k, logits.shape[1]))
    columns, entries = in_order(columns, logits.gather(1, columns))
    head = whole_head(columns, entries, inputs.k, shard)
    if shard is not None:
        # Largest entries of this rank that are in no head are of the rest.
        others = torch.cat([others, torch.where(head.is_in, -torch.inf, entries)], 1).amax(1, keepdim=True)
        known = torch.full_like(others, torch.nan)
    maximum = highest(others, shard)
    reference = torch.where(maximum == -torch.inf, 0.0, maximum)  # an empty rest has no largest entry
    # The largest of each rest becomes 0; NaN stays. What is of the head is held finite: 0 times -inf is NaN.
    lowest = torch.finfo(rest.dtype).min
    torch.sub(logits.scatter_(1, columns, torch.where(head.is_in, lowest, entries)), reference, out=rest)
    sums_of_rank, weighted_of_rank = [], []
    tail = coalesce_draws(uniforms.int()[:, :0])
    for index, temperature in enumerate(sums.temperatures):
        if sums.squares[index]:
            powers.square_()
        else:
            torch.div(rest, temperature, out=powers).exp_()
        masses = part_masses(powers)
        sums_of_rank.append(masses.sum(1))
        if index in sums.entropies:
            weighted = torch.mul(powers, rest, out=logits).sum(1)
            if not weighted.isfinite().all():  # an entry of -inf is outside, too
                weighted = torch.mul(powers, rest.clamp_(min=lowest), out=logits).sum(1)
            weighted_of_rank.append(weighted / temperature)
        if index == sums.drawn:
            tail = draw_tail(powers, uniforms, masses, shard)
    totals = added(torch.stack([*sums_of_rank, *weighted_of_rank]), shard)
    weighted_totals = iter(totals[len(sums_of_rank) :])
    log_totals, entropies = {}, {}
    for index, (temperature, total) in enumerate(zip(sums.temperatures, totals, strict=False)):
        some = total != 0  # NaN is no empty rest
        log_totals[temperature] = torch.where(some, torch.where(some, total, 1.0).log(), -torch.inf)
        if index in sums.entropies:
            # -sum p log p = log total - sum of powers * rest / T / total.
            mean = next(weighted_totals) / torch.where(some, total, 1.0)
            entropies[temperature] = torch.where(some, log_totals[temperature] - mean, 0.0)
    of_rest = log_totals[1.0][:, None] + reference
    normaliser = torch.cat([head.values, of_rest], 1).logsumexp(1, keepdim=True)
    normaliser = torch.where(known.isnan(), normaliser, known)
    head_ids, head_logprobs = in_order(head.ids, head.values - normaliser)
    offset = (reference - normaliser)[:, 0]
    log_sums = {T: total + offset / T for T, total in log_totals.items()}
    tail_ids, tail_counts = tail
    tail_logprobs = values_at(rest, tail_ids.clamp_min(0).long(), shard) + offset[:, None]
    log_rest = [log_sums[temperature] for temperature in inputs.temperatures]
    drawn_at = inputs.draw_temperature
    return TeacherStatistics(
        head_ids=head_ids.int(),
        head_logprobs=head_logprobs.float(),
        tail_ids=tail_ids,
        tail_counts=tail_counts,
        log_rest=torch.stack(log_rest, 1).float() if log_rest else rest.new_empty(rest.shape[0], 0).float(),
        rest_entropy=(
            entropies[1.0] + 0.0 * normaliser[:, 0]
        ).float(),  # a maximum over ranks passes over NaN
        true_logprob=torch.where(labels >= 0, label_logits - normaliser[:, 0], 0.0).float(),
        entropy=whole_entropy(head_logprobs, log_sums[drawn_at], entropies[drawn_at], drawn_at).float(),
        tail_logprobs=torch.where(tail_ids >= 0, tail_logprobs, -torch.inf).float(),
    )


def largest_ids(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k most likely entries of each row in any order, and the largest of the others.

    Which of equal ones is taken at the edge is a rule of log-probabilities: the one of smaller id. Two logits
    may round to one log-probability, so rows whose edge is that close are normalised and sorted whole.

    Args:
        logits: [C, V].
        k: 0 to V.

    Returns:
        (ids int64 [C, k]; the largest other logit [C, 1], -inf where there is none, NaN where the row's
        largest entry is no finite number: such a row is no distribution, and every plane says so;
        the logsumexp [C, 1] of the rows that were sorted, NaN elsewhere).
    """
    size = logits.shape[1]
    candidates = _largest_parts(logits, min(k + 1, size))
    top, places = logits.gather(1, candidates).topk(min(k + 1, size), dim=1)
    ids = candidates.gather(1, places[:, :k])
    largest, known = top[:, :1], torch.full_like(top[:, :1], torch.nan)
    if k == size:
        return ids, torch.full_like(largest, -torch.inf) + 0.0 * largest, known
    if k > 0:
        # Each log-probability is rounded by no more than half a unit in the last place of these sums.
        inside, outside = top[:, k - 1], top[:, k]
        close = torch.finfo(top.dtype).eps * (largest[:, 0].abs() + inside.abs() + math.log(size))
        tied = (inside - outside <= close).nonzero()[:, 0]
        if tied.numel():
            known[tied] = logits[tied].logsumexp(1, keepdim=True) + 0.0 * largest[tied]
            ranked = (logits[tied] - known[tied]).sort(dim=1, descending=True, stable=True).indices
            ids[tied], top[tied, k] = (
                ranked[:, :k],
                logits[tied].scatter(1, ranked[:, :k], -torch.inf).amax(1),
            )
    return ids, top[:, k:] + 0.0 * largest, known


def in_order(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [C, k] and their values [C, k] by descending value, ties by ascending id."""
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), values


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


def part_masses(powers: Tensor) -> Tensor:
    """Sums [C, parts] of the parts of each row, from powers [C, V]; a last one may be shorter, or empty."""
    size = powers.shape[1]
    whole = size // PART * PART
    return torch.cat(
        [powers[:, :whole].unflatten(1, (size // PART, PART)).sum(2), powers[:, whole:].sum(1, keepdim=True)],
        dim=1,
    )


def draw_tail(
    powers: Tensor, uniforms: Tensor, masses: Tensor, shard: VocabularyShard | None = None
) -> tuple[Tensor, Tensor]:
    """Draws with replacement from powers / their sum by inverse CDF, coalesced.

    A draw finds its part by the parts' cumulative sums, and its entry by those inside of the part; where the
    parts of all draws are no less than the row, by those of the row.

    Args:
        powers: [C, V] unnormalised probabilities, the largest of a row 1; a row of zeros gives no draws.
        uniforms: float64 [C, n] in [0, 1).
        masses: of the parts of `powers`, from `part_masses`.
        shard: where the powers are those of this rank's columns.

    Returns:
        (ids int32 [C, n] distinct, ascending, padded with -1; counts int32 [C, n] padded with 0).
    """
    if uniforms.numel() == 0:
        return coalesce_draws(uniforms.int())
    in_parts = uniforms.shape[1] * PART < powers.shape[1]
    # float64: in float32 a cumulative sum over 10^5 entries loses those below its 10^-7.
    summands = masses.double() if in_parts else powers.to(torch.float64, copy=True)
    cumulative = summands.cumsum_(1)
    total = cumulative[:, -1:]
    if shard is None:
        drawn = _columns_at(powers, cumulative, uniforms * total, in_parts=in_parts)
        return coalesce_draws(torch.where(total > 0, drawn, -1))
    is_here, points = points_here(total[:, 0], uniforms, shard)
    drawn = _columns_at(powers, cumulative, points, in_parts=in_parts)
    return coalesce_draws(drawn_by_all(drawn, is_here, shard))


def _columns_at(powers: Tensor, cumulative: Tensor, points: Tensor, *, in_parts: bool) -> Tensor:
    """The column in which each point lies, int64 [C, n].

    Args:
        powers: [C, V].
        cumulative: float64, sums of the columns or of the parts.
        points: float64 [C, n], from 0 to the last of these sums.
        in_parts: whether `cumulative` is of parts.
    """
    found = first_above(cumulative, points)  # (C, n)
    if not in_parts:
        return found
    before = torch.where(found > 0, cumulative.gather(1, (found - 1).clamp_min(0)), 0.0)
    columns = found[:, :, None] * PART + torch.arange(PART, device=powers.device)  # (C, n, PART)
    entries = powers.gather(1, columns.clamp_max(powers.shape[1] - 1).flatten(1)).view(columns.shape)
    inside = torch.where(columns < powers.shape[1], entries, 0.0).double().cumsum_(2)
    return found * PART + first_above(inside, (points - before)[:, :, None])[:, :, 0]
