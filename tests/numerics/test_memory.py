"""The formula for peak memory against what torch's own profiler counts, on the CPU."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sparsekd.kernels import memory
from sparsekd.kernels.loss import sparse_kd_loss

# Of the formula. What it leaves out (K wide, one number per position) is 1 to 6 % at these sizes.
TOLERANCE = 0.1


def measured_peak(path, case, dtype, chunk) -> int:
    """Most bytes alive in forward and backward beyond what was there before."""
    hidden, weight = (value.to(dtype).requires_grad_() for value in (case.hidden, case.weight))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        output = sparse_kd_loss(
            hidden,
            weight,
            bias=None,
            targets=case.targets,
            labels=case.labels,
            weights=case.weights,
            objective=case.objective,
            head=case.head,
            impl="torch",
            chunk_positions=chunk,
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


@pytest.mark.parametrize(
    ("sizes", "chunk", "temperature", "softcap", "dtype"),
    [
        ((512, 16384, 16), None, 1.0, None, torch.float32),
        ((512, 16384, 16), None, 2.0, None, torch.float32),
        ((512, 16384, 16), 200, 2.0, 9.0, torch.float32),
        ((512, 16384, 16), None, 1.0, None, torch.bfloat16),
        ((128, 8192, 256), 64, 1.0, None, torch.float32),
        ((128, 8192, 256), 64, 1.0, None, torch.bfloat16),
    ],
    ids=str,
)
def test_torch(oracle, tmp_path, sizes, chunk, temperature, softcap, dtype):
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
    assert bool((case.weights == 0).any())
    peak = measured_peak(tmp_path / "trace.json", case, dtype, chunk)
    formula = memory.peak_bytes(
        "torch",
        positions=count,
        vocabulary_size=vocabulary,
        hidden_size=size,
        element_bytes=dtype.itemsize,
        temperature=temperature,
        softcap=softcap is not None,
        chunk_positions=chunk,
    )
    assert abs(peak - formula) < TOLERANCE * formula, (peak, formula, peak / formula)


def test_an_unknown_implementation():
    with pytest.raises(ValueError, match="'dense'"):
        memory.peak_bytes(
            "dense",
            positions=1,
            vocabulary_size=2,
            hidden_size=1,
            element_bytes=4,
            temperature=1.0,
            softcap=False,
            chunk_positions=None,
        )
