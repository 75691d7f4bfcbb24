"""Which process this is, on which machine, and whether another one still lives."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from sparsekd.logit_store.typed_json import Count, Matching

Life = Literal["runs", "stopped", "dead", "unknown"]
"""`unknown` is that of a process on another machine."""


@dataclass(frozen=True)
class Process:
    """A process, so named that a later one with its number is not taken for it."""

    host: Annotated[str, Matching(r"[A-Za-z0-9._-]{1,255}", "a host name")]
    machine: Annotated[str, Matching(r"[ -~]{0,200}", "up to 200 characters")]
    """Equal for two processes if and only if the numbers of processes mean the same to them: the machine
    since it was started, and its container."""
    pid: Count
    started: Count
    """When it was started, in ticks of the kernel's clock; 0 where nothing says so."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Process:
    """The process that calls."""
    return Process(_host(), _machine(), os.getpid(), _state_of(os.getpid())[1])


def life_of(process: Process) -> Life:
    """Whether a process lives, as far as one on this machine can say."""
    if process.machine != _machine() or not process.machine:
        return "unknown"
    state, started = _state_of(process.pid)
    # Z: it is dead, and its parent has not asked for its exit code yet.
    if state in ("", "Z", "X") or started != process.started:
        return "dead"
    return "stopped" if state in ("T", "t") else "runs"


def _host() -> str:
    name = platform.node() or "unnamed"
    return "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name[:255]
    )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: nobody is known to be dead, and its age has to tell
        return ""


def _state_of(pid: int) -> tuple[str, int]:
    """A process's state by Linux's letters, and when it was started; ("", 0) where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", 0
    # "pid (name) state parent ...", where a name may hold spaces and brackets; the start is the 22nd field.
    fields = text.rpartition(")")[2].split()
    return (fields[0], int(fields[19])) if len(fields) > 19 else ("", 0)
