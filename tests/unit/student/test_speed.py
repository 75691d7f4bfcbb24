"""How much of a GPU's arithmetic a run uses, where both are known."""

import pytest

from sparsekd.trainer.student.speed import peak_flops, token_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("Tesla V100-SXM2-16GB", None),
        ("", None),
    ],
)
def test_a_peak_is_known_by_the_boards_name_or_not_at_all(name: str, tera: float | None) -> None:
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def test_operations_are_those_of_the_papers_formula() -> None:
    """PaLM 540B has 118 layers, 48 heads of 256, rows of 2,048 positions. 238,300 tokens per second on 6,144
    chips of 275 TFLOP/s were 46.2 % with attention and 45.7 % without."""
    size = {"parameters": 540_350_000_000, "layers": 118, "sequence_length": 2048}
    whole = token_flops(attention_width=48 * 256, **size)
    without = token_flops(attention_width=0, **size)
    assert whole is not None and without is not None
    assert 238_300 / 6144 * whole / 275e12 == pytest.approx(0.462, abs=5e-4)
    assert 238_300 / 6144 * without / 275e12 == pytest.approx(0.457, abs=5e-4)


def test_a_routed_model_has_none() -> None:
    assert token_flops(parameters=100, layers=1, attention_width=8, sequence_length=8, routed=True) is None
