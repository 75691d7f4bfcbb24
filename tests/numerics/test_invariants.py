"""What must hold whatever the numbers: sums of gradients, self-distillation, limits, unbiasedness."""

import pytest
import torch

from sparsekd.kernels.objective import HeadTransform
from sparsekd.kernels.targets import SparseTargets

IMPLEMENTATIONS = ("reference", "torch", "torch/slices", "triton")


def logits_as_hidden(oracle, logits, **changes):
    """A case whose hidden states are its logits (the head is the identity), so d hidden is d logits."""
    size = logits.shape[1]
    case = oracle.make_case(seed=30, count=logits.shape[0], vocabulary=size, size=size, padding=0, **changes)
    return case.change(
        hidden=logits,
        weight=torch.eye(size, dtype=logits.dtype),
        bias=None,
        head=HeadTransform(vocabulary_size=size, scale=1.0, softcap=None),
        ce_weights=torch.ones(logits.shape[0]),
        kd_weights=torch.ones(logits.shape[0]),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["tail_bucket", "sampled", "renormalized", "truncated"])
def test_gradients_of_a_position_sum_to_zero(oracle, impl, mode):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(31)) * 3
    case = logits_as_hidden(oracle, logits, target_mode=mode, temperature=2.0, label_smoothing=0.1)
    gradient = oracle.measured(case, impl).hidden
    assert bool((gradient.sum(1).abs() < 1e-6 * gradient.abs().sum(1)).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_shift_of_logits_changes_nothing(oracle, impl):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(32))
    case = logits_as_hidden(oracle, logits, temperature=2.0)
    here = oracle.measured(case, impl)
    shifted = oracle.measured(case.change(hidden=logits + 8.0), impl)
    assert oracle.relative(shifted.kd, here.kd) < 1e-5
    assert oracle.relative(shifted.ce, here.ce) < 1e-5
    assert oracle.relative(shifted.hidden, here.hidden) < 1e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_permutation_of_the_vocabulary_changes_nothing(oracle, impl):
    case = oracle.make_case(seed=33, padding=0, temperature=2.0)
    order = torch.randperm(53, generator=torch.Generator().manual_seed(33))
    place = order.argsort()
    ids = torch.where(case.targets.ids >= 0, place[case.targets.ids.clamp_min(0)], -1)
    moved = case.change(
        weight=case.weight[order],
        bias=case.bias[order],
        targets=case.targets._replace(ids=ids),
        labels=torch.where(case.labels >= 0, place[case.labels.clamp_min(0)], -100),
    )
    here, there = oracle.measured(case, impl), oracle.measured(moved, impl)
    there.weight, there.bias = there.weight[place], there.bias[place]
    oracle.check(there, here, 1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["tail_bucket", "renormalized"])
@pytest.mark.parametrize(
    ("divergence", "temperature"), [("forward_kl", 1.0), ("reverse_kl", 2.0), ("total_variation", 2.0)]
)
def test_a_student_equal_to_its_teacher(oracle, impl, mode, divergence, temperature):
    generator = torch.Generator().manual_seed(34)
    logits = torch.randn(6, 40, generator=generator) * 3
    changes = {"target_mode": mode, "divergence": divergence, "temperature": temperature, "ce_weight": 0.0}
    case = logits_as_hidden(oracle, logits, **changes)
    targets = oracle.record(logits, k=5, n=6, temperature=temperature, generator=generator)
    found = oracle.measured(case.change(targets=targets), impl)
    assert bool((found.kd.abs() < 1e-6 * temperature**2).all())
    # Total variation has a corner there: any gradient up to its size is right.
    assert divergence == "total_variation" or bool((found.hidden.abs() < 1e-6).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["tail_bucket", "sampled", "renormalized", "truncated"])
def test_the_whole_vocabulary_as_head_is_dense_distillation(oracle, impl, mode):
    generator = torch.Generator().manual_seed(35)
    teacher = torch.randn(6, 20, generator=generator).double() * 2
    logits = torch.randn(6, 20, generator=generator)
    case = logits_as_hidden(oracle, logits, target_mode=mode, temperature=2.0, ce_weight=0.0, kd_weight=1.0)
    targets = oracle.record(teacher, k=20, n=2, temperature=2.0, generator=generator)
    found = oracle.measured(case.change(targets=targets), impl)
    p = (teacher / 2).softmax(1)
    q = (logits.double() / 2).softmax(1)
    assert oracle.relative(found.kd, 4 * (p * (p.log() - q.log())).sum(1)) < 1e-5
    assert oracle.relative(found.hidden, 2 * (q - p)) < 1e-5


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_mode_is_unbiased(oracle, k, temperature):
    """Value and gradient over many draws meet dense distillation; the tail bucket's do not."""
    count, size, n = 4000, 20, 4
    generator = torch.Generator().manual_seed(36)
    teacher = (torch.randn(1, size, generator=generator).double() * 2).expand(count, size)
    logits = torch.randn(1, size, generator=generator).double().expand(count, size).contiguous()
    changes = {"target_mode": "sampled", "temperature": temperature, "ce_weight": 0.0, "kd_weight": 1.0}
    case = logits_as_hidden(oracle, logits, **changes, dtype=torch.float64, k=k or 1)
    targets = oracle.record(teacher, k=k, n=n, temperature=temperature, generator=generator)
    found = oracle.measured(case.change(targets=targets), "torch", chunk=1000)
    p, q = (teacher[0] / temperature).softmax(0), (logits[0] / temperature).softmax(0)
    dense_value = temperature**2 * (p * (p.log() - q.log())).sum()
    dense_gradient = temperature * (q - p)

    value_error = (found.kd.mean() - dense_value) / (found.kd.std() / count**0.5)
    assert value_error.abs() < 4
    # Squared error over its expectation if unbiased: 1 on average over about 20 entries.
    noise = (found.hidden.var(0) / count).sum()
    assert ((found.hidden.mean(0) - dense_gradient).square().sum() / noise) < 2.5
    # The check has power: draws of the smallest id that are lost are caught.
    fewer = targets._replace(tail_counts=targets.tail_counts.index_fill(1, torch.tensor([0]), 0.0))
    wrong = oracle.measured(case.change(targets=fewer), "torch", chunk=1000)
    assert ((wrong.hidden.mean(0) - dense_gradient).square().sum() / noise) > 10


def test_targets_of_another_draw_differ(oracle):
    """Guards the test above against draws that never change."""
    generator = torch.Generator().manual_seed(37)
    teacher = torch.randn(1, 20, generator=generator).double().expand(50, 20)
    targets: SparseTargets = oracle.record(teacher, k=2, n=4, temperature=1.0, generator=generator)
    assert targets.ids.unique(dim=0).shape[0] > 10
