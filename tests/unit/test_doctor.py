"""`doctor` finds what is wrong and names the remedy."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsekd.trainer.door import doctor
from sparsekd.trainer.door.cli import main
from sparsekd.trainer.run.versions import version_of

ROOT = Path(__file__).parents[2]


def test_doctor_prints_versions_and_every_problem_has_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.run()
    text = capsys.readouterr().out
    assert f"torch         {version_of('torch')}" in text
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


def test_a_lock_that_a_killed_build_left_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert doctor.extension_locks().problem is None
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert "being compiled" in doctor.extension_locks().state and doctor.extension_locks().problem is None
    os.utime(lock, (1, time.time() - 3600))
    found = doctor.extension_locks()
    assert found.problem is not None and f"{lock} is 60 min old" in found.problem
    assert found.remedy is not None and f"rm {lock}" in found.remedy
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where torch puts them by default
    lock = tmp_path / "torch_extensions" / "py311_cpu" / "some" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1, 1))
    assert str(lock) in str(doctor.extension_locks().problem)


def test_a_node_that_others_cannot_reach_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-node.invalid")
    for name in ("SLURM_JOB_NUM_NODES", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.node_name().problem is None and "does not resolve" in doctor.node_name().state
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert "no-such-node.invalid does not resolve" in str(doctor.node_name().problem)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert "loopback" in str(doctor.node_name().problem) and doctor.node_name().remedy
    monkeypatch.setattr(socket, "gethostname", lambda: "192.0.2.7")
    assert doctor.node_name().problem is None and "192.0.2.7" in doctor.node_name().state


def test_room_for_one_more_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no checkpoint there yet" in doctor.room_for_checkpoints(tmp_path / "not" / "there").state
    folder = tmp_path / "run" / "checkpoints" / "step-00000002" / "engine"
    folder.mkdir(parents=True)
    (folder / "states.pt").write_bytes(bytes(3 << 20))
    assert doctor.room_for_checkpoints(tmp_path).problem is None
    free = SimpleNamespace(free=2 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: free)
    assert "finds no room" in str(doctor.room_for_checkpoints(tmp_path).problem)


def test_doctor_takes_a_folder_of_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", f"run.root={tmp_path}"])
    assert f"room for runs: {tmp_path}" in capsys.readouterr().out
    assert main(["doctor", f"run.root={tmp_path}", "train.steps=3"]) == 2
    assert "doctor takes run.root=... alone, found train.steps=3" in capsys.readouterr().err
