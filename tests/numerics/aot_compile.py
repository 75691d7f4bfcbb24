"""Compiles every Triton kernel for GPUs that are not here; run by test_ahead_of_time.py in its own process.

Prints one JSON line per compiled variant. TRITON_INTERPRET must not be set: the interpreter has no compiler.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsekd.kernels.triton_rows import fix_kernel, grad_kernel, prep_kernel, stats_kernel

INTEGERS = ("slab_stride", "gradient_stride", "entries", "vocabulary_size")
SCALARS = ("scale", "softcap", "inverse_temperature")
LONG_POINTERS = ("ids_ptr", "labels_ptr")
PLAIN = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "UNIT_TEMPERATURE": True, "NEEDS_SUM": False}
FULL = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "UNIT_TEMPERATURE": False, "NEEDS_SUM": True}


def argument_type(name: str, gradient: str) -> str:
    """Triton's type of an argument, by its name."""
    if name.isupper():
        return "constexpr"
    if name in INTEGERS:
        return "i32"
    if name in SCALARS:
        return "fp32"
    if name in LONG_POINTERS:
        return "*i64"
    return gradient if name == "gradient_ptr" else "*fp32"


def compile_all(architecture: int) -> None:
    """Compile plain and full variants of each kernel for one CUDA architecture."""
    target = GPUTarget("cuda", architecture, 32)
    for kernel in (prep_kernel, stats_kernel, grad_kernel, fix_kernel):
        for flags, gradient in ((PLAIN, "*bf16"), (FULL, "*fp32")):
            values = {**flags, "BLOCK_V": 2048, "BLOCK_K": 64}
            names = kernel.arg_names
            source = ASTSource(
                fn=kernel,
                signature={name: argument_type(name, gradient) for name in names},
                constexprs={name: values[name] for name in names if name.isupper()},
            )
            warps = 8 if "BLOCK_V" in names else 4
            compiled = triton.compile(source, target=target, options={"num_warps": warps})
            report = {
                "kernel": kernel.__name__,
                "architecture": architecture,
                "gradient": gradient,
                "cubin_bytes": len(compiled.asm["cubin"]),
                "shared_bytes": compiled.metadata.shared,
            }
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        compile_all(int(argument))
