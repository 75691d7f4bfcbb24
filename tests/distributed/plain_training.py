"""The same training in one process, float64, plain torch: dense softmax, AdamW, nothing of the loop.

Shapes: N positions, V vocabulary, k head, n draws.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.row import Row, TeacherRecord, position_ids
from sparsekd.trainer.data.order import row_at


@dataclass
class Sums:
    """Weighted sums over positions."""

    loss: Tensor
    kd: float
    ce: float
    agreement: float
    weight: float


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
    return model.double()


def row_sums(
    model: PreTrainedModel, row: Row, *, vocabulary: int, kd_weight: float, ce_weight: float
) -> Sums:
    """One row's loss, document by document, each alone in the model, from dense probabilities."""
    starts = [*row.segment_starts.tolist(), len(row.token_ids)]
    total = Sums(torch.zeros((), dtype=torch.float64), 0.0, 0.0, 0.0, 0.0)
    assert position_ids(row)[starts[:-1]].tolist() == [0] * (len(starts) - 1)
    for first, last in pairwise(starts):
        ids = torch.tensor(row.token_ids[first:last].astype(np.int64))[None]
        log_q = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :, :vocabulary], dim=-1)
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
    store: LogitStore, values: dict[str, Any], *, steps: int
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Trains as `values` say; returns the model and one record of metrics for each step."""
    vocabulary = store.manifest.tokenizer.vocabulary_size
    objective, optimizer = values["objective"], values["optimizer"]
    rows = store.rows("train")
    batch = values["train"]["global_batch_rows"]
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
                store.read_row("train", row_at((step - 1) * batch + offset, rows=rows, seed=0)),
                vocabulary=vocabulary,
                kd_weight=objective["kd_weight"],
                ce_weight=objective["ce_weight"],
            )
            for offset in range(batch)
        ]
        weight = sum(part.weight for part in parts)
        loss = sum((part.loss for part in parts), torch.zeros((), dtype=torch.float64)) / weight
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
