"""`doctor` finds what is wrong and names the remedy."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparsekd.trainer.door import doctor

ROOT = Path(__file__).parents[2]


def test_doctor_prints_versions_and_every_problem_has_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.run()
    text = capsys.readouterr().out
    assert f"torch         {doctor.version('torch')}" in text
    assert text.count("FIX ") == text.count("     -> ")
    assert (code == 0) == ("FIX " not in text)


@pytest.mark.parametrize("safe_path", [True, False])
def test_doctor_sees_the_kernels_collision_when_the_folder_is_searched_first(safe_path: bool) -> None:
    code = (
        "from sparsekd.trainer.door.doctor import kernels_collision as k; "
        "print(k().problem or 'no collision')"
    )
    environment = {"PATH": "/usr/bin:/bin", **({"PYTHONSAFEPATH": "1"} if safe_path else {})}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    assert ("no collision" in done.stdout) == safe_path, done.stdout


def test_slurm_problem_is_reported_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "2",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    finding = doctor.slurm()
    assert finding.problem is not None and "SLURM_PROCID=3" in finding.problem
    assert finding.remedy == "start ranks with srun"
