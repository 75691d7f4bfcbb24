"""For tests of ranks: the store by which they meet, in a process that can be killed."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

_SERVE = (
    "import sys\n"
    "from torch.distributed import TCPStore\n"
    "store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
    "print(store.port, flush=True)\n"
    "sys.stdin.read()\n"
)


@pytest.fixture
def served_store() -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A process that serves a store, and its port."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield server, int(server.stdout.readline())
        server.kill()
