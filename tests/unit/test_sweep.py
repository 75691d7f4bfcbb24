"""`--multirun`: which runs a sweep has, and what they are called."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.config.compose import compose_config
from sparsekd.trainer.config.sweep import swept_runs
from sparsekd.trainer.door import sweep
from sparsekd.trainer.door.cli import main
from sparsekd.trainer.run.errors import ConfigError


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `train` needs, in a folder of its own."""
    write_synthetic_store(tmp_path / "store", synthetic_manifest(), {"train": 3, "heldout": 1}, seed=1)
    monkeypatch.chdir(tmp_path)
    return ["store.path=store", "student.config={model_type: llama}", "run.name=s"]


def names(base: list[str], *words: str) -> list[str]:
    runs = swept_runs([*base, *words], "train")
    for run in runs:  # the words alone make the run
        assert compose_config(run.overrides) == run.config
    return [run.config.run.name for run in runs]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["objective.kd_weight=0.5,1.0"], ["s-kd_weight=0.5", "s-kd_weight=1.0"]),
        # The last key varies fastest.
        (
            ["train.seed=0,1", "objective=kd,kd_ce"],
            [f"s-seed={seed}-objective={name}" for seed in (0, 1) for name in ("kd", "kd_ce")],
        ),
        (["train.seed=range(1,4)"], ["s-seed=1", "s-seed=2", "s-seed=3"]),
        (["train.seed=choice(3,1)"], ["s-seed=3", "s-seed=1"]),
        (["objective=glob(skewed*)"], ["s-objective=skewed_forward_kl", "s-objective=skewed_reverse_kl"]),
        (["optimizer.betas=[0.9,0.95],[0.9,0.99]"], ["s-betas=0.9-0.95", "s-betas=0.9-0.99"]),
        (["student.config.hidden_size=32,64"], ["s-hidden_size=32", "s-hidden_size=64"]),
        # Two keys with one last part are told apart by the whole.
        (
            ["train.seed=1,2", "store.seed=5,6"],
            [f"s-train.seed={a}-store.seed={b}" for a in (1, 2) for b in (5, 6)],
        ),
        # Text stays as typed, also where Hydra would see a number.
        (["tracking.project=007,1e-3"], ["s-project=007", "s-project=1e-3"]),
        (["tracking.project='a,b',c"], ["s-project=a-b", "s-project=c"]),
        (["tracking.group=null,g"], ["s-group=null", "s-group=g"]),
        (["run.name=a,b"], ["a", "b"]),
        (["run.name=a,a"], ["a-0", "a-1"]),
        (["tracking.project=a/b,a:b"], ["s-project=a-b-0", "s-project=a-b-1"]),
        (["tracking.project=../x,/"], ["s-project=x", "s-project=none"]),
    ],
)
def test_the_runs_of_a_sweep_have_folders_of_their_own(
    base: list[str], words: list[str], expected: list[str]
) -> None:
    assert names(base, *words) == expected


