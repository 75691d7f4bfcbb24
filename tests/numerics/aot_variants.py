"""Every variant of every Triton kernel that the package can launch."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from teacher_variants import teacher_variants

from sparsekd.kernels import triton_assess, triton_block, triton_rows

INTEGERS = {
    "slab_stride",
    "gradient_stride",
    "entries",
    "columns",
    "head_size",
    "draws",
    "vocabulary_size",
}
NUMBERS = {
    "scale",
    "softcap",
    "temperature",
    "inverse_temperature",
    "kd_weight",
    "ce_weight",
    "label_smoothing",
    "z_loss",
}
LONG_POINTERS = {"ids_ptr", "labels_ptr"}
BOTH = (False, True)
# One entry, the usual head and draws, K = 256, and with as many draws.
BLOCKS_K = (1, 64, 256, 512)


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel.

    Attributes:
        kernel: the decorated function.
        constants: values of its constexpr arguments.
        signature: Triton's type of every argument.
        warps: as it is launched.
        ones: arguments that are 1, for which Triton compiles anew.
    """

    kernel: Any
    constants: dict[str, Any]
    signature: dict[str, str]
    warps: int
    ones: tuple[str, ...] = ()

    @property
    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """What Triton learns of the arguments at a launch: pointers and row strides are multiples of 16."""
        aligned = {name for name in self.signature if name.endswith(("_ptr", "_stride"))}
        places = enumerate(self.kernel.arg_names)
        return {(place,): [["tt.divisibility", 16]] for place, name in places if name in aligned}

    @property
    def name(self) -> str:
        """Its constants in words, and the dtype of the gradient where it writes one."""
        words = [f"{key}={value}" for key, value in self.constants.items()]
        if self.signature.get("gradient_ptr"):
            words.append(self.signature["gradient_ptr"])
        return " ".join([*words, *(f"{name}=1" for name in self.ones)])


def _variant(
    kernel: Any,
    constants: dict[str, Any],
    *,
    warps: int = 4,
    gradient: str = "*bf16",
    ones: tuple[str, ...] = (),
) -> Variant:
    constants = {**constants, **dict.fromkeys(ones, 1)}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return "i32"
        if name in NUMBERS:
            return "fp32"
        if name in LONG_POINTERS:
            return "*i64"
        assert name.endswith("_ptr"), f"{kernel.__name__} has the argument {name}: say its type here"
        return gradient if name == "gradient_ptr" else "*fp32"

    signature = {name: type_of(name) for name in kernel.arg_names}
    return Variant(kernel, constants, signature, warps, ones)


def _transforms() -> Iterator[dict[str, Any]]:
    for bias, softcap in itertools.product(BOTH, BOTH):
        yield {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap}


def all_variants() -> Iterator[Variant]:
    """Yields all of them, kernel by kernel."""
    block_v, wide = {"BLOCK_V": triton_block.BLOCK_V}, {"warps": triton_block.WARPS}
    squarings = sorted({-1, *triton_block.SQUARINGS.values()})
    for transform, block_k in itertools.product(_transforms(), BLOCKS_K):
        warps = triton_rows.warps_of_support(block_k)
        yield _variant(triton_rows.prep_kernel, {**transform, "BLOCK_K": block_k}, warps=warps)
    for transform, power, total in itertools.product(_transforms(), squarings, BOTH):
        constants = {**transform, "SQUARINGS": power, "NEEDS_TOTAL": total, **block_v}
        yield _variant(triton_rows.stats_kernel, constants, **wide)
    for transform, power, gradient in itertools.product(_transforms(), squarings, ("*bf16", "*fp32")):
        constants = {**transform, "SQUARINGS": power, **block_v}
        yield _variant(triton_rows.grad_kernel, constants, gradient=gradient, **wide)
    for gradient, block_k in itertools.product(("*bf16", "*fp32"), BLOCKS_K):
        warps = triton_rows.warps_of_support(block_k)
        yield _variant(triton_rows.fix_kernel, {"BLOCK_K": block_k}, warps=warps, gradient=gradient)
    # Without a teacher nothing is sampled; a record without a head must be.
    for flags in ((0, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)):
        names = ("HAS_TEACHER", "SAMPLED", "HAS_HEAD")
        constants = dict(zip(names, map(bool, flags), strict=True))
        for block_k in BLOCKS_K:
            warps = triton_rows.warps_of_support(block_k)
            yield _variant(triton_assess.assess_kernel, {**constants, "BLOCK_K": block_k}, warps=warps)
    # One entry, one draw: Triton takes an integer that is 1 for a constant.
    plain = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "BLOCK_K": 1}
    yield _variant(triton_rows.prep_kernel, plain, warps=1, ones=("entries",))
    yield _variant(triton_rows.fix_kernel, {"BLOCK_K": 1}, warps=1, ones=("entries",))
    one_draw = {"HAS_TEACHER": True, "SAMPLED": True, "HAS_HEAD": True, "BLOCK_K": 2}
    yield _variant(triton_assess.assess_kernel, one_draw, warps=1, ones=("head_size", "draws"))
    for teacher in teacher_variants():
        yield Variant(teacher.kernel, teacher.constants, teacher.signature, teacher.warps)
