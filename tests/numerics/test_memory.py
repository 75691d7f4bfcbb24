"""The formula for peak memory against what torch's own profiler counts, on the CPU."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sparsekd.kernels import memory
from sparsekd.kernels.loss import sparse_kd_loss

# Of the formula. What it leaves out (K wide, one number per position) is 1 to 6 % at these sizes.
TOLERANCE = 0.1


def measured_peak(path, case, dtype, **how) -> int:
    """Most bytes alive in forward and backward beyond what was there before."""
    hidden, weight = (value.to(dtype).requires_grad_() for value in (case.hidden, case.weight))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        output = sparse_kd_loss(
            hidden,
            weight,
            bias=None,
            targets=case.targets,
            labels=case.labels,
            ce_weights=case.ce_weights,
            kd_weights=case.kd_weights,
            objective=case.objective,
            head=case.head,
            impl="torch",
            **how,
        )
        output.loss.backward()
    found.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    # What is left are the gradients (and numbers per position): every event was seen.
    kept = hidden.numel() * hidden.element_size() + weight.numel() * weight.element_size()
    assert kept <= alive < kept * 1.05 + 100_000
    return peak


def shape_of(case, dtype) -> memory.LossShape:
    return memory.LossShape(
        positions=case.hidden.shape[0],
        vocabulary_size=case.weight.shape[0],
        hidden_size=case.hidden.shape[1],
        element_bytes=dtype.itemsize,
        temperature=case.objective.temperature,
        softcap=case.head.softcap is not None,
        on_cpu=True,
    )


@pytest.mark.parametrize(
    ("sizes", "chunk", "temperature", "softcap", "dtype"),
    [
        ((256, 8192, 16), None, 1.0, None, torch.float32),
        ((256, 8192, 16), None, 2.0, None, torch.float32),
        ((256, 8192, 16), 200, 2.0, 9.0, torch.float32),
        ((256, 8192, 16), None, 1.0, None, torch.bfloat16),
        ((128, 8192, 256), 64, 1.0, None, torch.float32),
        # Hidden states that are most of it: those that count are copied.
        ((1024, 256, 512), 64, 1.0, None, torch.float32),
        ((128, 8192, 256), 64, 1.0, None, torch.bfloat16),
    ],
    ids=str,
)
def test_slabs(oracle, tmp_path, sizes, chunk, temperature, softcap, dtype):
    count, vocabulary, size = sizes
    case = oracle.make_case(
        count=count,
        vocabulary=vocabulary,
        size=size,
        padding=0,
        with_bias=False,
        temperature=temperature,
        softcap=softcap,
    )
    assert bool(((case.ce_weights == 0) & (case.kd_weights == 0)).any())
    peak = measured_peak(tmp_path / "trace.json", case, dtype, chunk_positions=chunk)
    plan = memory.plan_memory("torch", shape_of(case, dtype), chunk_positions=chunk)
    assert plan.slice_columns == 0
    assert abs(peak - plan.peak_bytes) < TOLERANCE * plan.peak_bytes, (peak, plan, peak / plan.peak_bytes)


@pytest.mark.parametrize(
    ("sizes", "share", "temperature", "softcap", "dtype"),
    [
        ((256, 8192, 96), 0.9, 1.0, None, torch.float32),
        ((256, 8192, 96), 0.9, 2.0, None, torch.float32),
        ((256, 8192, 96), 0.9, 2.0, 9.0, torch.float32),
        ((256, 8192, 96), 0.9, 1.0, None, torch.bfloat16),
        # Hidden states that are no less than the logits of a slice.
        ((1024, 2048, 512), 0.9, 1.0, 9.0, torch.bfloat16),
        ((1024, 2048, 512), None, 1.0, None, torch.float32),
    ],
    ids=str,
)
def test_slices_keep_their_budget(oracle, tmp_path, sizes, share, temperature, softcap, dtype):
    """A budget below what whole rows need makes slices, and is kept but for what is K wide."""
    count, vocabulary, size = sizes
    case = oracle.make_case(
        count=count,
        vocabulary=vocabulary,
        size=size,
        padding=0,
        with_bias=False,
        temperature=temperature,
        softcap=softcap,
    )
    shape = shape_of(case, dtype)
    # None is the least budget that there is.
    least = min(plan.peak_bytes for plan in memory._plans("torch", shape, None))
    budget = least if share is None else int(share * memory.plan_memory("torch", shape).peak_bytes)
    plan = memory.plan_memory("torch", shape, memory_budget=budget)
    assert plan.slice_columns > 0 and plan.peak_bytes <= budget
    peak = measured_peak(tmp_path / "trace.json", case, dtype, memory_budget=budget)
    # Ids as int64, in the record and in a slice's columns, and a few tensors of values and gradients.
    small = count * (case.targets.ids.shape[1] * 60 + 200)
    assert 0.9 * plan.peak_bytes < peak < budget + small, (peak, plan, peak / plan.peak_bytes)


GPU = memory.LossShape(
    positions=8192,
    vocabulary_size=128256,
    hidden_size=4096,
    element_bytes=2,
    temperature=1.0,
    softcap=False,
    on_cpu=False,
)


def test_the_rule_on_a_gpu():
    """One buffer of gradients, a slab no larger than the weight's gradient, the target's 3.1 GiB."""
    plan = memory.plan_memory("triton", GPU)
    assert (plan.slab_positions, plan.buffer_positions, plan.slice_columns) == (2048, 8192, 0)
    assert plan.peak_bytes <= 3.1 * 2**30
    long = memory.plan_memory("triton", GPU._replace(positions=20000))
    assert long.buffer_positions % long.slab_positions == 0 and 6000 < long.buffer_positions <= 8192


def test_a_smaller_budget_gives_smaller_pieces_until_none_fits():
    shape = GPU._replace(positions=32768)
    # None is the least budget that there is.
    least = min(plan.peak_bytes for plan in memory._plans("triton", shape, None))
    peaks = []
    for budget in (8 * 2**30, 4 * 2**30, 3 * 2**30, 2 * 2**30, least):
        plan = memory.plan_memory("triton", shape, memory_budget=budget)
        assert plan.peak_bytes <= budget
        peaks.append((plan.peak_bytes, plan.slice_columns > 0))
    assert peaks == sorted(peaks, reverse=True, key=lambda peak: peak[0])
    assert [sliced for _, sliced in peaks] == [False, False, True, True, True]
    with pytest.raises(ValueError, match=rf"memory_budget is {least - 1} bytes, expected at least {least}"):
        memory.plan_memory("triton", shape, memory_budget=least - 1)


def test_bad_arguments():
    with pytest.raises(ValueError, match="'dense'"):
        memory.plan_memory("dense", GPU)
    with pytest.raises(ValueError, match="memory_budget is 5 and chunk_positions 7, expected one of them"):
        memory.plan_memory("triton", GPU, chunk_positions=7, memory_budget=5)
