"""The divergences: as functions of outcomes, where -inf lives, their limits, and whole through the loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.kernels.divergence import DIVERGENCE_FUNCTIONS, divergence_function
from sparsekd.kernels.objective import DIVERGENCES, MIXTURE_DIVERGENCES, HeadTransform

IMPLEMENTATIONS = ("reference", "torch", "triton")
# Each mixing divergence at the values of its paper (docs/losses.md, 4), and where it is the plain one.
MIXED = (
    ("jensen_shannon", 0.1),
    ("jensen_shannon", 0.5),
    ("jensen_shannon", 0.9),
    ("skewed_forward_kl", 0.0),
    ("skewed_forward_kl", 0.1),
    ("skewed_reverse_kl", 0.0),
    ("skewed_reverse_kl", 0.1),
)
EVERY = (("forward_kl", 0.1), ("reverse_kl", 0.1), ("total_variation", 0.1), *MIXED)
BOUND = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def between(oracle, divergence, mixture=0.1):
    """The divergence as a function of (log_p, log_q)."""
    return divergence_function(oracle.objective(divergence=divergence, mixture=mixture))


def outcomes(seed, count=8, size=6, spread=2.0):
    """Two random laws over outcomes as log-probabilities, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, count, size, generator=generator, dtype=torch.float64) * spread
    return logits.log_softmax(2).unbind(0)


def test_every_name_has_its_function():
    assert set(DIVERGENCE_FUNCTIONS) == set(DIVERGENCES)


# Through the whole loss.


@pytest.mark.parametrize(
    ("impl", "temperature"),
    [("reference", 1.0), ("reference", 2.0), ("torch", 1.0), ("torch", 2.0), ("triton", 2.0)],
)
@pytest.mark.parametrize("mode", ["tail_bucket", "renormalized"])
@pytest.mark.parametrize(("divergence", "mixture"), MIXED)
def test_every_mixture_against_the_oracle(oracle, impl, temperature, mode, divergence, mixture):
    case = oracle.make_case(
        count=5,
        target_mode=mode,
        divergence=divergence,
        mixture=mixture,
        temperature=temperature,
        label_smoothing=0.1,
        z_loss=0.01,
        scale=0.7,
        softcap=6.0,
    )
    oracle.check(oracle.measured(case, impl, upstream=0.25), oracle.dense(case), BOUND[torch.float32])


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("mode", ["tail_bucket", "renormalized"])
@pytest.mark.parametrize(("divergence", "mixture"), MIXED)
def test_float64_is_exact(oracle, impl, mode, divergence, mixture):
    case = oracle.make_case(
        seed=2,
        dtype=torch.float64,
        target_mode=mode,
        divergence=divergence,
        mixture=mixture,
        temperature=2.0,
    )
    oracle.check(oracle.measured(case, impl), oracle.dense(case), 1e-12, value_bound=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("divergence", MIXTURE_DIVERGENCES)
def test_bfloat16(oracle, impl, divergence):
    case = oracle.make_case(
        seed=1, dtype=torch.bfloat16, divergence=divergence, mixture=0.3, temperature=2.0, count=13
    )
    oracle.check(oracle.measured(case, impl, upstream=0.3), oracle.dense(case), BOUND[torch.bfloat16])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("divergence", MIXTURE_DIVERGENCES)
def test_padding_and_empty_rests(oracle, impl, divergence):
    """Where only the teacher, only the student, and where neither has probability, all in one case."""
    case = oracle.make_case(seed=22, divergence=divergence, mixture=0.3, temperature=2.0, softcap=6.0)
    targets = case.targets
    ids, log_rest = targets.ids.clone(), targets.log_rest.clone()
    head_logprobs = targets.head_logprobs.clone()
    ids[1, 3:5], head_logprobs[1, 3:5] = -1, torch.tensor([0.0, -torch.inf])
    ids[4, :5] = -1
    head_logprobs[0, 3:5] = -torch.inf
    log_rest[5] = -torch.inf
    case.labels[1] = 0
    targets = targets._replace(ids=ids, head_logprobs=head_logprobs, log_rest=log_rest)
    case = case.change(targets=targets)
    oracle.check(oracle.measured(case, impl), oracle.dense(case), BOUND[torch.float32])
    # The head as the whole vocabulary: neither side has a rest.
    whole = oracle.make_case(seed=20, vocabulary=9, k=9, n=0, divergence=divergence, mixture=0.3)
    oracle.check(oracle.measured(whole, impl), oracle.dense(whole), BOUND[torch.float32])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("divergence", "mixture"), [m for m in MIXED if m[1] > 0])
