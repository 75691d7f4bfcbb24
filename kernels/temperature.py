"""log R at a temperature between those that a record holds: an interpolation that is linear in the record.

Needs no torch until it is given tensors: configuration is checked with it before anything heavy is imported.

N positions, G grid temperatures, R_T the sum of exp(l_v / T) over every id outside the head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RestFormula:
    """log R_T as a linear function of what a record stores  (7.5).

    log R_T = constant + sum_g columns[g] * log R_g + entropy * H, H the entropy of the rest at temperature 1.

    Attributes:
        column: the stored column that is log R_T itself, where T is on the grid; None where it is not.
        constant: what the size of the rest adds.
        columns: G factors, of the stored log R.
        entropy: factor of the entropy of the rest.
    """

    column: int | None
    constant: float
    columns: tuple[float, ...]
    entropy: float


def same_temperature(left: float, right: float) -> bool:
    """Whether two temperatures are one, written down twice."""
    return math.isclose(left, right, rel_tol=1e-6)


def grid_column(temperature: float, temperatures: Sequence[float]) -> int | None:
    """The place of a temperature on a grid, or None where it is not on it."""
    places = [place for place, value in enumerate(temperatures) if same_temperature(temperature, value)]
    return places[0] if places else None


def check_temperature(temperature: float, temperatures: Sequence[float]) -> None:
    """Raise unless a record can speak for a temperature: on its grid, or between 1 and the grid's highest.

    Below 1, and on a grid without 1, the rest's entropy does not help and the error in the rest's probability
    is ten times as large (docs/losses.md, 7).

    Args:
        temperature: T.
        temperatures: the record's grid.

    Raises:
        ValueError: naming the temperature, the range and the remedy.
    """
    if grid_column(temperature, temperatures) is not None:
        return
    grid = ", ".join(f"{value:g}" for value in temperatures)
    held = f"temperature is {temperature:g}, but the store holds the rest's mass at {grid}"
    highest = max(temperatures)
    if grid_column(1.0, temperatures) is None or highest <= 1.0:
        raise ValueError(
            f"{held} and cannot interpolate, which takes a grid that holds 1 and reaches higher: choose one "
            "of these, or capture again with a grid that holds the temperature"
        )
    if not 1.0 < temperature < highest:
        raise ValueError(
            f"{held} and can interpolate from 1 to {highest:g}: choose a temperature in that range or one of "
            "these, or capture again with a grid that holds it"
        )


def rest_formula(temperature: float, *, temperatures: Sequence[float], rest_size: int) -> RestFormula:
    """How a record's log R at a temperature follows from what it stores  (7.5).

    In b = 1 / T the polynomial through log(rest_size) at b = 0, through the stored log R at every 1 / T of
    the grid, and with the slope log R_1 - H at b = 1.

    Args:
        temperature: T.
        temperatures: the record's grid.
        rest_size: how many ids are outside the head; 0 where the head is the whole vocabulary.

    Raises:
        ValueError: the record cannot speak for this temperature (`check_temperature`).
    """
    check_temperature(temperature, temperatures)
    column = grid_column(temperature, temperatures)
    if column is not None:
        exact = tuple(float(place == column) for place in range(len(temperatures)))
        return RestFormula(column=column, constant=0.0, columns=exact, entropy=0.0)
    place_of_one = grid_column(1.0, temperatures)
    assert place_of_one is not None
    others = [0.0, *(1 / value for place, value in enumerate(temperatures) if place != place_of_one)]
    b = 1 / temperature

    def vanishing_at_others(without: float | None) -> float:
        """The product of (b - x) over the other nodes x but one, divided by the same at that one, or at 1."""
        at = 1.0 if without is None else without
        return math.prod((b - x) / (at - x) for x in others if x != without)

    # Every node but b = 1 is simple, so its factor has a double zero there.
    simple = [vanishing_at_others(x) * ((b - 1) / (x - 1)) ** 2 for x in others]
    slope = (b - 1) * vanishing_at_others(None)
    value_at_one = vanishing_at_others(None) - slope * sum(1 / (1 - x) for x in others)
    columns = simple[1:]
    columns.insert(place_of_one, value_at_one + slope)
    return RestFormula(
        column=None,
        # Nothing outside the head: log R is -inf whatever is added.
        constant=simple[0] * math.log(rest_size) if rest_size else 0.0,
        columns=tuple(columns),
        entropy=-slope,
    )


def rest_at_temperature(formula: RestFormula, log_rest: "Tensor", rest_entropy: "Tensor") -> "Tensor":
    """log R at the formula's temperature, [N], dtype of `log_rest`; -inf where the rest is empty  (7.5).

    Args:
        formula: from `rest_formula`, for this record's grid.
        log_rest: float [N, G], log R at each temperature of the grid; -inf where the rest is empty.
        rest_entropy: float [N], nats, of the rest renormalised at temperature 1.
    """
    if formula.column is not None:
        return log_rest[:, formula.column].contiguous()
    # -inf is masked before it meets a factor, which may be negative.
    empty = (log_rest == -math.inf).any(1)
    values = log_rest.double().masked_fill(empty[:, None], 0.0)
    # Term by term and not as a matrix product, whose order of sums, and so last bit, depends on N.
    total = formula.entropy * rest_entropy.double() + formula.constant
    for factor, value in zip(formula.columns, values.unbind(1), strict=True):
        total = total + factor * value
    return total.masked_fill(empty, -math.inf).to(log_rest.dtype)
