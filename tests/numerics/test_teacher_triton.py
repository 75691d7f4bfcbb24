"""The teacher's record by Triton where its way of finding the head is strained, against the `torch` one.

The blocks are small, so that a small vocabulary is many of them. The weight is the identity, so that logits
are exactly what a test says, and equal results are asked for bit by bit.
"""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from sparsekd.kernels import triton_teacher, triton_teacher_rows
from sparsekd.kernels.objective import HeadTransform
from sparsekd.kernels.teacher import teacher_statistics
from sparsekd.kernels.teacher_record import TeacherStatistics
from sparsekd.kernels.teacher_torch import torch_statistics

GRID = (1.0, 2.0, 4.0)
LANES = 32
SIZE = 301  # odd: no multiple of any block


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name, value in {"BLOCK_V": LANES, "PART": 16, "PARTS": 2, "BLOCK_N": 4}.items():
        monkeypatch.setattr(triton_teacher, name, value)


@pytest.fixture
def redone(monkeypatch):
    """The hidden states of positions that were done again by `torch`, call by call."""
    calls = []

    def counted(inputs):
        calls.append(inputs.hidden.cpu())
        return torch_statistics(inputs)

    monkeypatch.setattr(triton_teacher, "torch_statistics", counted)
    return calls


def record(logits, impl, *, k, uniforms=None, weight=None, bias=None, labels=None, **changed):
    count, size = logits.shape
    if weight is None:
        weight = torch.eye(size, dtype=logits.dtype)
    if uniforms is None:
        generator = torch.Generator().manual_seed(5)
        uniforms = torch.rand(count, 7, generator=generator, dtype=torch.float64)
    if labels is None:
        labels = torch.arange(count) * 13 % size
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    arguments = {
        "head": HeadTransform(vocabulary_size=size, scale=1.0, softcap=None),
        "temperatures": GRID,
        "draw_temperature": 1.0,
        "chunk_positions": 4,
        **changed,
    }
    found = teacher_statistics(
        logits.to(device),
        weight.to(device),
        bias=None if bias is None else bias.to(device),
        labels=labels.to(device),
        k=k,
        n=uniforms.shape[1],
        uniforms=uniforms.to(device),
        impl=impl,
        **arguments,
    )
    return TeacherStatistics(*(plane.cpu() for plane in found))


def assert_alike(found, expected, tolerance=3e-6):
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        if one.dtype == torch.int32:
            assert torch.equal(one, other), name
        else:
            assert torch.equal(one.isinf(), other.isinf()), name
            assert torch.allclose(one, other, rtol=3e-7, atol=tolerance), name


