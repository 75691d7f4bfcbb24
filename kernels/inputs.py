"""What an implementation of the loss is given and gives back: plain data.

N positions, K support entries, V vocabulary (true), H hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.kernels.divergence import support_columns
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
    weights: Tensor
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


class Positions(NamedTuple):
    """What is known of N positions beside their logits.

    Attributes:
        ids: int64 [N, K], the support: the columns of the record that the objective reads; -1 pads.
        targets: the record, or None.
        labels: int64 [N]; negative is ignored.
        weights: [N], wide; 0 drops a position.
    """

    ids: Tensor
    targets: SparseTargets | None
    labels: Tensor
    weights: Tensor

    def take(self, rows: slice) -> "Positions":
        """Some of them."""
        return Positions(self.ids[rows], take_rows(self.targets, rows), self.labels[rows], self.weights[rows])

    def within(self, columns: range) -> tuple[Tensor, Tensor]:
        """(ids [N, K], labels [N]) counted from the first of these columns, negative outside of them."""

        def inside(values: Tensor) -> Tensor:
            local = values - columns.start
            return torch.where((local >= 0) & (local < len(columns)), local, -1)

        return inside(self.ids), inside(self.labels)


def positions_of(inputs: LossInputs) -> Positions:
    """The positions as the implementations read them: where one is dropped, nothing that could spread.

    A dropped position reads as one without label, its record as something finite.
    """
    kept = inputs.weights != 0
    targets, labels = inputs.targets, torch.where(kept, inputs.labels, -1)
    ids = labels.new_empty(labels.shape[0], 0)
    if targets is not None:
        ids = targets.ids[:, : support_columns(targets, inputs.objective)].contiguous()
        targets = targets._replace(
            head_logprobs=torch.where(kept[:, None], targets.head_logprobs, 0.0),
            tail_counts=torch.where(kept[:, None], targets.tail_counts, 0.0),
            log_rest=torch.where(kept, targets.log_rest, 0.0),
            entropy=torch.where(kept, targets.entropy, 0.0),
        )
    # Contiguous, as the row kernels read it; torch.where made the others so.
    weights = inputs.weights.to(wide_dtype(inputs.hidden.dtype)).contiguous()
    return Positions(ids, targets, labels, weights)
