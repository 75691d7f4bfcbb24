"""Starts the ranks of jobs, each a process forked from this one, which has loaded the libraries already.

A start then takes as long as a job's own work does, and a soak reaches hundreds of them. Nothing here has
begun a thread, a device or a process group: what a fork does not survive is each rank's own.

Reads lines of JSON from standard input. A list of jobs' ranks, `[{"words": [...], "environment": {...},
"output": PATH}, ...]`, forks a process for each, which is `sparsekd WORDS`, or `python PROGRAM WORDS` where
there is a "program", and answers with their numbers; the line `null` answers with the `[number, status]` of
all that ended since.
"""

import faulthandler
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import sparsekd.trainer.export.export
import sparsekd.trainer.student.loop
import sparsekd.trainer.teacher.capture  # noqa: F401
from sparsekd.trainer.door import cli
from sparsekd.trainer.run.ending import run_as_process

FORK_SAFE = {"jemalloc_bg_thd"}
"""Of pyarrow's memory pool, which makes it anew in the forked process."""


def be_a_rank(words: list[str], environment: dict[str, str], output: str, program: str | None = None) -> None:
    """What a forked process does, as if the command had just been typed."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(environment)
    faulthandler.register(signal.SIGRTMIN, all_threads=True)  # one that hangs says where
    if program is None:
        run_as_process(lambda: cli.main(words))
    else:
        sys.argv = [program, *words]
        runpy.run_path(program, run_name="__main__")


def ended() -> list[tuple[int, int]]:
    """Numbers and exit codes (less than 0: the signal) of children that ended since the last call."""
    found = []
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if child == 0:
            return found
        found.append((child, os.waitstatus_to_exitcode(status)))


def warm_up() -> None:
    """Loads what the libraries load at their first use only."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    me = str(os.getpid())
    others = [task for task in Path("/proc/self/task").iterdir() if task.name != me]
    begun = {(task / "comm").read_text().strip() for task in others} - FORK_SAFE
    assert not begun, f"a library began threads while it was loaded, which a fork does not survive: {begun}"


def main() -> None:
    """Serves until standard input ends; ranks that are left then end, too."""
    warm_up()
    print("loaded", flush=True)
    begun: set[int] = set()
    for line in sys.stdin:
        asked: list[dict[str, Any]] | None = json.loads(line)
        if asked is None:
            gone = ended()
            begun -= {child for child, _ in gone}
            print(json.dumps(gone), flush=True)
            continue
        children = []
        for rank in asked:
            child = os.fork()
            if child == 0:
                be_a_rank(**rank)
            children.append(child)
        begun |= set(children)
        print(json.dumps(children), flush=True)
    for child in begun:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
