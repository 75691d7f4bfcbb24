"""How a process ends: with its exit code, and without taking the interpreter apart under native threads."""

import atexit
import contextlib
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

_OUTPUT_LOST = 120
"""The interpreter's own exit code where standard output could not be written to the end."""
_NOBODY_READS = 141
"""As a shell tells of a program that SIGPIPE has ended, such as what stands before `| head`."""


def run_as_process(work: Callable[[], int | None]) -> NoReturn:
    """Runs `work` as all that this process does, and ends the process with the exit code that it gives.

    What happens at an exit happens here, too: a traceback is printed, threads are waited for, and what the
    libraries that `work` imports registered by `atexit` is done. Only then, instead of taking the interpreter
    apart, the process ends. A native thread that lets go of a Python object while the interpreter is taken
    apart is ended in the middle of a destructor, and aborts the process after all its work ("terminate called
    without an active exception", exit code -6). On a busy machine gloo's threads do so
    (pytorch/pytorch#190489); `destroy_process_group` ends them where nobody else refers to their group, and
    the hooks of a DeepSpeed engine refer to it as long as the process lives.

    Args:
        work: Returns the exit code, None for 0; or raises: SystemExit counts as ever, Ctrl-C gives 130, any
            other exception 1, both with a traceback. Where nobody reads the output any more it is 141.
    """
    code = 0

    def leave() -> None:
        ended = code
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # nobody reads any more, or it is closed
                ended = ended or _OUTPUT_LOST
        os._exit(ended)

    # Handlers run in reverse order: this one after those of all libraries that `work` imports.
    atexit.register(leave)
    try:
        code = work() or 0
    except SystemExit as left:
        code = _code_of(left)
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    except BrokenPipeError:
        code = _NOBODY_READS if _nobody_reads() else 1
        if code == 1:  # a connection's
            raise
    except BaseException:  # whatever it is: a traceback is printed, and 1 is Python's own code for it
        code = 1
        raise
    sys.exit(code)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone."""
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):  # closed, or no file of the system
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _code_of(left: SystemExit) -> int:
    """The exit code by Python's rules: none is 0, and a text is printed and is 1."""
    if left.code is None:
        return 0
    return left.code if isinstance(left.code, int) else 1
