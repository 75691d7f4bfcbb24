"""The head that computes the loss is the model's own head, and packed documents do not see one another."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from source_rows import with_records
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsekd.kernels.objective import HeadTransform, Objective
from sparsekd.kernels.targets import NOTHING, SparseTargets
from sparsekd.logit_store.row import Row
from sparsekd.logit_store.synthetic import synthetic_manifest, synthetic_rows
from sparsekd.trainer.data.batches import (
    MicroBatch,
    head_positions,
    micro_batch,
    rest_formula_of,
    sparse_targets,
)
from sparsekd.trainer.models.causal_lm import decoder_and_head, hidden_states
from sparsekd.trainer.run.errors import ModelError
from sparsekd.trainer.student import head as head_module
from sparsekd.trainer.student.head import (
    DistillationHead,
    LossSettings,
    Probe,
    Student,
    make_distillation_head,
)
from sparsekd.trainer.student.sums import sums_of

VOCABULARY = 97
MANIFEST = synthetic_manifest(vocabulary_size=VOCABULARY, sequence_length=32, k=3, n=4)


def llama(**changes: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": 104,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**sizes, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def settings(kd_weight: float = 0.5, softcap: float | None = None) -> LossSettings:
    objective = Objective(
        kd_weight=kd_weight,
        ce_weight=0.5,
        divergence="forward_kl",
        mixture=0.1,
        target_mode="tail_bucket",
        temperature=1.0,
        label_smoothing=0.0,
        z_loss=0.0,
    )
    transform = HeadTransform(vocabulary_size=VOCABULARY, scale=1.0, softcap=softcap)
    return LossSettings(
        objective=objective, transform=transform, impl="reference", chunk_positions=None, memory_budget=None
    )


def batch(count: int = 2, counting: int | None = None) -> MicroBatch:
    rest = rest_formula_of(settings().objective, MANIFEST)
    return micro_batch(with_records(synthetic_rows(MANIFEST, count, seed=5), rest), counting=counting)


@pytest.mark.parametrize("tied", [True, False])
def test_the_swap_keeps_the_parameter(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    weight, before = model.lm_head.weight, model(batch().token_ids).logits
    student = Student(model, settings())
    assert type(model.lm_head) is DistillationHead and model.lm_head.weight is weight
    assert student.is_tied is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    # Without a request it is the plain head: generation and plain forwards go on as before.
    assert torch.equal(model(batch().token_ids).logits, before)


def test_the_loss_is_that_of_the_model_s_own_logits() -> None:
    student, some = Student(llama(), settings(kd_weight=0.0)), batch()
    loss, parts, _ = student(some)
    logits = student.model(some.token_ids, position_ids=some.position_ids, use_cache=False).logits
    own = logits.reshape(-1, 104)[some.positions, :VOCABULARY].double()
    ce = nn.functional.cross_entropy(own, some.labels, reduction="none", ignore_index=-100) * some.ce_weights
    assert loss.item() == pytest.approx(0.5 * ce.sum().item(), rel=1e-6)
    assert parts[1].item() == pytest.approx(ce.sum().item(), rel=1e-6)


def weighted_batch() -> MicroBatch:
    """Two weights that differ, and positions where one of them is 0."""
    some = batch()
    count = len(some.positions)
    assert count > 20 and some.targets is not None
    kd_weights = 4 * (torch.arange(count) % 3 == 0).float()
    ce_weights = (torch.arange(count) % 4 != 3) * torch.linspace(0.5, 2.0, count)
    nothing = kd_weights == 0
    planes = {name: value.clone() for name, value in some.targets._asdict().items()}
    for name, value in NOTHING.items():
        planes[name][nothing] = value
    return replace(some, ce_weights=ce_weights, kd_weights=kd_weights, targets=SparseTargets(**planes))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_scale_is_of_the_gradient_alone(impl: str) -> None:
    """Loss and gradients are multiplied by it; what is logged is not."""
    student, plain = Student(llama(), replace(settings(), impl=impl)), weighted_batch()
    found = []
    for some in (plain, replace(plain, scale=torch.tensor(0.37))):
        student.zero_grad()
        output = student(some)
        output.loss.backward()
        gradient = torch.cat([value.grad.flatten() for value in student.parameters()])
        found.append((output.loss.item(), gradient, sums_of(output, some)))
    (loss, gradient, sums), (scaled_loss, scaled_gradient, scaled_sums) = found
    assert scaled_loss == pytest.approx(0.37 * loss, rel=1e-6)
    assert torch.allclose(scaled_gradient, 0.37 * gradient, rtol=1e-4, atol=1e-7)
    assert torch.allclose(scaled_sums, sums, rtol=1e-6) and torch.equal(scaled_sums[1:], sums[1:])


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_head_sees_the_positions_that_count(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    """Their loss and gradients are those of all positions, the others dropped by their weights."""
    some = weighted_batch()
    chosen = replace(settings(), impl=impl)
    student = Student(llama(), chosen)
    seen = []
    original = head_module.sparse_kd_loss
    monkeypatch.setattr(
        head_module, "sparse_kd_loss", lambda *a, **k: seen.append(a[0].shape) or original(*a, **k)
    )
    loss, parts, _ = student(some)
    loss.backward()
    assert seen == [(len(some.positions), 32)]
    found = {name: value.grad.clone() for name, value in student.named_parameters()}

    student.zero_grad()
    decoder, head = decoder_and_head(student.model)
    hidden = hidden_states(decoder, some.token_ids, some.position_ids).flatten(0, 1)

    def everywhere(values: Tensor, fill: float) -> Tensor:
        whole = values.new_full((len(hidden), *values.shape[1:]), fill)
        return whole.index_copy(0, some.positions, values)

    assert some.targets is not None
    whole = original(
        hidden,
        head.weight,
        bias=None,
        targets=SparseTargets(*(everywhere(value, 0) for value in some.targets)),
        labels=everywhere(some.labels, 7),
        ce_weights=everywhere(some.ce_weights, 0),
        kd_weights=everywhere(some.kd_weights, 0),
        objective=chosen.objective,
        head=chosen.transform,
        impl="reference",
    )
    whole.loss.backward()
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    for name, value in student.named_parameters():
        assert value.grad is not None and (found[name] - value.grad).norm() < 1e-5 * value.grad.norm(), name
    of_kd, of_ce = everywhere(some.kd_weights, 0), everywhere(some.ce_weights, 0)
    sums = [whole.kd @ of_kd, whole.ce @ of_ce, whole.agreement @ of_kd]
    assert parts.tolist() == pytest.approx([float(value) for value in sums], rel=1e-6)
    objective = chosen.objective
    together = objective.kd_weight * parts[0] + objective.ce_weight * parts[1]
    assert loss.item() == pytest.approx(together.item(), rel=1e-6)


def recorded_in(part: int, parts: int) -> MicroBatch:
    """Rows of which every `parts`-th counted position is recorded, weighed by the inverse of that share."""
    rows = synthetic_rows(MANIFEST, 2, seed=5)
    mask = np.stack([row.loss_mask for row in rows])
    recorded = mask & ((mask.cumsum().reshape(mask.shape) + part) % parts == 0)
    ids = np.stack([row.token_ids for row in rows]).astype(np.int64)
    labels = np.where(mask, np.roll(ids, -1, axis=1), -100)
    found = head_positions(labels, mask.astype(np.float32), recorded * np.float32(parts), recorded)
    for index, row in enumerate(rows):
        assert row.teacher is not None
        planes = {name: value[recorded[index][row.loss_mask]] for name, value in vars(row.teacher).items()}
        teacher = replace(row.teacher, **planes)
        rows[index] = replace(row, recorded=recorded[index], teacher=teacher)
    rest = rest_formula_of(settings().objective, MANIFEST)
    assert rest is not None
    return replace(
        batch(),
        positions=torch.from_numpy(found.positions),
        labels=torch.from_numpy(found.labels),
        ce_weights=torch.from_numpy(found.ce_weights),
        kd_weights=torch.from_numpy(found.kd_weights),
        targets=sparse_targets(rows, rest, found.records),
        weight_sum=torch.tensor(found.weight_sum),
    )


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_few_recorded_positions_are_together_all_of_them(ce_weight: float) -> None:
    """Four ways to record a quarter: their mean loss and gradient are those of recording everything."""
    chosen = replace(settings(), objective=replace(settings().objective, ce_weight=ce_weight))
    student = Student(llama(), chosen)

    def gradients(some: MicroBatch) -> list[Tensor]:
        student.zero_grad()
        loss = student(some).loss
        (loss / some.weight_sum).backward()
        return [loss.detach() / some.weight_sum, *(value.grad.clone() for value in student.parameters())]

    whole = gradients(batch())
    quarters = [gradients(recorded_in(part, 4)) for part in range(4)]
    for expected, *parts in zip(whole, *quarters, strict=True):
        mean = torch.stack(parts).mean(0)
        assert (mean - expected).norm() < 1e-5 * expected.norm()
        assert (parts[0] - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
def test_a_micro_batch_of_padding_has_a_loss_of_0_and_gradients_of_0(impl: str, kd_weight: float) -> None:
    none = batch(counting=0)
    assert len(none.positions) == 0
    student = Student(llama(), replace(settings(kd_weight), impl=impl))
    loss, parts, _ = student(none)
    assert loss.item() == 0 and parts.tolist() == [0, 0, 0]
    loss.backward()
    for name, value in student.named_parameters():
        assert value.grad is not None and bool((value.grad == 0).all()), name


def test_a_probe_gives_both_logits() -> None:
    student, some = Student(llama(), settings()), batch()
    own, ours = student(Probe(some.token_ids, some.position_ids))
    assert own.shape[-1] == 104 and ours.shape[-1] == VOCABULARY
    assert torch.allclose(own[..., :VOCABULARY], ours, atol=1e-6)
    wrong = Student(llama(), settings(softcap=0.05))
    own, ours = wrong(Probe(some.token_ids, some.position_ids))
    assert not torch.allclose(own[..., :VOCABULARY], ours, atol=1e-3)


def test_a_head_with_a_forward_of_its_own_is_refused() -> None:
    class Adapted(nn.Linear):
        pass

    with pytest.raises(ModelError, match=r"is a Adapted, not a plain nn\.Linear"):
        make_distillation_head(Adapted(4, 5), settings())


def packed_row() -> Row:
    rows = synthetic_rows(MANIFEST, 40, seed=6)
    return next(row for row in rows if len(row.segment_starts) >= 3)


def segment_logits(model: PreTrainedModel, row: Row, hidden: Tensor) -> list[Tensor]:
    starts = [*row.segment_starts.tolist(), len(row.token_ids)]
    logits = model.lm_head(hidden)[0]
    return [logits[first:last] for first, last in pairwise(starts)]


def alone(model: PreTrainedModel, row: Row) -> list[Tensor]:
    starts = [*row.segment_starts.tolist(), len(row.token_ids)]
    ids = torch.from_numpy(row.token_ids.astype("int64"))
    return [model(ids[None, first:last], use_cache=False).logits[0] for first, last in pairwise(starts)]


def largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


@torch.no_grad()
def test_documents_in_a_row_do_not_see_one_another() -> None:
    """And either of the two mistakes that would let them is seen: a mask of ones, or the default cache."""
    model = llama(initializer_range=0.5).eval()
    row = packed_row()
    one = micro_batch(with_records([row], None))
    decoder, _ = decoder_and_head(model)
    packed = segment_logits(model, row, hidden_states(decoder, one.token_ids, one.position_ids))
    assert largest_difference(packed, alone(model, row)) < 1e-4
    # The first document sees nothing before it in any case; the others do.
    for mistake in ({"use_cache": False, "attention_mask": torch.ones_like(one.token_ids)}, {}):
        hidden = decoder(input_ids=one.token_ids, position_ids=one.position_ids, **mistake).last_hidden_state
        assert largest_difference(segment_logits(model, row, hidden), alone(model, row)) > 0.1
    continued = torch.arange(32)[None]
    hidden = hidden_states(decoder, one.token_ids, continued)
    assert largest_difference(segment_logits(model, row, hidden), alone(model, row)) > 0.1
