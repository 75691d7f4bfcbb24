"""Time, peak memory and accuracy of the contestants of one case, in one process, on the same inputs.

Contestants take turns: every round runs all of them once, in a new order, on the next of several input sets.
"""

import gc
import json
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from kernel_accuracy import exact_results, relative_errors, rounding_alone
from kernel_cases import CannotRunError, Inputs, Setting, in_float64, make_inputs
from kernel_peers import Peer, Step
from torch.profiler import ProfilerActivity, profile

INPUT_SETS = 3
WARM_ROUNDS = {"cuda": 3, "cpu": 1}
SEED = 0
# A contestant that takes so many times the floor is timed once, so that it does not use up everybody's time.
SLOW = 30
SLOW_SECONDS = 1.0


@dataclass
class Row:
    """What was found of one contestant; milliseconds, bytes, relative errors."""

    name: str
    note: str
    reason: str = ""  # why there are no numbers
    times: list[float] = field(default_factory=list)
    peak: int | None = None
    errors: list[float] = field(default_factory=list)  # of dH and dW, or of head and log R
    subtract: str = ""

    def quantile(self, share: float) -> float:
        """A quantile of the times, the nearest measured one."""
        return sorted(self.times)[round(share * (len(self.times) - 1))]

    @property
    def median(self) -> float:
        """The median time."""
        return self.quantile(0.5)


@dataclass
class Result:
    """One case: its rows, what exact gradients rounded to the dtype would be off by, and when it ran."""

    setting: Setting
    rows: list[Row]
    rounding: dict[str, list[float]]  # truth -> errors of dH and dW of the exact gradient, rounded once
    rounding_inside: dict[str, list[float]]  # the same with the exact gradient of the logits rounded as well
    seconds: float
    clocks: str

    def row(self, name: str) -> Row | None:
        """The row of a name, if it has numbers."""
        return next((row for row in self.rows if row.name == name and row.times), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Result":
        """From plain data."""
        rows = [Row(**row) for row in data["rows"]]
        return cls(**{**data, "setting": Setting(**data["setting"]), "rows": rows})


def measure(setting: Setting, peers: Sequence[Peer], device: torch.device, repeats: int) -> Result:
    """All numbers of one case."""
    begin = time.monotonic()
    torch._dynamo.reset()
    rows = {peer.name: Row(peer.name, peer.note, subtract=peer.subtract) for peer in peers}
    sets = [make_inputs(setting, SEED + number, device) for number in range(INPUT_SETS)]
    steps: dict[str, Step] = {}
    prepared: dict[str, Step] = {}
    floor = 0.0
    for peer in peers:
        row = rows[peer.name]
        row.reason = peer.available(device) or ""
        if row.reason:
            continue
        try:
            step = prepared[peer.name] = peer.prepare(setting, device)
            step(sets[0])  # compiles and tunes
            row.peak, seconds = _peak(step, sets[0], device)
        except Exception as error:  # whatever a third party raises becomes a row
            row.reason = brief(error)
        else:
            floor = floor or seconds  # the floor is the first contestant
            if seconds > max(SLOW * floor, SLOW_SECONDS):
                row.times = [1e3 * seconds]
                row.note = f"{row.note}; so slow that it was timed once".lstrip("; ")
            else:
                steps[peer.name] = step
        _release(device)
    _take_turns(steps, rows, sets, device, repeats)
    clocks = _clocks() if device.type == "cuda" else ""
    del sets
    small = setting.for_accuracy()
    rounding, inside = _accuracy(small, peers, device, rows, prepared if small == setting else {})
    _release(device)
    return Result(setting, list(rows.values()), rounding, inside, time.monotonic() - begin, clocks)


def _take_turns(
    steps: dict[str, Step], rows: dict[str, Row], sets: list[Inputs], device: torch.device, repeats: int
) -> None:
    """The timed rounds, after some that are not counted."""
    order = random.Random(SEED)
    warm = WARM_ROUNDS[device.type]
    for number in range(warm + repeats):
        inputs = sets[number % len(sets)]
        names = list(steps)
        order.shuffle(names)
        marks: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        for name in names:
            try:
                if device.type == "cuda":
                    # No wait between contestants: the host runs ahead, as it does in training.
                    marks[name] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                    marks[name][0].record()
                    steps[name](inputs)
                    marks[name][1].record()
                    continue
                begin = time.perf_counter()
                steps[name](inputs)
                if number >= warm:
                    rows[name].times.append(1e3 * (time.perf_counter() - begin))
            except Exception as error:  # as above
                rows[name].reason, rows[name].times = brief(error), []
                marks.pop(name, None)
                del steps[name]
        if marks:
            torch.cuda.synchronize()
        if number >= warm:
            for name, (start, stop) in marks.items():
                rows[name].times.append(start.elapsed_time(stop))


def _peak(step: Step, inputs: Inputs, device: torch.device) -> tuple[int, float]:
    """(most bytes alive during a step beyond what was there before, seconds); what it returns is counted."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, begin = torch.cuda.memory_allocated(), time.perf_counter()
        kept = step(inputs)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        del kept
        return torch.cuda.max_memory_allocated() - before, seconds
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        begin = time.perf_counter()
        kept = step(inputs)
        seconds = time.perf_counter() - begin
    del kept
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak, seconds


def _accuracy(
    small: Setting,
    peers: Sequence[Peer],
    device: torch.device,
    rows: dict[str, Row],
    prepared: dict[str, Step],
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Fill in the errors against float64 at the small shape; returns what rounding alone costs, by truth."""
    inputs = make_inputs(small, SEED, device)
    wide = in_float64(inputs)
    truths = sorted({peer.truth for peer in peers if peer.truth})
    exact = {truth: exact_results(truth, wide, small) for truth in truths}
    once: dict[str, list[float]] = {}
    inside: dict[str, list[float]] = {}
    for truth in truths:
        if truth != "record":
            once[truth], inside[truth] = rounding_alone(truth, wide, small, exact[truth])
    for peer in peers:
        row = rows[peer.name]
        if not peer.truth or row.reason:
            continue
        try:
            step = prepared.get(peer.name) or peer.prepare(small, device)
            row.errors = relative_errors(step(inputs), exact[peer.truth])
        except Exception as error:  # as above
            row.note = f"{row.note}; accuracy not measured: {brief(error)}".lstrip("; ")
    return once, inside


def brief(error: BaseException) -> str:
    """An exception in a few words, without the machine's paths."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = str(error).strip().splitlines() or [""]
    words = re.sub(r"(/[\w.+-]+){2,}", "...", lines[0]).replace("|", "/")
    if len(words) > 80:
        words = words[:77] + "..."
    kind = "" if isinstance(error, CannotRunError) else f"{type(error).__name__}: "
    return f"{kind}{words}"


def _release(device: torch.device) -> None:
    """Give freed memory back, so that one contestant's blocks are not in another's way."""
    if device.type == "cuda":  # elsewhere memory goes back at once
        gc.collect()
        torch.cuda.empty_cache()


def _clocks() -> str:
    """Clocks and temperature after the timed rounds, as nvidia-smi reads them; nothing is set."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.strip().splitlines()[0] if found.strip() else ""
