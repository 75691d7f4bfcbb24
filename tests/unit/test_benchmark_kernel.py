"""The kernel benchmark at tiny shapes, so that it cannot rot where no GPU runs it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--device", "cpu", "--shapes", "300x16", "--positions", "24", "--k", "8", "--repeats", "2"]


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    """The script benchmarks/kernel.py as a module; it finds its own neighbours."""
    spec = importlib.util.spec_from_file_location("kernel_benchmark", BENCHMARKS / "kernel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_every_table_is_written(kernel, tmp_path):
    pytest.importorskip("matplotlib")
    kept = tmp_path / "kept.json"
    words = [*TINY, "--without", "compile", "--resume", str(kept), "--out", str(tmp_path)]
    kernel.main(words)
    page = (tmp_path / "kernel_cpu.md").read_text()
    for table, story in kernel.TABLES.items():
        assert f"## {table}. {story[0].upper()}{story[1:]}" in page
    assert (tmp_path / "kernel_cpu.png").stat().st_size > 10_000
    assert str(tmp_path) not in page

    results = json.loads(kept.read_text())["results"]
    assert len(results) == 2 * len(kernel.TABLES)
    for result in results:
        bound = 1e-5 if result["setting"]["dtype_name"] == "float32" else 3e-2
        for row in result["rows"]:
            assert bool(row["times"]) != bool(row["reason"]), row
            assert all(error < bound for error in row["errors"]), row
            # Ours, the floor and whatever is plain torch run everywhere.
            third_party = row["name"].startswith(("Liger", "cut", "quack", "torch linear"))
            assert row["times"] or third_party, row

    # A second call finds every case finished.
    kernel.measure = None
    kernel.main(words)


def test_a_budget_says_what_it_left_out(kernel, tmp_path):
    pytest.importorskip("matplotlib")
    words = [*TINY, "--only", "D", "--dtypes", "float32", "--budget-seconds", "1e-9", "--out", str(tmp_path)]
    kernel.main(words)
    assert "- D: 24 x 300 x 16, float32, k 8, n" in (tmp_path / "kernel_cpu.md").read_text()


def test_the_plan_varies_one_thing_at_a_time(kernel):
    words = ["--device", "cpu", "--dtypes", "float32", "--k", "4", "8", "--temperature", "1", "2"]
    tables = [(case.table, case.k, case.temperature) for case in kernel.plan(kernel.parse(words))]
    base = [(table, 4, 1.0) for table in "ABCD"]
    assert tables == [*base, ("A", 8, 1.0), ("D", 8, 1.0), ("A", 4, 2.0), ("C", 4, 2.0)]
    assert ("A", 8, 2.0) in {
        (case.table, case.k, case.temperature) for case in kernel.plan(kernel.parse([*words, "--cross"]))
    }


def test_a_failure_is_a_few_words():
    measure = sys.modules["kernel_measure"]
    assert measure.brief(torch.OutOfMemoryError("CUDA out of memory. Tried ...")) == "out of memory"
    assert measure.brief(ModuleNotFoundError("x", name="cutlass")) == "cutlass is not installed"
    assert measure.brief(RuntimeError("no /usr/lib/thing.so | here\nmore")) == "RuntimeError: no ... / here"
