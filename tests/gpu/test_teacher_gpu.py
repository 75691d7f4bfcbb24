"""The teacher's compiled Triton kernels on a real device: accuracy, repetition, size, memory."""

import importlib.util
import os

import pytest
import torch

from sparsekd.kernels import teacher_memory, triton_teacher
from sparsekd.kernels.objective import HeadTransform
from sparsekd.kernels.teacher import teacher_statistics
from sparsekd.kernels.teacher_record import TeacherStatistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 would test the interpreter"
    ),
]

GRID = (1.0, 2.0, 4.0)


def build(
    count: int,
    vocabulary: int,
    size: int,
    dtype: torch.dtype,
    *,
    draws: int = 32,
    softcap: float | None = None,
) -> dict[str, object]:
    """Arguments of one call, on the device; logits of standard deviation 2.5."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    labels = torch.randint(0, vocabulary, (count,), generator=generator, device="cuda")
    labels[::7] = -100
    return {
        "hidden": normal(count, size).to(dtype),
        "weight": (normal(vocabulary + 64, size) * 2.5 / size**0.5).to(dtype),
        "bias": normal(vocabulary + 64).to(dtype),
        "labels": labels,
        "head": HeadTransform(vocabulary_size=vocabulary, scale=1.0, softcap=softcap),
        "n": draws,
        "temperatures": GRID,
        "uniforms": torch.rand(count, draws, generator=generator, device="cuda", dtype=torch.float64),
    }


def run(arguments: dict[str, object], impl: str = "triton", **named: object) -> TeacherStatistics:
    return teacher_statistics(impl=impl, **{"draw_temperature": 1.0, "k": 64, **arguments, **named})


@pytest.fixture
def not_redone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where `torch` does positions again: ordinary logits are the kernels' business."""
    monkeypatch.setattr(triton_teacher, "torch_statistics", lambda inputs: pytest.fail("done again by torch"))


@pytest.mark.parametrize("k", [0, 1, 64, 1500])
@pytest.mark.parametrize("draw_temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [4099, 50257])
def test_against_float64(k, draw_temperature, softcap, dtype, vocabulary, not_redone):
    arguments = build(96, vocabulary, 256, dtype, softcap=softcap)
    found = run(arguments, k=k, draw_temperature=draw_temperature, chunk_positions=40)
    # float64 of the same inputs.
    z = arguments["hidden"].double() @ arguments["weight"][:vocabulary].double().T
    z = z + arguments["bias"][:vocabulary].double()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    l = z.log_softmax(1)  # noqa: E741, the design's name of a log-probability
    bound = 2e-5

    assert torch.allclose(found.head_logprobs.double(), l.topk(k, dim=1).values, rtol=0, atol=bound)
    assert torch.allclose(
        found.head_logprobs.double(), l.gather(1, found.head_ids.long()), rtol=0, atol=bound
    )
    rest = l.scatter(1, found.head_ids.long(), -torch.inf)
    for g, temperature in enumerate(GRID):
        expected = (rest / temperature).logsumexp(1)
        assert torch.allclose(found.log_rest[:, g].double(), expected, rtol=0, atol=bound)
    r = rest.softmax(1)
    entropy = -(r * r.clamp_min(1e-300).log()).sum(1)
    assert torch.allclose(found.rest_entropy.double(), entropy, rtol=0, atol=bound)
    p = (l / draw_temperature).softmax(1)
    assert torch.allclose(found.entropy.double(), -(p * p.log()).sum(1), rtol=0, atol=bound)
    labels = arguments["labels"]
    truth = torch.where(labels >= 0, l.gather(1, labels.clamp_min(0)[:, None])[:, 0], 0.0)
    assert torch.allclose(found.true_logprob.double(), truth, rtol=0, atol=bound)

    # Draws: of a uniform that lies within rounding of the edge between two ids either is right.
    edges = (rest / draw_temperature).softmax(1).cumsum(1)
    wanted = torch.searchsorted(edges, arguments["uniforms"], right=True).clamp_max(vocabulary - 1)
    drawn = torch.repeat_interleave(found.tail_ids.flatten(), found.tail_counts.flatten()).reshape(96, -1)
    assert drawn.shape[1] == arguments["n"]
    assert float((wanted.sort(dim=1).values == drawn).double().mean()) > 0.998
    assert bool((rest.gather(1, drawn.long()) > -torch.inf).all())


def test_draws_follow_the_law(not_redone):
    """Chi-square over a million draws from one distribution, at T = 2."""
    size, count, draws, k = 1000, 4096, 256, 20
    arguments = build(1, size, 64, torch.float32)
    arguments |= {
        "hidden": arguments["hidden"].expand(count, -1),
        "labels": torch.full((count,), -100).cuda(),
    }
    generator = torch.Generator("cuda").manual_seed(1)
    uniforms = torch.rand(count, draws, generator=generator, device="cuda", dtype=torch.float64)
    found = run(arguments, n=draws, uniforms=uniforms, k=k, draw_temperature=2.0)
    times = torch.zeros(size + 1, dtype=torch.float64, device="cuda")
    times.index_add_(0, found.tail_ids.flatten().long() % (size + 1), found.tail_counts.flatten().double())
    z = arguments["hidden"][0].double() @ arguments["weight"][:size].double().T
    law = ((z + arguments["bias"][:size].double()) / 2).softmax(0)
    law[found.head_ids[0].long()] = 0
    expected = law / law.sum() * count * draws
    some = expected > 0
    statistic = ((times[:size][some] - expected[some]) ** 2 / expected[some]).sum()
    assert bool((times[:size][~some] == 0).all())
    # 979 degrees of freedom: 5 standard deviations of sqrt(2 * 979).
    assert abs(float(statistic) - 979) < 5 * 44.3


def test_repetition_is_bitwise_equal():
    arguments = build(1500, 50257, 256, torch.bfloat16)
    first, second = run(arguments), run(arguments)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_more_logits_than_32_bits_count():
    """The last positions of a slab of 2.2e9 logits."""
    vocabulary, count = 262144, 8448
    arguments = build(count, vocabulary, 64, torch.bfloat16, draws=4)
    found = run(arguments, k=8, chunk_positions=count)
    last = {name: arguments[name][-8:] for name in ("hidden", "labels", "uniforms")}
    alone = run(arguments | last, k=8, chunk_positions=8)
    for one, other in zip(found, alone, strict=True):
        if one.dtype == torch.float32:
            assert torch.allclose(one[-8:], other, rtol=0, atol=1e-5)
    assert float((found.head_ids[-8:] == alone.head_ids).double().mean()) > 0.95


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_peak_memory_is_the_formula(impl):
    vocabulary, count, k, draws = 65536, 4096, 64, 32
    arguments = build(count, vocabulary, 256, torch.bfloat16, draws=draws)
    run(arguments, impl, k=k)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(arguments, impl, k=k)
    transient = torch.cuda.max_memory_allocated() - before
    formula = teacher_memory.peak_bytes(
        impl,
        positions=count,
        vocabulary_size=vocabulary,
        k=k,
        n=draws,
        grid=len(GRID),
        chunk_positions=None,
        on_cpu=False,
    )
    assert 0.9 * formula < transient < 1.1 * formula
