"""Where metrics go: metrics.jsonl, which is the truth; Weights & Biases, its mirror; and the console.

Only the first rank tracks. A W&B that fails is reported once and left alone: training goes on.
"""

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from sparsekd.trainer.config.schema import Config, TrackingConfig
from sparsekd.trainer.run.errors import UserError, writing
from sparsekd.trainer.run.ranks import Ranks

METRICS_NAME = "metrics.jsonl"
WANDB_ID_NAME = "wandb_id"

WandbMode = Literal["online", "offline", "disabled", "shared"]

Record = Mapping[str, str | int | float | None]
"""One line of metrics: its `kind` ("train" or "heldout"), its `step`, and numbers; None is not measured."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics, oldest first; an empty list where there are none."""
    path = folder / METRICS_NAME
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines(keepends=True):
        # A process killed while writing leaves half a line at the end.
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def cut_metrics(folder: Path, *, step: int) -> int:
    """Cuts a run's metrics back to what was written up to `step`; returns the number of lines dropped."""
    path = folder / METRICS_NAME
    if not path.is_file():
        return 0
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        working = path.with_name(f".{METRICS_NAME}.tmp")
        with writing(path):
            with working.open("w") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(working, path)
    return len(lines) - len(kept)


class Tracker:
    """Writes the metrics of one run; use it in a `with` block.

    Args:
        folder: The run folder.
        name: Name of the run.
        tracking: The configuration of W&B.
        settings: The whole configuration as nested plain values, for W&B.
        steps: Steps of the whole run.
        start_step: The step from which this process goes on.

    Raises:
        UserError: The metrics cannot be written; so do `log` and `sync`, also where the file was removed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        tracking: TrackingConfig,
        settings: dict[str, Any],
        steps: int,
        start_step: int,
    ) -> None:
        self._path = folder / METRICS_NAME
        with writing(self._path):
            self._file = self._path.open("a")
        self._console = _bar(steps, start_step) if sys.stdout.isatty() else _Lines(steps, start_step)
        self._wandb = _Wandb(folder, name=name, tracking=tracking, settings=settings)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.close()
        # Closing writes what could not be written before: that was said, and the disk is still full.
        with contextlib.suppress(OSError) if kind is not None else writing(self._path):
            self._file.close()
        self._wandb.finish(failed=kind is not None)

    def log(self, record: Record) -> None:
        """Writes one line of metrics, to the operating system at once."""
        with writing(self._path):
            self._check_there()
            self._file.write(json.dumps(dict(record)) + "\n")
            self._file.flush()
        self._console.show(record)
        self._wandb.log(record)

    def say(self, text: str) -> None:
        """A line for the console alone."""
        self._console.say(text)

    def sync(self) -> None:
        """Makes all lines durable; called before the checkpoint that counts on them."""
        with writing(self._path):
            self._check_there()
            os.fsync(self._file.fileno())

    def _check_there(self) -> None:
        """A removed file takes lines without end, which nobody will ever read.

        Raises:
            OSError: It is not there any more.
            UserError: Another file has its name.
        """
        if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
            raise UserError(
                f"{self._path} was replaced by another file while this command ran (by another job in its "
                "folder, or by an editor); run the same command again when nothing else writes there: it "
                "goes on from the newest checkpoint."
            )


class NoTracker:
    """What the other ranks log to."""

    def __enter__(self) -> "NoTracker":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, record: object) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def sync(self) -> None:
        pass


def tracker_of(folder: Path, config: Config, step: int, here: Ranks) -> Tracker | NoTracker:
    """The tracker of a run that goes on from `step`; metrics are written by the first rank alone."""
    if not here.is_first:
        return NoTracker()
    cut_metrics(folder, step=step)
    return Tracker(
        folder,
        name=config.run.name,
        tracking=config.tracking,
        settings=asdict(config),
        steps=config.train.steps,
        start_step=step,
    )


def line(record: Record, *, steps: int, seconds_left: float | None) -> str:
    """One line of metrics for people; what was not measured is left out."""
    width = len(str(steps))
    head = f"step {record['step']:>{width}}/{steps}"
    if record["kind"] == "heldout":
        return "  ".join([f"{head}  held-out", *_numbers(record, ("loss", "kd", "ce", "agreement"))])
    if record["kind"] == "skipped":
        return f"{head}  left out damaged row {record['row']}: {record['reason']}"
    parts = [head, *_numbers(record, ("loss", "kd", "ce", "agreement"))]
    parts += [f"lr {record['learning_rate']:.2e}", f"grad {record['gradient_norm']:.3f}"]
    parts += [f"{record['tokens_per_second']:,.0f} tokens/s", f"wait {record['data_wait_share']:.0%}"]
    if seconds_left is not None:
        parts.append(f"left {duration(seconds_left)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 12m05s, 3h20m, 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def _numbers(record: Record, names: tuple[str, ...]) -> list[str]:
    values = [(name, record[name]) for name in names]
    return [f"{name} {value:.4f}" for name, value in values if value is not None]


class _Pace:
    """Time left, from the steps that this process has taken after the first, which warms things up."""

    def __init__(self, steps: int, start_step: int) -> None:
        self._steps = steps
        self._first_step = start_step + 1
        self._began: float | None = None

    def seconds_left(self, step: int) -> float | None:
        now = time.monotonic()
        if self._began is None:
            self._began, self._first_step = now, step
            return None
        if step <= self._first_step:
            return None
        return (now - self._began) / (step - self._first_step) * (self._steps - step)


class _Lines:
    """Plain lines, for logs and pipes: a bar would fill them with control characters."""

    def __init__(self, steps: int, start_step: int) -> None:
        self._steps = steps
        self._pace = _Pace(steps, start_step)

    def show(self, record: Record) -> None:
        left = self._pace.seconds_left(int(record["step"] or 0)) if record["kind"] == "train" else None
        print(line(record, steps=self._steps, seconds_left=left), flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """A progress bar with the newest numbers, for a terminal."""

    def __init__(self, steps: int, start_step: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._steps = steps
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._task = self._progress.add_task("", total=steps, completed=start_step)
        self._progress.start()

    def show(self, record: Record) -> None:
        text = line(record, steps=self._steps, seconds_left=None)
        if record["kind"] != "train":
            self._progress.console.print(text, highlight=False)
        else:
            numbers = text.partition("  ")[2]
            self._progress.update(self._task, completed=int(record["step"] or 0), description=numbers)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _bar(steps: int, start_step: int) -> "_Bar | _Lines":
    return _Bar(steps, start_step)


def wandb_mode(tracking: TrackingConfig, environment: Mapping[str, str], *, has_key: bool) -> WandbMode:
    """What `tracking.wandb=auto` comes to: WANDB_MODE if it is set, online with a key, else offline."""
    wanted = tracking.wandb
    if wanted == "auto" and "WANDB_MODE" in environment:
        wanted = environment["WANDB_MODE"]
    elif wanted == "auto":
        wanted = "online" if has_key else "offline"
    known = {mode: mode for mode in get_args(WandbMode)}
    if wanted not in known:
        raise ValueError(f"WANDB_MODE={wanted} is none of {', '.join(known)}")
    return known[wanted]


class _Wandb:
    """The mirror. Its own step axes: W&B drops what comes with a smaller `step=` than before, as a resumed
    run's first lines do."""

    def __init__(
        self, folder: Path, *, name: str, tracking: TrackingConfig, settings: dict[str, Any]
    ) -> None:
        self._run: Any = None
        if tracking.wandb == "disabled":
            return
        try:
            import wandb

            mode = wandb_mode(tracking, os.environ, has_key=wandb.login(prompt=False))
            if mode == "disabled":
                return
            self._run = wandb.init(
                project=tracking.project,
                entity=tracking.entity,
                group=tracking.group,
                tags=tracking.tags or None,
                name=name,
                id=_kept_id(folder),
                resume="allow",
                mode=mode,
                dir=str(folder),
                config=settings,
                settings=wandb.Settings(silent=True, console="off"),
            )
            for kind in ("train", "heldout"):
                self._run.define_metric(f"{kind}/step")
                self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
        except Exception as error:  # a mirror's failure, whatever it is, must not stop training
            self._give_up(error)

    def log(self, record: Record) -> None:
        if self._run is None:
            return
        kind = record["kind"]
        numbers = {
            f"{kind}/{key}": value for key, value in record.items() if key != "kind" and value is not None
        }
        try:
            self._run.log(numbers)
        except Exception as error:  # as above
            self._give_up(error)

    def finish(self, *, failed: bool) -> None:
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=1 if failed else 0)
        except Exception as error:  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = str(error).strip().splitlines()[:1]
        print(
            f"Weights & Biases failed ({type(error).__name__}: {reason[0] if reason else ''}); "
            f"training goes on, and {METRICS_NAME} has everything.",
            flush=True,
        )


def _kept_id(folder: Path) -> str:
    """The run's id, made once and kept in the run folder, so that a resumed run stays one run."""
    path = folder / WANDB_ID_NAME
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
