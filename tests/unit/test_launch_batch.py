"""`launch=slurm`: the batch script, and what is refused before sbatch sees it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.launch.batch import batch_script, submit
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.door.cli import main


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def words_that_arrive(script: str, folder: Path) -> list[str]:
    """Runs a batch script by bash, without Slurm, and returns what srun gets for the program to start."""
    saved = folder / "words.json"
    code = f"import json, sys; json.dump(sys.argv[1:], open({str(saved)!r}, 'w'))"
    program(folder / "srun", f"#!{sys.executable}\n{code}\n")
    program(folder / "sparsekd", f"#!/bin/sh\necho {folder}\n")
    program(folder / "python", "#!/bin/sh\n")
    environment = {**os.environ, "PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "1"}
    subprocess.run(["bash"], input=script, text=True, env=environment, check=True, stdout=subprocess.DEVNULL)
    return list(json.loads(saved.read_text()))


@pytest.mark.parametrize("verb", ["train", "capture"])
def test_every_word_arrives_as_it_was_typed(verb: str, tmp_path: Path) -> None:
    chance = random.Random(3)
    letters = "ab= '\"\\$`!#*?[]{}()<>|&;~^%-é\N{SNOWMAN}"
    words = ["".join(chance.choice(letters) for _ in range(chance.randrange(0, 9))) for _ in range(300)]
    script = batch_script(verb, {"nodes": "2"}, [], words, programs=str(tmp_path))
    arrived = words_that_arrive(script, tmp_path)
    start = arrived.index(verb) + 1
    assert arrived[start - 2] == "sparsekd"
    # The job itself must not submit again.
    assert arrived[start:] == [*words, "launch.scheduler=none"]


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_options_take_the_place_of_the_template_s(tmp_path: Path) -> None:
    options = {"signal": "USR2@30", "nodes": "4", "output": 'a "b" \\c'}
    script = batch_script("train", options, ["--exclusive", "--nodes=5"], [], programs=str(tmp_path))
    assert directives(script) == [
        *("--job-name=sparsekd-train", "--open-mode=append", "--requeue"),
        *("--signal=USR2@30", "--nodes=4", '--output="a \\"b\\" \\\\c"', "--exclusive", "--nodes=5"),
    ]
    # sbatch reads no option behind the first command.
    first_command = script.index("export PATH")
    assert script.rindex("#SBATCH") < first_command


@pytest.mark.parametrize("word", ["a\nb", "a\rb", "a\0b", "a\x1bb", "a\u2028b"])
def test_what_no_line_can_hold_is_refused(word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which a batch script cannot"):
        batch_script("train", {}, [], [word], programs="/x")
    with pytest.raises(ValueError, match="cannot be --partition"):
        batch_script("train", {"partition": word}, [], [], programs="/x")
    for extra in (f"--comment={word}", "nodes", "rm -rf /", "", "-N4"):
        with pytest.raises(ValueError, match="is not an option of sbatch"):
            batch_script("train", {}, [extra], [], programs="/x")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `train` needs, in a folder of its own."""
    write_synthetic_store(tmp_path / "store", synthetic_manifest(), {"train": 3, "heldout": 1}, seed=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # without Slurm, where it is installed
    return ["store.path=store", "student.config={model_type: llama}", "launch=slurm"]


def test_a_dry_run_shows_the_script_and_writes_nothing(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["train", *settings, "launch.slurm.time=1:00:00", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --time=1:00:00\n" in shown and f"--chdir={tmp_path}\n" in shown
    assert "launch.slurm.time=1:00:00" in shown and "set -- store.path=store" in shown
    assert "--dry-run" not in shown.partition("srun")[0]
    assert sorted(tmp_path.iterdir()) == before


def test_the_script_is_submitted_once(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path / "sbatch", f'#!/bin/sh\necho "$*" >> {tmp_path}/called\necho "17;cluster"\n')
    assert main(["train", *settings, "run.name=a"]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "called").read_text() == "--parsable runs/a/train.sbatch\n"
    assert (tmp_path / "runs/a/train.sbatch").read_text() in shown and (tmp_path / "runs/a/logs").is_dir()
    assert "job 17\n" in shown and "squeue -j 17" in shown


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("train", ["launch.slurm.array=2"], "launch.slurm.array=2 is for capture"),
        ("train", ["launch.slurm.extra=[nodes]"], "is not an option of sbatch"),
        ("train", ["run.name=a\nb"], "which a batch script cannot"),
        ("train", ["run.name=a\\b"], "has a backslash"),
        ("train", [], "sbatch is not on PATH here"),
        ("report", [], "launch.scheduler=slurm submits capture and train, not report"),
        ("train", ["launch.scheduler=none", "--dry-run"], "--dry-run shows the batch script of launch=slurm"),
    ],
)
def test_what_cannot_be_submitted_is_one_sentence(
    settings: list[str], capsys: pytest.CaptureFixture[str], verb: str, words: list[str], said: str
) -> None:
    assert main([verb, *settings, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_one_rank_of_many_does_not_submit(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, text)
    assert main(["train", *settings]) == 2
    assert "this is one of 2 ranks" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["echo no partition >&2; exit 1", "echo", "echo 'job x'"])
def test_sbatch_s_own_refusal_is_shown(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "sbatch", f"#!/bin/sh\n{script}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ValueError, match=r"sbatch refused job\.sbatch: ") as said:
        submit("job.sbatch")
    assert "exit 1" not in script or "no partition" in str(said.value)
