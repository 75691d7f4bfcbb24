"""What an implementation of the loss is given and gives back: plain data.

N positions, K support entries, V vocabulary (true), H hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.kernels.gemm import wide_dtype
from sparsekd.kernels.memory import MemoryPlan
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.shard import VocabularyShard
from sparsekd.kernels.targets import SparseTargets, take_rows


class LossInputs(NamedTuple):
    """Checked arguments of `sparse_kd_loss`, how much memory is taken, and what wants a gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: SparseTargets | None
    labels: Tensor
    ce_weights: Tensor
    kd_weights: Tensor
    objective: Objective
    head: HeadTransform
    shard: VocabularyShard | None
    plan: MemoryPlan
    hidden_gradient: bool
    weight_gradient: bool
    bias_gradient: bool

    @property
    def needs_gradient(self) -> bool:
        """Whether any gradient is asked for."""
        return self.hidden_gradient or self.weight_gradient or self.bias_gradient

    @property
    def kept(self) -> Tensor:
        """Bool [N]: the positions that are not dropped."""
        return are_kept(self.ce_weights, self.kd_weights)

    @property
    def columns(self) -> range:
        """The ids of the true vocabulary whose rows `weight` holds."""
        start = 0 if self.shard is None else self.shard.start
        return range(start, min(start + self.weight.shape[0], self.head.vocabulary_size))

    def wide_bias(self, rows: slice) -> Tensor | None:
        """The bias of some rows of `weight`, wide and contiguous."""
        if self.bias is None:
            return None
        return self.bias[rows].to(wide_dtype(self.hidden.dtype)).contiguous()


class LossParts(NamedTuple):
    """What an implementation gives back: values, and gradients for an upstream gradient of 1.

    Of the weight's gradient it gives either itself or, where `MemoryPlan.weight_in_backward` says so, the
    gradient of the products hidden @ weight.T, [N, V] in the operands' dtype.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    agreement: Tensor
    hidden_gradient: Tensor | None
    weight_gradient: Tensor | None
    bias_gradient: Tensor | None
    logit_gradient: Tensor | None


def are_kept(ce_weights: Tensor, kd_weights: Tensor) -> Tensor:
    """Bool [N]: where one of the two weights is not 0; the other positions are dropped from everything."""
    return (ce_weights != 0) | (kd_weights != 0)


def support_columns(targets: SparseTargets | None, objective: Objective) -> int:
    """How many columns of `targets.ids` the objective reads: its support.

    Without distillation the teacher's most likely id remains, for the agreement.
    """
    if targets is None:
        return 0
    if objective.kd_weight == 0:
        return min(1, targets.head_size)
    return targets.ids.shape[1] if objective.target_mode == "sampled" else targets.head_size


class Positions(NamedTuple):
    """What is known of N positions beside their logits.

    Attributes:
        ids: int64 [N, K], the support: the columns of the record that the objective reads; -1 pads, also all
            of them where the record does not count.
        targets: the record, or None.
        labels: int64 [N]; negative is ignored.
        ce_weights: [N], wide; kd_weights: [N], wide. 0 leaves a position out of the cross-entropy, or out of
            the distillation, its record unread; both 0 drop it.
    """

    ids: Tensor
    targets: SparseTargets | None
    labels: Tensor
    ce_weights: Tensor
    kd_weights: Tensor

    @property
    def kept(self) -> Tensor:
        """Bool [N]: those that are not dropped."""
        return are_kept(self.ce_weights, self.kd_weights)

    @property
    def recorded(self) -> Tensor:
        """Bool [N]: those whose record counts."""
        return self.kd_weights != 0

    def take(self, rows: slice) -> "Positions":
        """Some of them."""
        return Positions(
            self.ids[rows],
            take_rows(self.targets, rows),
            self.labels[rows],
            self.ce_weights[rows],
            self.kd_weights[rows],
        )

    def within(self, columns: range) -> tuple[Tensor, Tensor]:
        """(ids [N, K], labels [N]) counted from the first of these columns, negative outside of them."""

        def inside(values: Tensor) -> Tensor:
            local = values - columns.start
            return torch.where((local >= 0) & (local < len(columns)), local, -1)

        return inside(self.ids), inside(self.labels)


def positions_of(inputs: LossInputs) -> Positions:
    """The positions as the implementations read them: what does not count holds nothing that could spread.

    A position without weight for the cross-entropy reads as one without label. One without weight for the
    distillation has no support, and as its record an even law over head and rest, whatever was there.
    """
    recorded = inputs.kd_weights != 0
    targets, labels = inputs.targets, torch.where(inputs.ce_weights != 0, inputs.labels, -1)
    ids = labels.new_empty(labels.shape[0], 0)
    if targets is not None:
        read = targets.ids[:, : support_columns(targets, inputs.objective)]
        ids = torch.where(recorded[:, None], read, -1)
        targets = SparseTargets(
            *(torch.where(recorded if value.ndim == 1 else recorded[:, None], value, 0) for value in targets)
        )
    # Contiguous, as the row kernels read them; torch.where made the others so.
    wide = wide_dtype(inputs.hidden.dtype)
    ce_weights, kd_weights = (value.to(wide).contiguous() for value in (inputs.ce_weights, inputs.kd_weights))
    return Positions(ids, targets, labels, ce_weights, kd_weights)
