"""The one kernel of forward KL and cross-entropy against the plain functions that it stands for."""

import pytest
import torch

from sparsekd.kernels import triton_assess
from sparsekd.kernels.blocks import assess
from sparsekd.kernels.inputs import LossInputs, positions_of
from sparsekd.kernels.memory import DENSE
from sparsekd.kernels.partial import Reading, RestSums

VOCABULARY = 53


def inputs(oracle, **changes):
    """(reading, sums, positions, objective) of a case, taken from dense logits."""
    case = oracle.make_case(seed=50, vocabulary=VOCABULARY, **changes)
    generator = torch.Generator().manual_seed(50)
    logits = torch.randn(case.labels.numel(), VOCABULARY, generator=generator) * 3
    wanted = case.objective
    positions = positions_of(
        LossInputs(
            hidden=logits,
            weight=logits,
            bias=None,
            targets=case.targets,
            labels=case.labels,
            ce_weights=case.ce_weights,
            kd_weights=case.kd_weights,
            objective=wanted,
            head=case.head,
            shard=None,
            plan=DENSE,
            hidden_gradient=True,
            weight_gradient=True,
            bias_gradient=False,
        )
    )
    ids, labels = positions.ids, positions.labels
    inside = torch.zeros_like(logits, dtype=torch.int).scatter_add(1, ids.clamp_min(0), (ids >= 0).int()) > 0
    rest = logits.masked_fill(inside, -torch.inf)
    maximum = rest.amax(1)
    sums = RestSums(
        maximum=maximum,
        sum_t=((rest - maximum[:, None]) / wanted.temperature).exp().sum(1),
        sum_1=(rest - maximum[:, None]).exp().sum(1),
        total=torch.where(inside, 0.0, logits).sum(1) * (wanted.label_smoothing > 0),
    )
    # Rubbish where nothing may be read: a dropped position, and a label that is ignored.
    sums.sum_1[3], sums.total[3] = torch.nan, torch.inf
    reading = Reading(
        support=torch.where(ids >= 0, logits.gather(1, ids.clamp_min(0)), -torch.inf),
        label=torch.where(labels >= 0, logits.gather(1, labels.clamp_min(0)[:, None])[:, 0], -torch.inf),
    )
    return reading, sums, positions, wanted


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(
    "changes",
    [
        {"target_mode": "tail_bucket"},
        {"target_mode": "sampled"},
        {"target_mode": "sampled", "k": 0},
        {"target_mode": "tail_bucket", "label_smoothing": 0.1, "z_loss": 0.05},
        {"target_mode": "tail_bucket", "ce_weight": 0.0},
        {"kd_weight": 0.0, "label_smoothing": 0.1, "z_loss": 0.05},
        {"kd_weight": 0.0, "k": 0, "n": 0},
        {"target_mode": "tail_bucket", "k": 1, "n": 0},
    ],
    ids=str,
)
def test_equal_to_the_plain_functions(oracle, changes, temperature):
    reading, sums, positions, objective = inputs(oracle, temperature=temperature, **changes)
    assert triton_assess.is_fused(objective)
    how = {"vocabulary_size": VOCABULARY, "needs_gradient": True}
    expected = assess(reading, sums, positions, objective, **how)
    found = triton_assess.assess_fused(reading, sums, positions, objective, **how)
    for name in ("loss", "kd", "ce"):
        error = oracle.relative(getattr(found, name).double(), getattr(expected, name).double())
        assert error < 1e-5, (name, error)
    assert torch.equal(found.agreement, expected.agreement)
    for name in expected.gradient._fields:
        one, other = (getattr(side.gradient, name).double() for side in (found, expected))
        assert oracle.relative(one, other) < 1e-5, name
    kept = positions.kept
    assert torch.allclose(found.rest.t[kept], expected.rest.t[kept], rtol=1e-6)
    assert torch.allclose(found.rest.one[kept], expected.rest.one[kept], rtol=1e-6)
    assert assess(reading, sums, positions, objective, **{**how, "needs_gradient": False}).gradient is None


@pytest.mark.parametrize(
    "changes", [{"divergence": "reverse_kl"}, {"target_mode": "truncated"}, {"target_mode": "renormalized"}]
)
def test_every_other_objective_is_left_to_them(oracle, monkeypatch, changes):
    reading, sums, positions, objective = inputs(oracle, **changes)
    assert not triton_assess.is_fused(objective)
    called = []
    monkeypatch.setattr(triton_assess, "assess", lambda *a, **k: called.append(1) or assess(*a, **k))
    triton_assess.assess_fused(
        reading, sums, positions, objective, vocabulary_size=VOCABULARY, needs_gradient=False
    )
    assert called
