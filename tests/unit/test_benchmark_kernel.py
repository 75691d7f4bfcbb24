"""Parts of the kernel benchmark; tests/integration/test_benchmarks.py runs the whole."""

import json

import kernel
import pytest
import torch
from kernel_measure import brief

TINY = ["--smoke", "--only", "D", "--dtypes", "float32"]


@pytest.fixture(autouse=True)
def matplotlib() -> None:
    pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_cases_of_an_earlier_call_are_named_and_kept(tmp_path, monkeypatch):
    kept = tmp_path / "kept.json"
    words = [*TINY, "--resume", str(kept), "--out", str(tmp_path)]
    kernel.main(words)
    page = tmp_path / "kernel_cpu.md"
    assert "No cache was used" in page.read_text()
    (result,) = json.loads(kept.read_text())["results"]
    for row in result["rows"]:
        assert bool(row["times"]) != bool(row["reason"]), row
        assert all(error < 1e-5 for error in row["errors"]), row

    monkeypatch.setattr(kernel, "measure", None)  # nothing is left to measure
    kernel.main(words)
    assert "**A cache was used.** 1 of 1 cases are of earlier calls of the same code" in page.read_text()


@pytest.mark.parametrize(
    ("name", "other"),
    [("code", "0" * 12), ("device", "an abacus"), ("repeats", 7), ("versions", "torch 0.4")],
)
def test_times_of_anything_else_are_refused(tmp_path, name, other):
    kept = tmp_path / "kept.json"
    words = [*TINY, "--budget-seconds", "1e-9", "--resume", str(kept), "--out", str(tmp_path)]
    arguments = kernel.parse(words)
    torch.set_num_threads(1)
    made_with = kernel.made_with(arguments, torch.device("cpu"), kernel.running_code())
    kernel.save(kept, {}, made_with)
    kernel.main(words)
    kernel.save(kept, {}, {**made_with, name: other})
    with pytest.raises(SystemExit, match=f"holds times of {name} {other}, but this is {name} "):
        kernel.main(words)


def test_a_budget_says_what_it_left_out(tmp_path):
    kernel.main([*TINY, "--budget-seconds", "1e-9", "--out", str(tmp_path)])
    assert "- D: 24 x 300 x 16, float32, k 8, n" in (tmp_path / "kernel_cpu.md").read_text()


def test_the_plan_varies_one_thing_at_a_time():
    words = ["--device", "cpu", "--dtypes", "float32", "--k", "4", "8", "--temperature", "1", "2"]
    tables = [(case.table, case.k, case.temperature) for case in kernel.plan(kernel.parse(words))]
    base = [(table, 4, 1.0) for table in "ABCD"]
    assert tables == [*base, ("A", 8, 1.0), ("D", 8, 1.0), ("A", 4, 2.0), ("C", 4, 2.0)]
    assert ("A", 8, 2.0) in {
        (case.table, case.k, case.temperature) for case in kernel.plan(kernel.parse([*words, "--cross"]))
    }


def test_a_failure_is_a_few_words():
    assert brief(torch.OutOfMemoryError("CUDA out of memory. Tried ...")) == "out of memory"
    assert brief(ModuleNotFoundError("x", name="cutlass")) == "cutlass is not installed"
    assert brief(RuntimeError("no /usr/lib/thing.so | here\nmore")) == "RuntimeError: no ... / here"
