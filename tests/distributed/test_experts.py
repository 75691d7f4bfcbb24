"""Ranks that route to different experts train as one process does under ZeRO-3, however experts are kept."""

from typing import Any

import pytest
from custom_models import write_listed_experts
from distributed_harness import VOCABULARY, Workplace

pytestmark = pytest.mark.distributed

ROUNDING = 2e-5
EXPERTS = 40
"""More than the 32 tokens of a rank's micro-batch meet."""


@pytest.fixture(scope="module")
def trained(workplace: Workplace) -> Workplace:
    """Each kind of student on two ranks under stage 3, and on one rank under stage 1."""
    fields: dict[str, Any] = workplace.run_values("")["student"]["config"]
    listed = {key: value for key, value in fields.items() if key != "model_type"}
    folder = write_listed_experts(
        workplace.root / "listed_experts", {**listed, "vocab_size": VOCABULARY}, count=EXPERTS
    )
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": 1}
    students = {
        "listed": {"path": str(folder), "trust_remote_code": True, "config": {}},
        # A type whose experts are one tensor, of none of the classes that DeepSpeed knows.
        "fused": {"config": {**fields, **experts, "model_type": "olmoe"}},
    }
    for stage, ranks in ((3, 2), (1, 1)):
        runs = [
            workplace.run_values(
                f"{kind}_{stage}",
                student=student,
                engine={"zero_stage": stage},
                train={"steps": 2, "global_batch_rows": 2, "micro_batch_rows": 1},
            )
            for kind, student in students.items()
        ]
        workplace.run(runs, ranks=ranks)
    return workplace


@pytest.mark.parametrize("kind", ["listed", "fused"])
def test_it_is_what_one_process_trains(trained: Workplace, kind: str) -> None:
    found, expected = trained.metrics(f"{kind}_3"), trained.metrics(f"{kind}_1")
    assert len(found) == 2
    for field in ("loss", "gradient_norm"):
        assert [line[field] for line in found] == pytest.approx(
            [line[field] for line in expected], rel=ROUNDING
        )
