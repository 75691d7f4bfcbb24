"""Every variant of every Triton kernel compiles for GPUs that are not here, and fits them."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Shared memory that a block may use: of compute capability 8.0, 9.0 and 10.0 (CUDA C++ Programming Guide,
# "Technical specifications per compute capability"), and the local data share of CDNA 3.
SHARED_LIMIT = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024, "gfx942": 64 * 1024}
PROCESSES = 2


def test_kernels_compile_and_fit(tmp_path):
    # Processes of their own: with the interpreter switched on Triton has no compiler.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    # The scripts import their neighbour; the folder that we are in must not come first.
    script = Path(__file__).with_name("aot_compile.py")
    environment |= {"PYTHONPATH": str(script.parent), "PYTHONSAFEPATH": "1"}
    jobs = []
    for part in range(PROCESSES):
        arguments = [str(script), str(part), str(PROCESSES), *SHARED_LIMIT]
        with (tmp_path / f"{part}.out").open("w") as out, (tmp_path / f"{part}.err").open("w") as err:
            jobs.append(
                subprocess.Popen([sys.executable, *arguments], env=environment, stdout=out, stderr=err)
            )
    codes = [job.wait() for job in jobs]
    assert not any(codes), "".join((tmp_path / f"{part}.err").read_text() for part in range(PROCESSES))
    lines = [
        line for part in range(PROCESSES) for line in (tmp_path / f"{part}.out").read_text().splitlines()
    ]
    reports = [json.loads(line) for line in lines]
    print(f"{'kernel':16} {'arch':6} {'variants':>8} {'registers':>9} {'spilled':>7} {'shared':>6}")
    for kernel in sorted({report["kernel"] for report in reports}):
        for architecture in SHARED_LIMIT:
            some = [r for r in reports if (r["kernel"], r["architecture"]) == (kernel, architecture)]
            assert some, f"{kernel} was not compiled for {architecture}"
            most = (max(r[key] for r in some) for key in ("registers", "spilled_bytes", "shared_bytes"))
            print("{:16} {:6} {:8} {:9} {:7} {:6}".format(kernel, architecture, len(some), *most))
    spilled = [r for r in reports if r["spilled_bytes"]]
    assert not spilled, spilled
    too_large = [r for r in reports if r["shared_bytes"] > SHARED_LIMIT[r["architecture"]]]
    assert not too_large, too_large


def test_no_kernel_is_forgotten():
    """The package's modules define no Triton kernel that the list of variants leaves out."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "PYTHONSAFEPATH": "1"}
    code = (
        "import importlib, pkgutil, sparsekd.kernels as package\n"
        "from aot_variants import all_variants\n"
        "listed = {variant.kernel.__name__ for variant in all_variants()}\n"
        "names = [item.name for item in pkgutil.iter_modules(package.__path__)]\n"
        "modules = [importlib.import_module(f'sparsekd.kernels.{name}') for name in names]\n"
        "found = {name for module in modules for name in vars(module) if name.endswith('_kernel')}\n"
        "print(sorted(found ^ listed))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
