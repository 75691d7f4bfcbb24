"""The same training in one process, float64, plain torch: dense softmax, AdamW, nothing of the loop.

Shapes: N positions, V vocabulary, k head, n draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.row import PADDING_DOCUMENT, Row, TeacherRecord, position_ids
from sparsekd.trainer.data.order import GlobalOrder


@dataclass
class Sums:
    """Weighted sums over positions."""

    loss: Tensor
    kd: float
    ce: float
    agreement: float
    weight: float
    router: list[Tensor]  # of each document with tokens: [layers, tokens, experts], before the softmax


def student(config: dict[str, Any], *, seed: int, vocabulary: int) -> PreTrainedModel:
    """The student of a seed, made on one process in float32; then in float64."""
    fields = {
        "vocab_size": vocabulary,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    } | config
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="sdpa")
    torch.manual_seed(seed)
    model.init_weights()
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")  # the others have no float64
    return model.double()


def row_sums(
    model: PreTrainedModel, row: Row, *, vocabulary: int, kd_weight: float, ce_weight: float
) -> Sums:
    """One row's loss, document by document, each alone in the model, from dense probabilities."""
    starts = [*row.segment_starts.tolist(), len(row.token_ids)]
    total = Sums(torch.zeros((), dtype=torch.float64), 0.0, 0.0, 0.0, 0.0, [])
    assert position_ids(row)[starts[:-1]].tolist() == [0] * (len(starts) - 1)
    counts = bool(row.loss_mask.any())
    for (first, last), document in zip(pairwise(starts), row.segment_documents.tolist(), strict=True):
        ids = torch.tensor(row.token_ids[first:last].astype(np.int64))[None]
        output = model(input_ids=ids, use_cache=False)
        if counts and document != PADDING_DOCUMENT and getattr(model.config, "num_experts", None):
            total.router.append(torch.stack(_router_logits(model, ids)))
        log_q = torch.log_softmax(output.logits[0, :, :vocabulary], dim=-1)
        for offset in range(last - first):
            position = first + offset
            if not row.loss_mask[position]:
                continue
            ce = -log_q[offset, int(row.token_ids[position + 1])]
            kd = torch.zeros((), dtype=torch.float64)
            if kd_weight:
                assert row.recorded is not None and row.teacher is not None
                number = int(row.recorded[:position].sum())
                kd = _sampled_kd(log_q[offset], row.teacher, number)
                top = int(row.teacher.head_ids[number, 0])
                total.agreement += float(int(log_q[offset].argmax()) == top)
            total.loss = total.loss + kd_weight * kd + ce_weight * ce
            total.kd += float(kd.detach())
            total.ce += float(ce.detach())
            total.weight += 1.0
    return total


def _router_logits(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What the gate of each layer says of a document's tokens, [tokens, experts] each."""
    found: list[Tensor] = []
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda _, __, output: found.append(output[0])) for gate in gates]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert found
    return found


def balance(documents: list[Tensor], *, experts_per_token: int) -> Tensor:
    """Experts times the sum over experts of (share of choices) x (mean probability), over layers and tokens.

    Shares of choices count each of a token's experts as one, so that they sum to `experts_per_token`.
    """
    if not documents:
        return torch.zeros((), dtype=torch.float64)
    logits = torch.cat(documents, dim=1).flatten(0, 1)  # (layers * tokens, experts)
    probability = logits.softmax(-1)
    chosen = probability.argsort(-1, descending=True)[:, :experts_per_token]
    count, experts = logits.shape
    value = torch.zeros((), dtype=torch.float64)
    for expert in range(experts):
        share = float((chosen == expert).sum()) / count
        value = value + experts * share * probability[:, expert].mean()
    return value


