"""The teacher's record against a float64 dense oracle, and its draws against their law."""

import math

import pytest
import torch

from sparsekd.kernels.objective import HeadTransform
from sparsekd.kernels.teacher import teacher_statistics
from sparsekd.kernels.teacher_record import TeacherInputs, TeacherStatistics, sums_of_rest
from sparsekd.kernels.teacher_torch import _one_slice, draw_tail, in_order, largest_ids, part_masses

GRID = (1.0, 2.0, 4.0)
IMPLEMENTATIONS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def inputs(*, count=9, vocabulary=67, padding=5, size=16, dtype=torch.float32, seed=0, with_bias=True):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, size, generator=generator).to(dtype)
    weight = torch.randn(vocabulary + padding, size, generator=generator).to(dtype)
    bias = torch.randn(vocabulary + padding, generator=generator).to(dtype) if with_bias else None
    labels = torch.randint(0, vocabulary, (count,), generator=generator)
    labels[1] = -100
    return hidden, weight, bias, labels, generator


def statistics(
    hidden, weight, bias, labels, uniforms, *, k, head, draw_temperature=1.0, chunk=4, impl="torch"
):
    # With a GPU the compiled kernels run, else Triton's interpreter.
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    found = teacher_statistics(
        hidden.to(device),
        weight.to(device),
        bias=None if bias is None else bias.to(device),
        labels=labels.to(device),
        head=head,
        k=k,
        n=uniforms.shape[1],
        temperatures=GRID,
        draw_temperature=draw_temperature,
        uniforms=uniforms.to(device),
        chunk_positions=chunk,
        impl=impl,
    )
    return TeacherStatistics(*(plane.cpu() for plane in found))


ORACLE_CASES = [
    *(
        ("torch", dtype, k, temperature)
        for dtype in DTYPES
        for k in (0, 1, 6, 67)
        for temperature in (1.0, 2.0)
    ),
    *(("triton", torch.float32, k, temperature) for k in (0, 1, 6, 67) for temperature in (1.0, 2.0)),
    ("triton", torch.bfloat16, 6, 2.0),
]


# Rows of one part, of parts without and with a rest, and of so many that few can hold the head.
SIZES = [67, 256, 700, 1999]


@pytest.mark.parametrize(("impl", "dtype", "k", "draw_temperature"), ORACLE_CASES, ids=str)
def test_record_against_the_oracle(impl, dtype, k, draw_temperature):
    against_the_oracle(67, impl, dtype, k, draw_temperature)


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES[1:])
def test_record_of_longer_rows_against_the_oracle(size, k):
    against_the_oracle(size, "torch", torch.float32, k, 1.0)


