"""Whole rows are read 16 bytes at a time, also where the vocabulary is odd.

That all variants compile and fit is tested in test_ahead_of_time.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, re, triton
from teacher_variants import teacher_variants
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for variant in teacher_variants():
    if "HAS_BIAS" in variant.constants:
        attributes = {(i,): [["tt.divisibility", 16]] for i in variant.aligned}
        source = ASTSource(variant.kernel, variant.signature, variant.constants, attributes)
        options = {"num_warps": variant.warps}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        wide = len(re.findall(r"ld[.]global\\S*[.]v4", ptx))
        print(json.dumps([variant.kernel.__name__, variant.constants["HAS_BIAS"], wide]))
"""


def test_rows_are_read_wide(tmp_path):
    # A process of its own: with the interpreter switched on Triton has no compiler.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "PYTHONSAFEPATH": "1"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted({name for name, _, _ in found}) == ["collect_kernel", "draw_kernel", "scan_kernel"]
    # Two loads of four numbers for each thread, and as many of the bias.
    assert all(wide >= (4 if bias else 2) for _, bias, wide in found), found
