"""The learning rate's course at the points that matter."""

import math
from itertools import pairwise

import pytest

from sparsekd.trainer.config.schedule import check_schedule, learning_rate
from sparsekd.trainer.config.schema import ScheduleConfig
from sparsekd.trainer.run.errors import ConfigError


def rates(kind: str, **options: float) -> list[float]:
    schedule = ScheduleConfig(kind=kind, warmup_steps=10, final_ratio=0.1, **options)
    return [learning_rate(step, peak=2.0, steps=110, schedule=schedule) for step in range(1, 111)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_starts_above_zero(kind: str) -> None:
    assert rates(kind)[:10] == pytest.approx([0.2 * step for step in range(1, 11)])


def test_cosine() -> None:
    course = rates("cosine")
    assert course[-1] == pytest.approx(0.2)
    assert course[59] == pytest.approx(0.2 + 1.8 / 2)
    assert course[34] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert all(a > b for a, b in pairwise(course[10:]))


def test_wsd_stays_then_falls_linearly() -> None:
    course = rates("wsd", decay_fraction=0.2)  # the last 22 steps
    assert course[10:88] == [2.0] * 78
    assert course[88] < 2.0
    assert course[98] == pytest.approx(2.0 - 1.8 / 2)
    assert course[-1] == pytest.approx(0.2)


def test_constant_and_no_warm_up() -> None:
    assert rates("constant")[10:] == [2.0] * 100
    assert (
        learning_rate(1, peak=2.0, steps=5, schedule=ScheduleConfig(kind="constant", warmup_steps=0)) == 2.0
    )


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps=100 .*train\.steps=100"):
        check_schedule(ScheduleConfig(warmup_steps=100), steps=100)
    with pytest.raises(ConfigError, match="overlap"):
        check_schedule(ScheduleConfig(kind="wsd", warmup_steps=50, decay_fraction=0.6), steps=100)
    check_schedule(ScheduleConfig(kind="wsd", warmup_steps=50, decay_fraction=0.5), steps=100)
