"""A process ends with its exit code, whatever native threads still do, and its output is whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# One rank on gloo whose group outlives `destroy_process_group`, as DeepSpeed's do, and whose thread comes
# back for the interpreter's lock while the interpreter is taken apart: that takes longer here than it sleeps.
GLOO = """
import sys, threading, time

class SlowToGo:
    def __del__(self, sleep=time.sleep):
        sleep(2)

kept = [SlowToGo()]

def work():
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    kept.append(dist.group.WORLD)
    begun = threading.Event()

    def late(_):
        if threading.current_thread() is not threading.main_thread():  # else it was done before it was asked
            begun.set()
            time.sleep(1)

    while not begun.wait(0.01):
        kept.append(dist.all_reduce(torch.ones(1), async_op=True).get_future().then(late))
    dist.destroy_process_group()
"""
LIGHT = """
def work():
    import atexit, threading, time

    atexit.register(print, "registered")
    threading.Thread(target=lambda: time.sleep(0.3) or print("waited for")).start()
    print("worked")
"""
END = "from sparsekd.trainer.run.ending import run_as_process\nrun_as_process(work)"


def ended(program: str, last: str, output: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    """Ends a process after `work` of a program, with this last line."""
    return subprocess.run(
        [sys.executable, "-P", "-c", f"{program}    {last}\n\n{END}"],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
    )


@pytest.mark.parametrize(("last", "code"), [("return 0", 0), ("raise SystemExit(2)", 2)])
def test_a_thread_of_gloo_does_not_abort_what_has_done_its_work(last: str, code: int) -> None:
    done = ended(GLOO, last)
    assert done.returncode == code, done.stderr
    assert "terminate called" not in done.stderr


@pytest.mark.parametrize(
    ("last", "code", "said"),
    [
        ("return None", 0, ""),
        ("return 7", 7, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit('a text')", 1, "a text\n"),
        ("raise ValueError('a fault')", 1, "ValueError: a fault\n"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt\n"),
    ],
)
def test_all_else_is_as_at_any_exit(last: str, code: int, said: str) -> None:
    done = ended(LIGHT, last)
    assert done.returncode == code, done.stderr
    assert done.stdout == "worked\nwaited for\nregistered\n"
    assert done.stderr.endswith(said) and bool(said) == bool(done.stderr)


def test_output_that_cannot_be_written_is_no_success() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with open("/dev/full", "w") as full:
        assert ended(LIGHT, "return 0", full.fileno()).returncode == 120
        assert ended(LIGHT, "return 2", full.fileno()).returncode == 2


@pytest.mark.parametrize(("is_read", "code"), [(False, 141), (True, 1)])
def test_an_output_that_nobody_reads_ends_it_without_a_traceback(is_read: bool, code: int) -> None:
    """As before `| head`; a connection that breaks is a failure all the same."""
    reader, writer = os.pipe()
    if not is_read:
        os.close(reader)
    program = """
def work():
    import sys

    print("a page", flush=True)
"""
    done = ended(program, "raise BrokenPipeError(32, 'a connection')", writer)
    os.close(writer)
    if is_read:
        os.close(reader)
    assert done.returncode == code and ("Traceback" in done.stderr) == is_read, done.stderr
