"""Trainings for the soak: shapes of runs, the undisturbed ones beside them, and the judge of both."""

import json
import signal
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from distributed_harness import TIMED_FIELDS, VOCABULARY, Workplace, make_workplace, overrides_of
from forked import Server
from plain_training import relative_difference, student
from soak_jobs import GENTLE, Blow, Job, Run, Stand, lines_of, seconds_of

from sparsekd.trainer.state.record import read_commit

STEPS, BATCH = 30, 12
# Of losses, relative; of weights, relative to how far training moved them. Another number of ranks sums in
# another order.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Shape:
    """What the trainings of a soak differ in."""

    stage: int
    shuffle: str
    log_every: int
    behind: bool
    """Whether checkpoints are written behind the steps."""

    def values(self, work: Workplace, name: str, world: int) -> dict[str, Any]:
        """Its configuration; a step is one micro-batch on each rank, whatever their number."""
        values = work.run_values(
            name,
            student={"config": {"num_hidden_layers": 1}},
            engine={"zero_stage": self.stage, "timeout_minutes": 1},
            data={"shuffle": self.shuffle},
            train={
                "steps": STEPS,
                "global_batch_rows": BATCH,
                "micro_batch_rows": BATCH // world,
                "log_every": self.log_every,
                "evaluate_every": 7,
                "evaluate_rows": 5,
                "checkpoint_every": 3,
                "save_behind": self.behind,
            },
            launch={"start_minutes": 1},
        )
        config = work.run_values("")["student"]["config"]
        values["student"]["config"] = config | {"num_hidden_layers": 1}
        return values


class Trainings:
    """All trainings of a soak.

    Args:
        root: An empty folder to work in.
        server: Forks the ranks.
    """

    def __init__(self, root: Path, server: Server) -> None:
        root.mkdir()
        self.work, self._server = make_workplace(root), server
        self._quiet: dict[tuple[Shape, int], tuple[Path, tuple[float, float]]] = {}

    def quiet(self, shape: Shape, world: int) -> tuple[Path, tuple[float, float]]:
        """The run folder of an undisturbed run, and its seconds: before the first step, and from there on."""
        key = (replace(shape, behind=False), world)
        if key not in self._quiet:
            run = self.run(f"quiet-{len(self._quiet)}", shape, world)
            self._quiet[key] = run.folder, seconds_of(run.start(world), run)
        return self._quiet[key]

    def start(self, name: str, shape: Shape, world: int) -> Job:
        return self.start_with(shape.values(self.work, name, world), name, world)

    def start_with(self, values: dict[str, Any], name: str, world: int) -> Job:
        return Job(self._server, ["train", *overrides_of(values)], world, self.output(name))

    def run(self, name: str, shape: Shape, usual: int) -> "Training":
        return Training(self, name, shape, usual)

    def output(self, name: str) -> Path:
        return self.work.root / f"{name}.txt"


class Training(Run):
    """One training that is disturbed.

    Args:
        trainings: To which it belongs.
        name: Of the run.
        shape: Of the run.
        usual: See `Run`.
    """

    verb = "train"

    def __init__(self, trainings: Trainings, name: str, shape: Shape, usual: int) -> None:
        super().__init__(trainings.work.folder(name), trainings.output(name), usual)
        self._all, self._name, self._shape = trainings, name, shape
        self._begins_at, self._starts, self._marks = 0, 0, set[str]()
        self._has_left = False

    def quiet_seconds(self) -> tuple[float, float]:
        return self._all.quiet(self._shape, self.usual)[1]

    def note(self) -> None:
        super().note()
        self._begins_at, self._marks = newest_step(self.folder), marks_of(self.folder)
        self._starts = len(lines_of(self.folder / "starts.jsonl"))
        for old in (self.folder / "logs").glob("rank_*.pulse"):
            old.unlink()

    def start(self, world: int) -> Job:
        return self._all.start(self._name, self._shape, world)

    def stands(self, world: int) -> list[Stand | None]:
        return pulses(self.folder / "logs", world)

    def is_reached(self, since: str, world: int) -> bool:
        if since == "start":
            return True
        early = () if since == "pulse" else ("start", "convert")
        return all(stand is not None and stand["phase"] not in early for stand in self.stands(world))

    def is_done(self) -> bool:
        # One that is killed between its mark and its leaving owns the folder still: the next start tidies.
        return self._has_left and "DONE" in marks_of(self.folder)

    def problems_of_start(self, job: Job, blow: Blow) -> list[str]:
        self._has_left = set(job.codes) == {0}
        blow.fell = blow.fell and "DONE" not in marks_of(self.folder)
        begun = lines_of(self.folder / "starts.jsonl")[self._starts :]
        wrong = problems_of_end(self.folder, job, blow, set() if begun else self._marks)
        if begun and begun[0]["step"] != self._begins_at:
            found = begun[0]["step"]
            wrong.append(f"it began at step {found}, the newest checkpoint was of {self._begins_at}")
        if not begun and self._begins_at != STEPS and not blow.fell:
            wrong.append("a start left no line in starts.jsonl")
        return wrong + [line for line in self.said().splitlines() if "passed over" in line]

    def problems_of_run(self, widths: set[int]) -> list[str]:
        is_equal, run = len(widths) == 1, self.folder
        quiet = self._all.quiet(self._shape, min(widths) if is_equal else self.usual)[0]
        wrong = [f"{what}: {found} != {wanted}" for what, found, wanted in _sides(run, quiet)]
        found, expected = _lines(run), _lines(quiet)
        if is_equal and found != expected:
            wrong.append("other lines of metrics")
        places = [
            [(line["kind"], line["step"], line["tokens"]) for line in each] for each in (found, expected)
        ]
        if places[0] != places[1]:
            wrong.append("lines of other steps")
        else:
            off = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected, strict=True))
            if off > ROUNDING:
                wrong.append(f"losses are off by {off:.1e}")
        work = self._all.work
        ours, theirs = (work.weights(folder.name, STEPS) for folder in (run, quiet))
        if is_equal and not all(torch.equal(ours[name], theirs[name]) for name in theirs):
            wrong.append("weights are not bit-equal")
        config = self._shape.values(work, "", 1)["student"]["config"]
        begin = student(config, seed=0, vocabulary=VOCABULARY).state_dict()
        off = relative_difference(ours, theirs, begin)
        if off > ROUNDING:
            wrong.append(f"weights are off by {off:.1e}")
        return wrong


