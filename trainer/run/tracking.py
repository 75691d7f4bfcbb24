"""Where metrics go: metrics.jsonl, which is the truth; Weights & Biases, its mirror; and the console.

Only the first rank tracks, in threads: a slow disk or service does not hold the ranks. A W&B that fails is
reported once and left alone: training goes on.
"""

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from sparsekd.logit_store.errors import first_line
from sparsekd.logit_store.typed_json import one_line
from sparsekd.trainer.config.schema import Config, TrackingConfig
from sparsekd.trainer.run.behind import Behind
from sparsekd.trainer.run.console import readable_seconds
from sparsekd.trainer.run.errors import DataError, UserError, writing
from sparsekd.trainer.run.files import write_whole
from sparsekd.trainer.run.mirror import Sent
from sparsekd.trainer.run.ranks import Ranks

METRICS_NAME = "metrics.jsonl"
_MOST_WAITING = 1000
"""Lines that may wait to be written, and as many to be sent."""
_SECONDS_FOR_MIRROR = 60.0
"""At the end, to send what waits."""

WANDB_ID_NAME = "wandb_id"

_LAST_BYTES = 1 << 16
"""Of metrics.jsonl, in which its last line surely lies."""

WandbMode = Literal["online", "offline", "disabled", "shared"]

Record = Mapping[str, Any]
"""One line of metrics: its `kind`, its `step`, and numbers, also of sources; None is not measured."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics, oldest first; an empty list where there are none.

    Raises:
        DataError: A line is no line of metrics.
    """
    return [record for _, record in _whole_lines(folder / METRICS_NAME)]


def cut_metrics(folder: Path, *, step: int) -> int:
    """Cuts a run's metrics back to what was written up to `step`; returns the number of lines dropped.

    Raises:
        DataError: A line is no line of metrics.
        UserError: The file cannot be written.
    """
    path = folder / METRICS_NAME
    kept = [line for line, record in _whole_lines(path) if record["step"] <= step]
    dropped = len(path.read_bytes().splitlines()) - len(kept) if path.is_file() else 0
    if dropped:
        with writing(path):
            write_whole(path, "".join(kept))
    return dropped


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file of metrics as they are and as records; half a line at the end, as a process that is
    killed while it writes leaves it, is none."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        record = _record_of(line, f"{path}, line {number},")
        yield line.decode(), record


def _record_of(line: bytes, where: str) -> dict[str, Any]:
    """A line of metrics as a record.

    Raises:
        DataError: It is none.
    """
    try:
        record = json.loads(line.decode())
        is_record = type(record["kind"]) is str and type(record["step"]) is int
    except (ValueError, TypeError, KeyError, RecursionError):  # text of any content
        is_record = False
    if not is_record:
        found = one_line(line[:100].decode(errors="replace").rstrip("\n"))
        raise DataError(
            f"{where} is no line of metrics (found {found}): take it out, or restore the file from a copy."
        )
    return dict(record)


def seconds_of_run(folder: Path) -> float:
    """Wall seconds of a run over all its starts, up to its last whole line of metrics; 0 where there is none.

    Only the end of the file is read.

    Raises:
        DataError: That line is no line of metrics.
    """
    path = folder / METRICS_NAME
    if not path.is_file():
        return 0.0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LAST_BYTES))
        lines = file.read().rpartition(b"\n")[0].splitlines()
    last = _record_of(lines[-1], f"The last line of {path}") if lines else {}
    seconds = last.get("run_seconds", 0.0)
    return float(seconds) if isinstance(seconds, int | float) else 0.0


