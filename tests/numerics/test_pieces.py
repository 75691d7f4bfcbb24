"""What only large calls reach, by constants made small: assessments in parts, rows with gaps, the floor."""

import math

import pytest
import torch

from sparsekd.kernels import memory, slices, triton_block
from sparsekd.kernels.divergence import reverse_kl


@pytest.mark.parametrize("impl", ["torch/slices", "triton/slices"])
@pytest.mark.parametrize("changes", [{}, {"divergence": "jensen_shannon", "temperature": 2.0}], ids=str)
@pytest.mark.parametrize("positions", [1, 3, 7])
def test_slices_assess_their_positions_in_parts(oracle, monkeypatch, impl, changes, positions):
    """Seven positions in parts of one, of three with one left over, and in one that is just full."""
    monkeypatch.setattr(slices, "ASSESSED_POSITIONS", positions)
    case = oracle.make_case(seed=33, **changes)
    oracle.check(oracle.measured(case, impl), oracle.dense(case), 1e-5)
    with torch.no_grad():
        output, _ = oracle.call(case, impl)
    assert oracle.relative(output.loss.double().cpu(), oracle.dense(case).loss) < 1e-5


def test_reverse_kl_is_held_at_its_floor():
    """At probability 0 and below e^-87, where the gradient in q is finite; above it nothing is held."""
    log_q = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    own = 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    for logprob, held in ((-math.inf, -87.0), (-100.0, -87.0), (-86.0, -86.0)):
        log_p = torch.tensor([[0.0, logprob]], dtype=torch.float64)
        leaf = log_q[None].clone().requires_grad_()
        value = reverse_kl(log_p, leaf)
        assert value.item() == pytest.approx(own - 0.75 * held, rel=1e-12)
        value.sum().backward()
        assert leaf.grad[0, 1].item() == pytest.approx(0.75 * (math.log(0.75) + 1 - held), rel=1e-12)


@pytest.mark.parametrize(("columns", "stride"), [(1, 128), (128, 128), (129, 256), (151_937, 152_064)])
def test_rows_start_at_multiples_of_their_alignment(columns, stride):
    assert memory.row_stride(columns) == stride


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_row_kernels_get_aligned_rows(oracle, monkeypatch, dtype):
    """Of logits and of their gradient, so that an odd vocabulary keeps aligned products."""
    strides = []
    original = triton_block.TritonBlock.gradient

    def gradient(self, rest, numbers, out):
        strides.append((self._products.stride(0), out.stride(0)))
        return original(self, rest, numbers, out)

    monkeypatch.setattr(triton_block.TritonBlock, "gradient", gradient)
    case = oracle.make_case(seed=34, dtype=dtype)
    assert case.head.vocabulary_size == 53
    oracle.measured(case, "triton", chunk=None)
    assert strides == [(128, 128)]
