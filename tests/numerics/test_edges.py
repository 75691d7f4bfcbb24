"""Where -inf lives, what is padded, what is dropped, what is empty."""

import pytest
import torch

from sparsekd.kernels.targets import SparseTargets

IMPLEMENTATIONS = ("reference", "torch", "torch/slices", "triton", "triton/slices")
BOUND = 1e-5
NAN = torch.nan


@pytest.mark.parametrize(
    ("impl", "softcap"),
    [("reference", 6.0), ("torch", 6.0), ("torch", None), ("triton", 6.0)],
)
@pytest.mark.parametrize("mode", ["tail_bucket", "sampled", "renormalized", "truncated"])
def test_the_head_is_the_vocabulary(oracle, impl, mode, softcap):
    """An empty rest: log R is -inf, no draws, and the student's own rest is empty where all ids are used."""
    case = oracle.make_case(
        seed=20,
        count=4,
        vocabulary=9,
        k=9,
        n=3,
        target_mode=mode,
        temperature=2.0,
        softcap=softcap,
        label_smoothing=0.1,
    )
    assert bool((case.targets.log_rest == -torch.inf).all() and (case.targets.ids[:, 9:] == -1).all())
    found, expected = oracle.measured(case, impl), oracle.dense(case)
    oracle.check(found, expected, BOUND)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["tail_bucket", "sampled"])
def test_a_teacher_with_an_empty_rest_and_a_student_without(oracle, impl, mode):
    """p = 0 for the rest as a whole: nothing to learn there, but the student's mass on it is pushed out."""
    case = oracle.make_case(seed=21, target_mode=mode)
    targets = case.targets
    ids = targets.ids.clone()
    ids[:, targets.head_size :] = -1
    empty = targets._replace(
        ids=ids,
        log_rest=torch.full_like(targets.log_rest, -torch.inf),
        tail_counts=torch.zeros_like(targets.tail_counts),
    )
    case = case.change(targets=empty)
    oracle.check(oracle.measured(case, impl), oracle.dense(case), BOUND)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["tail_bucket", "sampled", "renormalized", "truncated"])
def test_padded_ids(oracle, impl, mode):
    """Padding in the head, whatever log-probability stands there, and a position of nothing but padding."""
    case = oracle.make_case(seed=22, target_mode=mode, temperature=2.0, softcap=6.0)
    targets = case.targets
    ids, logprobs, counts = targets.ids.clone(), targets.head_logprobs.clone(), targets.tail_counts.clone()
    ids[1, 3:5], logprobs[1, 3:5] = -1, torch.tensor([0.0, -torch.inf])
    case.labels[1] = 0
    if mode in ("tail_bucket", "sampled"):
        ids[4], counts[4] = -1, 0.0
    if mode == "sampled":
        ids[5, targets.head_size :], counts[5] = -1, 0.0
    case = case.change(targets=targets._replace(ids=ids, head_logprobs=logprobs, tail_counts=counts))
    oracle.check(oracle.measured(case, impl), oracle.dense(case), BOUND)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_positions_with_different_numbers_of_draws(oracle, impl):
    """Records of 6, of 2 and of no draws in one batch mean what each means alone."""
    case = oracle.make_case(seed=19, n=6, target_mode="sampled")
    few = oracle.make_case(seed=19, n=2, target_mode="sampled").targets
    assert torch.equal(few.head_logprobs, case.targets.head_logprobs)
    ids, counts, log_rest = case.targets.ids.clone(), case.targets.tail_counts.clone(), case.targets.log_rest
    for position in (0, 4, 5):
        ids[position, 5:], counts[position] = -1, 0.0
    for position in (0, 4):
        ids[position, 5:7], counts[position, :2] = few.ids[position, 5:], few.tail_counts[position]
    log_rest = log_rest.index_fill(0, torch.tensor([5]), -torch.inf)
    mixed = case.change(
        targets=case.targets._replace(ids=ids, tail_counts=counts, log_rest=log_rest),
    )
    assert sorted(set(counts.sum(1).tolist())) == [0.0, 2.0, 6.0]
    found = oracle.measured(mixed, impl)
    oracle.check(found, oracle.dense(mixed), BOUND)
    alone = oracle.measured(case.change(targets=few), impl)
    whole = oracle.measured(case, impl)
    assert oracle.relative(found.kd[[0, 4]], alone.kd[[0, 4]]) < BOUND
    assert oracle.relative(found.kd[[1, 2, 6]], whole.kd[[1, 2, 6]]) < BOUND


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_padded_vocabulary_gets_exactly_zero(oracle, impl):
    case = oracle.make_case(seed=23, padding=11, label_smoothing=0.1)
    case.weight[53:] = 1e4
    case.bias[53:] = 1e4
    found = oracle.measured(case, impl)
    oracle.check(found, oracle.dense(case), BOUND)
    assert bool((found.weight[53:] == 0).all() and (found.bias[53:] == 0).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "total_variation"])
