"""Being asked to stop: by a signal, by the scheduler's end time, or by the death of the launcher.

What asks is noted at once, also while the main thread waits inside of a library; the loop looks at its own
times, and all ranks stop at one and the same step.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

STOPPED_NAME = "STOPPED.json"
STOPPED_CODE = 75
"""The exit code of a command that was stopped and can go on: EX_TEMPFAIL of BSD's sysexits.h, "try again"."""

_SECONDS_BETWEEN_INTERRUPTS = 2.0
"""One Ctrl-C reaches a process several times: from the terminal, and from each launcher above it."""

_SECONDS_OF_END = 90.0
"""Slurm sends SIGTERM at a job's end time, and SIGKILL after KillWait (30 s by default)."""


@dataclass(frozen=True)
class StopRequest:
    """Why a run stops."""

    reason: str
    """`warning` (SIGUSR1 or SIGUSR2, a scheduler's), `time limit`, `terminated`, `interrupted` or `launcher
    died`."""
    signal: str | None

    @property
    def requeue(self) -> bool:
        """Whether the batch script should have the job started again: not where a person stopped it."""
        return self.reason in ("warning", "time limit")

    def __str__(self) -> str:
        return self.reason + (f", {self.signal}" if self.signal else "")


_REASONS = {
    signal.SIGUSR1: "warning",
    signal.SIGUSR2: "warning",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "terminated",
    signal.SIGINT: "interrupted",
}


class StopWatch:
    """Notes the first request to stop; later ones change nothing.

    Args:
        end_time: When the scheduler ends the job, in seconds since 1970; None where nothing says so.
        launcher: Number of the process whose death stops this one; None where there is none.
    """

    def __init__(self, *, end_time: float | None = None, launcher: int | None = None) -> None:
        self.end_time = end_time
        self._launcher = launcher
        self._seconds_to_save = 60.0  # until one was measured
        self._first_interrupt: float | None = None
        self.request: StopRequest | None = None

    def save_takes(self, seconds: float) -> None:
        """How long the last checkpoint took: so long before the end time the run has to stop."""
        self._seconds_to_save = seconds

    def note_signal(self, number: int) -> None:
        """A signal has come."""
        kind = signal.Signals(number)
        now = time.monotonic()
        if self.request is None:
            late = self.end_time is not None and time.time() > self.end_time - _SECONDS_OF_END
            reason = "time limit" if kind == signal.SIGTERM and late else _REASONS[kind]
            self._stop(reason, kind.name)
        if kind == signal.SIGINT:
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt >= _SECONDS_BETWEEN_INTERRUPTS:
                _leave_at_once()

    def look(self) -> None:
        """Looks at the clock and for the launcher."""
        if self.request is not None:
            return
        # Twice the time of a save, as file systems are slower when a whole machine stops; and half a minute.
        if self.end_time is not None and time.time() > self.end_time - 2 * self._seconds_to_save - 30:
            self._stop("time limit", None)
        elif self._launcher is not None and os.getppid() != self._launcher:
            self._stop("launcher died", None)

    def _stop(self, reason: str, name: str | None) -> None:
        self.request = StopRequest(reason, name)
        if os.environ.get("RANK", "0") == "0":
            # Nobody may read any more, or it is closed; the run has to stop all the same.
            with contextlib.suppress(OSError, ValueError):
                print(
                    f"asked to stop ({self.request}): finishing what was begun", file=sys.stderr, flush=True
                )


def _leave_at_once() -> None:
    print("interrupted again: leaving at once, without saving", file=sys.stderr, flush=True)
    os._exit(130)


@contextmanager
def watched(environment: Mapping[str, str]) -> Iterator[StopWatch]:
    """Watches for requests to stop for the length of a `with` block.

    Signals are taken only in a program's main thread; elsewhere, as in a notebook's worker, they stay what
    they were, and the end time alone counts. A signal that was ignored from outside (nohup) stays ignored.
    """
    # torchrun sets it: its death by a signal that it does not know leaves its ranks without a parent.
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in environment else None
    watch = StopWatch(end_time=_end_time(environment), launcher=launcher)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    # A thread reads what the handler in C writes: the main thread may stand in a collective, where no handler
    # of Python's runs.
    thread = threading.Thread(target=_watch, args=(watch, reader), name="stop", daemon=True)
    thread.start()
    try:
        with _signals_to(writer):
            yield watch
    finally:
        os.close(writer)  # ends the thread
        thread.join()
        os.close(reader)


@contextmanager
def _signals_to(writer: int) -> Iterator[None]:
    """Has the numbers of signals written to a pipe, where they can be taken: in a program's main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _REASONS}
    old_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _noted)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(old_fd)


def _noted(number: int, frame: object) -> None:
    """Nothing is left to do: the thread reads the signal from the pipe."""


def _watch(watch: StopWatch, reader: int) -> None:
    while True:
        ready, _, _ = select.select([reader], [], [], 1.0)
        if ready:
            numbers = os.read(reader, 256)
            if not numbers:
                return
            for number in numbers:
                if number in _REASONS:
                    watch.note_signal(number)
        watch.look()


def _end_time(environment: Mapping[str, str]) -> float | None:
    """When Slurm ends this job; None without Slurm, or where the job has no limit."""
    text = environment.get("SLURM_JOB_END_TIME", "")
    if not text and (job := environment.get("SLURM_JOB_ID")):
        # Some releases do not set the variable. One rank asks: the controller answers for all jobs.
        if environment.get("SLURM_PROCID", "0") != "0":
            return None
        command = ["squeue", "--noheader", "--jobs", job, "--format", "%e"]
        # Without an answer the limit is not known: Slurm's signals still stop the run.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=20,
                env={**environment, "SLURM_TIME_FORMAT": "%s"},
            )
            text = asked.stdout.strip()
    return float(text) if text.isascii() and text.isdigit() else None
