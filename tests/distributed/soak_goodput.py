"""The share of useful time of a training that is killed again and again, and what the rest went into."""

import json
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import Server
from soak_counts import GOODPUT_PARTS
from soak_jobs import Job, lines_of
from soak_training import Shape, Trainings, newest_step, pulses

WORLD = 2
SECONDS_BETWEEN_KILLS, SECONDS_BETWEEN_CHECKPOINTS = 20.0, 2.0
SHARE_OF_STEPS = 0.8
"""Of the minutes that are asked for: what the steps would take undisturbed."""
SHAPE = Shape(stage=2, shuffle="global", log_every=1, behind=True)


@dataclass
class Watched:
    """Where the first rank of one start stood, from moment to moment.

    Args:
        began: When it was started, in seconds of the monotonic clock.
    """

    began: float
    moments: list[tuple[float, int, str]] = field(default_factory=list)
    """When it came into a phase of a step."""
    ended: float = 0.0

    def look(self, logs: Path) -> None:
        stand = pulses(logs, 1)[0]
        now = ("start", 0) if stand is None else (stand["phase"], stand["step"])
        if not self.moments or self.moments[-1][1:] != now[::-1]:
            self.moments.append((time.monotonic() if self.moments else self.began, now[1], now[0]))

    def seconds(self, kept: int) -> dict[str, float]:
        """Its seconds by what they went into.

        Args:
            kept: The step of the newest checkpoint when it was over; what was done beyond it was lost.
        """
        spent: dict[str, float] = defaultdict(float)
        ends = [moment for moment, _, _ in self.moments[1:]] + [self.ended]
        for (moment, step, phase), end in zip(self.moments, ends, strict=True):
            if phase in ("start", "convert"):
                part = "start-up"
            elif phase == "save":
                part = "saving"
            elif phase in ("left", "failed"):
                part = "the rest"
            else:
                part = "kept steps" if step <= kept else "lost steps"
            spent[part] += end - moment
        return spent


def goodput(minutes: float, results: Path, commit: str) -> None:
    """Trains on 2 ranks, killed every 20 s for so long; tells the share of useful time.

    Args:
        minutes: After which it is not killed any more.
        results: The file of JSON lines to which the result is added.
        commit: That runs.
    """
    with tempfile.TemporaryDirectory(prefix="goodput-") as root:
        server = Server()
        try:
            record = _measured(minutes, Trainings(Path(root) / "trainings", server))
        finally:
            server.end()
    print(
        f"goodput: done after {record['seconds']:.0f} s and {record['kills']} kills, one every "
        f"{SECONDS_BETWEEN_KILLS:.0f} s; {record['steps']} steps of {record['step_seconds'] * 1000:.0f} ms "
        f"(median) are {record['shares']['useful']:.1%} of the time"
    )
    print("goodput: " + ", ".join(f"{part} {share:.1%}" for part, share in record["shares"].items()))
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        place = {"time": time.strftime("%F %T"), "kind": "goodput", "verb": "train", "commit": commit}
        file.write(json.dumps(place | record) + "\n")


def _measured(minutes: float, trainings: Trainings) -> dict[str, Any]:
    probe = _start(trainings, "probe", 50, 1000)
    assert probe.wait(300) and set(probe.codes) == {0}, probe.output.read_text()[-6000:]
    usual = _step_seconds(trainings, "probe")
    steps = round(SHARE_OF_STEPS * minutes * 60 / usual)
    every = max(round(SECONDS_BETWEEN_CHECKPOINTS / usual), 1)
    print(f"{steps} steps of about {usual * 1000:.0f} ms, a checkpoint every {every}", flush=True)
    folder = trainings.work.folder("killed")
    began, kills = time.monotonic(), 0
    spent: dict[str, float] = defaultdict(float)
    while not (folder / "DONE.json").exists():
        for old in (folder / "logs").glob("rank_*.pulse"):
            old.unlink()
        job = _start(trainings, "killed", steps, every)
        is_last = job.began - began > minutes * 60
        deadline = job.began + (3600 if is_last else SECONDS_BETWEEN_KILLS)
        watched = Watched(job.began)
        while not job.is_over() and time.monotonic() < deadline:
            watched.look(folder / "logs")
            time.sleep(0.005)
        if not job.is_over():
            job.send(signal.SIGKILL, None)
            job.wait(60)
            kills += 1
        elif set(job.codes) != {0}:
            raise SystemExit(f"it ended with {job.codes}:\n{job.output.read_text()[-6000:]}")
        watched.ended = time.monotonic()
        for part, seconds in watched.seconds(newest_step(folder)).items():
            spent[part] += seconds
    wall, median = time.monotonic() - began, _step_seconds(trainings, "killed")
    return {
        "seconds": round(wall, 1),
        "kills": kills,
        "steps": steps,
        "step_seconds": median,
        "shares": shares_of(spent, useful=steps * median, wall=wall),
    }


def shares_of(spent: dict[str, float], *, useful: float, wall: float) -> dict[str, float]:
    """The shares of `GOODPUT_PARTS`, which come to 1.

    Args:
        spent: Seconds by what they went into.
        useful: Seconds of all steps, had each taken the median.
        wall: Seconds from the first start to the last end.
    """
    parts = {part: spent.get(part, 0.0) for part in ("start-up", "lost steps", "saving")}
    parts = {"useful": useful, **parts, "slower steps": spent.get("kept steps", 0.0) - useful}
    parts["the rest"] = wall - sum(parts.values())
    return {part: parts[part] / wall for part in GOODPUT_PARTS}


def _start(trainings: Trainings, name: str, steps: int, checkpoint_every: int) -> Job:
    values = SHAPE.values(trainings.work, name, WORLD)
    values["train"] |= {"steps": steps, "checkpoint_every": checkpoint_every, "evaluate_every": 0}
    return trainings.start_with(values, name, WORLD)


def _step_seconds(trainings: Trainings, name: str) -> float:
    """The median time of a step, by the lines of metrics."""
    lines = lines_of(trainings.work.folder(name) / "metrics.jsonl")
    return statistics.median(line["step_seconds"] for line in lines if line["kind"] == "train")