def random_logits(count, *, size=SIZE, spread=2.0, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("k", [0, 1, 6, 40])
def test_many_blocks_and_an_odd_vocabulary(k, redone):
    logits = random_logits(3)
    assert_alike(record(logits, "triton", k=k), record(logits, "torch", k=k))
    assert not redone


def test_any_grid_with_bias_scale_softcap_and_padded_rows():
    logits, bias = random_logits(3), random_logits(1, seed=1)[0]
    head = HeadTransform(vocabulary_size=SIZE - 9, scale=0.7, softcap=5.0)
    labels = torch.tensor([SIZE - 10, -100, 0])
    changed = {"temperatures": (0.7, 3.0, 1.4), "draw_temperature": 1.4, "head": head, "labels": labels}
    found = record(logits, "triton", k=5, bias=bias, **changed)
    assert_alike(found, record(logits, "torch", k=5, bias=bias, **changed))
    z = 5.0 * torch.tanh(0.7 * (logits + bias)[:, : SIZE - 9].double() / 5.0)
    l = z.log_softmax(1)  # noqa: E741, the design's name of a log-probability
    assert torch.allclose(found.true_logprob.double(), torch.tensor([l[0, -1], 0.0, l[2, 0]]), atol=3e-6)
    rest = l.scatter(1, found.head_ids.long(), -math.inf)
    for g, temperature in enumerate(changed["temperatures"]):
        assert torch.allclose(found.log_rest[:, g].double(), (rest / temperature).logsumexp(1), atol=3e-6)


def test_ties_inside_the_head_and_across_its_edge(redone):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(0, 60, (4, SIZE), generator=generator).float() / 8
    # About five entries of each value.
    assert_alike(record(logits, "triton", k=12), record(logits, "torch", k=12))
    assert not redone


def test_more_ties_than_the_list_holds(redone):
    """Two of three positions with all logits equal: these alone are done again, and the smallest ids win."""
    logits = torch.zeros(3, SIZE)
    logits[1] = random_logits(1)[0]
    found = record(logits, "triton", k=3)
    assert_alike(found, record(logits, "torch", k=3))
    assert found.head_ids[0].tolist() == found.head_ids[2].tolist() == [0, 1, 2]
    assert len(redone) == 1 and torch.equal(redone[0], logits[[0, 2]])


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_largest_entries_all_on_few_lanes(lanes, redone):
    """Then the bound lies below many entries of the head, and the list holds more; it still suffices."""
    logits = random_logits(2)
    for lane in range(lanes):
        logits[:, 5 + lane :: LANES] += 30
    assert_alike(record(logits, "triton", k=6), record(logits, "torch", k=6))
    assert not redone


def test_a_rest_far_below_the_head(redone):
    """Its mass is 1e-41 of the whole: it is still summed and drawn from, and not what rounding leaves."""
    logits = random_logits(2)
    logits[:, [7, 100, 250]] += 100
    found = record(logits, "triton", k=3)
    expected = record(logits, "torch", k=3)
    assert_alike(found, expected, tolerance=1e-5)
    l = logits.double().log_softmax(1)  # noqa: E741, as above
    rest = l.scatter(1, found.head_ids.long(), -math.inf)
    assert torch.allclose(found.log_rest[:, 0].double(), rest.logsumexp(1), rtol=0, atol=1e-5)
    r = rest.softmax(1)
    entropy = -(r * r.clamp_min(1e-300).log()).sum(1)
    assert torch.allclose(found.rest_entropy.double(), entropy, rtol=0, atol=1e-5)
    assert bool((found.log_rest[:, 0] < -90).all()) and found.tail_counts.sum(1).tolist() == [7, 7]
    assert not redone


@pytest.mark.filterwarnings("ignore:(overflow|invalid value)")
def test_a_gap_inside_the_rest_is_done_again(redone):
    """Two equal largest entries and k = 1: one heads the rest, all others of which lie 100 nats below it."""
    logits = random_logits(2)
    logits[0, [40, 7]] = 110.0
    found = record(logits, "triton", k=1)
    assert_alike(found, record(logits, "torch", k=1), tolerance=1e-5)
    assert found.head_ids[0].tolist() == [7] and set(found.tail_ids[0].tolist()) == {40, -1}
    assert abs(float(found.log_rest[0, 0]) - math.log(0.5)) < 4e-6  # half a rounding of 110
    assert len(redone) == 1 and torch.equal(redone[0], logits[:1])


def test_uniforms_at_the_ends_and_entries_of_probability_zero():
    """The first and the last id that can be drawn; never a banned one, a padded one or one of the head."""
    logits = random_logits(2, spread=0.5)
    logits[:, [3, 297]] += 5  # the head
    bias = torch.zeros(SIZE)
    bias[:3], bias[298:], bias[100:150] = -math.inf, -math.inf, -math.inf
    ends = torch.tensor([[0.0, 2.0**-53, 1 - 2.0**-53]] * 2, dtype=torch.float64)
    for k, expected in ((2, [4, 296]), (0, [3, 297])):
        found = record(logits, "triton", k=k, bias=bias, uniforms=ends)
        assert found.tail_ids.tolist() == [[*expected, -1]] * 2
        assert found.tail_counts.tolist() == [[2, 1, 0]] * 2
    many = ((torch.arange(400, dtype=torch.float64) + 0.5) / 400).expand(1, 400)
    found = record(logits[:1], "triton", k=2, bias=bias, uniforms=many)
    assert_alike(found, record(logits[:1], "torch", k=2, bias=bias, uniforms=many))
    drawn = found.tail_ids[found.tail_ids >= 0].long()
    assert bool((bias[drawn] == 0).all()) and not {3, 297} & set(drawn.tolist())


def test_nothing_reads_what_nothing_wrote(monkeypatch):
    """Memory that comes with NaN and absurd integers in it gives the same bits."""
    logits = random_logits(2)
    expected = record(logits, "triton", k=6)
    empty = torch.empty

    def poisoned(*shape, **named):
        found = empty(*shape, **named)
        return found.fill_(math.nan if found.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", poisoned)
    found = record(logits, "triton", k=6)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_repetition_and_chunks_do_not_change_a_bit():
    logits = random_logits(3)
    first = record(logits, "triton", k=6)
    for chunk in (4, 2, 1):
        again = record(logits, "triton", k=6, chunk_positions=chunk)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_head_larger_than_its_kernels_take(monkeypatch, redone):
    monkeypatch.setattr(triton_teacher, "MOST_ENTRIES", 5)
    logits = random_logits(2)
    assert_alike(record(logits, "triton", k=6), record(logits, "torch", k=6), tolerance=0)
    assert len(redone) == 1


def test_what_triton_cannot_do_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"hidden's dtype is torch.float64, expected bfloat16 or float32"):
        record(random_logits(1).double(), "triton", k=1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"bias": None, "labels": torch.zeros(1, dtype=torch.int64), "k": 1, "n": 1}
    with pytest.raises(ValueError, match=r"hidden's device is cpu, expected cuda for impl='triton'"):
        teacher_statistics(
            torch.zeros(1, 2),
            torch.zeros(3, 2),
            head=HeadTransform(vocabulary_size=3, scale=1.0, softcap=None),
            temperatures=GRID,
            draw_temperature=1.0,
            uniforms=torch.zeros(1, 1, dtype=torch.float64),
            impl="triton",
            **arguments,
        )


MUTATIONS = {
    "head counted in the rest": [("kept = (logprobs < threshold) &", "kept = inside &")],
    "head drawn from": [("tl.float32), mask=head)", "tl.float32), mask=head & (lane < 0))")],
    "listed entries lost to the sums": [("beyond = (lane >= entries) & (lane < limit)", "beyond = lane < 0")],
    "listed entries lost to the draws": [("range(entries, limit)", "range(limit, limit)")],
    "draw temperature ignored": [("tl.exp(shifted * inverse_temperature)", "tl.exp(shifted)")],
    "parts at another temperature": [("            if i == DRAWN:", "            if i == 0:")],
    "first block dropped": [
        ("for start in range(0, vocabulary_size, PARTS", "for start in range(32, 301, PARTS")
    ],
    "last block dropped": [("slab_stride,\n        vocabulary_size,", "slab_stride, vocabulary_size - 32,")],
    "draws off by one": [("below * PART + first, -1)", "below * PART + first + 1, -1)")],
    "ties to the larger id": [
        ("(0x7FFFFFFF - column)", "column"),
        ("0x7FFFFFFF - (key & 0x7FFFFFFF)", "key & 0x7FFFFFFF"),
        ("(0x7FFFFFFF - (one & 0x7FFFFFFF))", "(one & 0x7FFFFFFF)"),
    ],
    "not squared": [("power = power * power", "power = power")],
    "bound too high": [("kth - normaliser - margin", "kth - normaliser + 9.0")],
}


@pytest.mark.parametrize("name", ["none", *MUTATIONS])
def test_broken_kernels_are_noticed(name, monkeypatch, tmp_path):
    source = Path(triton_teacher_rows.__file__).read_text()
    for old, new in MUTATIONS.get(name, []):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path = tmp_path / "mutated_rows.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mutated_rows", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for kernel in ("scan_kernel", "collect_kernel", "settle_kernel", "draw_kernel"):
        monkeypatch.setattr(triton_teacher, kernel, getattr(module, kernel))
    # Done again by `torch`, a position would be right: it is to stay wrong.
    monkeypatch.setattr(triton_teacher, "_sound", lambda inputs, sums, rows: rows.found >= 0)

    # Coarse values for ties; several of the largest on one lane, so that the list holds more than the head.
    logits = (random_logits(2) * 4).round() / 4
    logits[:, 5::LANES] += 5
    changed = {"k": 6, "draw_temperature": 2.0}
    expected = record(logits, "torch", **changed)
    if name == "none":
        assert_alike(record(logits, "triton", **changed), expected)
        return
    with pytest.raises(AssertionError):
        assert_alike(record(logits, "triton", **changed), expected)


def test_sums_of_any_grid():
    sums = triton_teacher.sums_of_rest((1.0, 2.0, 4.0), 2.0)
    assert sums == ((4.0, 2.0, 1.0), (False, True, True), (2, 1), 1) and sums.number == 5
    assert triton_teacher.sums_of_rest((), 1.0) == ((1.0,), (False,), (0,), 0)
    assert triton_teacher.sums_of_rest((0.75, 1.5), 0.75) == (
        (1.5, 1.0, 0.75),
        (False, False, False),
        (1, 2),
        2,
    )


def spoiled(logits, what):
    """(logits, weight, bias) with one thing in it that is no number, or no logits at all."""
    weight, bias = torch.eye(SIZE), torch.zeros(SIZE)
    logits = logits.clone()
    if what == "NaN in a head row":
        weight[17, 3] = math.nan
    elif what == "NaN in the last head row":
        weight[SIZE - 1, SIZE - 1] = math.nan
    elif what == "NaN in the bias":
        bias[200] = math.nan
    elif what == "NaN in one hidden state":
        logits[1, 40] = math.nan
    elif what == "inf in the bias":
        bias[9] = math.inf
    elif what == "a bias of -inf":
        bias.fill_(-math.inf)
    else:
        assert what == "NaN among a bias of -inf"
        bias.fill_(-math.inf)[7] = math.nan
    return logits, weight, bias


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("k", [0, 6, SIZE])
@pytest.mark.parametrize(
    "what",
    [
        "NaN in a head row",
        "NaN in the last head row",
        "NaN in the bias",
        "NaN in one hidden state",
        "inf in the bias",
        "a bias of -inf",
        "NaN among a bias of -inf",
    ],
)
def test_what_is_no_number_is_not_hidden(what, k):
    """A record of such logits says so at every position that has one, and so no store takes it."""
    logits, weight, bias = spoiled(random_logits(3), what)
    found = record(logits, "triton", k=k, weight=weight, bias=bias)
    expected = record(logits, "torch", k=k, weight=weight, bias=bias)
    bad = torch.tensor([what != "NaN in one hidden state", True, what != "NaN in one hidden state"])
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan()), name
        if one.is_floating_point():
            assert torch.allclose(one[~bad], other[~bad], rtol=3e-7, atol=3e-6), name
        else:
            assert torch.equal(one[~bad], other[~bad]), name
    for one in (found, expected):
        assert one.entropy.isnan().tolist() == bad.tolist()
        key = one.head_logprobs[:, :1] if k else one.log_rest
        assert bool(key[bad].isnan().all()) and not bool(key[~bad].isnan().any())
