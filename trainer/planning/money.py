"""What a distillation costs, and from how many requests a month on the student has repaid it."""

from dataclasses import dataclass

from sparsekd.trainer.config.plan import PlanConfig
from sparsekd.trainer.run.console import readable_seconds


@dataclass(frozen=True)
class Work:
    """What devices have to do.

    Attributes:
        name: For people.
        tokens: That pass a device, of all times together.
        tokens_per_second: Of all devices together; None where nothing says it.
        devices: At one time.
    """

    name: str
    tokens: float
    tokens_per_second: float | None
    devices: int

    @property
    def seconds(self) -> float | None:
        """From beginning to end."""
        return self.tokens / self.tokens_per_second if self.tokens_per_second else None

    def price(self, hour_price: float) -> float | None:
        """Of all its devices' hours."""
        return self.seconds / 3600 * self.devices * hour_price if self.seconds is not None else None


def break_even(plan: PlanConfig, cost: float) -> float | None:
    """Requests a month at which what is saved pays upkeep and, within `plan.months`, the cost.

    (cost / months + upkeep) / ((teacher_price - student_price) * request_tokens / 1e6); None where a request
    of the student costs as much as one of the teacher.

    Args:
        plan: Its prices.
        cost: Of teacher pass and trainings together.
    """
    assert plan.teacher_price is not None
    saved = (plan.teacher_price - plan.student_price) * plan.request_tokens / 1e6
    return (cost / plan.months + plan.upkeep_price) / saved if saved > 0 else None


def time_lines(works: list[Work], keys: dict[str, str]) -> list[tuple[str, str]]:
    """How long each work takes; where nothing says how fast it is, the key that would.

    Args:
        works: In the order of the lines.
        keys: Of each work's speed, by its name.
    """
    lines = []
    for work in works:
        if work.seconds is None:
            lines.append((work.name, f"time unknown; give {keys[work.name]}"))
            continue
        on = f" on {work.devices} devices" if work.devices > 1 else ""
        lines.append(
            (work.name, f"{readable_seconds(work.seconds)} at {work.tokens_per_second:,.0f} tokens/s{on}")
        )
    return lines


def money_lines(plan: PlanConfig, works: list[Work]) -> list[tuple[str, str]]:
    """What the works cost, and the break-even; nothing where plan.hour_price is not given."""
    if plan.hour_price is None:
        return []
    prices = {work.name: work.price(plan.hour_price) for work in works}
    lines = [
        (name, "unknown, as its time is" if price is None else f"{price:,.2f}")
        for name, price in prices.items()
    ]
    known = [price for price in prices.values() if price is not None]
    if len(known) < len(prices):
        return lines
    cost = sum(known)
    lines.append(("together", f"{cost:,.2f} at {plan.hour_price:,.2f} for a device's hour"))
    if plan.teacher_price is None:
        return [*lines, ("break-even", "unknown; give plan.teacher_price=... and plan.student_price=...")]
    requests = break_even(plan, cost)
    if requests is None:
        return [*lines, ("break-even", "never: a token of the student costs as much as one of the teacher")]
    return [
        *lines,
        (
            "break-even",
            f"{requests:,.0f} requests a month of {plan.request_tokens:,} tokens repay it in "
            f"{plan.months:g} months, with {plan.upkeep_price:,.2f} a month for upkeep",
        ),
    ]
