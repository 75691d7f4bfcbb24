"""The cases of the kernel benchmark: settings, synthetic inputs, and every call of the package under test.

N positions, V vocabulary, H hidden, K entries of the teacher's head, T temperature, n draws of the tail.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.kernels.loss import LossOutput, sparse_kd_loss
from sparsekd.kernels.memory import LossShape, MemoryPlan, plan_memory
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.targets import SparseTargets
from sparsekd.kernels.teacher import TeacherStatistics, teacher_statistics

TABLES: dict[str, str] = {
    "A": "distillation plus cross-entropy from a sparse record",
    "B": "cross-entropy alone",
    "C": "distillation from a live teacher's hidden states",
    "D": "the teacher's record from its hidden states",
}
SPREAD = 2.0  # standard deviation of the part of a logit that depends on the position
TEACHER_NOISE = 0.3  # the teacher's hidden states are the student's with so much noise
KD_WEIGHT = CE_WEIGHT = 0.5
DRAWS = 24  # of the record in table D, beside K exact entries: what `capture` keeps by default
GRID = (1.0, 2.0, 4.0)  # temperatures of the record in table D
# Accuracy is measured where a dense float64 loss is cheap: at most so many positions, entries, hidden units.
ACCURACY_SHAPE = (256, 32768, 256)


class CannotRunError(Exception):
    """A contestant cannot take part in a case; the message is what its row says."""


@dataclass(frozen=True)
class Setting:
    """One case: a table, a shape, a record, a dtype."""

    table: str
    positions: int
    vocabulary: int
    hidden: int
    k: int
    temperature: float
    dtype_name: str
    data: str  # "zipf" or "gaussian"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states and head."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype_name]

    @property
    def shape(self) -> str:
        """N x V x H."""
        return f"{self.positions} x {self.vocabulary} x {self.hidden}"

    @property
    def title(self) -> str:
        """What tells this case from the others of its table."""
        record = {
            "A": f", K {self.k}, T {self.temperature:g}",
            "B": "",
            "C": f", K {self.k}, T {self.temperature:g}",
            "D": f", k {self.k}, n {DRAWS}",
        }
        return f"{self.shape}, {self.dtype_name}{record[self.table]}"

    def for_accuracy(self) -> "Setting":
        """The same case at the small shape where a float64 loss is cheap."""
        sizes = (self.positions, self.vocabulary, self.hidden)
        count, vocabulary, hidden = (min(pair) for pair in zip(sizes, ACCURACY_SHAPE, strict=True))
        return Setting(
            self.table,
            count,
            vocabulary,
            hidden,
            min(self.k, vocabulary - 1),
            self.temperature,
            self.dtype_name,
            self.data,
        )


class Inputs(NamedTuple):
    """What every contestant of a case is given."""

    hidden: Tensor  # [N, H], wants a gradient
    weight: Tensor  # [V, H], wants a gradient
    teacher_hidden: Tensor  # [N, H]; the teacher has the student's head
    labels: Tensor  # int64 [N]
    targets: SparseTargets  # the teacher's K most likely entries, and the rest at T
    ones: Tensor  # float32 [N], the weights of the positions
    uniforms: Tensor  # float64 [N, n], what decides the draws of table D


def make_inputs(setting: Setting, seed: int, device: torch.device) -> Inputs:
    """Inputs from a seed.

    "zipf": a logit is -log(rank of its id) plus normal noise, so that the ids' frequencies fall as in text
    and every position has a few likely ids. "gaussian": the noise alone, so that no id is likely.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, setting.hidden, generator=generator, device=device)

    hidden = normal(setting.positions)
    weight = normal(setting.vocabulary) * (SPREAD / setting.hidden**0.5)
    teacher = hidden + TEACHER_NOISE * normal(setting.positions)
    if setting.data == "zipf":
        rank = 1 + torch.randperm(setting.vocabulary, generator=generator, device=device)
        hidden[:, 0] = teacher[:, 0] = 1.0
        weight[:, 0] = -rank.float().log()
    hidden, weight, teacher = (value.to(setting.dtype) for value in (hidden, weight, teacher))
    uniforms = torch.rand(setting.positions, DRAWS, generator=generator, device=device, dtype=torch.float64)
    record = teacher_record(
        teacher, weight, k=setting.k, temperatures=(setting.temperature,), uniforms=uniforms[:, :0]
    )
    # Labels as a teacher would draw them, roughly: its likely ids, the first ones most often.
    place = torch.rand(setting.positions, 1, generator=generator, device=device).log().mul(-2).long()
    labels = record.head_ids.long().gather(1, place.clamp(max=setting.k - 1))[:, 0]
    targets = SparseTargets(
        ids=record.head_ids.long(),
        head_logprobs=record.head_logprobs,
        tail_counts=record.head_logprobs.new_empty(setting.positions, 0),
        log_rest=record.log_rest[:, 0].contiguous(),
        entropy=record.entropy,
    )
    return Inputs(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        teacher_hidden=teacher,
        labels=labels,
        targets=targets,
        ones=torch.ones(setting.positions, device=device),
        uniforms=uniforms,
    )


