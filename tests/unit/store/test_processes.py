"""Processes that work for one that gives them items: whatever becomes of them, it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
from multiprocessing.connection import Connection
from sparsekd.logit_store.tools.processes import Processes, WorkerKilledError, results_of

def send_half(self, buffer, *words):
    os.write(self._handle, bytes(buffer)[: len(buffer) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

def work(item):
    if item[0] == 5:
        Connection._send = send_half
    if item[0] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return bytes(100)

if __name__ == "__main__":
    try:
        if sys.argv[1] == "results":
            print(sum(1 for _ in results_of(work, ((item,) for item in range(20)), 2, what="test")))
        elif sys.argv[1] == "items":
            # Larger than a pipe's room: what sends them waits for a reader.
            print(sum(1 for _ in results_of(work, ((6, bytes(1 << 20)) for _ in range(20)), 2, what="test")))
        else:
            with Processes(work, 2, what="test") as processes:
                for item in range(20):
                    processes.begin((item,))
                raise ValueError("another problem")
    except (WorkerKilledError, ValueError) as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("results", "A process of test was killed"),
        ("items", "A process of test was killed"),  # Python 3.11.2 waited here (its issue 94777)
        ("leaving", "another problem"),
    ],
)
def test_a_process_that_is_killed_in_the_middle_of_its_work_holds_nobody(
    how: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
