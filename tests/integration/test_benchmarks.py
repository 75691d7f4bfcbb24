"""Every benchmark as a program, at its smallest and from nothing: what a page says must be of code that runs.

Each starts in an empty folder, so that nothing an earlier run has left can stand in for what the code does.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import capture as benchmark_capture
import kernel_cases
import loader_contestants
import loader_report
import pytest
import save_worker
import store_fidelity
import store_ours
import store_peers
import store_targets
from capture_world import config_for

from sparsekd.trainer.teacher import capture

pytestmark = pytest.mark.integration

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HEAD = re.compile(r"Written by `benchmarks/(\w+\.py) --smoke.*, code of .*commit.*, digest `[0-9a-f]{12}`: ")
NO_CACHE = "No cache was used: this run made everything itself."


@pytest.fixture(autouse=True)
def matplotlib() -> None:
    pytest.importorskip("matplotlib")


def run(script: str, folder: Path, *words: str | Path) -> None:
    """The benchmark in its own process, which begins in an empty folder."""
    empty = folder / "empty"
    empty.mkdir()
    command = [sys.executable, BENCHMARKS / script, "--smoke", "--out", folder, *words]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(empty.iterdir())


def page_of(folder: Path, name: str) -> str:
    page = (folder / name).read_text()
    assert HEAD.match(page.splitlines()[2])
    assert str(folder) not in page
    return page


def tables(page: str) -> list[list[str]]:
    return [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]


def test_api_bias(tmp_path: Path) -> None:
    run("api_bias.py", tmp_path)
    page = page_of(tmp_path, "api_bias.md")
    assert NO_CACHE in page
    cells = {row[0]: row for row in tables(page)}
    # A list of one that is renormalised is certain of itself: no gradient, so a bias of all that there is.
    assert float(cells["K = 1, rest dropped, renormalised (`renormalized`)"][2]) == 1
    assert "none seen" in cells["m = 5, counts of samples (`sampled`, k = 0)"][2]


def test_store(tmp_path: Path) -> None:
    run("store.py", tmp_path)
    page = page_of(tmp_path, "store_cpu.md")
    assert NO_CACHE in page
    assert (tmp_path / "store_cpu.png").stat().st_size > 10_000
    real = page[page.index("## Real: V = 1,024") : page.index("## What the layouts do not carry")]
    cells = {row[0]: row for row in tables(real)}
    for layout in [*store_ours.ours(), *store_peers.peers()]:
        row = cells[layout.name]
        assert float(row[1]) > 0 and row[cells["layout"].index("ids exact")] == "yes", row
        assert layout.is_ours or f"- {layout.name}: {layout.lacks}." in page
    assert cells["exact"][cells["layout"].index("max")] == "0"
    assert "### The trained teacher, V = 1,024" in page
    for case in store_fidelity.CASES:
        assert len(re.findall(rf"^\| {case} \| (?:sampled|tail_bucket) \|", page, re.MULTILINE)) == 2, case

    found = {row[0]: row for row in tables(page[: page.index("## Text")])}
    for target in store_targets.SIZES:
        assert float(found[f"bytes/token, {target.name}"][3]) > 0
    for target in store_targets.RATIOS:
        assert float(found[target.name][3].split()[0]) > 0
        assert found[target.name][4] == "other sizes"


def test_kernel(tmp_path: Path) -> None:
    run("kernel.py", tmp_path)
    page = page_of(tmp_path, "kernel_cpu.md")
    assert NO_CACHE in page
    assert (tmp_path / "kernel_cpu.png").stat().st_size > 10_000
    for table, story in kernel_cases.TABLES.items():
        assert f"## {table}. {story[0].upper()}{story[1:]}" in page
        for dtype in ("float32", "bfloat16"):
            assert f"### {table}: 24 x 300 x 16, {dtype}" in page


def test_loader(tmp_path: Path) -> None:
    """Without the peer that needs an environment of its own."""
    for package in ("datasets", "moto", "obstore"):
        pytest.importorskip(package)
    run("loader.py", tmp_path)
    page = page_of(tmp_path, "loader_cpu.md")
    assert NO_CACHE in page and "mosaicml-streaming was not measured" in page
    assert (tmp_path / "loader_cpu.png").stat().st_size > 10_000
    cells = {row[0]: row for row in tables(page)}
    for name in loader_contestants.LOADERS:
        assert name.startswith("mosaicml") or float(cells[name][1].replace(",", "")) > 0
    # Requests do not depend on the machine.
    for name, most in loader_report.REQUESTS_MOST.items():
        assert 0 < float(cells[f"requests a row, {name}"][2]) <= most


def test_save(tmp_path: Path) -> None:
    run("save.py", tmp_path)
    page = page_of(tmp_path, "save_cpu.md")
    assert NO_CACHE in page
    assert (tmp_path / "save_cpu.png").stat().st_size > 10_000
    cells = {row[0]: row for row in tables(page)}
    for name in save_worker.WAYS:
        pause, size = float(cells[name][1]), int(cells[name][-1].replace(",", ""))
        assert (pause >= 0 and size == 0) if name == save_worker.NOTHING else (pause > 0 and size > 0), name
    # All write the same state.
    assert cells[save_worker.BEHIND][-1][:2] == cells[save_worker.TORCH][-1][:2]
    assert "other sizes" in page


def test_capture(tmp_path: Path) -> None:
    run("capture.py", tmp_path)
    page = page_of(tmp_path, "capture_cpu.md")
    assert NO_CACHE in page and "other sizes" in page
    cells = {row[0]: row for row in tables(page)}
    for name in (benchmark_capture.FORWARD, benchmark_capture.TOPK, benchmark_capture.CAPTURE):
        assert int(cells[name][1].replace(",", "")) > 0


def test_prepare(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    run("prepare.py", tmp_path)
    page = page_of(tmp_path, "prepare_cpu.md")
    assert NO_CACHE in page
    rows = [row for row in tables(page) if row[0].startswith(("sparsekd", "datasets.map"))]
    assert len(rows) == 3 and all(int(row[1].replace(",", "")) > 0 for row in rows)
    assert len({row[1] for row in rows}) == 1  # the same tokens, whoever makes them


def test_models(tmp_path: Path) -> None:
    run("models.py", tmp_path)
    page = page_of(tmp_path, "models.md")
    assert NO_CACHE in page
    cells = {row[0]: row for row in tables(page)}
    assert cells["llama"][1:] == ["packed", "sdpa", "yes", "yes", ""]
    assert cells["mamba"][1:] == ["packing=none", "eager", "yes", "yes", ""]
    assert cells["bert"][1] == "refused" and "sees the tokens" in cells["bert"][-1]


@pytest.mark.usefixtures("own_environment")
def test_demo_seeds(tokens: Path, llama: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    shutil.copytree(llama, demo / "teacher" / "export")
    capture.run(config_for(tokens, demo / "teacher" / "export", demo / "store"))
    run("demo_seeds.py", tmp_path, "--demo", demo)
    page = page_of(tmp_path, "demo_seeds.md")
    assert "**A cache was used.** Teacher and store are those of an earlier `make demo`, store `" in page
    (row,) = (row for row in tables(page) if row[0] == "1")
    teacher, kd, ce, margin = map(float, row[1:5])
    assert margin == pytest.approx(ce - kd, abs=2e-3)
    assert min(teacher, kd, ce) > 1
