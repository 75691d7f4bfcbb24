"""A few of many rows."""

import numpy as np


def evenly(rows: int, count: int | None) -> list[int]:
    """Returns at most `count` of the numbers below `rows`, spread evenly; all of them for None."""
    if count is None or rows <= count:
        return list(range(rows))
    return [int(index) for index in np.linspace(0, rows - 1, count)]