def _sampled_kd(log_q: Tensor, teacher: TeacherRecord, number: int) -> Tensor:
    """-entropy - sum over head p_i log q_i - sum over draws (R / Z) count_j / n log q_j, at T = T_d = 1."""
    head = np.exp(teacher.head_logprobs[number].astype(np.float64))
    rest = math.exp(float(teacher.log_rest[number, 0]))
    scale = head.sum() + rest
    counts = teacher.tail_counts[number].astype(np.float64)
    value = torch.tensor(-float(teacher.entropy[number]), dtype=torch.float64)
    for share, token in zip(head / scale, teacher.head_ids[number], strict=True):
        value = value - share * log_q[int(token)]
    for count, token in zip(counts, teacher.tail_ids[number], strict=True):
        if count > 0:
            value = value - (rest / scale) * count / counts.sum() * log_q[int(token)]
    return value


def train(
    store: LogitStore, values: dict[str, Any], *, steps: int, batches: Sequence[Sequence[Row]] | None = None
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Trains as `values` say; returns the model and one record of metrics for each step.

    Args:
        store: Its rows are taken in the global order, where no batches are given.
        values: The configuration.
        steps: How many are taken.
        batches: The rows of each step.
    """
    vocabulary = store.manifest.tokenizer.vocabulary_size
    objective, optimizer = values["objective"], values["optimizer"]
    batch, micro = values["train"]["global_batch_rows"], values["train"]["micro_batch_rows"]
    if batches is None:
        places = GlobalOrder(store.rows("train"), seed=0).places(0, steps * batch)
        rows = [store.read_row("train", place.row) for place in places]
        batches = [rows[first : first + batch] for first in range(0, len(rows), batch)]
    coefficient = values["student"].get("router_loss")
    if coefficient is None and values["student"]["config"].get("output_router_logits"):
        coefficient = values["student"]["config"]["router_aux_loss_coef"]
    model = student(values["student"]["config"], seed=0, vocabulary=vocabulary)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=optimizer["epsilon"],
    )
    records = []
    for step in range(1, steps + 1):
        parts = [
            row_sums(
                model,
                row,
                vocabulary=vocabulary,
                kd_weight=objective["kd_weight"],
                ce_weight=objective["ce_weight"],
            )
            for row in batches[step - 1]
        ]
        weight = sum(part.weight for part in parts)
        loss = sum((part.loss for part in parts), torch.zeros((), dtype=torch.float64)) / weight
        if coefficient:
            rows_of = [parts[first : first + micro] for first in range(0, batch, micro)]
            balances = [
                balance(
                    [one for part in few for one in part.router],
                    experts_per_token=model.config.num_experts_per_tok,
                )
                for few in rows_of
            ]
            router = torch.stack(balances).mean()
            loss = loss + coefficient * router
        adamw.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        clipping = optimizer["gradient_clipping"]
        if clipping and norm > clipping:
            for gradient in gradients:
                gradient.mul_(clipping / (norm + 1e-6))
        for group in adamw.param_groups:
            group["lr"] = _cosine(step, values)
        adamw.step()
        records.append(
            {
                "loss": float(loss.detach()),
                "kd": sum(part.kd for part in parts) / weight,
                "ce": sum(part.ce for part in parts) / weight,
                "agreement": sum(part.agreement for part in parts) / weight,
                "gradient_norm": float(norm),
                "learning_rate": _cosine(step, values),
                **({"router_loss": float(router.detach())} if coefficient else {}),
            }
        )
    return model, records


def _cosine(step: int, values: dict[str, Any]) -> float:
    peak, warmup, steps = (
        values["optimizer"]["learning_rate"],
        values["schedule"]["warmup_steps"],
        values["train"]["steps"],
    )
    if step <= warmup:
        return peak * step / warmup
    course = (step - warmup) / (steps - warmup)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * course)) / 2)


def relative_difference(
    found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]
) -> float:
    """Norm of the difference of two sets of weights, relative to how far training moved them."""
    difference = sum(float((found[name].double() - expected[name]).detach().norm() ** 2) for name in expected)
    moved = sum(float((expected[name] - start[name]).detach().norm() ** 2) for name in expected)
    return math.sqrt(difference / moved)
