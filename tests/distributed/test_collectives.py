"""What ranks tell one another in a step and for a line of metrics: as much for few ranks as for many."""

import json
from pathlib import Path
from typing import Any

import pytest
from distributed_harness import Workplace

pytestmark = pytest.mark.distributed

COUNTING = Path(__file__).with_name("counting.py")
ROWS, STEPS = 8, 5
MUCH = 1e6  # what the slow rank of counting.py says
Parts = dict[str, list[dict[str, int]]]


def counted(work: Workplace, tmp_path: Path, *, ranks: int, stage: int) -> tuple[Parts, dict[str, Any]]:
    """The collectives of each step and line of metrics of one micro-batch a rank; and the last line."""
    root = tmp_path / str(ranks)
    root.mkdir()
    values = work.run_values(
        "run",
        run={"root": str(root)},
        engine={"zero_stage": stage},
        train={"steps": STEPS, "micro_batch_rows": ROWS // ranks, "global_batch_rows": ROWS},
    )
    work.run([values], ranks=ranks, worker=COUNTING)
    lines = (root / "run" / "metrics.jsonl").read_text().splitlines()
    return json.loads((root / "counts.json").read_text()), json.loads(lines[-1])


def test_collectives_do_not_grow_with_ranks_and_a_line_has_the_worst_of_them(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, line = counted(workplace, tmp_path, ranks=1, stage=0)
    assert line["data_wait_share"] <= 1 and 0 < line["step_seconds"] < MUCH
    assert 0 < line["peak_memory_gib"] < MUCH and "model_flops_utilisation" not in line
    monkeypatch.setenv("SLOW", "1")
    two, line = counted(workplace, tmp_path, ranks=2, stage=0)
    assert two == alone
    # One for weights and votes; DeepSpeed's mean of gradients and agreement on them.
    assert alone["step"] == [{"all_reduce": 3}] * STEPS
    # Numbers that are none, sums, the slowest; and that the line was written, in two parts.
    assert alone["log"] == [{"all_reduce": 3, "broadcast_object_list": 1, "broadcast": 2}] * STEPS
    assert line["step_seconds"] >= MUCH and line["peak_memory_gib"] == MUCH
    assert 2 < line["data_wait_share"] <= 3 and line["tokens_per_second"] <= ROWS * 32 / MUCH


def test_zero_3_gathers_no_more_often_for_more_ranks(workplace: Workplace, tmp_path: Path) -> None:
    two, four = (counted(workplace, tmp_path, ranks=ranks, stage=3)[0] for ranks in (2, 4))
    # The first steps trace the order of modules, and tell of it.
    assert two["step"][3:] == four["step"][3:] and "all_gather_into_tensor" in two["step"][-1]
    assert two["log"] == four["log"]
