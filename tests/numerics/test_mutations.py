"""The comparison with the oracle must be able to fail: the code is broken on purpose, and it notices."""

from dataclasses import replace

import pytest
import torch

from sparsekd.kernels import function, loss, slices
from sparsekd.kernels.objective import MIXTURE_DIVERGENCES

FUSED = ("torch", "triton")


def break_assess(monkeypatch, change):
    """Puts change(assess, reading, sums, positions, objective, **rest) in the place of every `assess`."""
    original = loss.run_fused

    def mutated(implementation, inputs):
        def assess(*arguments, **named):
            return change(implementation.assess, *arguments, **named)

        return original(implementation._replace(assess=assess), inputs)

    monkeypatch.setattr(loss, "run_fused", mutated)


def break_targets(monkeypatch, change):
    """The record of every call changed."""
    original = loss.run_fused
    monkeypatch.setattr(
        loss, "run_fused", lambda how, inputs: original(how, inputs._replace(targets=change(inputs.targets)))
    )


def zero_gradient(monkeypatch):
    original = function.scaled_gradient
    monkeypatch.setattr(function, "scaled_gradient", lambda *a: torch.zeros_like(original(*a)))


def wrong_sign(monkeypatch):
    original = function.scaled_gradient
    monkeypatch.setattr(function, "scaled_gradient", lambda *a: -original(*a))


def without_square(assess, reading, sums, positions, objective, **named):
    square = objective.temperature**2
    objective = replace(objective, kd_weight=objective.kd_weight / square)
    found = assess(reading, sums, positions, objective, **named)
    return found._replace(kd=found.kd / square)


def no_square_in_value_and_gradient(monkeypatch):
    break_assess(monkeypatch, without_square)


def no_square_in_gradient(monkeypatch):
    def change(assess, *arguments, **named):
        gradient = without_square(assess, *arguments, **named).gradient
        return assess(*arguments, **named)._replace(gradient=gradient)

    break_assess(monkeypatch, change)


def missing_tail(monkeypatch):
    break_targets(monkeypatch, lambda t: t._replace(log_rest=torch.full_like(t.log_rest, -torch.inf)))


def swapped(monkeypatch):
    """The divergence with teacher and student exchanged, which has a name of its own."""
    exchanged = {
        "forward_kl": "reverse_kl",
        "jensen_shannon": "jensen_shannon",
        "skewed_forward_kl": "skewed_reverse_kl",
        "skewed_reverse_kl": "skewed_forward_kl",
    }

    def change(assess, reading, sums, positions, objective, **named):
        divergence = exchanged[objective.divergence]
        share = 1 - objective.mixture if divergence == "jensen_shannon" else objective.mixture
        objective = replace(objective, divergence=divergence, mixture=share)
        return assess(reading, sums, positions, objective, **named)

    break_assess(monkeypatch, change)


def another_mixture(monkeypatch):
    def change(assess, reading, sums, positions, objective, **named):
        objective = replace(objective, mixture=1.1 * objective.mixture)
        return assess(reading, sums, positions, objective, **named)

    break_assess(monkeypatch, change)


def label_not_subtracted(monkeypatch):
    def change(assess, *arguments, **named):
        found = assess(*arguments, **named)
        gradient = found.gradient._replace(label=torch.zeros_like(found.gradient.label))
        return found._replace(gradient=gradient)

    break_assess(monkeypatch, change)


def one_chunk_dropped(monkeypatch):
    calls = []

    def change(assess, *arguments, **named):
        calls.append(None)
        found = assess(*arguments, **named)
        if len(calls) != 2:
            return found
        nothing = type(found.gradient)(*(torch.zeros_like(value) for value in found.gradient))
        return found._replace(gradient=nothing)

    break_assess(monkeypatch, change)


def index_off_by_one(monkeypatch):
    break_targets(monkeypatch, lambda t: t._replace(ids=torch.where(t.ids >= 0, (t.ids + 1) % 53, -1)))


def record_off_by_one(monkeypatch):
    break_targets(monkeypatch, lambda t: type(t)(*(value.roll(1, 0) for value in t)))


MUTATIONS = (
    zero_gradient,
    wrong_sign,
    no_square_in_value_and_gradient,
    no_square_in_gradient,
    missing_tail,
    swapped,
    label_not_subtracted,
    one_chunk_dropped,
    index_off_by_one,
    record_off_by_one,
)
MIXTURE_MUTATIONS = (
    no_square_in_value_and_gradient,
    no_square_in_gradient,
    missing_tail,
    swapped,
    another_mixture,
    record_off_by_one,
)


def check_it_notices(oracle, monkeypatch, mutation, impl, case):
    """The comparison passes on the code as it is and fails on the broken one, by the loosest bound in use."""
    expected = oracle.dense(case)
    oracle.check(oracle.measured(case, impl), expected, 1e-2)
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match="relative errors"):
        oracle.check(oracle.measured(case, impl), expected, 1e-2)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices(oracle, monkeypatch, mutation, dtype, impl):
    case = oracle.make_case(seed=11, temperature=2.0, dtype=dtype, count=5)
    check_it_notices(oracle, monkeypatch, mutation, impl, case)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("divergence", MIXTURE_DIVERGENCES)
@pytest.mark.parametrize("mutation", MIXTURE_MUTATIONS)
def test_the_comparison_notices_with_a_mixture(oracle, monkeypatch, mutation, divergence, impl):
    case = oracle.make_case(seed=11, temperature=2.0, divergence=divergence, mixture=0.3, count=5)
    check_it_notices(oracle, monkeypatch, mutation, impl, case)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(
    "mutation", [zero_gradient, no_square_in_gradient, label_not_subtracted, one_chunk_dropped]
)
def test_gradients_alone_notice(oracle, monkeypatch, mutation, impl):
    """Mutations that leave every value right are caught by the gradients."""
    case = oracle.make_case(seed=12, temperature=2.0, count=5)
    expected = oracle.dense(case)
    mutation(monkeypatch)
    found = oracle.measured(case, impl)
    assert oracle.relative(found.loss, expected.loss) < 1e-5
    assert oracle.relative(found.weight, expected.weight) > 2e-2
    assert oracle.relative(found.hidden, expected.hidden) > 2e-2


def slice_dropped(monkeypatch):
    original = slices._slices
    monkeypatch.setattr(
        slices, "_slices", lambda *a: (one for place, one in enumerate(original(*a)) if place != 1)
    )


def gradient_of_slice_misplaced(monkeypatch):
    original = slices._slices

    def mutated(*arguments):
        for rows, matrix, block in original(*arguments):
            yield slice(0, rows.stop - rows.start), matrix, block

    monkeypatch.setattr(slices, "_slices", mutated)


@pytest.mark.parametrize("impl", ["torch/slices", "triton/slices"])
@pytest.mark.parametrize(
    "mutation", [slice_dropped, gradient_of_slice_misplaced, missing_tail, swapped, label_not_subtracted]
)
def test_the_comparison_notices_in_slices(oracle, monkeypatch, mutation, impl):
    case = oracle.make_case(seed=11, temperature=2.0, count=4)
    check_it_notices(oracle, monkeypatch, mutation, impl, case)
