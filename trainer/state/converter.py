"""DeepSpeed's converter in a process that ends with the one that started it, and its workers with it.

    python -m sparsekd.trainer.state.converter ARGUMENTS

Standard input is a pipe of which only the starter holds the other end: it is closed however the starter ends.
The process must have been started in a session of its own.
"""

import os
import runpy
import signal
import threading

_CONVERTER = "deepspeed.checkpoint.ds_to_universal"


def main() -> None:
    threading.Thread(target=_end_with_starter, name="starter", daemon=True).start()
    runpy.run_module(_CONVERTER, run_name="__main__", alter_sys=True)


def _end_with_starter() -> None:
    os.read(0, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
