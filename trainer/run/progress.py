"""How far a long action is, for people who wait for it."""

import sys
import time

from sparsekd.logit_store.tools.derive import Progress

SECONDS_BETWEEN_LINES = 5.0
"""Between lines of progress, where there is no terminal to write over."""


class ProgressLine:
    """Tells how far a long action is: over one line on a terminal, otherwise now and then in a line of its
    own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_terminal = sys.stderr.isatty()
        self._shown = False
        self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self._shown and self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _tell(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < (0.2 if self._is_terminal else SECONDS_BETWEEN_LINES):
            return
        self._last, self._shown = now, True
        of = f"/{total:,} ({done / total:.0%})" if total else ""
        line = f"{self._name}: {done:,}{of} {what}"
        begin, end = ("\r\x1b[K", "") if self._is_terminal else ("", "\n")
        print(f"{begin}{line}", end=end, file=sys.stderr, flush=True)
