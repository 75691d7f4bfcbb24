"""Words for people: durations, sizes, and how far a long action is."""

import sys
import time

from sparsekd.logit_store.tools.derive import Progress

SECONDS_BETWEEN_LINES = 5.0
"""Between lines of progress, where there is no terminal to write over."""


class Interval:
    """Says when it is time for another line.

    Args:
        seconds: Between lines; None for `SECONDS_BETWEEN_LINES`.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = SECONDS_BETWEEN_LINES if seconds is None else seconds
        self._last = time.monotonic()

    def is_over(self) -> bool:
        """Whether so much time has gone since the beginning, or since it was last over."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


class ProgressLine:
    """Tells how far a long action is: over one line on a terminal, otherwise now and then in a line of its
    own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_terminal = sys.stderr.isatty()
        self._shown = False
        self._interval = Interval(0.2 if self._is_terminal else None)

    def __enter__(self) -> Progress:
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self._shown and self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _tell(self, what: str, done: int, total: int) -> None:
        if not self._interval.is_over():
            return
        self._shown = True
        of = f"/{total:,} ({done / total:.0%})" if total else ""
        line = f"{self._name}: {done:,}{of} {what}"
        begin, end = ("\r\x1b[K", "") if self._is_terminal else ("", "\n")
        print(f"{begin}{line}", end=end, file=sys.stderr, flush=True)


def readable_seconds(seconds: float) -> str:
    """A duration for people: `45 s`, `12 min`, `3 h 05 min`, `2 d 04 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes < 48 * 60
        else f"{hours // 24} d {hours % 24:02d} h"
    )


def size_text(count: float) -> str:
    """Bytes in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
