"""The `triton` implementation of the teacher's record: products by cuBLAS, two reads of them by row kernels.

A row's k largest entries are found without ranking the row. The first read leaves in registers the largest
entry of each lane, that is of every BLOCK_V-th column. The k-th largest of those bounds the k-th largest one
from below, and only about k + k^2 / (2 BLOCK_V) entries reach it: the second read lists these and sums the
others.

N positions, C positions of the slab, V vocabulary (true), H hidden, k head, n draws, S sums and P parts of a
row (triton_teacher_rows.py).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparsekd.kernels.gemm import plain_precision, prepare_operand, wide_product
from sparsekd.kernels.memory import row_stride
from sparsekd.kernels.teacher_memory import MOST_ENTRIES, PART, list_room
from sparsekd.kernels.teacher_record import (
    SumsOfRest,
    TeacherInputs,
    TeacherStatistics,
    coalesce_draws,
    sums_of_rest,
    values_of_draws,
    whole_entropy,
)
from sparsekd.kernels.teacher_torch import torch_statistics
from sparsekd.kernels.triton_teacher_rows import collect_kernel, draw_kernel, scan_kernel, settle_kernel

# Columns that the first read takes at a time, and its warps.
BLOCK_V = 2048
SCAN_WARPS = 8
# Parts that the second read takes at a time, and its warps. Whole parts to a warp keep their sums within it;
# and the fewer columns, the fewer blocks hold an entry that must be listed.
PARTS = 4
COLLECT_WARPS = 2
SETTLE_WARPS = 4
# Draws that a program makes at a time.
BLOCK_N = 16
DRAW_WARPS = 4

EMPTY = -(2**63)  # a place of the list that nothing was written to: below every key

# Sums count from an entry of the rest, so they are 1 at least; and float32 ends at 3e38.
SOUND_SUMS = (0.5, 1e30)


class _Rows(NamedTuple):
    """What the kernels leave of all positions."""

    head_ids: Tensor  # int32 [N, k]
    head_logprobs: Tensor  # float32 [N, k]
    drawn: Tensor  # int32 [N, n], draws one by one; -1 where the rest is empty
    drawn_logprobs: Tensor  # float32 [N, n], l of each; -inf where the rest is empty
    label: Tensor  # float32 [N], l of the label
    normaliser: Tensor  # float32 [N], logsumexp of z
    reference: Tensor  # float32 [N], z from which the sums count
    totals: Tensor  # float32 [N, S]
    found: Tensor  # int32 [N], entries above the bound


def triton_statistics(inputs: TeacherInputs) -> TeacherStatistics:
    """The record of N positions; one wait for the device, at the end."""
    if inputs.k > MOST_ENTRIES:
        return torch_statistics(inputs)
    sums = sums_of_rest(inputs.temperatures, inputs.draw_temperature)
    rows = _run_kernels(inputs, sums)
    found = _record(inputs, sums, rows)
    again = (~_sound(inputs, sums, rows)).nonzero()[:, 0]
    if again.numel():
        redone = torch_statistics(
            inputs._replace(
                hidden=inputs.hidden[again],
                labels=inputs.labels[again],
                uniforms=inputs.uniforms[again],
                chunk_positions=max(inputs.chunk_positions // 8, 1),
            )
        )
        for plane, values in zip(found, redone, strict=True):
            plane[again] = values
    return found


def _run_kernels(inputs: TeacherInputs, sums: SumsOfRest) -> _Rows:
    """All kernels, chunk by chunk."""
    hidden, head, k, n = inputs.hidden.contiguous(), inputs.head, inputs.k, inputs.uniforms.shape[1]
    count, size = hidden.shape[0], head.vocabulary_size
    stride, parts, room = row_stride(size), math.ceil(size / PART), list_room(k)
    chunk = min(inputs.chunk_positions, max(count, 1))

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    rows = _Rows(
        head_ids=new(count, k, dtype=torch.int32),
        head_logprobs=new(count, k),
        drawn=new(count, n, dtype=torch.int32),
        drawn_logprobs=new(count, n),
        label=new(count),
        normaliser=new(count),
        reference=new(count),
        totals=new(count, sums.number),
        found=new(count, dtype=torch.int32),
    )
    slab, threshold, chunk_sums = new(chunk, stride), new(chunk), new(chunk, sums.number)
    keys, masses = new(chunk, room, dtype=torch.int64), new(chunk, parts)
    cumulative = new(chunk, parts, dtype=torch.float64)
    bias = slab  # only its dtype is read where a model has none
    if inputs.bias is not None:
        bias = torch.zeros(stride, dtype=torch.float32, device=hidden.device)
        bias[:size] = inputs.bias[:size]
    uniforms, labels = inputs.uniforms.contiguous(), inputs.labels.contiguous()

    softcap = 1.0 if head.softcap is None else head.softcap
    transform = (head.scale, softcap)
    flags: dict[str, Any] = {"HAS_BIAS": inputs.bias is not None, "HAS_SOFTCAP": head.softcap is not None}
    inverses = tuple(1.0 / temperature for temperature in sums.temperatures)
    which: dict[str, Any] = {"INVERSES": inverses, "ENTROPIES": sums.entropies, "DRAWN": sums.drawn}
    block_n = min(BLOCK_N, triton.next_power_of_2(max(n, 1)))
    with plain_precision(hidden.device, hidden.dtype):
        matrix = prepare_operand(inputs.weight[:size])
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            length = part.stop - start
            wide_product(prepare_operand(hidden[part]), matrix.T, out=slab[:length, :size])
            of = _Rows(*(plane[part] for plane in rows))
            scan_kernel[(length,)](
                slab,
                bias,
                labels[part],
                of.normaliser,
                threshold,
                of.reference,
                of.label,
                stride,
                size,
                k,
                *transform,
                BLOCK_V=max(BLOCK_V, triton.next_power_of_2(2 * k)),
                num_warps=SCAN_WARPS,
                **flags,
            )
            keys.fill_(EMPTY)
            collect_kernel[(length,)](
                slab,
                bias,
                of.normaliser,
                threshold,
                of.reference,
                keys,
                of.found,
                chunk_sums,
                masses,
                stride,
                size,
                parts,
                *transform,
                SQUARES=sums.squares,
                ROOM=room,
                PARTS=PARTS,
                PART=PART,
                num_warps=COLLECT_WARPS,
                **which,
                **flags,
            )
            settle_kernel[(length,)](
                slab,
                keys.sort(dim=1, descending=True).values,
                of.found,
                chunk_sums,
                masses,
                of.normaliser,
                of.reference,
                of.head_ids,
                of.head_logprobs,
                of.totals,
                cumulative,
                stride,
                parts,
                k,
                ROOM=room,
                PART=PART,
                BLOCK_P=triton.next_power_of_2(parts),
                num_warps=SETTLE_WARPS,
                **which,
            )
            if n == 0:
                continue
            draw_kernel[(length, triton.cdiv(n, block_n))](
                slab,
                bias,
                of.normaliser,
                of.reference,
                cumulative,
                uniforms[part],
                of.drawn,
                of.drawn_logprobs,
                stride,
                size,
                parts,
                n,
                inverses[sums.drawn],
                *transform,
                STEPS=parts.bit_length(),
                PART=PART,
                BLOCK_N=block_n,
                num_warps=DRAW_WARPS,
                **flags,
            )
    return rows


def _record(inputs: TeacherInputs, sums: SumsOfRest, rows: _Rows) -> TeacherStatistics:
    """The record from what the kernels left (docs/losses.md, 7); anything where a row is not sound."""
    shift = rows.reference.double() - rows.normaliser.double()
    totals = rows.totals.double()
    some = totals[:, : len(sums.temperatures)] > 0
    masses = torch.where(some, totals[:, : len(sums.temperatures)], 1.0)

    def log_sum(temperature: float) -> Tensor:
        """(7.1)"""
        index = sums.temperatures.index(temperature)
        return torch.where(some[:, index], masses[:, index].log() + shift / temperature, -torch.inf)

    def entropy(temperature: float) -> Tensor:
        """(7.2): -sum r log r = log M - sum of powers times exponents / M, M the sum of powers."""
        index = sums.temperatures.index(temperature)
        weighted = totals[:, len(sums.temperatures) + sums.entropies.index(index)]
        value = masses[:, index].log() - weighted / masses[:, index]
        return torch.where(some[:, index], value, 0.0)

    drawn_at = inputs.draw_temperature
    ids, counts = coalesce_draws(rows.drawn)
    log_rest = [log_sum(temperature) for temperature in inputs.temperatures]
    whole = whole_entropy(rows.head_logprobs.double(), log_sum(drawn_at), entropy(drawn_at), drawn_at)
    return TeacherStatistics(
        head_ids=rows.head_ids,
        head_logprobs=rows.head_logprobs,
        tail_ids=ids,
        tail_counts=counts,
        log_rest=torch.stack(log_rest, 1).float() if log_rest else rows.totals[:, :0],
        rest_entropy=entropy(1.0).float(),
        true_logprob=rows.label,
        entropy=whole.float(),
        tail_logprobs=values_of_draws(ids, rows.drawn, rows.drawn_logprobs),
    )


def _sound(inputs: TeacherInputs, sums: SumsOfRest, rows: _Rows) -> Tensor:
    """Bool [N]: the list held every entry above the bound, and no sum left the range of float32."""
    listed = (rows.found >= inputs.k) & (rows.found <= list_room(inputs.k))
    if inputs.k == inputs.head.vocabulary_size:
        return listed
    masses = rows.totals[:, : len(sums.temperatures)]
    return listed & ((masses >= SOUND_SUMS[0]) & (masses <= SOUND_SUMS[1])).all(1)
