"""A Slurm cluster for the session; see slurm_cluster.py."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# pytest's importlib mode adds no folder by itself.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from distributed_harness import Workplace, make_workplace
from slurm_cluster import Cluster, missing_programs, start_cluster, start_keeper


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes; skips where Slurm is not installed or may not be started."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd is started by root alone")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own folders are too long for a socket
    keeper = start_keeper(folder)
    try:
        yield start_cluster(folder)
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("slurm"))