def against_the_oracle(size, impl, dtype, k, draw_temperature):
    hidden, weight, bias, labels, generator = inputs(vocabulary=size, dtype=dtype)
    head = HeadTransform(vocabulary_size=size, scale=0.9, softcap=8.0)
    uniforms = torch.rand(9, 5, generator=generator, dtype=torch.float64)
    found = statistics(
        hidden, weight, bias, labels, uniforms, k=k, head=head, draw_temperature=draw_temperature, impl=impl
    )
    logits = 0.9 * (hidden.double() @ weight[:size].double().T + bias[:size].double())
    logits = 8.0 * torch.tanh(logits / 8.0)
    for t in range(9):
        l = logits[t].log_softmax(0)  # noqa: E741, the design's name of a log-probability
        order = sorted(range(size), key=lambda v: -float(l[v]))
        assert found.head_ids[t].tolist() == order[:k]
        assert torch.allclose(found.head_logprobs[t].double(), l[order[:k]], rtol=0, atol=3e-6)
        rest = l[order[k:]]
        for g, temperature in enumerate(GRID):
            if k == size:
                assert found.log_rest[t, g] == -math.inf
            else:
                expected = (rest / temperature).exp().sum().log()
                assert abs(float(found.log_rest[t, g]) - float(expected)) < 3e-6
        r = rest.exp() / rest.exp().sum()
        assert abs(float(found.rest_entropy[t]) + float((r * r.log()).sum())) < 1e-5
        p = (l / draw_temperature).softmax(0)
        assert abs(float(found.entropy[t]) + float((p * p.log()).sum())) < 1e-5
        truth = 0.0 if labels[t] < 0 else float(l[labels[t]])
        assert abs(float(found.true_logprob[t]) - truth) < 3e-6

        drawn = [int(v) for v in found.tail_ids[t] if v >= 0]
        counts = found.tail_counts[t].tolist()
        assert drawn == sorted(set(drawn)) and not set(drawn) & set(order[:k])
        assert found.tail_ids[t, len(drawn) :].eq(-1).all() and not any(counts[len(drawn) :])
        assert sum(counts) == (0 if k == size else 5) and all(counts[: len(drawn)])
        there = found.tail_logprobs[t, : len(drawn)].double()
        assert torch.allclose(there, l[drawn], rtol=0, atol=3e-6)
        assert found.tail_logprobs[t, len(drawn) :].eq(-math.inf).all()
        # Inverse CDF over ascending ids.
        law = torch.tensor([0.0 if v in order[:k] else float(p[v]) for v in range(size)], dtype=torch.float64)
        if k < size:
            edges = (law / law.sum()).cumsum(0)
            wanted = sorted(int((edges <= u).sum()) for u in uniforms[t])
            assert wanted == [v for v, c in zip(drawn, counts, strict=False) for _ in range(c)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_types_shapes_and_no_positions(impl):
    hidden, weight, bias, labels, _ = inputs(dtype=torch.bfloat16)
    head = HeadTransform(vocabulary_size=67, scale=1.0, softcap=None)
    for count in (9, 0):
        found = statistics(
            hidden[:count],
            weight,
            bias,
            labels[:count],
            torch.full((count, 5), 0.5, dtype=torch.float64),
            k=3,
            head=head,
            impl=impl,
        )
        kinds = [(tuple(value.shape), value.dtype) for value in found]
        assert kinds == [
            ((count, 3), torch.int32),
            ((count, 3), torch.float32),
            ((count, 5), torch.int32),
            ((count, 5), torch.int32),
            ((count, 3), torch.float32),
            ((count,), torch.float32),
            ((count,), torch.float32),
            ((count,), torch.float32),
            ((count, 5), torch.float32),
        ]


@pytest.mark.parametrize(("impl", "chunks"), [("torch", (1, 4, 100)), ("triton", (3,))])
def test_chunks_do_not_matter(impl, chunks, monkeypatch):
    monkeypatch.setattr("sparsekd.kernels.teacher_memory.slice_positions", lambda size: 3)
    count = 23 if impl == "torch" else 8
    hidden, weight, bias, labels, generator = inputs(count=count)
    head = HeadTransform(vocabulary_size=67, scale=1.0, softcap=None)
    uniforms = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    whole = statistics(hidden, weight, bias, labels, uniforms, k=4, head=head, chunk=count, impl=impl)
    for chunk in chunks:
        parts = statistics(hidden, weight, bias, labels, uniforms, k=4, head=head, chunk=chunk, impl=impl)
        for one, other in zip(whole, parts, strict=True):
            if one.dtype == torch.int32:
                assert torch.equal(one, other)
            else:
                assert torch.allclose(one, other, rtol=0, atol=3e-6)


def top_ids(logits, k):
    """Ids of the head in order, and the largest log-probability outside, as lists of rows."""
    ids, other, known = largest_ids(logits, k)
    normaliser = torch.where(known.isnan(), logits.logsumexp(1, keepdim=True), known)
    return in_order(ids, logits.gather(1, ids) - normaliser)[0].tolist(), (other - normaliser)[:, 0].tolist()


def one_slice(logits, labels, uniforms, k, head):
    """The record of rows of logits, without a product: 0 times infinity would be in every column."""
    grid = (1.0, 2.0)
    inputs = TeacherInputs(logits, logits, None, labels, head, k, grid, 1.0, uniforms, len(logits))
    scratch = torch.empty(2, *logits.shape)
    return _one_slice(logits.clone(), labels, uniforms, inputs, sums_of_rest(grid, 1.0), scratch)


def test_ties_go_to_the_smaller_id():
    generator = torch.Generator().manual_seed(1)
    # Few distinct values, so that ties lie inside the head and across its edge.
    for size, most in ((40, 4), (1999, 600), (1999, 4)):
        values = torch.randint(0, most, (50, size), generator=generator).float()
        logprobs = (values - values.logsumexp(1, keepdim=True)).tolist()
        for k in (0, 1, 3, 7, 20, 39, 40):
            found, others = top_ids(values, k)
            for row, ids, other in zip(logprobs, found, others, strict=True):
                ranked = sorted(range(size), key=lambda v: (-row[v], v))
                assert ids == ranked[:k]
                assert other == (row[ranked[k]] if k < size else -math.inf)


def test_ties_are_those_of_log_probabilities():
    """Two logits far above 0 that differ by their last bit are one log-probability."""
    values = torch.full((1, 1999), 0.0)
    values[0, 1500], values[0, 3] = 2.0, 2.0 - 2**-23
    values[0, 800] = 1000.0
    normaliser = values.logsumexp(1, keepdim=True)
    assert (values - normaliser)[0, 1500] == (values - normaliser)[0, 3]
    assert top_ids(values, 2)[0] == [[800, 3]]


def test_a_row_without_a_largest_finite_entry_is_no_distribution():
    """Every plane that a distribution would decide says so; the other rows are as they were."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(4))
    logits[1, 7], logits[2, 7], logits[3, 7] = math.nan, math.inf, -math.inf
    head = HeadTransform(vocabulary_size=300, scale=1.0, softcap=None)
    labels = torch.full((4,), 5)
    uniforms = torch.rand(4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for k in (0, 2, 300):
        found = one_slice(logits, labels, uniforms, k, head)
        for name in ("head_logprobs", "log_rest", "rest_entropy", "true_logprob", "entropy"):
            plane = getattr(found, name)
            assert plane[[1, 2]].isnan().all(), name
            assert not plane[[0, 3]].isnan().any(), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_head_beyond_one_logsumexp_of_the_next(impl):
    """A rest of mass 1e-12 is summed, not made from 1 minus the head, and can still be drawn from."""
    logits = torch.full((1, 20), -30.0)
    logits[0, 7] = 0.0
    head = HeadTransform(vocabulary_size=20, scale=1.0, softcap=None)
    uniforms = torch.rand(1, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = statistics(logits, torch.eye(20), None, torch.tensor([-100]), uniforms, k=1, head=head, impl=impl)
    assert abs(float(found.log_rest[0, 0]) - (math.log(19) - 30)) < 1e-5
    assert abs(float(found.rest_entropy[0]) - math.log(19)) < 1e-5
    assert int(found.tail_counts.sum()) == 6 and 7 not in found.tail_ids.tolist()[0]


def test_uniforms_at_the_ends():
    rest = torch.tensor([[-math.inf, 0.0, -1.0, -math.inf, -2.0, -math.inf]])
    ends = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    ids, counts = draw_tail(rest.exp(), ends, part_masses(rest.exp()))
    assert ids.tolist() == [[1, 4]] and counts.tolist() == [[1, 1]]
    # The same in parts: none of them whole, some empty.
    long = torch.full((1, 1999), -math.inf)
    long[0, [300, 301, 1400]] = torch.tensor([0.0, -1.0, -2.0])
    ids, counts = draw_tail(long.exp(), ends, part_masses(long.exp()))
    assert ids.tolist() == [[300, 1400]] and counts.tolist() == [[1, 1]]


@pytest.mark.parametrize("draw_temperature", [1.0, 2.0])
@pytest.mark.parametrize(("impl", "count", "n"), [("torch", 4000, 10), ("triton", 8, 2000)])
def test_draws_follow_the_law(impl, count, n, draw_temperature, monkeypatch):
    """Chi-square over many draws, and E[target] = p; a wrong temperature is caught by the same check."""
    if impl == "triton" and not torch.cuda.is_available():
        monkeypatch.setattr("sparsekd.kernels.triton_teacher.BLOCK_N", 512)  # fewer programs to interpret
    size, k = 30, 4
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, size, generator=generator) * 2
    uniforms = torch.rand(count, n, generator=generator, dtype=torch.float64)
    found = statistics(
        logits.expand(count, size),
        torch.eye(size),
        None,
        torch.full((count,), -100),
        uniforms,
        k=k,
        head=HeadTransform(vocabulary_size=size, scale=1.0, softcap=None),
        draw_temperature=draw_temperature,
        chunk=1000,
        impl=impl,
    )
    times = torch.zeros(size + 1, dtype=torch.float64)
    times.index_add_(0, found.tail_ids.flatten().long() % (size + 1), found.tail_counts.flatten().double())
    times = times[:size]

    def chi_square(temperature):
        law = (logits[0].double() / temperature).softmax(0)
        law[found.head_ids[0].long()] = 0
        expected = law / law.sum() * count * n
        some = expected > 0
        assert bool((times[~some] == 0).all())
        return float(((times[some] - expected[some]) ** 2 / expected[some]).sum())

    # 25 degrees of freedom: the 0.001 quantile from above is 52.6.
    assert chi_square(draw_temperature) < 52.6
    assert chi_square(draw_temperature * 1.2) > 100

    p = (logits[0].double() / draw_temperature).softmax(0)
    rest_mass = found.log_rest[0, GRID.index(draw_temperature)].double().exp()
    total = rest_mass + (found.head_logprobs[0].double() / draw_temperature).exp().sum()
    target = rest_mass / total * times / (count * n)
    head_ids = found.head_ids[0].long()
    target[head_ids] = (found.head_logprobs[0].double() / draw_temperature).exp() / total
    assert torch.allclose(target[head_ids], p[head_ids], rtol=1e-5, atol=0)
    spread = (rest_mass / total) * ((p / (rest_mass / total)) / (count * n)).sqrt()
    assert bool(((target - p).abs() < 5 * spread + 1e-6).all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 68}, "k is 68, expected a number from 0 to the vocabulary size 67"),
        ({"uniforms": torch.zeros(9, 5)}, "uniforms' dtype is torch.float32, expected torch.float64"),
        ({"uniforms": torch.zeros(8, 5, dtype=torch.float64)}, "uniforms' shape"),
        ({"labels": torch.zeros(8, dtype=torch.int64)}, "labels' shape"),
        ({"chunk": 0}, "chunk_positions is 0"),
        ({"head": HeadTransform(vocabulary_size=99, scale=1.0, softcap=None)}, "head.vocabulary_size is 99"),
        ({"impl": "reference"}, "impl is 'reference', expected one of torch, triton"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, words):
    hidden, weight, bias, labels, _ = inputs()
    given = {
        "labels": labels,
        "uniforms": torch.zeros(9, 5, dtype=torch.float64),
        "k": 3,
        "head": HeadTransform(vocabulary_size=67, scale=1.0, softcap=None),
        **change,
    }
    with pytest.raises(ValueError) as caught:
        statistics(hidden, weight, bias, given.pop("labels"), given.pop("uniforms"), **given)
    assert words in str(caught.value)