def in_float64(inputs: Inputs) -> Inputs:
    """The same inputs, hidden states and head widened; what was rounded before stays so."""
    return inputs._replace(
        hidden=inputs.hidden.detach().double().requires_grad_(),
        weight=inputs.weight.detach().double().requires_grad_(),
        teacher_hidden=inputs.teacher_hidden.double(),
    )


def our_loss(
    inputs: Inputs,
    setting: Setting,
    *,
    impl: str,
    kd_weight: float = KD_WEIGHT,
    ce_weight: float = CE_WEIGHT,
    memory_budget: int | None = None,
) -> LossOutput:
    """The package's loss: the one place where the benchmark calls it."""
    return sparse_kd_loss(
        inputs.hidden,
        inputs.weight,
        bias=None,
        targets=inputs.targets if kd_weight else None,
        labels=inputs.labels,
        ce_weights=inputs.ones,
        kd_weights=inputs.ones,
        objective=Objective(
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            divergence="forward_kl",
            mixture=0.5,  # not read
            target_mode="tail_bucket",
            temperature=setting.temperature,
            label_smoothing=0.0,
            z_loss=0.0,
        ),
        head=HeadTransform(vocabulary_size=setting.vocabulary, scale=1.0, softcap=None),
        impl=impl,
        memory_budget=memory_budget,
    )


def smaller_plans(setting: Setting, impl: str, device: torch.device) -> list[MemoryPlan]:
    """Every cut of our loss that a budget can choose, from the rule's own down to the smallest that works."""
    shape = LossShape(
        positions=setting.positions,
        vocabulary_size=setting.vocabulary,
        hidden_size=setting.hidden,
        element_bytes=setting.dtype.itemsize,
        temperature=setting.temperature,
        softcap=False,
        on_cpu=device.type == "cpu",
    )
    plans = [plan_memory(impl, shape)]
    while True:
        try:
            plans.append(plan_memory(impl, shape, memory_budget=plans[-1].peak_bytes - 1))
        except ValueError:  # no cut is that small
            return plans


def teacher_record(
    hidden: Tensor,
    weight: Tensor,
    *,
    k: int,
    temperatures: tuple[float, ...],
    uniforms: Tensor,
    labels: Tensor | None = None,
    impl: str = "torch",
) -> TeacherStatistics:
    """The package's teacher statistics: the one place where the benchmark calls them."""
    if labels is None:
        labels = torch.full((hidden.shape[0],), -100, device=hidden.device)
    return teacher_statistics(
        hidden,
        weight,
        bias=None,
        labels=labels,
        head=HeadTransform(vocabulary_size=weight.shape[0], scale=1.0, softcap=None),
        k=k,
        n=uniforms.shape[1],
        temperatures=temperatures,
        draw_temperature=1.0,
        uniforms=uniforms,
        impl=impl,
    )