@pytest.mark.parametrize("towards", ["head", "rest"])
def test_a_gap_of_a_hundred_nats(oracle, impl, divergence, towards):
    """The student puts e^-100 where the teacher has its mass: large and finite, never NaN."""
    case = oracle.make_case(
        seed=24, count=4, size=53, padding=0, with_bias=False, divergence=divergence, ce_weight=0.0
    )
    logits = torch.full((4, 53), -50.0)
    ids = case.targets.ids[:, : case.targets.head_size]
    if towards == "head":
        logits.scatter_(1, ids, 50.0)
    else:
        logits.fill_(50.0).scatter_(1, ids, -50.0)
    case = case.change(
        weight=torch.eye(53), hidden=logits + torch.randn(4, 53, generator=torch.Generator().manual_seed(1))
    )
    found, expected = oracle.measured(case, impl), oracle.dense(case)
    assert bool((expected.kd[case.kd_weights > 0] > 0.3).all())
    if towards == "rest" and divergence != "forward_kl":
        # These lose interest where the student has no mass: a true gradient of about e^-100, 0 in float32.
        assert expected.hidden.norm() < 1e-12
        assert found.hidden.norm() < 1e-6 and found.weight.norm() < 1e-4
        assert oracle.relative(found.kd, expected.kd) < BOUND
        return
    oracle.check(found, expected, BOUND)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_tiny_tail_keeps_its_precision(oracle, impl):
    """Student tail mass 1e-7: summed directly its gradient is right to 1e-5; as 1 - sum it would be lost."""
    case = oracle.make_case(seed=25, count=4, size=53, padding=0, with_bias=False, ce_weight=0.0, k=5, n=0)
    ids = case.targets.ids
    logits = torch.randn(4, 53, generator=torch.Generator().manual_seed(2)) - 20.0
    logits.scatter_(1, ids, torch.randn(4, 5, generator=torch.Generator().manual_seed(3)))
    # A teacher whose tail is as small, so that the tail's gradient is not swamped by p.
    targets = case.targets._replace(log_rest=torch.full((4,), -17.0))
    case = case.change(weight=torch.eye(53), hidden=logits, targets=targets)
    expected = oracle.dense(case)
    outside = torch.ones(4, 53, dtype=torch.bool).scatter(1, ids, False)
    tail = expected.hidden[outside]
    assert 1e-10 < tail.norm() < 1e-6
    assert oracle.relative(oracle.measured(case, impl).hidden[outside], tail) < BOUND


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("empty", ["no positions", "weight 0", "no labels"])
def test_nothing_to_do(oracle, impl, empty):
    case = oracle.make_case(seed=26, kd_weight=0.0 if empty == "no labels" else 0.5)
    if empty == "weight 0":
        nothing = torch.zeros_like(case.ce_weights)
        case = case.change(ce_weights=nothing, kd_weights=nothing)
    elif empty == "no labels":
        case = case.change(labels=torch.full_like(case.labels, -100))
    else:
        case = case.change(
            hidden=case.hidden[:0],
            labels=case.labels[:0],
            ce_weights=case.ce_weights[:0],
            kd_weights=case.kd_weights[:0],
            targets=SparseTargets(*(value[:0] for value in case.targets)),
        )
    found = oracle.measured(case, impl)
    assert found.loss == 0
    for value in (found.kd, found.ce, found.hidden, found.weight, found.bias):
        assert bool((value == 0).all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {"target_mode": "tail_bucket"},
        {"target_mode": "tail_bucket", "temperature": 2.0},
        {"target_mode": "tail_bucket", "temperature": 3.0, "label_smoothing": 0.1, "z_loss": 0.05},
        {"target_mode": "sampled"},
        {"target_mode": "sampled", "temperature": 4.0},
        {"divergence": "reverse_kl", "temperature": 2.0},
        {"divergence": "jensen_shannon", "mixture": 0.5},
    ],
    ids=str,
)
def test_what_is_dropped_cannot_harm(oracle, impl, changes):
    """Rubbish in the record, the label and the logits of a position of weight 0."""
    case = oracle.make_case(seed=27, **changes)
    expected = oracle.dense(case)
    targets = SparseTargets(*(value.clone() for value in case.targets))
    targets.head_logprobs[3] = torch.nan
    targets.tail_counts[3] = torch.nan
    targets.log_rest[3] = -torch.inf
    targets.entropy[3] = torch.nan
    targets.ids[3] = -1
    hidden = case.hidden.clone()
    hidden[3] = 3e38
    found = oracle.measured(case.change(targets=targets, hidden=hidden), impl)
    oracle.check(found, expected, BOUND)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "changes", [{"kd_weight": 0.0}, {"ce_weight": 0.0}, {"target_mode": "sampled"}], ids=str
)
@pytest.mark.parametrize("where", ["rest", "support", "bias", "hidden", "inf", "everywhere"])
def test_logits_that_are_no_numbers_are_not_hidden(oracle, impl, where, changes):
    """A head that has diverged, wherever it has, shows in the loss, and no such position agrees."""
    case = oracle.make_case(seed=28, count=4, **changes)
    support = case.targets.ids[:, : 1 if "kd_weight" in changes else case.targets.head_size]
    if where == "rest":
        case.weight[next(v for v in range(53) if v not in set(case.targets.ids.flatten().tolist()))] = NAN
    elif where == "support":
        case.weight[support[1]] = NAN
    elif where == "bias":
        case.bias[52] = NAN
    elif where == "hidden":
        case.hidden[1] = NAN
    elif where == "inf":
        case.bias[52] = torch.inf
    else:
        case.weight[:] = NAN
    output, leaves = oracle.call(case, impl)
    assert torch.isnan(output.loss)
    output.loss.backward()
    assert bool(leaves["weight"].grad.isnan().any())
    assert output.agreement[1] == 0 or where == "inf"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kd_weight", [0.0, 1.0])