def _sides(run: Path, quiet: Path) -> Iterator[tuple[str, Any, Any]]:
    """What differs, whatever the number of ranks: names of files, and rows consumed."""
    names = [sorted(path.name for path in folder.iterdir()) for folder in (run, quiet)]
    if names[0] != names[1]:
        yield "names in the run folder", *names
    # Those that a stop saved may be of other steps than every third.
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    if len(kept) != 2 or not all(name.startswith("step-") for name in kept):
        yield "checkpoints that are kept", kept, "two, and nothing else"
    commits = [read_commit(folder / "checkpoints" / f"step-{STEPS:08d}") for folder in (run, quiet)]
    rows = [commit.rows_consumed for commit in commits]
    if rows != [STEPS * BATCH] * 2:
        yield "rows consumed", *rows


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = lines_of(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMED_FIELDS} for line in lines]


def pulses(logs: Path, world: int) -> list[dict[str, Any] | None]:
    """Where each rank stands, or stood when it died."""
    found: list[dict[str, Any] | None] = []
    for rank in range(world):
        try:
            found.append(json.loads((logs / f"rank_{rank}.pulse").read_bytes()))
        except (OSError, ValueError):
            found.append(None)
    return found


def marks_of(run: Path) -> set[str]:
    """How a run ended, by its marks."""
    return {name for name in ("DONE", "FAILED", "STOPPED") if (run / f"{name}.json").exists()}


def problems_of_end(run: Path, job: Job, blow: Blow, earlier: Set[str] = frozenset()) -> list[str]:
    """What is wrong with exit codes and marks, after a training was struck.

    Args:
        run: The run folder.
        job: The start, which is over.
        blow: What befell it.
        earlier: Marks of an earlier start, where this one died before it touched the folder.
    """
    codes, marks = job.codes, marks_of(run)
    wrong: list[str] = []

    def expect(holds: bool, text: str) -> None:
        if not holds:
            wrong.append(f"{text}: codes {codes}, marks {sorted(marks)}")

    expect(len(marks) <= 1, "marks of two ends")
    if "DONE" in marks:
        # A blow may still hit a rank that has nothing left to do but to leave.
        allowed = {0} if blow.signal is None or blow.is_gentle else {0, -signal.SIGKILL}
        expect(set(codes) <= allowed, "done, with other codes")
        return wrong
    expect(blow.fell, "not done, though nobody disturbed it")
    if not blow.fell:
        return wrong
    if blow.is_gentle:
        expect(set(codes) == {75} and marks == {"STOPPED"}, "a gentle signal")
        if marks == {"STOPPED"}:
            wrong += _problems_of_stop(run, job, blow)
    elif blow.rank is None or job.world == 1:
        expect(set(codes) == {-signal.SIGKILL} and marks <= earlier, "all ranks killed")
    else:
        others = {code for rank, code in enumerate(codes) if rank != blow.rank}
        expect(codes[blow.rank] == -signal.SIGKILL and others == {2}, "one rank killed")
        expect(marks == {"FAILED"}, "one rank killed")
        if marks == {"FAILED"}:
            record = json.loads((run / "FAILED.json").read_text())
            blamed = (record["rank"], record["pid"])
            if blamed != (blow.rank, job.pids[blow.rank]):
                wrong.append(f"rank {blow.rank} was killed, {blamed} is blamed: {record['message']}")
    return wrong


def _problems_of_stop(run: Path, job: Job, blow: Blow) -> list[str]:
    """A gentle stop: its record, and that every step that was taken is saved."""
    stopped = json.loads((run / "STOPPED.json").read_text())
    step = stopped.pop("step")
    assert blow.signal is not None
    said = {
        "reason": GENTLE[blow.signal],
        "signal": blow.signal.name,
        "requeue": blow.signal == signal.SIGUSR2,
    }
    wrong = []
    if stopped != said:
        wrong.append(f"STOPPED.json says {stopped}, expected {said}")
    stands = pulses(run / "logs", job.world)
    # A run that is stopped while it converts a checkpoint has not come to a step yet.
    if any(stand is None or stand != {"step": step, "phase": "left"} for stand in stands):
        wrong.append(f"STOPPED.json says step {step}, the ranks left at {stands}")
    if (newest := newest_step(run)) != step:
        wrong.append(f"STOPPED.json says step {step}, the newest checkpoint is of {newest}")
    logged = [line["step"] for line in lines_of(run / "metrics.jsonl") if line["kind"] == "train"]
    # One that took no step leaves the lines of its predecessor, killed later, to its successor.
    took_none = any(start["step"] == step for start in lines_of(run / "starts.jsonl")[-1:])
    if logged and logged[-1] > step and not took_none:
        wrong.append(f"STOPPED.json says step {step}, metrics go to {logged[-1]}")
    if (run / "OWNER.json").exists():
        wrong.append("OWNER.json is left after a gentle stop")
    return wrong


def newest_step(run: Path) -> int:
    """The step of the newest published checkpoint, 0 without one."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-" + "[0-9]" * 8)), default=0)
