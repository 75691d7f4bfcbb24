"""What a soak has come to, counted from its file of JSON lines, or from a part of them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak_jobs import lines_of

VERBS = ("train", "capture")
GOODPUT_PARTS = ("useful", "start-up", "lost steps", "saving", "slower steps", "the rest")
"""What the time of a training under kills goes into. Slower steps: what kept steps took beyond the
median one, with their lines of metrics."""


@dataclass
class Totals:
    """Sums over starts and runs."""

    kills: int = 0
    signals: int = 0
    """Gentle ones."""
    starts: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    """By verb."""
    wrong: int = 0
    """Runs that were not the undisturbed ones, or a start of which ended as none should."""
    seconds: float = 0.0
    """Of all starts."""
    worlds: set[int] = field(default_factory=set)
    """Numbers of ranks."""
    phases: Counter[str] = field(default_factory=Counter)
    """How often a blow fell where a rank was in a phase, by verb and phase."""

    def count(self, line: dict[str, Any]) -> None:
        """Adds one line. Those from before captures were soaked have no verb: they are of trainings."""
        verb = line.get("verb", "train")
        if line["kind"] == "run":
            self.runs[verb] += 1
            self.wrong += bool(line["problems"])
        if line["kind"] != "start":
            return
        self.starts += 1
        self.seconds += line["seconds"]
        self.worlds.add(line["world"])
        if line["fell"]:
            self.kills += line["signal"] == "SIGKILL"
            self.signals += line["signal"] != "SIGKILL"
            marks = {stand["phase"] if stand else "before" for stand in line["pulses"]}
            self.phases.update(f"{verb}: {mark}" for mark in marks)


def counted(lines: Iterable[dict[str, Any]]) -> Totals:
    """What some lines come to."""
    totals = Totals()
    for line in lines:
        totals.count(line)
    return totals


def totals_of(results: Path) -> Totals:
    """What a file of results comes to."""
    return counted(lines_of(results))


def told(totals: Totals) -> str:
    """In one line."""
    runs = ", ".join(f"{totals.runs[verb]} {verb}" for verb in VERBS)
    return (
        f"{totals.kills} kills and {totals.signals} gentle signals in {totals.starts} starts, "
        f"{sum(totals.runs.values())} runs ({runs}), {totals.seconds / 3600:.2f} h; {totals.wrong} runs were "
        f"wrong; fell in {dict(totals.phases.most_common())}"
    )
