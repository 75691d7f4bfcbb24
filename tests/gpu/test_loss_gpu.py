"""The compiled Triton kernels on a real device: accuracy, repetition, no host wait, memory."""

import importlib.util
import os
from dataclasses import replace

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
        impl="triton",
    )
    targets = SparseTargets(
        ids=torch.cat([found.head_ids, found.tail_ids], 1).long(),
        head_logprobs=found.head_logprobs,
        tail_counts=found.tail_counts.float(),
        log_rest=found.log_rest[:, 0 if temperature == 1.0 else 1].contiguous(),
        entropy=found.entropy,
    )
    labels[1::7] = found.head_ids[1::7, 3].long()
    ce_weights, kd_weights = torch.rand(2, count, generator=generator, device="cuda")
    ce_weights[::5] = kd_weights[::10] = kd_weights[3::10] = 0
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
        "ce_weights": ce_weights,
        "kd_weights": kd_weights,
        "objective": objective,
        "head": head,
    }


def run(
    leaves: dict[str, torch.Tensor],
    rest: dict[str, object],
    impl: str,
    chunk: int | None = None,
    memory_budget: int | None = None,
) -> tuple[LossOutput, dict[str, torch.Tensor]]:
    """Values and gradients for an upstream gradient of 0.3."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    output = sparse_kd_loss(
        leaves["hidden"],
        leaves["weight"],
        bias=leaves["bias"],
        impl=impl,
        chunk_positions=chunk,
        memory_budget=memory_budget,
        **rest,
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


def test_low_precision_is_as_good_as_an_exact_loss_rounded_once():
    """No more than 1.2 times the error of the exact gradient of the logits, rounded to bfloat16 once."""
    leaves, rest = build(512, 32000, 256, torch.bfloat16, "tail_bucket", 1.0, None)
    rest["objective"] = replace(rest["objective"], label_smoothing=0.0, z_loss=0.0)
    exact = {name: value.double() for name, value in leaves.items()}
    _, wanted = run(exact, rest, "reference")
    # The gradient of the logits itself: that of an identity head's hidden states.
    logits = exact["hidden"] @ exact["weight"][:32000].T + exact["bias"][:32000]
    output = sparse_kd_loss(
        logits.requires_grad_(),
        torch.eye(32000, dtype=torch.float64, device="cuda"),
        bias=None,
        impl="reference",
        **rest,
    )
    of_logits = torch.autograd.grad(output.loss * 0.3, logits)[0].bfloat16().double()
    once = {
        "hidden": (of_logits @ exact["weight"][:32000]).bfloat16(),
        "weight": (of_logits.T @ exact["hidden"]).bfloat16(),
    }
    _, found = run(leaves, rest, "triton")
    assert relative(found["hidden"], wanted["hidden"]) < 1.2 * relative(once["hidden"], wanted["hidden"])
    of_weight = wanted["weight"][:32000]
    assert relative(found["weight"][:32000], of_weight) < 1.2 * relative(once["weight"], of_weight)


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
    """Neither for the loss nor for the gathering of its positions, whose indices come from the CPU."""
    leaves, rest = build(600, 32000, 256, torch.bfloat16, "sampled", 1.0, None)
    everywhere = leaves["hidden"].repeat_interleave(2, 0)
    run(leaves, rest, "triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        positions = torch.arange(0, 1200, 2).pin_memory().to("cuda", non_blocking=True)
        run({**leaves, "hidden": everywhere.index_select(0, positions)}, rest, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def shape_of(leaves: dict[str, torch.Tensor], vocabulary: int) -> memory.LossShape:
    return memory.LossShape(
        positions=leaves["hidden"].shape[0],
        vocabulary_size=vocabulary,
        hidden_size=leaves["hidden"].shape[1],
        element_bytes=leaves["hidden"].element_size(),
        temperature=1.0,
        softcap=False,
        on_cpu=False,
    )


@pytest.mark.parametrize(("count", "share"), [(4096, None), (12288, None), (12288, 0.6), (4096, 0.3)])
def test_peak_memory_is_the_formula(count, share):
    """One buffer of gradients, two, many small ones, and slices."""
    vocabulary, size = 65536, 512
    leaves, rest = build(count, vocabulary, size, torch.bfloat16, "tail_bucket", 1.0, None)
    shape = shape_of(leaves, vocabulary)
    budget = None if share is None else int(share * memory.plan_memory("triton", shape).peak_bytes)
    plan = memory.plan_memory("triton", shape, memory_budget=budget)
    cut = (plan.slice_columns > 0, plan.buffer_positions < count)
    expected = {(4096, None): (False, False), (4096, 0.3): (True, False)}
    assert cut == expected.get((count, share), (False, True))
    run(leaves, rest, "triton", memory_budget=budget)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(leaves, rest, "triton", memory_budget=budget)
    # `run` makes copies of the leaves first.
    copies = sum(value.numel() * value.element_size() for value in leaves.values())
    transient = torch.cuda.max_memory_allocated() - before - copies
    assert 0.9 * plan.peak_bytes < transient < 1.1 * plan.peak_bytes
    assert transient < memory.dense_bytes(count, vocabulary)


@pytest.mark.parametrize("mode", ["tail_bucket", "sampled"])
def test_slices_equal_slabs(mode):
    leaves, rest = build(600, 50257, 256, torch.bfloat16, mode, 2.0, None)
    _, whole = run(leaves, rest, "triton")
    least = min(plan.peak_bytes for plan in memory._plans("triton", shape_of(leaves, 50257), None))
    _, sliced = run(leaves, rest, "triton", memory_budget=least)
    for name in whole:
        assert relative(sliced[name], whole[name]) < 5e-3


def test_offsets_beyond_32_bits():
    """8,704 rows of 262,144 columns: the last rows of slab and buffer lie beyond 2^31 elements."""
    vocabulary, count = 262144, 8704
    leaves, rest = build(count, vocabulary, 64, torch.bfloat16, "tail_bucket", 1.0, None)
    last = slice(count - 64, count)
    few = {**leaves, "hidden": leaves["hidden"][last]}
    targets = rest["targets"]
    assert isinstance(targets, SparseTargets)
    of_last = {
        **rest,
        "targets": SparseTargets(*(value[last] for value in targets)),
        "labels": rest["labels"][last],
        "ce_weights": rest["ce_weights"][last],
        "kd_weights": rest["kd_weights"][last],
    }
    whole, gradients = run(leaves, rest, "triton", chunk=count)
    part, wanted = run(few, of_last, "torch", chunk=64)
    assert relative(whole.kd[last], part.kd) < 1e-4
    assert relative(gradients["hidden"][last], wanted["hidden"]) < 1e-2


def test_the_default_on_cuda():
    assert default_impl(torch.device("cuda")) == "triton"