@pytest.mark.parametrize("towards", ["head", "rest"])
def test_a_gap_of_a_hundred_nats(oracle, impl, divergence, mixture, towards):
    """The student puts e^-100 where the teacher has its mass: bounded by the mixture, and finite."""
    case = oracle.make_case(
        seed=24,
        count=4,
        size=53,
        padding=0,
        with_bias=False,
        divergence=divergence,
        mixture=mixture,
        ce_weight=0.0,
    )
    ids = case.targets.ids[:, : case.targets.head_size]
    high, low = (50.0, -50.0) if towards == "head" else (-50.0, 50.0)
    logits = torch.full((4, 53), low).scatter(1, ids, high)
    noise = torch.randn(4, 53, generator=torch.Generator().manual_seed(1))
    case = case.change(weight=torch.eye(53), hidden=logits + noise)
    found, expected = oracle.measured(case, impl), oracle.dense(case)
    kept = case.kd_weights > 0
    bound = -math.log(mixture)
    if divergence == "jensen_shannon":
        bound = mixture * bound - (1 - mixture) * math.log(1 - mixture)
    assert bool((expected.kd[kept] > 1e-2).all() and (expected.kd[kept] < bound).all())
    if towards == "head":
        oracle.check(found, expected, BOUND[torch.float32])
        return
    # All these lose interest where the student has no mass: a gradient of about e^-100 there, 0 in float32.
    assert oracle.relative(found.kd, expected.kd) < BOUND[torch.float32]
    assert expected.hidden.norm() < 1e-12 and found.hidden.norm() < 1e-6


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["tail_bucket", "renormalized"])
@pytest.mark.parametrize(("divergence", "mixture"), MIXED)
def test_a_student_equal_to_its_teacher(oracle, impl, mode, divergence, mixture):
    generator = torch.Generator().manual_seed(34)
    logits = torch.randn(6, 40, generator=generator) * 3
    case = identity_head(
        oracle, logits, target_mode=mode, divergence=divergence, mixture=mixture, temperature=2.0
    )
    targets = oracle.record(logits, k=5, n=0, temperature=2.0, generator=generator)
    found = oracle.measured(case.change(targets=targets), impl)
    assert bool((found.kd.abs() < 4e-6).all())
    # Beside the gradient of forward KL for a student one nat away.
    assert found.hidden.norm() < 1e-5 * oracle.measured(case, "torch").hidden.norm()


def identity_head(oracle, logits, k=5, n=0, **changes):
    """A case whose hidden states are its logits: the head is the identity, every position counts."""
    count, size = logits.shape
    case = oracle.make_case(
        seed=30, count=count, vocabulary=size, size=size, padding=0, k=k, n=n, ce_weight=0.0, **changes
    )
    return case.change(
        hidden=logits,
        weight=torch.eye(size, dtype=logits.dtype),
        bias=None,
        head=HeadTransform(vocabulary_size=size, scale=1.0, softcap=None),
        ce_weights=torch.ones(count),
        kd_weights=torch.ones(count),
    )


# Between outcomes: limits and symmetries.


def test_jensen_shannon_at_one_half_is_symmetric(oracle):
    log_p, log_q = outcomes(1)
    half = between(oracle, "jensen_shannon", 0.5)
    assert oracle.relative(half(log_q, log_p), half(log_p, log_q)) < 1e-14
    # Elsewhere the roles change with the share: the check has power.
    tenth, most = between(oracle, "jensen_shannon", 0.1), between(oracle, "jensen_shannon", 0.9)
    assert oracle.relative(most(log_q, log_p), tenth(log_p, log_q)) < 1e-14
    assert oracle.relative(tenth(log_q, log_p), tenth(log_p, log_q)) > 1e-2