class Tracker:
    """Writes the metrics of one run; use it in a `with` block.

    Args:
        folder: The run folder.
        name: Name of the run.
        tracking: The configuration of W&B.
        settings: What runs, as nested plain values, for W&B.
        steps: Steps of the whole run.
        start_step: The step from which this process goes on.
        require_owner: Checks, before something is written, that the folder is still this run's.
        began: When this start began, in seconds of the monotonic clock.
        seconds_before: Wall seconds of the run's earlier starts.

    Raises:
        UserError: The metrics cannot be written; so do `sync`, the next `log`, and the end of the block, also
            where the file was removed.
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
        began: float,
        require_owner: Callable[[], None],
        seconds_before: float = 0.0,
    ) -> None:
        self._require_owner = require_owner
        self._began, self._seconds_before = began, seconds_before
        self._path = folder / METRICS_NAME
        with writing(self._path):
            self._file = self._path.open("a")
        self._console = _bar(steps, start_step) if sys.stdout.isatty() else _Lines(steps, start_step)
        self._wandb = _Wandb(folder, name=name, tracking=tracking, settings=settings)
        self._lines = Behind(self._write, most=_MOST_WAITING, name="metrics")
        self._mirror = Behind(self._wandb.log, most=_MOST_WAITING, name="wandb")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._console.close()
        # Closing writes what could not be written before: that was said, and the disk is still full.
        with contextlib.suppress(OSError) if kind is not None else writing(self._path):
            self._file.close()
        if self._mirror.close(_SECONDS_FOR_MIRROR):
            self._wandb.finish(failed=kind is not None)
        else:
            self._wandb.leave(f"no answer for {_SECONDS_FOR_MIRROR:.0f} s")
        if kind is None:
            self._lines.flush()

    def log(self, record: Record) -> None:
        """Has one line of metrics written, with the seconds so far; it is the operating system's in a moment.

        Raises:
            UserError: An earlier line could not be written.
        """
        seconds = time.monotonic() - self._began
        spent = {"seconds": round(seconds, 3), "run_seconds": round(self._seconds_before + seconds, 3)}
        self._lines.put({**record, **spent})

    def _write(self, record: Record) -> None:
        """Writes a line, by the thread; then people and W&B get it."""
        with writing(self._path):
            self._check_there()
            self._require_owner()
            self._file.write(json.dumps(dict(record)) + "\n")
            self._file.flush()
        self._console.show(record)
        if not self._mirror.offer(record):
            self._wandb.leave(f"{_MOST_WAITING:,} lines wait for it")

    def say(self, text: str) -> None:
        """A line for the console alone."""
        self._console.say(text)

    def sync(self) -> None:
        """Makes all lines durable; called before the checkpoint that counts on them.

        Raises:
            UserError: One could not be written.
        """
        self._lines.flush()
        with writing(self._path):
            self._check_there()
            self._require_owner()
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
    """What the other ranks log to: nothing comes of it."""

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


def tracker_of(
    folder: Path,
    config: Config,
    step: int,
    settings: dict[str, Any],
    here: Ranks,
    require_owner: Callable[[], None],
) -> Tracker | NoTracker:
    """The tracker of a run that goes on from `step`; metrics are written by the first rank alone."""
    if not here.is_first:
        return NoTracker()
    seconds_before = seconds_of_run(folder)  # also those of the steps that are taken again
    cut_metrics(folder, step=step)
    return Tracker(
        folder,
        name=config.run.name,
        tracking=config.tracking,
        settings=settings,
        steps=config.train.steps,
        start_step=step,
        require_owner=require_owner,
        began=here.began,
        seconds_before=seconds_before,
    )


def line(record: Record, *, steps: int, seconds_left: float | None) -> str:
    """One line of metrics for people; what was not measured is left out."""
    width = len(str(steps))
    head = f"step {record['step']:>{width}}/{steps}"
    if record["kind"] == "heldout":
        return "  ".join([f"{head}  held-out", *_numbers(record, ("loss", "kd", "ce", "agreement"))])
    if record["kind"] == "skipped":
        return f"{head}  left out damaged row {record['row']}: {record['reason']}"
    if record["kind"] == "nonfinite":
        return f"{head}  left out, the first of {record['skipped']} up to now: {record['found']}"
    if record["kind"] == "spike":
        return (
            f"{head}  spike: loss {record['loss']:.4f}, usually {record['usual_loss']:.4f}; gradient norm "
            f"{record['gradient_norm']:.3f}, usually {record['usual_gradient_norm']:.3f}"
        )
    parts = [head, *_numbers(record, ("loss", "kd", "ce", "agreement"))]
    parts.append(f"lr {record['learning_rate']:.2e}")
    if record["gradient_norm"] is not None:
        parts.append(f"grad {record['gradient_norm']:.3f}")
    parts += [f"{record['tokens_per_second']:,.0f} tokens/s", f"wait {record['data_wait_share']:.0%}"]
    if seconds_left is not None:
        parts.append(f"left {readable_seconds(seconds_left)}")
    return "  ".join(parts)


def _step_of(record: Record) -> int:
    step = record["step"]
    return step if isinstance(step, int) else 0


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
        left = self._pace.seconds_left(_step_of(record)) if record["kind"] == "train" else None
        print(line(record, steps=self._steps, seconds_left=left), flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass  # every line is written


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
            self._progress.update(self._task, completed=_step_of(record), description=numbers)

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
    """The mirror. Its own step axes: W&B's own drops what comes with a smaller `step=` than before.

    A run that goes on after a crash takes some steps again, which W&B would draw twice: it gets only what
    lies beyond the last step that it has. Kept lines that it lacks, as an earlier start could not reach it or
    was killed offline, it gets first.
    """

    def __init__(
        self, folder: Path, *, name: str, tracking: TrackingConfig, settings: dict[str, Any]
    ) -> None:
        self._run: Any = None
        self._sent: Sent | None = None
        if tracking.wandb == "disabled":
            return
        try:
            import wandb

            mode = wandb_mode(tracking, os.environ, has_key=wandb.login(prompt=False))
            if mode == "disabled":
                return
            kept = read_metrics(folder)
            # A run of before there was a record of what was sent: W&B has its lines.
            is_known = (folder / WANDB_ID_NAME).is_file()
            last = {str(record["kind"]): int(record["step"]) for record in kept} if is_known else {}
            self._sent = Sent(folder, offline=mode == "offline", kept=last)
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
            for record in kept:
                self.log(record)
        except Exception as error:  # a mirror's failure, whatever it is, must not stop training
            self._give_up(error)

    def log(self, record: Record) -> None:
        if self._run is None or self._sent is None:
            return
        kind = record["kind"]
        numbers = {
            f"{kind}/{key}": value for key, value in record.items() if key != "kind" and value is not None
        }
        try:
            if self._sent.is_new(str(kind), _step_of(record)):
                self._run.log(numbers)
        except Exception as error:  # as above
            self._give_up(error)

    def finish(self, *, failed: bool) -> None:
        try:
            if self._run is not None:
                self._run.finish(exit_code=1 if failed else 0)
            if self._sent is not None:
                self._sent.close()
        except Exception as error:  # as above
            self._give_up(error)

    def leave(self, why: str) -> None:
        """Sends nothing more, as it takes nothing; the next start sends what it lacks."""
        if self._run is not None:
            self._give_up(TimeoutError(why))

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(
            f"Weights & Biases failed ({type(error).__name__}: {first_line(error)}); "
            f"training goes on, and {METRICS_NAME} has everything.",
            flush=True,
        )


def _kept_id(folder: Path) -> str:
    """The run's id, made once and kept in the run folder, so that a resumed run stays one run."""
    path = folder / WANDB_ID_NAME
    if not path.is_file():
        write_whole(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
