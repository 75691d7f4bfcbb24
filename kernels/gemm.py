"""Matrix products that keep float32 accuracy where low-precision inputs meet.

Logits must not be rounded to bfloat16: the distillation gradient is a difference q - p, and rounding costs
1.5 % to 36 % of it, the more the closer the student is. bfloat16 inputs with float32 sums and a float32
result are exact enough and cost no more, so that is what every product here does.

N positions, V vocabulary, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsekd.kernels.objective import HeadTransform

LOW_PRECISION = (torch.bfloat16, torch.float16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def plain_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Shield the products inside from autocast; let the CPU use its bfloat16 units for bfloat16 inputs.

    The CPU has no product of bfloat16 inputs with a float32 result. But its float32 product may read its
    inputs as bfloat16 (oneDNN), still sums in float32, and is faster where the processor has such units. That
    is exact for inputs that were bfloat16; the gradient of the logits is rounded so, as on a GPU. A float32
    model keeps full precision.
    """
    # Settable since torch 2.9; without it the same product runs in full float32, to the same accuracy.
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if device.type != "cpu" or dtype != torch.bfloat16 or not hasattr(matmul, "fp32_precision"):
        matmul = None
    before = None if matmul is None else matmul.fp32_precision
    try:
        if matmul is not None:
            matmul.fp32_precision = "bf16"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if matmul is not None:
            matmul.fp32_precision = before


def prepare_operand(operand: Tensor) -> Tensor:
    """The operand as the products want it: on CUDA unchanged, on the CPU widened once to float32."""
    if operand.dtype in LOW_PRECISION and operand.device.type != "cuda":
        return operand.float()
    return operand


def wide_product(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """left @ right with wide sums and a wide result.

    Args:
        left: [M, K].
        right: [K, N], dtype of `left`.
        out: [M, N], written when given; dtype `wide_dtype(left.dtype)`.
    """
    if left.dtype in LOW_PRECISION:
        if left.device.type == "cuda":
            if out is None:
                return torch.mm(left, right, out_dtype=torch.float32)
            return torch.mm(left, right, out_dtype=torch.float32, out=out)
        left, right = left.float(), right.float()
    return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in place, `total` [M, N] wide."""
    if left.dtype in LOW_PRECISION:
        if left.device.type == "cuda":
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
            return
        left, right = left.float(), right.float()
    total.addmm_(left, right)


def product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right with wide sums, rounded once: `out` [M, N] of the operands' dtype or wide."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        wide_product(left, right, out=out)


def transform_logits(
    products: Tensor, bias: Tensor | None, head: HeadTransform
) -> tuple[Tensor, Tensor | None]:
    """Turn products into logits, in place (docs/losses.md, 2).

    Args:
        products: [N, V] hidden @ weight.T, wide; overwritten by the logits.
        bias: [V] or None.
        head: scale and softcap.

    Returns:
        The logits, and the softcap's slope 1 - (z / c)^2 [N, V], None without a softcap.
    """
    if bias is not None:
        products.add_(bias)
    if head.scale != 1.0:
        products.mul_(head.scale)
    if head.softcap is None:
        return products, None
    products.div_(head.softcap).tanh_()
    slope = products.square().neg_().add_(1.0)
    return products.mul_(head.softcap), slope
