"""Compiles Triton kernels for GPUs that are not here; run by test_ahead_of_time.py in a process of its own.

`aot_compile.py PART PARTS ARCHITECTURE...` compiles its share of all variants for these architectures, and
prints a JSON line for each: registers, spills and shared memory. TRITON_INTERPRET must not be set: the
interpreter has no compiler.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from aot_variants import Variant, all_variants
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Report:
    """What one variant takes on one architecture.

    Attributes:
        registers: of a thread.
        spilled_bytes: of a thread, to local memory.
        shared_bytes: of a block.
    """

    kernel: str
    variant: str
    architecture: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_variant(variant: Variant, architecture: str) -> Report:
    """Compiles one variant to machine code and reads what it takes."""
    is_amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if is_amd else GPUTarget("cuda", int(architecture), 32)
    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": variant.warps})
    assert compiled.asm["hsaco" if is_amd else "cubin"]
    registers, spilled = (
        _amd_use(compiled.asm["amdgcn"]) if is_amd else _nvidia_use(compiled.asm["ptx"], architecture)
    )
    name = variant.kernel.__name__
    return Report(name, variant.name, architecture, registers, spilled, compiled.metadata.shared)


def _amd_use(assembly: str) -> tuple[int, int]:
    """(vector registers, spilled bytes) from the metadata of the assembly."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found is not None, key
        return int(found[1])

    # Scalar registers spill into vector registers, and private memory beyond that is counted here.
    return number("vgpr_count"), 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")


def _nvidia_use(ptx: str, architecture: str) -> tuple[int, int]:
    """(registers, spilled bytes) as the assembler of Triton prints them."""
    found = re.search(r"\.target (\S+)", ptx)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "kernel.ptx"
        place.write_text(ptx)
        target = found[1].split(",")[0]
        done = subprocess.run(
            [
                get_ptxas(int(architecture)).path,
                "-v",
                f"--gpu-name={target}",
                str(place),
                "-o",
                str(place.with_suffix(".cubin")),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert registers is not None and spills, done.stderr
    return int(registers[1]), sum(map(int, spills))


def share(part: int, parts: int, architectures: list[str]) -> Iterator[tuple[Variant, str]]:
    """Yields this process's part of all variants on all architectures."""
    mine = itertools.islice(all_variants(), part, None, parts)
    yield from itertools.product(mine, architectures)


def main(arguments: list[str]) -> None:
    part, parts, *architectures = arguments
    for variant, architecture in share(int(part), int(parts), architectures):
        report: dict[str, Any] = vars(compile_variant(variant, architecture))
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
