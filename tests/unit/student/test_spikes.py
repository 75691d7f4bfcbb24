"""A step far above the usual is found at the next look, by what the steps before it were."""

import math

import pytest
import torch

from sparsekd.trainer.student.spikes import Spike, Spikes

CPU = torch.device("cpu")


def looked(spikes: Spikes, first: int, figures: list[tuple[float, float]]) -> list[Spike]:
    """Notes steps by (loss, norm) as each of two equal ranks does, and looks."""
    for step, (loss, norm) in enumerate(figures, start=first):
        spikes.note(step, torch.tensor(loss / 2, dtype=torch.float64), torch.tensor(norm))
    return spikes.found(2 * spikes.losses())


def test_a_step_is_judged_by_the_median_of_those_before_it() -> None:
    spikes = Spikes(5.0, CPU)
    usual = [(2.0, 0.5), (3.0, 0.25), (4.0, 1.0)] * 6
    assert looked(spikes, 1, usual) == []
    assert looked(spikes, 19, [(15.0, 2.5), (3.0, 2.6), (15.1, 0.5), (3.0, 0.5)]) == [
        Spike(20, 3.0, 3.0, pytest.approx(2.6), 0.5),
        Spike(21, pytest.approx(15.1), 3.0, 0.5, 0.5),
    ]
    assert looked(spikes, 23, []) == []


def test_the_first_steps_are_no_spikes_and_a_new_level_becomes_the_usual() -> None:
    spikes = Spikes(5.0, CPU)
    assert looked(spikes, 1, [(100.0, 100.0), *[(1.0, 1.0)] * 14]) == []
    assert looked(spikes, 16, [(100.0, 1.0)]) == []
    assert [spike.step for spike in looked(spikes, 17, [(100.0, 1.0)])] == [17]
    found = looked(spikes, 18, [(100.0, 1.0)] * 300)
    assert 5 < len(found) < 30 and found[-1].step == 17 + len(found)


def test_what_is_no_number_or_not_above_nothing_is_no_spike() -> None:
    spikes = Spikes(5.0, CPU)
    assert looked(spikes, 1, [(-1.0, 1.0), (math.nan, 1.0), (1.0, math.inf)] * 20) == []
    assert looked(spikes, 61, [(-0.5, 1.0), (7.0, 1.0)]) == []
    assert len(looked(spikes, 63, [(1.0, 6.0)])) == 1
    # Nor does it move the usual.
    spikes = Spikes(5.0, CPU)
    assert looked(spikes, 1, [(1.0, 1.0)] * 16 + [(math.nan, 1.0)] * 40) == []
    assert len(looked(spikes, 57, [(6.0, 1.0)])) == 1


def test_nothing_is_kept_where_nothing_is_looked_for() -> None:
    spikes = Spikes(0.0, CPU)
    assert looked(spikes, 1, [(1.0, 1.0)] * 40 + [(1e9, 1e9)]) == []
    assert spikes.losses().shape == (0,)
