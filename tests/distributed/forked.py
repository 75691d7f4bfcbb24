"""Ranks of jobs, forked from a process that has loaded the libraries already (see `fork_server`).

A rank of its own interpreter takes six seconds of a core before it does anything. What is tested of those
seconds, and of launchers, starts them so; everything else is the same in a rank that is forked.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SERVER = Path(__file__).with_name("fork_server.py")

ALONE = {
    "DS_ACCELERATOR": "cpu",
    # Where each has one alone, libraries begin no threads, which a fork does not take along.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONSAFEPATH": "1",
}


class Server:
    """The process from which ranks are forked."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ALONE,
        )
        assert self._read() == "loaded\n"
        self.ended: dict[int, int] = {}
        """Exit codes of all ranks, of whatever job, that had ended when it was last asked."""

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def ask(self, question: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def start(self, ranks: list[dict[str, Any]]) -> list[int]:
        """Forks ranks in this process's environment, but for what each says; returns their numbers."""
        for rank in ranks:
            rank["environment"] = os.environ | ALONE | rank["environment"]
        pids: list[int] = self.ask(ranks)
        for pid in pids:
            self.ended.pop(pid, None)  # of an earlier process with this number
        return pids

    def look(self) -> None:
        """Asks who has ended since."""
        self.ended |= dict(self.ask(None))

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)


@functools.cache
def server() -> Server:
    """That of this process; it ends with it, as its standard input does."""
    return Server()


@functools.cache
def _outputs() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="forked-")


def new_output() -> Path:
    """A file for what a rank writes, which goes with this process."""
    descriptor, name = tempfile.mkstemp(dir=_outputs().name)
    os.close(descriptor)
    return Path(name)


def places(world: int) -> list[dict[str, str]]:
    """The variables of each rank of a new job on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


class ForkedRank:
    """A rank that was forked, with what tests ask of a `subprocess.Popen`.

    Args:
        pid: Its number.
        output: The file to which it writes.
    """

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self._output = pid, output
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            server().look()
            self.returncode = server().ended.get(self.pid)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:  # until it was asked for, no other process has its number
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: It does not end in so many seconds.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float) -> tuple[str, None]:
        """What it has written when it has ended; raises as `wait` does."""
        self.wait(timeout)
        return self._output.read_text(errors="replace"), None


class ForkedJob:
    """The ranks of a job as one, as a launcher is: where one fails, the others are asked to end."""

    def __init__(self, ranks: Sequence[ForkedRank]) -> None:
        self.ranks = ranks

    def poll(self) -> int | None:
        codes = [rank.poll() for rank in self.ranks]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            for rank in self.ranks:
                rank.send_signal(signal.SIGTERM)
        return (failed or 0) if None not in codes else None

    def wait(self, timeout: float) -> int:
        """0, or the exit code of one that failed.

        Raises:
            subprocess.TimeoutExpired: They do not all end in so many seconds.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a job", timeout)
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        """SIGKILL to every rank at once, as a node that loses its power."""
        for rank in self.ranks:
            rank.kill()
        self.wait(60)


def forked(words: list[str], output: list[Path], program: Path | None = None) -> list[ForkedRank]:
    """Forks the ranks of a job.

    Args:
        words: Of the command line of sparsekd, or of the program.
        output: The file of each rank, to whose end it writes; ranks may share one.
        program: A script that each runs in place of sparsekd.
    """
    ranks = [
        {"words": words, "environment": place, "output": str(file), "program": program and str(program)}
        for place, file in zip(places(len(output)), output, strict=True)
    ]
    pids = server().start(ranks)
    return [ForkedRank(pid, file) for pid, file in zip(pids, output, strict=True)]
