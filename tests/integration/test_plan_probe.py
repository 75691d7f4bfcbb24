"""`plan --probe`: what a teacher says of some rows forecasts the store that `capture` then writes."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.door.api import plan_of
from sparsekd.trainer.door.cli import main
from sparsekd.trainer.teacher.capture import run as capture
from sparsekd.trainer.teacher.summary import draws_noise
from sparsekd.trainer.teacher.trial import measured

sys.path.insert(0, str(Path(__file__).parent))
from capture_world import config_for, make_teacher, make_tokens

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_environment")]

NEAR = 0.03
"""By how much a forecast of the size may be off."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("plan"))


def planned(config: Config, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The plan's lines by their names, of the first section that has one."""
    capsys.readouterr()
    plan_of(config)
    return lines_of(capsys.readouterr().out)


def lines_of(printed: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in printed.splitlines():
        name, _, value = line.strip().partition("  ")
        found.setdefault(name, value.strip())
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"store__k": 5, "store__n": 7},
        {"store__k": 16, "store__n": 0, "store__codec": "compact"},
        {"store__k": 4, "store__n": 6, "store__positions": "sampled", "store__share": 0.3},
    ],
)
def test_it_forecasts_the_store(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, object]
) -> None:
    teacher = make_teacher(tmp_path / "teacher", "llama")
    config = config_for(tokens, teacher, tmp_path / "store", **settings)
    estimated = planned(config, capsys)
    config.plan.probe_rows = 60
    lines = planned(config, capsys)
    capture(config)
    said = capsys.readouterr().out
    files = [path for part in ("shards", "index") for path in (tmp_path / "store" / part).rglob("*.*")]
    real = sum(path.stat().st_size for path in files)
    assert size_of(lines) == pytest.approx(real, rel=NEAR)
    assert f"{len(files) - 2:,} files" in lines["size"]  # the index has one for each split
    # Made-up records of an untrained teacher miss by plane what they may meet in all.
    assert farthest(lines, tmp_path / "store") < 0.012 < farthest(estimated, tmp_path / "store")
    # What the pass says at its end of train, the larger part.
    loss, tail = map(float, re.findall(r"train +teacher ([\d.]+) .* mass ([\d.]+)", said)[0])
    assert float(lines["teacher"].split()[0]) == pytest.approx(loss, rel=0.1)
    assert float(lines["tail"].split()[0]) == pytest.approx(tail, rel=0.15, abs=0.002)


def farthest(lines: dict[str, str], store: Path) -> float:
    """By how much of a record's bytes the planes that are farthest off are so."""
    opened = open_store(store)
    indices = [opened.index(split) for split in opened.manifest.splits]
    tokens = sum(opened.tokens(split)[0] for split in opened.manifest.splits)
    planes = ("head_ids", "head_logprobs", "tail_ids", "log_rest", "entropy")
    real = {name: sum(index.plane_bytes.get(name, 0) for index in indices) / tokens for name in planes}
    found = {name: float(lines[name].split()[0]) if name in lines else 0.0 for name in planes}
    return max(abs(found[name] - real[name]) for name in planes) / sum(real.values())


def size_of(lines: dict[str, str]) -> float:
    number, unit = lines["size"].split()[:2]
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


def test_its_records_are_those_of_a_capture(tokens: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", "gemma2")
    config = config_for(tokens, teacher, tmp_path / "store", teacher__micro_batch_rows=1)
    config.plan.probe_rows = 10_000  # more than there are
    found = measured(config)
    capture(config)
    store = open_store(tmp_path / "store")
    assert [split for split, _ in found.rows].count("train") == store.rows("train")
    number = dict.fromkeys(store.manifest.splits, 0)
    for split, row in found.rows:
        again = store.read_row(split, number[split])
        number[split] += 1
        assert row.teacher is not None and again.teacher is not None
        assert (row.token_ids == again.token_ids).all() and (row.recorded == again.recorded).all()
        assert np.abs(row.teacher.log_rest - again.teacher.log_rest).max() < 0.05  # 8 bits


def test_the_flag_measures_and_a_plan_without_teacher_says_what_it_needs(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_teacher(tmp_path / "teacher", "llama")
    words = [f"store.tokens={tokens}", "launch.device=cpu", "teacher.dtype=float32"]
    assert main(["plan", "--probe", *words, f"teacher.path={teacher}", "plan.hour_price=3"]) == 0
    lines = lines_of(capsys.readouterr().out)
    speed = float(lines["speed"].split()[0].replace(",", ""))
    hours = open_store(tokens).tokens("train")[0] + open_store(tokens).tokens("heldout")[0]
    assert f"at {speed:,.0f} tokens/s" in lines["teacher pass"] and hours
    assert main(["plan", "--probe", *words]) == 2
    assert "teacher.path is not set" in capsys.readouterr().err
    assert main(["train", "--probe"]) == 2
    assert "--probe is not a flag of sparsekd train" in capsys.readouterr().err


@pytest.mark.parametrize(("k", "n"), [(0, 4), (3, 24)])
def test_the_noise_of_draws(k: int, n: int) -> None:
    """Against draws that are made: one position's error where the difference spreads by 1 nat."""
    chance = np.random.default_rng(5)
    probabilities = np.sort(chance.dirichlet(np.full(50, 0.5)))[::-1]
    rest = probabilities[k:] / probabilities[k:].sum()
    difference = chance.standard_normal(len(rest))
    difference = (difference - rest @ difference) / np.sqrt(rest @ (difference - rest @ difference) ** 2)
    tail = probabilities[k:].sum()
    drawn = difference[chance.choice(len(rest), p=rest, size=(200_000, n))]
    error = (tail * drawn.mean(axis=1)).std()
    found = draws_noise(np.array([tail]), n)
    assert found == pytest.approx(error, rel=0.02)
    assert draws_noise(np.array([tail]), 0) is None
