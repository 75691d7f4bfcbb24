"""Only positions that count reach the head: products, launches and bytes of the Triton path follow them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from source_rows import with_records
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekd.kernels import triton_assess, triton_block, triton_teacher
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.targets import NOTHING
from sparsekd.kernels.teacher import teacher_statistics
from sparsekd.logit_store.row import narrowed
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.trainer.data.batches import MicroBatch, micro_batch, rest_formula_of
from sparsekd.trainer.student.head import LossSettings, WeightedLoss, make_distillation_head

VOCABULARY, HIDDEN, LENGTH = 97, 16, 40
MANIFEST = synthetic_manifest(vocabulary_size=VOCABULARY, sequence_length=LENGTH, k=3, n=4)
OBJECTIVE = Objective(
    kd_weight=0.5,
    ce_weight=0.5,
    divergence="forward_kl",
    mixture=0.1,
    target_mode="tail_bucket",
    temperature=1.0,
    label_smoothing=0.0,
    z_loss=0.0,
)


class Counted(TorchDispatchMode):
    """What is done inside: multiplications of the products, and the programs and bytes of each kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0
        self.launches: dict[str, int] = {}
        self.programs: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = [each for each in args if isinstance(each, Tensor)][-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))

    def launch(self, name: str, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        self.launches[name] = self.launches.get(name, 0) + 1
        self.programs[name] = self.programs.get(name, 0) + math.prod(grid)
        taken = sum(each.numel() * each.element_size() for each in arguments if isinstance(each, Tensor))
        self.bytes[name] = self.bytes.get(name, 0) + taken


class Kernel:
    """A kernel whose launches are counted before they are made."""

    def __init__(self, kernel: Any, name: str, counted: Counted) -> None:
        self.kernel, self.name, self.counted = kernel, name, counted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> Any:
            self.counted.launch(self.name, grid, arguments)
            return self.kernel[grid](*arguments, **named)

        return launch


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    counted = Counted()
    with monkeypatch.context() as patch:
        for module in (triton_block, triton_assess, triton_teacher):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Kernel(getattr(module, name), name, counted))
        with counted:
            yield counted


def batch(learned: int, *, multiple: int = 1) -> MicroBatch:
    """Rows of 80 positions, of which the last so many of those that count do."""
    rows = synthetic_rows(MANIFEST, 2, seed=5)
    counts = np.concatenate([row.loss_mask for row in rows])
    kept = counts & (counts[::-1].cumsum()[::-1] <= learned)
    narrow = [narrowed(row, part) for row, part in zip(rows, np.split(kept, 2), strict=True)]
    return micro_batch(with_records(narrow, rest_formula_of(OBJECTIVE, MANIFEST)), multiple=multiple)


def trained(some: MicroBatch, impl: str = "triton") -> tuple[WeightedLoss, Tensor, Tensor]:
    """(loss, gradient of the hidden states [N, H], gradient of the head's weight)."""
    torch.manual_seed(0)
    settings = LossSettings(
        objective=OBJECTIVE,
        transform=HeadTransform(vocabulary_size=VOCABULARY, scale=1.0, softcap=None),
        impl=impl,
        chunk_positions=None,
        memory_budget=None,
    )
    head = make_distillation_head(nn.Linear(HIDDEN, VOCABULARY, bias=False), settings)
    hidden = torch.randn(2, LENGTH, HIDDEN, requires_grad=True)
    output = head(hidden, some)
    assert isinstance(output, WeightedLoss)
    output.loss.backward()
    assert hidden.grad is not None and head.weight.grad is not None
    return output, hidden.grad.flatten(0, 1), head.weight.grad


def test_the_loss_costs_what_its_positions_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 24 of 60, 40 per cent of the three products, of the programs and of what they read and write."""
    found = []
    for learned in (60, 24):
        with counting(monkeypatch) as counted:
            trained(batch(learned))
        assert counted.multiplications == 3 * learned * VOCABULARY * HIDDEN
        assert counted.programs == dict.fromkeys(counted.programs, learned)
        assert set(counted.programs) == {
            f"{name}_kernel" for name in ("prep", "stats", "assess", "grad", "fix")
        }
        found.append(counted)
    whole, part = found
    assert part.launches == whole.launches == dict.fromkeys(whole.programs, 1)
    for name in ("prep_kernel", "stats_kernel", "assess_kernel", "grad_kernel", "fix_kernel"):
        assert part.bytes[name] * 60 == whole.bytes[name] * 24, name


def test_the_statistics_cost_what_their_positions_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The capture hands over the recorded positions alone."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(60, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    uniforms = torch.rand(60, 4, dtype=torch.float64)
    programs, products = [], []
    for recorded in (60, 24):
        with counting(monkeypatch) as counted:
            teacher_statistics(
                hidden[-recorded:],
                weight,
                bias=None,
                labels=torch.zeros(recorded, dtype=torch.int64),
                head=HeadTransform(vocabulary_size=VOCABULARY, scale=1.0, softcap=None),
                k=3,
                n=4,
                temperatures=(1.0, 2.0),
                draw_temperature=1.0,
                uniforms=uniforms[-recorded:],
                impl="triton",
            )
        programs.append(counted.programs)
        products.append(counted.multiplications)
    assert products == [60 * VOCABULARY * HIDDEN, 24 * VOCABULARY * HIDDEN]
    assert {"scan_kernel", "collect_kernel", "settle_kernel"} <= set(programs[0])
    assert {name: count * 24 for name, count in programs[0].items()} == {
        name: count * 60 for name, count in programs[1].items()
    }


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_positions_that_fill_up_change_nothing(impl: str) -> None:
    """Of as many as a multiple asks for, each once, ascending, among them those that count."""
    plain, filled = batch(24), batch(24, multiple=16)
    assert len(plain.positions) == 24 and len(filled.positions) == 32
    assert filled.positions.unique().tolist() == filled.positions.tolist()
    assert filled.weight_sum == plain.weight_sum and torch.equal(filled.routed, plain.routed)
    added = ~torch.isin(filled.positions, plain.positions)
    assert added.sum() == 8 and not (filled.ce_weights[added].any() or filled.kd_weights[added].any())
    assert filled.targets is not None and plain.targets is not None
    for name, value in filled.targets._asdict().items():
        assert torch.equal(value[~added], getattr(plain.targets, name))
        assert (value[added] == NOTHING[name]).all()
    expected, found = trained(plain, impl), trained(filled, impl)
    assert found[0].loss.item() == pytest.approx(expected[0].loss.item(), rel=1e-6)
    assert torch.allclose(found[0].parts, expected[0].parts, rtol=1e-6)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    assert not found[1][filled.positions[added]].any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_micro_batch_without_positions_runs_the_head_all_the_same(impl: str) -> None:
    """Nothing fills up what is empty; loss and gradients are 0, and they are there."""
    nothing = batch(0, multiple=16)
    assert len(nothing.positions) == 0
    output, of_hidden, of_weight = trained(nothing, impl)
    assert output.loss.item() == 0 and not output.parts.any()
    assert not of_hidden.any() and not of_weight.any()


def test_no_more_positions_come_in_than_there_are() -> None:
    assert len(batch(60, multiple=64).positions) == 64
    assert len(batch(60, multiple=1000).positions) == 2 * LENGTH
