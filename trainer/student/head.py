"""The student as DeepSpeed sees it: one module whose forward is the loss.

Under ZeRO-3 a weight exists only inside the forward and backward of the module that owns it. So the loss is
the forward of the output head itself, called inside the engine's forward. The head keeps its Parameter object
(its class is swapped), so that an embedding tied to it stays tied.

Shapes: B rows, L tokens of a row, N = B * L positions, H hidden, V rows of the head's weight.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd.kernels.loss import sparse_kd_loss
from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.trainer.data.batches import MicroBatch
from sparsekd.trainer.models.causal_lm import decoder_and_head, dense_logits, hidden_states, model_arguments
from sparsekd.trainer.models.router import check_router, states_and_balance
from sparsekd.trainer.run.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Which loss the head computes, and how."""

    objective: Objective
    transform: HeadTransform
    impl: str
    chunk_positions: int | None
    memory_budget: int | None  # bytes, instead of chunk_positions
    router_coefficient: float = 0.0  # of the load-balancing loss of a mixture of experts; 0 for none


@dataclass(frozen=True)
class Probe:
    """Asks the student for logits twice: by the model's own forward and by our reading of its head."""

    token_ids: Tensor  # (B, L) int64
    position_ids: Tensor  # (B, L) int64


class WeightedLoss(NamedTuple):
    """The loss of a micro-batch and what it is made of, all weighted sums over its positions."""

    loss: Tensor  # float32 scalar, differentiable; times the micro-batch's scale
    parts: Tensor  # float64 (3,): kd by kd_weights, ce by ce_weights, agreement by kd_weights; detached
    router: Tensor | None = None  # float32 scalar, differentiable: a mean over tokens, not part of `loss`


class DistillationHead(nn.Linear):
    """An output head that is plain with hidden states alone, and the loss with a micro-batch beside them."""

    settings: LossSettings

    def forward(  # type: ignore[override]  # wider than nn.Linear's on purpose
        self, input: Tensor, request: MicroBatch | Probe | None = None
    ) -> Tensor | WeightedLoss:
        """Logits (..., V) without a request; the weighted loss for a micro-batch; true logits for a probe.

        Args:
            input: Hidden states, (..., H), as the decoder returns them.
            request: What is wanted of them.
        """
        if request is None:
            return super().forward(input)
        if isinstance(request, Probe):
            return dense_logits(input, self, self.settings.transform)
        scale = 1.0 if request.scale is None else request.scale
        # Also where no position is left: under ZeRO-3 every rank's head must take part in both passes.
        output = sparse_kd_loss(
            input.flatten(0, -2).index_select(0, request.positions),
            self.weight,
            bias=self.bias,
            targets=request.targets,
            labels=request.labels,
            # Scaled here and not in the loss: the weight's gradient is then made as it is written.
            ce_weights=request.ce_weights * scale,
            kd_weights=request.kd_weights * scale,
            objective=self.settings.objective,
            head=self.settings.transform,
            impl=self.settings.impl,
            chunk_positions=self.settings.chunk_positions,
            memory_budget=self.settings.memory_budget,
        )
        of_kd, of_ce = request.kd_weights.double(), request.ce_weights.double()
        parts = [output.kd.double() @ of_kd, output.ce.double() @ of_ce, output.agreement.double() @ of_kd]
        return WeightedLoss(loss=output.loss, parts=torch.stack(parts))


def make_distillation_head(head: nn.Linear, settings: LossSettings) -> DistillationHead:
    """Turns a model's head into a `DistillationHead` in place: same object, same Parameter.

    Raises:
        ModelError: The head is a subclass of nn.Linear whose forward is its own.
    """
    if type(head) is not nn.Linear:
        raise ModelError(
            f"The student's head is a {type(head).__name__}, not a plain nn.Linear, so its loss would skip "
            "what that class adds; use a model without adapters or quantisation on its head."
        )
    head.__class__ = DistillationHead
    assert isinstance(head, DistillationHead)
    head.settings = settings
    return head


class Student(nn.Module):
    """A causal language model whose forward takes a micro-batch and returns its loss."""

    def __init__(self, model: PreTrainedModel, settings: LossSettings) -> None:
        super().__init__()
        self.model = model
        self.router_coefficient = settings.router_coefficient
        if self.router_coefficient:
            check_router(model)
        make_distillation_head(decoder_and_head(model)[1], settings)

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one Parameter: by identity, not by what the configuration claims."""
        return self.model.get_input_embeddings().weight is self.model.get_output_embeddings().weight

    def forward(self, request: MicroBatch | Probe) -> WeightedLoss | tuple[Tensor, Tensor]:
        """The loss of a micro-batch, or for a probe the model's own logits and ours."""
        decoder, head = decoder_and_head(self.model)
        if self.training and self.router_coefficient and isinstance(request, MicroBatch):
            hidden, router = states_and_balance(
                self.model, decoder, request.token_ids, request.position_ids, request.routed
            )
            loss: WeightedLoss = head(hidden, request)
            return loss._replace(router=router)
        hidden = hidden_states(decoder, request.token_ids, request.position_ids)  # (B, L, H)
        ours = head(hidden, request)
        if isinstance(request, MicroBatch):
            return ours
        own = self.model(**model_arguments(self.model, request.token_ids, request.position_ids))
        return own.logits.reshape(*request.token_ids.shape, -1), ours
