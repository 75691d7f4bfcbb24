"""Spikes between lines of metrics are those that a line for every step shows."""

import json
import statistics
from typing import Any

import pytest
from distributed_harness import TRAIN_ROWS, Workplace

from sparsekd.trainer.data.order import BatchShape, GlobalOrder, step_rows

pytestmark = pytest.mark.distributed

FACTOR, STEPS = 1.02, 30  # so low that an even course has some


def test_spikes_between_lines_are_told_with_their_rows(workplace: Workplace) -> None:
    train = {"steps": STEPS, "spike_factor": FACTOR, "log_every": 7}
    every = workplace.run_values("every", train=train | {"log_every": 1, "spike_factor": 0.0})
    seldom = workplace.run_values("seldom", train=train)
    output = workplace.run([every, seldom], ranks=2)
    assert workplace.metrics("every", "spike") == []
    steps = workplace.metrics("every")
    expected: list[dict[str, Any]] = []
    for before, line in enumerate(steps):
        usual = {
            name: statistics.median(other[name] for other in steps[:before] or steps)
            for name in ("loss", "gradient_norm")
        }
        if before >= 16 and any(line[name] > FACTOR * usual[name] for name in usual):
            shape = BatchShape(global_rows=8, micro_rows=2, world_size=2)
            expected.append(
                {
                    "kind": "spike",
                    "step": line["step"],
                    "tokens": line["tokens"],
                    "rows": step_rows(before * 8, shape, GlobalOrder(TRAIN_ROWS, 0)),
                    "loss": pytest.approx(line["loss"], rel=1e-9),
                    "usual_loss": pytest.approx(usual["loss"], rel=1e-9),
                    "gradient_norm": pytest.approx(line["gradient_norm"], rel=1e-9),
                    "usual_gradient_norm": pytest.approx(usual["gradient_norm"], rel=1e-9),
                }
            )
    found = workplace.metrics("seldom", "spike")
    assert 2 <= len(expected) < 14 and found == expected
    assert f"step {found[0]['step']:>2}/{STEPS}  spike: loss {found[0]['loss']:.4f}, usually " in output
    # They come before the line of training that they were found for.
    lines = [json.loads(line) for line in (workplace.folder("seldom") / "metrics.jsonl").open()]
    ends = {line["step"]: place for place, line in enumerate(lines) if line["kind"] == "train"}
    for place, line in enumerate(lines):
        if line["kind"] == "spike":
            assert place < min(ends[step] for step in ends if step >= line["step"])
