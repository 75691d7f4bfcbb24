"""The workplace that all distributed tests share; see distributed_harness.py."""

import sys
from pathlib import Path

import pytest

# pytest's importlib mode adds no folder by itself.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # how a page was made

from distributed_harness import Workplace, all_runs, make_workplace


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="session")
def trained(workplace: Workplace) -> Workplace:
    """The workplace after the shared two-rank job."""
    workplace.run(list(all_runs(workplace).values()), ranks=2)
    return workplace
