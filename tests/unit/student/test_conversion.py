"""The converter ends with the first rank, and writes only while the run folder is that rank's."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sparsekd.trainer.run.errors import OwnerError
from sparsekd.trainer.state.universal import _Conversion

# Stands for DeepSpeed's converter: two workers of a pool, that take as long as those of a large model.
SLOW = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor

def work(number):
    with open(os.environ["PIDS"], "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(600)

if __name__ == "__main__":
    with open(os.environ["PIDS"], "a") as file:
        file.write(f"{os.getpid()}\\n")
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
"""

FIRST_RANK = """
import os, sys
from pathlib import Path
from sparsekd.trainer.state.universal import _Conversion
os.environ["PYTHONPATH"] = sys.argv[1]
folder = Path(sys.argv[2])
work = _Conversion(folder / "step-00000001", folder / ".step-00000001.tmp-universal", "a" * 64, lambda: None)
while work.look() is None:
    pass
"""


def converter(place: Path, text: str) -> Path:
    """A package that is taken for DeepSpeed by what is started with it in PYTHONPATH."""
    package = place / "deepspeed" / "checkpoint"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "ds_to_universal.py").write_text(text)
    return place


def test_it_ends_with_the_first_rank_however_that_ends(tmp_path: Path) -> None:
    place, pids = converter(tmp_path / "packages", SLOW), tmp_path / "pids"
    rank = subprocess.Popen(
        [sys.executable, "-c", FIRST_RANK, str(place), str(tmp_path)],
        env=os.environ | {"PIDS": str(pids), "DS_ACCELERATOR": "cpu"},
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (pids.is_file() and len(pids.read_text().split()) == 3):
        time.sleep(0.05)
    processes = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    assert len(processes) == 3
    rank.kill()
    rank.wait()
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        process.kill()
    assert not alive


QUICK = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_folder") + 1])
folder.mkdir(parents=True)
(folder / "weights.pt").touch()
"""


@pytest.mark.parametrize("taken_over", [False, True])
def test_who_lost_the_run_folder_meanwhile_publishes_nothing_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_over: bool
) -> None:
    """The folder's new owner may have converted the same checkpoint, and read it at this moment."""
    monkeypatch.setenv("PYTHONPATH", str(converter(tmp_path / "packages", QUICK)))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    asked = 0

    def require() -> None:
        nonlocal asked
        asked += 1
        if taken_over and asked == 2:
            raise OwnerError("another job's")

    converted = folder / ".step-00000001.tmp-universal"
    work = _Conversion(folder / "step-00000001", converted, "a" * 64, require)
    try:
        if taken_over:
            with pytest.raises(OwnerError, match="another job's"):
                while work.look() is None:
                    pass
        else:
            while work.look() is None:
                pass
    finally:
        work.end()
    assert asked == 2
    assert [path.name for path in folder.iterdir()] == ([] if taken_over else [converted.name])
