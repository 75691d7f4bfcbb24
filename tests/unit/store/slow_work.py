"""What the processes of test_jobs do, in a module that a process which is started afresh can import."""

import os
import signal
import time
from pathlib import Path

from sparsekd.logit_store.errors import StoreError


def work(folder: Path, item: int) -> int:
    """What the processes of these tests do: late items are done before early ones."""
    (folder / f"{item}-{os.getpid()}").touch()
    time.sleep(0.02 * (3 - item % 4))
    if item == 13:
        raise StoreError("item 13 is wrong.")
    if item == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 19:
        time.sleep(600)
    return item * item
