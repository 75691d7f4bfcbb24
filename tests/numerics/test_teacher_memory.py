"""The teacher's formula for peak memory against what torch's own profiler counts, on the CPU."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sparsekd.kernels import teacher_memory
from sparsekd.kernels.objective import HeadTransform
from sparsekd.kernels.teacher import teacher_statistics

SIZE = 20_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu measures on the device")
@pytest.mark.parametrize(
    ("impl", "count", "n", "draw_temperature", "chunk"),
    [
        ("torch", 64, 0, 1.0, 32),
        ("torch", 64, 8, 1.0, 32),
        ("torch", 64, 8, 2.0, 32),
        ("torch", 96, 8, 1.0, 96),  # a chunk of two slices
        ("torch", 64, 200, 1.0, 32),  # draws from sums of whole rows
        ("triton", 6, 8, 1.0, 3),
    ],
)
def test_peak_is_the_formula(impl, count, n, draw_temperature, chunk, tmp_path):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 16, generator=generator) for rows in (count, SIZE))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = teacher_statistics(
            hidden,
            weight,
            bias=None,
            labels=torch.zeros(count, dtype=torch.int64),
            head=HeadTransform(vocabulary_size=SIZE, scale=1.0, softcap=None),
            k=8,
            n=n,
            temperatures=(1.0, 2.0, 4.0),
            draw_temperature=draw_temperature,
            uniforms=torch.rand(count, n, generator=generator, dtype=torch.float64),
            chunk_positions=chunk,
            impl=impl,
        )
    path = tmp_path / "trace.json"
    found.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    # The result is left, and the arguments that were made inside: every event was seen.
    assert alive >= sum(plane.numel() * plane.element_size() for plane in kept)
    formula = teacher_memory.peak_bytes(
        impl,
        positions=count,
        vocabulary_size=SIZE,
        k=8,
        n=n,
        grid=3,
        chunk_positions=chunk,
    )
    assert 0.95 * formula < peak < 1.05 * formula


def test_chunks_and_memory():
    assert teacher_memory.positions_rule("triton", 128256) == 2048
    assert teacher_memory.positions_rule("triton", 262144) == 1024
    assert teacher_memory.positions_rule("torch", 2048) == 1024
    assert teacher_memory.positions_rule("torch", 128256) == 256
    shape = {"vocabulary_size": 128256, "k": 64, "n": 32, "grid": 3}
    peak = teacher_memory.peak_bytes("triton", positions=8192, chunk_positions=None, **shape)
    # One slab and a little: a quarter of the whole logits in float32, and less where chunks are shorter.
    assert 1 < peak / (4 * 2048 * 128256) < 1.1
    assert teacher_memory.peak_bytes("triton", positions=8192, chunk_positions=512, **shape) < 0.3 * peak
    assert (
        1
        < teacher_memory.peak_bytes("torch", positions=8192, chunk_positions=2048, **shape)
        / (4 * 2048 * 128256)
        < 1.1
    )
    assert all(teacher_memory.list_room(k) > 1.4 * k + 60 for k in range(teacher_memory.MOST_ENTRIES + 1))