def test_a_rest_of_nothing_but_nan_is_not_an_empty_rest(oracle, impl, kd_weight):
    """The only id outside the support has diverged; label and record know nothing of it."""
    if kd_weight:
        # A teacher without a rest: no draw is there to read the id.
        changes = {"vocabulary": 9, "k": 8, "n": 1, "ce_weight": 0.0, "target_mode": "sampled"}
        case = oracle.make_case(seed=29, count=2, **changes)
        ids = case.targets.ids.clone()
        ids[:, 8:] = -1
        empty = torch.full((2,), -torch.inf)
        targets = case.targets._replace(
            ids=ids, log_rest=empty, tail_counts=torch.zeros_like(case.targets.tail_counts)
        )
        outside = next(v for v in range(9) if v not in set(ids[0].tolist()))
    else:
        case = oracle.make_case(seed=29, count=2, vocabulary=2, k=1, n=0, kd_weight=0.0)
        targets = case.targets
        outside = 1 - int(targets.ids[0, 0])
    case = case.change(targets=targets, labels=targets.ids[:, 0].clone())
    assert torch.isfinite(oracle.measured(case, impl).loss)
    case.weight[outside] = NAN
    output, _ = oracle.call(case, impl)
    assert torch.isnan(output.loss)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["tail_bucket", "sampled", "truncated"])
def test_a_head_entry_of_probability_zero(oracle, impl, mode):
    """-inf is a legal log-probability of an id that is there."""
    case = oracle.make_case(seed=29, target_mode=mode)
    case.targets.head_logprobs[[1, 4], 4] = -torch.inf
    oracle.check(oracle.measured(case, impl), oracle.dense(case), BOUND)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_slice_within_the_support(oracle, impl):
    """All columns of one slice are support, and the rest is far below: nothing of it is lost or NaN."""
    case = oracle.make_case(seed=30, count=4, size=53, padding=0, with_bias=False, k=20, n=0, temperature=2.0)
    ids = torch.arange(20).expand(4, 20).contiguous()
    logits = torch.randn(4, 53, generator=torch.Generator().manual_seed(30))
    logits[:, 20:] -= 250.0
    case = case.change(
        weight=torch.eye(53), hidden=logits, targets=case.targets._replace(ids=ids), labels=ids[:, 3]
    )
    oracle.check(oracle.measured(case, impl), oracle.dense(case), BOUND)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["tail_bucket", "sampled", "renormalized"])
def test_arguments_with_gaps(oracle, impl, mode):
    """Every argument a view with strides of its own."""
    case = oracle.make_case(seed=31, target_mode=mode, temperature=2.0)

    def with_gaps(value):
        wide = value.new_zeros(*(2 * length for length in value.shape))
        view = wide[tuple(slice(None, None, 2) for _ in value.shape)]
        return view.copy_(value)

    device = oracle.device_of(impl)
    views = {name: with_gaps(getattr(case, name).to(device)) for name in ("hidden", "weight", "bias")}
    leaves = {name: view.detach().requires_grad_() for name, view in views.items()}
    assert not any(leaf.is_contiguous() for leaf in leaves.values())
    how, _, way = impl.partition("/")
    with pytest.MonkeyPatch.context() as patch:
        if way:
            patch.setattr(oracle.loss_module, "plan_memory", oracle._plan_of_slices)
        output = oracle.sparse_kd_loss(
            leaves["hidden"],
            leaves["weight"],
            bias=leaves["bias"],
            targets=SparseTargets(*(with_gaps(value.to(device)) for value in case.targets)),
            labels=with_gaps(case.labels.to(device)),
            ce_weights=with_gaps(case.ce_weights.to(device)),
            kd_weights=with_gaps(case.kd_weights.to(device)),
            objective=case.objective,
            head=case.head,
            impl=how,
        )
    output.loss.backward()
    expected = oracle.dense(case)
    assert oracle.relative(output.loss.detach().double().cpu(), expected.loss) < BOUND
    for name, leaf in leaves.items():
        assert oracle.relative(leaf.grad.double().cpu(), getattr(expected, name)) < BOUND, name
