"""The variants of the teacher's Triton kernels, as `triton_statistics` launches them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton

from sparsekd.kernels import triton_teacher
from sparsekd.kernels.teacher_memory import MOST_ENTRIES, PART, list_room
from sparsekd.kernels.triton_teacher_rows import collect_kernel, draw_kernel, scan_kernel, settle_kernel

# Every other pointer is to float32.
TYPES = {
    **dict.fromkeys(("slab_stride", "vocabulary_size", "entries", "parts", "draws"), "i32"),
    **dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32"),
    **dict.fromkeys(("labels_ptr", "keys_ptr"), "*i64"),
    **dict.fromkeys(("found_ptr", "head_ids_ptr", "drawn_ptr"), "*i32"),
    **dict.fromkeys(("cumulative_ptr", "uniforms_ptr"), "*fp64"),
}
WARPS = {
    scan_kernel: triton_teacher.SCAN_WARPS,
    collect_kernel: triton_teacher.COLLECT_WARPS,
    settle_kernel: triton_teacher.SETTLE_WARPS,
    draw_kernel: triton_teacher.DRAW_WARPS,
}


class TeacherVariant(NamedTuple):
    """One way to compile a kernel.

    Attributes:
        kernel: the decorated function.
        constants: values of its constexpr arguments.
        signature: Triton's type of every argument.
        warps: as it is launched.
        aligned: arguments that are multiples of 16 at every call: pointers, in bytes, and the row's stride.
    """

    kernel: Any
    constants: dict[str, Any]
    signature: dict[str, str]
    warps: int
    aligned: tuple[int, ...]


def _constants(
    *, full: bool, k: int, vocabulary_size: int, temperatures: tuple[float, ...], draw_temperature: float
) -> dict[str, Any]:
    sums = triton_teacher.sums_of_rest(temperatures, draw_temperature)
    parts = triton.cdiv(vocabulary_size, PART)
    return {
        "HAS_BIAS": full,
        "HAS_SOFTCAP": full,
        "INVERSES": tuple(1.0 / temperature for temperature in sums.temperatures),
        "SQUARES": sums.squares,
        "ENTROPIES": sums.entropies,
        "DRAWN": sums.drawn,
        "ROOM": list_room(k),
        "BLOCK_V": max(triton_teacher.BLOCK_V, triton.next_power_of_2(2 * k)),
        "PARTS": triton_teacher.PARTS,
        "PART": PART,
        "BLOCK_P": triton.next_power_of_2(parts),
        "STEPS": parts.bit_length(),
        "BLOCK_N": triton_teacher.BLOCK_N,
    }


def teacher_variants() -> Iterator[TeacherVariant]:
    """Yields the kernels of a usual record, of the same with bias and softcap, and of the largest."""
    usual = {"k": 64, "vocabulary_size": 128256, "temperatures": (1.0, 2.0, 4.0), "draw_temperature": 1.0}
    largest = {
        "k": MOST_ENTRIES,
        "vocabulary_size": 262143,
        "temperatures": (0.7, 1.0, 2.0, 4.0),
        "draw_temperature": 1.5,
    }
    for full, record in ((False, usual), (True, usual), (True, largest)):
        values = _constants(full=full, **record)
        for kernel, warps in WARPS.items():
            names = kernel.arg_names
            constants = {name: values[name] for name in names if name.isupper()}
            if kernel is settle_kernel and full and record is usual:
                continue  # it knows neither bias nor softcap
            yield TeacherVariant(
                kernel,
                constants,
                {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in names},
                warps,
                tuple(i for i, name in enumerate(names) if name.endswith("_ptr") or name == "slab_stride"),
            )
