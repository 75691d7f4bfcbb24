"""The compiled Triton kernels on a real device: accuracy, repetition, no host wait, memory."""

import importlib.util
import os

import pytest
import torch

from sparsekd.kernels import memory
from sparsekd.kernels.loss import LossOutput, default_impl, sparse_kd_loss
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.targets import SparseTargets
from sparsekd.kernels.teacher import teacher_statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 would test the interpreter"
    ),
]

HEAD = 32
DRAWS = 16


def build(
    count: int,
    vocabulary: int,
    size: int,
    dtype: torch.dtype,
    mode: str,
    temperature: float,
    softcap: float | None,
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """(leaves, other arguments) of one call, on the device."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    rows = vocabulary + 64
    head = HeadTransform(vocabulary_size=vocabulary, scale=1.0, softcap=softcap)
    labels = torch.randint(0, vocabulary, (count,), generator=generator, device="cuda")
    labels[::7] = -100
    found = teacher_statistics(
        normal(count, size).to(dtype),
        (normal(rows, size) * 2 / size**0.5).to(dtype),
        bias=None,
        labels=labels,
        head=head,
        k=HEAD,
        n=DRAWS,
        temperatures=(1.0, 2.0),
        draw_temperature=temperature,
        uniforms=torch.rand(count, DRAWS, generator=generator, device="cuda", dtype=torch.float64),
        chunk_positions=256,
    )
    targets = SparseTargets(
        ids=torch.cat([found.head_ids, found.tail_ids], 1).long(),
        head_logprobs=found.head_logprobs,
        tail_counts=found.tail_counts.float(),
        log_rest=found.log_rest[:, 0 if temperature == 1.0 else 1].contiguous(),
        entropy=found.entropy,
    )
    labels[1::7] = found.head_ids[1::7, 3].long()
    weights = torch.rand(count, generator=generator, device="cuda")
    weights[::5] = 0
    leaves = {
        "hidden": normal(count, size).to(dtype),
        "weight": (normal(rows, size) * 2 / size**0.5).to(dtype),
        "bias": normal(rows).to(dtype),
    }
    objective = Objective(
        kd_weight=0.6,
        ce_weight=0.4,
        divergence="forward_kl",
        mixture=0.1,
        target_mode=mode,
        temperature=temperature,
        label_smoothing=0.05,
        z_loss=1e-3,
    )
    return leaves, {
        "targets": targets,
        "labels": labels,
        "weights": weights,
        "objective": objective,
        "head": head,
    }


def run(
    leaves: dict[str, torch.Tensor], rest: dict[str, object], impl: str, chunk: int | None = None
) -> tuple[LossOutput, dict[str, torch.Tensor]]:
    """Values and gradients for an upstream gradient of 0.3."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    output = sparse_kd_loss(
        leaves["hidden"], leaves["weight"], bias=leaves["bias"], impl=impl, chunk_positions=chunk, **rest
    )
    (output.loss * 0.3).backward()
    return output, {name: value.grad for name, value in leaves.items()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("mode", ["tail_bucket", "sampled"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("vocabulary", [4099, 50257])
def test_against_float64(mode, temperature, softcap, dtype, bound, vocabulary):
    leaves, rest = build(300, vocabulary, 256, dtype, mode, temperature, softcap)
    expected, wanted = run({name: value.double() for name, value in leaves.items()}, rest, "reference")
    for impl in ("triton", "torch"):
        output, gradients = run(leaves, rest, impl, chunk=128)
        assert relative(output.loss, expected.loss) < 1e-4
        assert relative(output.kd, expected.kd) < 1e-3 and relative(output.ce, expected.ce) < 1e-4
        for name, gradient in gradients.items():
            assert relative(gradient, wanted[name]) < bound, (impl, name)
        assert bool((gradients["weight"][vocabulary:] == 0).all())


def test_several_gradient_buffers(monkeypatch):
    leaves, rest = build(300, 4099, 256, torch.bfloat16, "tail_bucket", 1.0, None)
    _, whole = run(leaves, rest, "triton", chunk=50)
    monkeypatch.setattr(memory, "BUFFER_POSITIONS", 100)
    _, parts = run(leaves, rest, "triton", chunk=50)
    for name in whole:
        assert relative(parts[name], whole[name]) < 5e-3


def test_repetition_is_bitwise_equal():
    leaves, rest = build(600, 32000, 256, torch.bfloat16, "sampled", 1.0, None)
    first, once = run(leaves, rest, "triton")
    second, twice = run(leaves, rest, "triton")
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_no_host_wait():
    leaves, rest = build(600, 32000, 256, torch.bfloat16, "sampled", 1.0, None)
    run(leaves, rest, "triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(leaves, rest, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("count", [4096, 12288])
def test_peak_memory_is_the_formula(count):
    """At 12,288 positions there are two gradient buffers."""
    vocabulary, size = 65536, 512
    leaves, rest = build(count, vocabulary, size, torch.bfloat16, "tail_bucket", 1.0, None)
    run(leaves, rest, "triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(leaves, rest, "triton")
    # `run` makes copies of the leaves first.
    copies = sum(value.numel() * value.element_size() for value in leaves.values())
    transient = torch.cuda.max_memory_allocated() - before - copies
    formula = memory.peak_bytes(
        "triton",
        positions=count,
        vocabulary_size=vocabulary,
        hidden_size=size,
        element_bytes=2,
        temperature=1.0,
        softcap=False,
        chunk_positions=None,
    )
    assert 0.9 * formula < transient < 1.1 * formula
    assert transient < memory.dense_bytes(count, vocabulary)


def test_the_default_on_cuda():
    assert default_impl(torch.device("cuda")) == "triton"
