"""A step whose numbers are none is left out of the training if one says so, and of nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_harness import TRAIN_ROWS, Values, Workplace

from sparsekd.trainer.data.order import BatchShape, GlobalOrder, micro_batches, step_rows

pytestmark = pytest.mark.distributed

POISONING = Path(__file__).with_name("poisoning.py")
SHAPE = BatchShape(global_rows=8, micro_rows=2, world_size=2)
ORDER = GlobalOrder(TRAIN_ROWS, 0)


def skipping(work: Workplace, name: str, *, steps: int = 5, most: int = 2, **engine: Any) -> Values:
    train = {"steps": steps, "checkpoint_every": 1, "keep_checkpoints": 9, "log_every": 2}
    policy = {"nonfinite": "skip", "nonfinite_most": most}
    return work.run_values(name, engine=engine, train=train | policy)


def optimizer_tensors(work: Workplace, name: str, step: int) -> list[torch.Tensor]:
    """All tensors of the optimizer's state in a checkpoint, of all ranks."""
    folder = work.folder(name) / "checkpoints" / f"step-{step:08d}"
    found: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                collect(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                collect(part)

    for path in sorted(folder.rglob("*optim_states.pt")):
        collect(torch.load(path, weights_only=False)["optimizer_state_dict"])
    return found


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    assert len(left) == len(right) > 0
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("poison", ["value", "gradient"])
def test_a_step_that_is_left_out_changes_nothing(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    monkeypatch.setenv("POISON", poison)
    monkeypatch.setenv("POISONED", "[3, 8, 13, 18, 23]")  # the third step of each run, of five
    names: dict[str, dict[str, Any]] = {f"{poison}_3": {}, f"{poison}_bf16_3": {"dtype": "bfloat16"}}
    names[f"{poison}_bf16_2"] = {"dtype": "bfloat16", "zero_stage": 2}
    names[f"{poison}_1"] = {"zero_stage": 1}
    names[f"{poison}_offload_3"] = {"offload": "cpu"}
    output = workplace.run(
        [skipping(workplace, name, **engine) for name, engine in names.items()], ranks=2, worker=POISONING
    )
    for name in names:
        states = [optimizer_tensors(workplace, name, step) for step in (2, 3, 4)]
        assert same(states[0], states[1]) and not same(states[1], states[2]), name
        weights = [list(workplace.weights(name, step).values()) for step in (2, 3, 4)]
        assert same(weights[0], weights[1]) and not same(weights[1], weights[2]), name
        assert all(tensor.isfinite().all() for tensor in weights[2])
        (told,) = workplace.metrics(name, "nonfinite")
        assert told["step"] == 3 and told["skipped"] == 1
        rows: Any = step_rows(16, SHAPE, ORDER)
        expected = f"a gradient that is not a finite number, though its losses are, on rows {rows}"
        if poison == "value":
            rows = [place.row for place in micro_batches(16, SHAPE, ORDER, rank=1)[1]]
            expected = f"a loss that is not a finite number, on rank 1, micro-batch 2 of 2, rows {rows}"
        expected += f" of {workplace.root / 'store'}"
        assert told["found"] == expected and f"up to now: {expected}" in output
        lines = workplace.metrics(name)
        assert [line["step"] for line in lines] == [1, 2, 4, 5]
        # Means without the step that was left out.
        assert all(0 < line["loss"] < 10 and line["gradient_norm"] > 0 for line in lines)


def test_too_many_end_the_run(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISON", "value")
    monkeypatch.setenv("POISONED", "[2, 3, 4]")
    output = workplace.run([skipping(workplace, "many")], ranks=2, worker=POISONING, expected=2)
    assert "3 steps of this start were left out, more than train.nonfinite_most=2" in output
    saved = sorted(path.name for path in (workplace.folder("many") / "checkpoints").glob("step-*"))
    assert saved[-1] == "step-00000003"
