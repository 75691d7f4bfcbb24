"""What a line of metrics says: means with the right denominators, and None for what is not measured."""

from typing import Any

import pytest
import torch

from sparsekd.trainer.data.batches import MicroBatch
from sparsekd.trainer.student.head import WeightedLoss
from sparsekd.trainer.student.sums import means, no_sums, sums_of

CPU = torch.device("cpu")


def batch(ce_weights: list[float], kd_weights: list[float]) -> MicroBatch:
    count = len(ce_weights)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    return MicroBatch(
        token_ids=ids,
        position_ids=ids,
        positions=torch.arange(count),
        labels=torch.zeros(count, dtype=torch.int64),
        ce_weights=torch.tensor(ce_weights),
        kd_weights=torch.tensor(kd_weights),
        targets=None,
        weight_sum=torch.tensor(ce_weights).sum(),
        routed=ids == 0,
    )


def sums(some: MicroBatch, kd: list[float], ce: list[float], agreement: list[float]) -> torch.Tensor:
    """Of losses at each position, half distillation and half cross-entropy."""
    values = [
        sum(weight * value for weight, value in zip(weights.tolist(), values, strict=True))
        for weights, values in ((some.kd_weights, kd), (some.ce_weights, ce), (some.kd_weights, agreement))
    ]
    loss = torch.tensor(0.5 * values[0] + 0.5 * values[1], requires_grad=True)
    return sums_of(WeightedLoss(loss, torch.tensor(values, dtype=torch.float64)), some)


def line(total: torch.Tensor, **changes: Any) -> dict[str, float | None]:
    return means(total, **{"has_teacher": True, "has_head": True, "heldout": False, **changes})


def test_a_line_of_training_has_the_denominator_of_the_loss() -> None:
    """One of four positions recorded with probability 1/4, of documents of weight 1, 1, 2, 2."""
    total = sums(batch([1, 1, 2, 2], [0, 0, 8, 0]), [9, 9, 1.5, 9], [4, 3, 2, 1], [0, 0, 1, 0])
    assert not total.requires_grad and total.dtype == torch.float64
    found = line(total)
    loss = pytest.approx(0.5 * 12 / 6 + 0.5 * 13 / 6)
    assert found == {"loss": loss, "kd": 2.0, "ce": 13 / 6, "agreement": 1.0}
    # Over all that may be recorded instead, the mean is the one of recording everything.
    kd, weights = [2.0, 4.0, 1.0, 3.0], [1.0, 1.0, 2.0, 2.0]
    inverse = 4 * torch.diag(torch.tensor(weights))
    drawn = [sums(batch(weights, one), kd, kd, kd) for one in inverse.tolist()]
    whole = sums(batch(weights, weights), kd, kd, kd)
    expected = line(whole)["kd"]
    assert expected == line(whole)["ce"] == 14 / 6
    assert sum(line(one)["kd"] or 0 for one in drawn) / 4 == pytest.approx(expected)
    # A share of positions stays one, whatever chance recorded.
    lucky = sums(batch([1, 1, 1, 1], [4, 4, 0, 0]), kd, kd, [1, 1, 0, 0])
    assert line(lucky)["agreement"] == 1.0 and line(lucky)["kd"] == 6.0


def test_a_held_out_line_counts_each_position_once() -> None:
    total = sums(batch([1, 1, 1, 1], [1, 0, 1, 0]), [2, 9, 4, 9], [4, 3, 2, 1], [1, 0, 0, 0])
    assert line(total, heldout=True) == {"loss": 2.0, "kd": 3.0, "ce": 2.5, "agreement": 0.5}


def test_what_is_not_measured_is_none() -> None:
    total = sums(batch([1, 1], [1, 1]), [2, 4], [1, 3], [1, 0])
    assert line(total, has_head=False) == {"loss": 2.5, "kd": 3.0, "ce": 2.0, "agreement": None}
    assert line(total, has_teacher=False) == {"loss": 2.5, "kd": None, "ce": 2.0, "agreement": None}
    nothing = dict.fromkeys(("loss", "kd", "ce", "agreement"))
    assert line(no_sums(CPU)) == line(no_sums(CPU), heldout=True) == nothing
    padding = sums(batch([], []), [], [], [])
    assert torch.equal(padding, no_sums(CPU)) and torch.equal(total + padding, total)
