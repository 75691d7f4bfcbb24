"""A training whose first rank is slow with files: `slow_files.py RUNS.json`; how slow SLOW_SECONDS says.

Once each: reading the student's weights, checking a checkpoint, converting it, and writing the next one.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsekd.trainer.run.ending import run_as_process

sys.path.insert(0, str(Path(__file__).parent))  # a safe path has no folder of the script


def once_slowly(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but that the first rank's first call takes longer."""
    waits = [float(os.environ["SLOW_SECONDS"])] if os.environ.get("RANK", "0") == "0" else []

    def slow(*args: Any, **kwargs: Any) -> Any:
        if waits:
            print(f"slow: {work.__name__}", flush=True)
            time.sleep(waits.pop())
        return work(*args, **kwargs)

    return slow


def main() -> int:
    import worker

    from sparsekd.trainer.state import checkpoint, save, universal
    from sparsekd.trainer.student import setup

    setup.content_of = once_slowly(setup.content_of)  # type: ignore[attr-defined]
    checkpoint.crc32_of = once_slowly(checkpoint.crc32_of)
    save.torch_save = once_slowly(save.torch_save)
    universal._Conversion._start = once_slowly(universal._Conversion._start)  # type: ignore[method-assign]
    return worker.main()


if __name__ == "__main__":
    run_as_process(main)
