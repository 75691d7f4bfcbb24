"""NVIDIA's compute-sanitizer over every kernel: no access out of bounds, nothing read unwritten, no race."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer (of the CUDA toolkit) is not on PATH"),
]

PROGRAM = """
import torch
from sparsekd.kernels.loss import sparse_kd_loss
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.targets import SparseTargets
from sparsekd.kernels.teacher import teacher_statistics

count, vocabulary, size, k, n = 70, 5003, 64, 16, 8
head = HeadTransform(vocabulary_size=vocabulary, scale=1.0, softcap=15.0)
torch.manual_seed(0)
hidden = torch.randn(count, size, device="cuda").bfloat16().requires_grad_()
weight = torch.randn(vocabulary + 5, size, device="cuda").bfloat16().requires_grad_()
bias = torch.randn(vocabulary + 5, device="cuda").bfloat16().requires_grad_()
labels = torch.randint(0, vocabulary, (count,), device="cuda")
labels[::5] = -100
uniforms = torch.rand(count, n, dtype=torch.float64, device="cuda")
found = teacher_statistics(
    hidden.detach(), weight.detach(), bias=bias.detach(), labels=labels, head=head, k=k, n=n,
    temperatures=(1.0, 2.0, 4.0), draw_temperature=1.0, uniforms=uniforms, impl="triton",
)
targets = SparseTargets(
    ids=torch.cat([found.head_ids, found.tail_ids], 1).long(), head_logprobs=found.head_logprobs,
    tail_counts=found.tail_counts.float(), log_rest=found.log_rest[:, 0].contiguous(), entropy=found.entropy,
)
modes = (("sampled", "forward_kl"), ("tail_bucket", "forward_kl"), ("tail_bucket", "reverse_kl"))
for mode, divergence in modes:
    objective = Objective(
        kd_weight=0.5, ce_weight=0.5, divergence=divergence, mixture=0.1, target_mode=mode, temperature=1.0,
        label_smoothing=0.1, z_loss=1e-3,
    )
    for budget in (None, 2_000_000):
        output = sparse_kd_loss(
            hidden, weight, bias=bias, targets=targets, labels=labels,
            ce_weights=torch.ones(count, device="cuda"), kd_weights=torch.arange(count, device="cuda") % 3.0,
            objective=objective, head=head, impl="triton", memory_budget=budget,
        )
        output.loss.backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_clean(tool):
    # The caching allocator would hide accesses beyond a tensor within its own block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONSAFEPATH": "1"}
    # Only our kernels: cuBLAS reads padding of its own that initcheck reports.
    only = [item for word in ("_kernel",) for item in ("--kernel-name", f"kernel_substring={word}")]
    done = subprocess.run(
        [str(SANITIZER), f"--tool={tool}", "--error-exitcode=3", *only, sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