def test_what_is_swept_is_what_each_run_has(base: list[str]) -> None:
    runs = swept_runs([*base, "tracking.project=007,x", "train.seed=1,2"], "train")
    found = [(run.config.tracking.project, run.config.train.seed, run.chosen) for run in runs]
    assert found[0] == ("007", 1, {"tracking.project": "007", "train.seed": "1"})
    assert [entry[:2] for entry in found] == [("007", 1), ("007", 2), ("x", 1), ("x", 2)]
    assert swept_runs([*base, "tracking.group=null,g"], "train")[0].config.tracking.group is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.seed=1"], "needs a key with several values"),
        (["train.seed=range(0,100000000)"], "has at most 1,000"),
        (["train.seed=range(40)", "train.steps=range(200,240)"], "name 1,600 runs"),
        (["train.seed=interval(0,1)"], "names no values to try"),
        (["objective=glob(nothing*)"], "names no values to try"),
        (["train.seed=1,x"], "train.seed"),
        (["train.steps=0,5"], "train.steps=0 is out of range"),
        (["objective.temperature=1,9"], "temperature"),
        (["objective=kd,nothing"], "nothing is not one of"),
        (["train.sed=1,2"], "did you mean 'train.seed'"),
        (["run.name=f(a,b)"], "can be read in more than one way"),
        (["hydra.x=1,2"], "setting of Hydra itself"),
        (["nonsense", "train.seed=1,2"], "is not an override of the form key=value"),
    ],
)
def test_a_sweep_with_a_fault_starts_nothing(base: list[str], words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        swept_runs([*base, *words], "train")


def test_runs_follow_one_another_and_end_in_a_table(
    base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = []

    def run_one(words: list[str], ranks: int) -> int:
        begun.append((compose_config(words[1:]), ranks))
        folder = Path("runs", begun[-1][0].run.name)
        folder.mkdir(parents=True)
        records = [{"kind": "heldout", "step": 5, "ce": 1.5, "kd": None}, {"kind": "train", "step": 6}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return [0, 2, 75][len(begun) - 1]

    monkeypatch.setattr(sweep, "_run_one", run_one)
    words = [*base, "train.seed=1,2,3,4", "launch.sweep_ranks=2"]
    assert main(["train", "--multirun", *words]) == 2
    assert [(config.train.seed, ranks) for config, ranks in begun] == [(1, 2), (2, 2), (3, 2)]
    table = capsys.readouterr().out.splitlines()[-5:]
    assert table[0].split()[:2] == ["run", "train.seed"]
    assert table[1].split() == ["runs/s-seed=1", "1", "5", "1.5000", "-", "-", "done"]
    assert "failed (2), see runs/s-seed=2" in table[2] and table[3].endswith("  stopped")
    assert table[4].split() == ["runs/s-seed=4", "4", "-", "-", "-", "-", "not", "begun"]


def test_each_run_of_a_sweep_is_submitted(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\necho $2 >> {tmp_path}/called\necho 17\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [*base, "launch=slurm", "train.seed=1,2"]
    assert main(["train", "-m", "--dry-run", *words]) == 0 and not (tmp_path / "runs").exists()
    assert main(["train", "-m", *words]) == 0
    paths = [f"runs/s-seed={seed}/train.sbatch" for seed in (1, 2)]
    assert (tmp_path / "called").read_text().splitlines() == paths
    for seed, path in enumerate(paths, 1):
        script = Path(path).read_text()
        assert f"train.seed={seed}" in script and "train.seed=1,2" not in script
        assert "multirun" not in script
    assert "runs/s-seed=2   17  runs/s-seed=2/train.sbatch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("capture", ["store.k=1,2"], "--multirun is for train"),
        ("train", ["launch.scheduler=none,slurm"], "launch.scheduler cannot be swept"),
        ("train", ["train.seed=1"], "needs a key with several values"),
    ],
)
def test_what_is_no_sweep_is_one_sentence(
    base: list[str], capsys: pytest.CaptureFixture[str], verb: str, words: list[str], said: str
) -> None:
    assert main([verb, *base, *words, "--multirun"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("early", [False, True])
def test_a_signal_to_the_sweep_reaches_the_run(early: bool) -> None:
    """The sweep waits for its run, which takes the time that it needs to save; also for one just begun."""
    code = (
        "import os, signal, subprocess, sys\n"
        "from sparsekd.trainer.door import sweep\n"
        "run = 'import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "print(1, flush=True); signal.pause()'\n"
        "class Begun(subprocess.Popen):\n"
        "    def __init__(self, command, env):\n"
        "        super().__init__([sys.executable, '-c', run], stdout=subprocess.PIPE)\n"
        "        self.stdout.readline()\n"
        f"        if {early}:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "    def wait(self, timeout=None):\n"
        f"        if not {early}:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return super().wait(timeout)\n"
        "subprocess.Popen = Begun\n"
        "sys.exit(sweep._run_one([], 1))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 75
