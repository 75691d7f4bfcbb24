"""The elementwise work of the `triton` implementation: the row kernels' launches, no host wait.

C positions, W columns of the block, K support entries, T temperature.
"""

from typing import Any

import triton
from torch import Tensor

from sparsekd.kernels.blocks import Implementation, Rest
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.partial import Reading, RestSums
from sparsekd.kernels.statistics import LogitGradient
from sparsekd.kernels.triton_assess import assess_fused
from sparsekd.kernels.triton_rows import fix_kernel, grad_kernel, prep_kernel, stats_kernel, warps_of_support

BLOCK_V = 2048
WARPS = 8
# Temperatures at which one exponential serves T and 1.
SQUARINGS = {1.0: 0, 2.0: 1, 4.0: 2}


class TritonBlock:
    """A `Block` [C, W] by row kernels."""

    def __init__(
        self,
        products: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        labels: Tensor,
        objective: Objective,
        head: HeadTransform,
    ) -> None:
        count, entries = ids.shape
        self._products, self._ids, self._labels = products, ids, labels
        # Only its dtype is read where a model has no bias.
        self._bias = products if bias is None else bias
        self._objective = objective
        softcap = 1.0 if head.softcap is None else head.softcap
        self._transform: tuple[float, float] = (head.scale, softcap)
        self._flags: dict[str, Any] = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": head.softcap is not None}
        self._block_v = min(BLOCK_V, triton.next_power_of_2(products.shape[1]))
        self._block_k = triton.next_power_of_2(max(entries, 1))
        support, self._support_slope = products.new_empty(2, count, entries)
        label, self._label_slope = products.new_empty(2, count)
        self.reading = Reading(support, label)
        prep_kernel[(count,)](
            products,
            self._bias,
            ids,
            labels,
            support,
            self._support_slope,
            label,
            self._label_slope,
            products.stride(0),
            entries,
            *self._transform,
            BLOCK_K=self._block_k,
            num_warps=warps_of_support(self._block_k),
            **self._flags,
        )

    def rest_sums(self) -> RestSums:
        """One read of the block."""
        count, columns = self._products.shape
        sums = RestSums(*self._products.new_empty(4, count))
        stats_kernel[(count,)](
            self._products,
            self._bias,
            *sums,
            self._products.stride(0),
            columns,
            *self._transform,
            1.0 / self._objective.temperature,
            SQUARINGS=SQUARINGS.get(self._objective.temperature, -1),
            NEEDS_TOTAL=self._objective.label_smoothing > 0,
            BLOCK_V=self._block_v,
            num_warps=WARPS,
            **self._flags,
        )
        return sums

    def gradient(self, rest: Rest, gradient: LogitGradient, out: Tensor | None) -> Tensor:
        """Dense part from a second read, then the support and the label."""
        out = self._products if out is None else out
        count, columns = self._products.shape
        temperature = self._objective.temperature
        gradient = LogitGradient(*(value.contiguous() for value in gradient))
        grad_kernel[(count, triton.cdiv(columns, self._block_v))](
            self._products,
            self._bias,
            out,
            rest.t,
            rest.one,
            gradient.rest_t,
            gradient.rest_1,
            gradient.uniform,
            self._products.stride(0),
            out.stride(0),
            columns,
            *self._transform,
            temperature,
            1.0 / temperature,
            SQUARINGS=SQUARINGS.get(temperature, -1),
            BLOCK_V=self._block_v,
            num_warps=WARPS,
            **self._flags,
        )
        fix_kernel[(count,)](
            out,
            self._ids,
            self._labels,
            gradient.support,
            self._support_slope,
            self.reading.label,
            self._label_slope,
            rest.t,
            rest.one,
            gradient.rest_t,
            gradient.rest_1,
            gradient.uniform,
            gradient.label,
            out.stride(0),
            self._ids.shape[1],
            1.0 / temperature,
            BLOCK_K=self._block_k,
            num_warps=warps_of_support(self._block_k),
        )
        return out


def _as_it_is(operand: Tensor) -> Tensor:
    return operand


TRITON = Implementation(block=TritonBlock, assess=assess_fused, prepare=_as_it_is)
