"""`import sparsekd` as notebooks and drivers do it: light, typed, and good for more than one training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synthetic_stores import write_synthetic_store
from wandb_files import offline_config

import sparsekd
from sparsekd.logit_store.synthetic import synthetic_manifest

pytestmark = pytest.mark.integration

DRIVER = Path(__file__).with_name("api_driver.py")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "store"
    manifest = synthetic_manifest(vocabulary_size=97, sequence_length=32, rows_per_shard=8)
    write_synthetic_store(folder, manifest, {"train": 22, "heldout": 5}, seed=3)
    return folder


def drive(store: Path, root: Path, *names: str, ranks: int = 1) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(DRIVER), str(store), str(root), *names]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def metrics(folder: Path) -> list[dict[str, Any]]:
    timed = (
        *("tokens_per_second", "data_wait_share", "step_seconds", "peak_memory_gib"),
        *("seconds", "run_seconds"),
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in timed} for entry in lines]


def test_trainings_follow_one_another(store: Path, tmp_path: Path) -> None:
    """After one that ended, one that failed with its engine alive, and refusals: the same numbers, bit for
    bit, as in a process of its own; and W&B is told what ran."""
    names = ("first", "mistyped", "exploded", "first", "plain", "second")
    printed = drive(store, tmp_path / "together", *names)
    assert re.findall("(?m)^(trained|refused)", printed) == [
        *("trained", "refused", "refused", "trained", "trained", "trained")
    ]
    assert "train.steps" in printed and "not a finite number" in printed
    drive(store, tmp_path / "alone", "second")
    both = [metrics(tmp_path / place / "second") for place in ("together", "alone")]
    assert both[0] == both[1] and len(both[0]) == 5
    logs = {name: (tmp_path / "together" / name / "logs" / "rank_0.log").read_text() for name in names[-2:]}
    assert all(
        [other for other in names if f"after {other}" in text] == [name] for name, text in logs.items()
    )

    told = offline_config(tmp_path / "together" / "second")
    manifest = sparsekd.open_store(store).manifest
    assert told["store"]["k"] == manifest.record.k != sparsekd.Config().store.k
    assert told["store"]["n"] == manifest.record.n and told["store"]["digest"]
    assert told["objective"]["target_mode"] == "sampled" and told["objective"]["impl"] == "torch"
    assert told["teacher"]["name"] == manifest.teacher.name and told["world_size"] == 1
    assert not {"corpus", "evaluate", "report", "plan", "export", "tracking"} & told.keys()


def test_trainings_of_two_ranks_follow_one_another(store: Path, tmp_path: Path) -> None:
    printed = drive(store, tmp_path, "first", "exploded", "second", ranks=2)
    assert [printed.count(f"\n{word} ") for word in ("trained", "refused", "left")] == [4, 1, 1]
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")


def test_the_import_is_light() -> None:
    heavy = ("torch", "numpy", "hydra", "pyarrow")
    code = (
        "import sparsekd, sys\n"
        f"assert not [name for name in {heavy} if name in sys.modules]\n"
        "assert sparsekd.__version__ and {'train', 'open_store'} <= set(dir(sparsekd))\n"
        "sparsekd.compose(['train.steps=3']); sparsekd.open_store; sparsekd.UserError; sparsekd.train\n"
        "assert 'torch' not in sys.modules\n"
    )
    for place in ("/", str(ROOT)):  # where the folders lie, too, even if Python looks there first
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_every_name_is_there() -> None:
    for name in sparsekd.__all__:
        assert getattr(sparsekd, name)
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        sparsekd.distill  # noqa: B018


def test_what_is_refused_is_an_exception(store: Path) -> None:
    with pytest.raises(sparsekd.UserError, match=r"objective\.kd_weight"):
        sparsekd.compose(["objective.kd_wait=1"])
    with pytest.raises(sparsekd.UserError, match="give a list"):
        sparsekd.train("store.path=x")
    with pytest.raises(sparsekd.UserError, match=r"store\.path is not set"):
        sparsekd.train([])
    config = sparsekd.compose([f"store.path={store}"])
    config.train.steps = 0
    with pytest.raises(sparsekd.UserError, match=r"train\.steps=0 is out of range"):
        sparsekd.train(config)
    with pytest.raises(sparsekd.StoreError):
        sparsekd.open_store(store.parent / "nowhere")


def test_plan_prints(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparsekd.plan([f"store.tokens={store}", "plan.hidden_size=64"])
    assert "store, estimated" in capsys.readouterr().out