def test_jensen_shannon_is_bounded(oracle):
    """By the entropy of its two shares, met by laws that have no outcome in common."""
    log_p = torch.tensor([[0.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    log_q = torch.tensor([[-torch.inf, math.log(0.3), math.log(0.7)]], dtype=torch.float64)
    for share in (0.1, 0.5, 0.9):
        bound = -share * math.log(share) - (1 - share) * math.log(1 - share)
        assert abs(float(between(oracle, "jensen_shannon", share)(log_p, log_q)) - bound) < 1e-14


@pytest.mark.parametrize(
    ("skewed", "plain"), [("skewed_forward_kl", "forward_kl"), ("skewed_reverse_kl", "reverse_kl")]
)
def test_little_skew_is_no_skew(oracle, skewed, plain):
    log_p, log_q = outcomes(2)
    expected = between(oracle, plain)(log_p, log_q)
    assert torch.equal(between(oracle, skewed, 0.0)(log_p, log_q), expected)
    distances = [
        oracle.relative(between(oracle, skewed, share)(log_p, log_q), expected)
        for share in (1e-2, 1e-4, 1e-6)
    ]
    assert distances[2] < 1e-4 < 1e-3 < distances[0] and distances[0] > distances[1] > distances[2]


@pytest.mark.parametrize(
    ("share", "plain"), [(1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")], ids=["forward", "reverse"]
)
def test_jensen_shannon_ends_in_both_kullback_leiblers(oracle, share, plain):
    """Divided by the smaller share, as GKD states it (arXiv 2306.13649)."""
    log_p, log_q = outcomes(3)
    found = between(oracle, "jensen_shannon", share)(log_p, log_q) / min(share, 1 - share)
    assert oracle.relative(found, between(oracle, plain)(log_p, log_q)) < 1e-4


def test_near_each_other_all_are_one_quadratic_form(oracle):
    """With d = log q - log p: KL = sum p d^2 / 2, Jensen-Shannon b (1 - b) of it, skewed (1 - a)^2 of it."""
    log_p, other = outcomes(4)
    log_q = (log_p + 1e-4 * other).log_softmax(1)
    half_square = (log_p.exp() * (log_q - log_p).square()).sum(1) / 2
    for divergence, mixture, factor in (
        ("forward_kl", 0.1, 1.0),
        ("jensen_shannon", 0.3, 0.3 * 0.7),
        ("skewed_forward_kl", 0.1, 0.81),
        ("skewed_reverse_kl", 0.1, 0.81),
    ):
        found = between(oracle, divergence, mixture)(log_p, log_q)
        assert oracle.relative(found, factor * half_square) < 1e-3, divergence


# Properties, over laws with any pattern of -inf and gaps of up to 100 nats.


@st.composite
def laws(draw, size=5):
    """Log-probabilities of one law: some of its outcomes impossible, never all of them."""
    logits = draw(st.lists(st.floats(-50, 50), min_size=size, max_size=size))
    impossible = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    impossible[draw(st.integers(0, size - 1))] = False
    masked = [-math.inf if gone else value for value, gone in zip(logits, impossible, strict=True)]
    return torch.tensor([masked], dtype=torch.float64).log_softmax(1)


BOUNDED = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize(("divergence", "mixture"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@BOUNDED
@given(log_p=laws(), log_q=laws())
def test_never_negative_and_never_nan(oracle, dtype, divergence, mixture, log_p, log_q):
    log_p, log_q = log_p.to(dtype), log_q.to(dtype).requires_grad_()
    value = between(oracle, divergence, mixture)(log_p, log_q)
    gradient = torch.autograd.grad(value.sum(), log_q)[0]
    assert bool((value > -1e-5 if dtype == torch.float32 else value > -1e-12).all())
    assert not bool(value.isnan().any() or gradient.isnan().any())
    impossible_for_student_alone = (log_p > -torch.inf) & (log_q == -torch.inf)
    is_forward = divergence == "forward_kl" or (divergence == "skewed_forward_kl" and mixture == 0)
    if not (is_forward and bool(impossible_for_student_alone.any())):
        assert bool(torch.isfinite(value).all() and torch.isfinite(gradient).all())


@pytest.mark.parametrize(("divergence", "mixture"), EVERY)
@BOUNDED
@given(law=laws())
def test_a_law_is_at_no_distance_from_itself(oracle, divergence, mixture, law):
    assert abs(float(between(oracle, divergence, mixture)(law, law))) < 1e-12


@pytest.mark.parametrize(("divergence", "mixture"), EVERY)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(1, 9),
    size=st.integers(2, 40),
    share=st.floats(0.05, 1.0),
    chunk=st.integers(1, 10),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    mode=st.sampled_from(["tail_bucket", "renormalized"]),
)
def test_through_the_torch_implementation(
    oracle, divergence, mixture, seed, count, size, share, chunk, temperature, mode
):
    """Gradients of a position sum to 0, values are true divergences, and chunks do not matter."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, size, generator=generator, dtype=torch.float64) * 4
    case = identity_head(
        oracle,
        logits,
        k=max(1, int(share * size)),
        spread=4.0,
        target_mode=mode,
        divergence=divergence,
        mixture=mixture,
        temperature=temperature,
    )
    found = oracle.measured(case, "torch", chunk=chunk)
    assert bool((found.kd >= -1e-12).all() and torch.isfinite(found.hidden).all())
    # Beside the size of forward KL's gradient, at most 2 T: what is left of sums that cancel.
    assert bool((found.hidden.sum(1).abs() < 1e-12 * temperature).all())
    whole = oracle.measured(case, "torch", chunk=100)
    assert oracle.relative(found.kd, whole.kd) < 1e-12
    assert oracle.relative(found.hidden, whole.hidden) < 1e-12
