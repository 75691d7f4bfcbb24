"""Every Triton kernel compiles for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

KERNELS = ("prep_kernel", "stats_kernel", "grad_kernel", "fix_kernel")
ARCHITECTURES = (80, 90, 100)
# The least shared memory a block may use on any of them.
SHARED_LIMIT = 48 * 1024


def test_kernels_compile(tmp_path):
    # A process of its own: with the interpreter switched on Triton has no compiler.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("aot_compile.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, ARCHITECTURES)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stdout)
    for architecture in ARCHITECTURES:
        names = [report["kernel"] for report in reports if report["architecture"] == architecture]
        assert sorted(names) == sorted(KERNELS * 2)
    assert all(report["cubin_bytes"] > 0 for report in reports)
    assert all(report["shared_bytes"] <= SHARED_LIMIT for report in reports)
