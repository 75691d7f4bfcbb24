"""Gradients made in forward meet the upstream gradient in backward: in pieces, or as one product."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekd.kernels import function
from sparsekd.kernels.function import scaled_gradient, scaled_product

POSITIONS, VOCABULARY, PADDED, HIDDEN = 96, 301, 320, 40
ROUNDING = 2.0**-8  # of a number to bfloat16, at most, relative


class Products(TorchDispatchMode):
    """The shapes of the products inside, and the dtypes that they are written in."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.found.append((tuple(result.shape), result.dtype))
        return result


def operands():
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(POSITIONS, VOCABULARY, generator=generator) * 1e-3
    return gradient.bfloat16(), torch.randn(POSITIONS, HIDDEN, generator=generator).bfloat16()


@pytest.mark.parametrize("upstream", [1.0, 0.25, 2.0**-20])
def test_a_power_of_two_is_rounded_once(upstream):
    gradient, hidden = operands()
    exact = upstream * gradient.double().T @ hidden.double()
    found = scaled_product(gradient, hidden, torch.tensor(upstream), PADDED)
    assert found.dtype == torch.bfloat16 and found.shape == (PADDED, HIDDEN)
    assert not found[VOCABULARY:].any()
    # One rounding, and that of float32 sums where their terms cancel.
    error = (found[:VOCABULARY].double() - exact).abs()
    sums = upstream * (gradient.double().abs().T @ hidden.double().abs())
    assert bool((error <= ROUNDING * exact.abs() + 1e-6 * sums).all())


def test_any_other_upstream_gradient_is_right():
    """It is not rounded itself, which at 0.3 would be 2.6e-3 of all entries alike, and nothing is used up."""
    gradient, hidden = operands()
    before = hidden.clone()
    upstream = 0.3
    exact = upstream * gradient.double().T @ hidden.double()
    found = scaled_product(gradient, hidden, torch.tensor(upstream), VOCABULARY).double()
    assert (found - exact).norm() < ROUNDING * exact.norm()
    assert float((found * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=5e-4)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("impl", ["triton"])
def test_the_weight_s_gradient_is_one_product_written_once(oracle, monkeypatch, impl):
    monkeypatch.setattr(function, "SCALE_ELEMENTS", 64)
    case = oracle.make_case(dtype=torch.bfloat16, seed=4)
    output, leaves = oracle.call(case, impl, chunk=None)
    with Products() as products:
        output.loss.backward()
    true_rows = case.head.vocabulary_size
    assert products.found == [((true_rows, case.hidden.shape[1]), torch.bfloat16)]
    assert leaves["weight"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(13, 8), (13,), (0, 8)])
def test_pieces_are_those_of_the_whole(monkeypatch, shape, dtype):
    """Of several rows each, the last one of fewer; of one row where a row is larger than a piece."""
    gradient, upstream = torch.randn(shape, generator=torch.Generator().manual_seed(2)), torch.tensor(0.3)
    whole = gradient.clone()
    for elements in (32, 4):
        monkeypatch.setattr(function, "SCALE_ELEMENTS", elements)
        found = scaled_gradient(gradient, upstream, dtype)
        assert found.dtype == dtype and torch.equal(found, (whole * upstream).to(dtype))
    assert torch.equal(gradient, whole)
