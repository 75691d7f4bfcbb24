"""What a distillation costs, and when it is repaid."""

import pytest

from sparsekd.trainer.config.plan import PlanConfig
from sparsekd.trainer.planning.money import Work, break_even, money_lines, time_lines


def test_a_pass_costs_its_devices_hours_however_many_there_are() -> None:
    alone, eight = (Work("pass", 7.2e6, 1000.0 * devices, devices) for devices in (1, 8))
    assert alone.seconds == 7200 and eight.seconds == 900
    assert alone.price(3.0) == eight.price(3.0) == 6.0
    assert Work("pass", 7.2e6, None, 1).price(3.0) is None


def test_at_the_break_even_both_cost_the_same() -> None:
    """Money of a whole time with the student, and with the teacher alone."""
    plan = PlanConfig(
        teacher_price=3.0, student_price=0.25, request_tokens=800, upkeep_price=40.0, months=6.0
    )
    cost = 5000.0
    requests = break_even(plan, cost)
    assert requests is not None
    tokens = requests * plan.months * plan.request_tokens / 1e6
    with_student = cost + plan.months * plan.upkeep_price + tokens * plan.student_price
    assert with_student == pytest.approx(tokens * 3.0)
    assert break_even(PlanConfig(teacher_price=0.2, student_price=0.2), cost) is None


def test_what_is_not_known_is_said() -> None:
    works = [Work("teacher pass", 1e9, 2e5, 8), Work("training", 1e8, None, 1)]
    keys = {"teacher pass": "a", "training": "plan.student_tokens_per_second=..."}
    times = dict(time_lines(works, keys))
    assert times["teacher pass"] == "83 min at 200,000 tokens/s on 8 devices"
    assert times["training"] == "time unknown; give plan.student_tokens_per_second=..."
    assert money_lines(PlanConfig(), works) == []
    assert dict(money_lines(PlanConfig(hour_price=2.0), works)) == {
        "teacher pass": "22.22",
        "training": "unknown, as its time is",
    }
    whole = [works[0], Work("training", 1e8, 5e4, 1)]
    lines = dict(money_lines(PlanConfig(hour_price=2.0), whole))
    assert lines["together"] == "23.33 at 2.00 for a device's hour"
    assert lines["break-even"].startswith("unknown; give plan.teacher_price=")
    lines = dict(money_lines(PlanConfig(hour_price=2.0, teacher_price=0.0), whole))
    assert lines["break-even"].startswith("never: ")
