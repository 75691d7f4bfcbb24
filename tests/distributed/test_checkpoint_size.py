"""Checkpoints before the first step: the size foreseen is the size written, in every stage."""

import pytest
from distributed_harness import Workplace

from sparsekd.trainer.state.room import checkpoint_size

pytestmark = pytest.mark.distributed

KINDS = [
    *((stage, "float32") for stage in (0, 1, 2, 3)),
    *((stage, "bfloat16") for stage in (1, 2, 3)),
]


def test_the_size_foreseen_is_the_size_written(workplace: Workplace) -> None:
    """Of a student large enough that names and shapes around its tensors do not count."""
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    config = workplace.run_values("")["student"]["config"] | sizes
    runs = {
        f"room_{stage}_{dtype}": workplace.run_values(
            f"room_{stage}_{dtype}",
            student={"config": config},
            engine={"zero_stage": stage, "dtype": dtype},
            train={"steps": 1},
        )
        for stage, dtype in KINDS
    }
    output = workplace.run(list(runs.values()), ranks=2)
    assert output.count("checkpoints: about ") == len(KINDS)
    parameters = sum(tensor.numel() for tensor in workplace.weights("room_3_bfloat16", 1).values())
    for (stage, dtype), name in zip(KINDS, runs, strict=True):
        wanted = checkpoint_size(parameters, stage=stage, dtype=dtype, ranks=2)
        files = list((workplace.folder(name) / "checkpoints" / "step-00000001").rglob("*_states.pt"))
        found = {rank: 0 for rank in (0, 1)}
        for path in files:
            found["pp_rank_1_" in path.name] += path.stat().st_size
        assert sum(found.values()) == pytest.approx(wanted.total, rel=0.05), name
        assert found[0] == pytest.approx(wanted.first, rel=0.05), name
        assert found[1] == pytest.approx(wanted.other, rel=0.05), name
