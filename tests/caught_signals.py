"""Whether a process handles a signal yet: a test that sends it earlier ends the process."""

import signal
import subprocess
import time
from pathlib import Path


def catches(job: "subprocess.Popen[str]", number: signal.Signals) -> bool:
    """Whether a process handles a signal, as the kernel has it."""
    status = Path(f"/proc/{job.pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def send_when_caught(job: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """Sends a signal to a process as soon as it handles it."""
    while job.poll() is None and not catches(job, number):
        time.sleep(0.005)
    job.send_signal(number)
