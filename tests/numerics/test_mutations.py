"""The comparison with the oracle must be able to fail: the code is broken on purpose, and it notices."""

import pytest
import torch

from sparsekd.kernels import chunked, divergence, function

FUSED = ("torch", "triton")


def _module(impl):
    if impl == "torch":
        return chunked
    from sparsekd.kernels import triton_loss

    return triton_loss


def zero_gradient(monkeypatch, impl):
    original = function.scaled_gradient
    monkeypatch.setattr(function, "scaled_gradient", lambda *a: torch.zeros_like(original(*a)))


def wrong_sign(monkeypatch, impl):
    original = function.scaled_gradient
    monkeypatch.setattr(function, "scaled_gradient", lambda *a: -original(*a))


def no_square_in_value_and_gradient(monkeypatch, impl):
    original = divergence.distillation
    monkeypatch.setattr(divergence, "distillation", lambda s, t, o: original(s, t, o) / o.temperature**2)


def no_square_in_gradient(monkeypatch, impl):
    original = divergence.logit_gradient

    def mutated(gradients, *rest, temperature, **named):
        smaller = gradients._replace(
            support=gradients.support / temperature**2, rest_t=gradients.rest_t / temperature**2
        )
        return original(smaller, *rest, temperature=temperature, **named)

    monkeypatch.setattr(divergence, "logit_gradient", mutated)


def missing_tail(monkeypatch, impl):
    original = divergence.teacher_outcomes

    def mutated(targets, *rest):
        return original(targets._replace(log_rest=torch.full_like(targets.log_rest, -torch.inf)), *rest)

    monkeypatch.setattr(divergence, "teacher_outcomes", mutated)


def swapped(monkeypatch, impl):
    original = divergence.forward_kl
    monkeypatch.setitem(divergence.DIVERGENCE_FUNCTIONS, "forward_kl", lambda p, q: original(q, p))


def label_not_subtracted(monkeypatch, impl):
    original = divergence.cross_entropy
    monkeypatch.setattr(
        divergence, "cross_entropy", lambda s, *a: original(s._replace(label=s.label.detach()), *a)
    )


def one_chunk_dropped(monkeypatch, impl):
    module = _module(impl)
    name = "_one_chunk" if impl == "torch" else "_one_slab"
    original, calls = getattr(module, name), []

    def mutated(*arguments):
        calls.append(None)
        given = original(*arguments)
        if len(calls) == 2:
            target = given[-1] if impl == "torch" else arguments[-1]
            target.zero_()
        return given

    monkeypatch.setattr(module, name, mutated)


def index_off_by_one(monkeypatch, impl):
    module = _module(impl)
    original = module.take_rows

    def mutated(targets, rows):
        taken = original(targets, rows)
        return taken._replace(ids=torch.where(taken.ids >= 0, (taken.ids + 1) % 53, -1))

    monkeypatch.setattr(module, "take_rows", mutated)


def record_off_by_one(monkeypatch, impl):
    module = _module(impl)
    original = module.take_rows
    monkeypatch.setattr(
        module, "take_rows", lambda t, rows: original(type(t)(*(value.roll(1, 0) for value in t)), rows)
    )


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


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_notices(oracle, monkeypatch, mutation, dtype, impl):
    case = oracle.make_case(seed=11, temperature=2.0, dtype=dtype, count=5)
    expected = oracle.dense(case)
    # The same comparison passes on the code as it is ...
    oracle.check(oracle.measured(case, impl), expected, 1e-2)
    mutation(monkeypatch, impl)
    # ... and fails on the broken one, with the loosest bound in use.
    with pytest.raises(AssertionError, match="relative errors"):
        oracle.check(oracle.measured(case, impl), expected, 1e-2)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(
    "mutation", [zero_gradient, no_square_in_gradient, label_not_subtracted, one_chunk_dropped]
)
def test_gradients_alone_notice(oracle, monkeypatch, mutation, impl):
    """Mutations that leave every value right are caught by the gradients."""
    case = oracle.make_case(seed=12, temperature=2.0, count=5)
    expected = oracle.dense(case)
    mutation(monkeypatch, impl)
    found = oracle.measured(case, impl)
    assert oracle.relative(found.loss, expected.loss) < 1e-5
    assert oracle.relative(found.weight, expected.weight) > 2e-2
    assert oracle.relative(found.hidden, expected.hidden) > 2e-2
