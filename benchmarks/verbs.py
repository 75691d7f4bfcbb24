"""Sparsekd's verbs for the benchmarks that use them, run as a user would."""

import os
import subprocess
import sys
from pathlib import Path


def sparsekd(*words: str, ranks: int = 1, threads: int = 1) -> None:
    """Runs one verb, its output unseen, and stops where it fails.

    Args:
        words: the verb and its overrides.
        ranks: processes, by torchrun where they are several.
        threads: of each.
    """
    command = ["sparsekd", *words]
    if ranks > 1:
        command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "--no-python", *command]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
