"""Which GPU a rank takes, where no GPU is needed to say so."""

import os

import pytest

from sparsekd.trainer.config.schema import LaunchConfig
from sparsekd.trainer.run.errors import UserError
from sparsekd.trainer.run.ranks import agree, broadcast_object, gather, gpu_index, on_first, ranks, together


def test_a_rank_takes_its_own_gpu_or_the_only_one_that_slurm_shows_it() -> None:
    assert gpu_index(3, visible=8, under_srun=False) == 3
    assert gpu_index(3, visible=8, under_srun=True) == 3
    assert gpu_index(3, visible=1, under_srun=True) == 0


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="torch sees 2 here; start at most 2 ranks on each"):
        gpu_index(2, visible=2, under_srun=True)
    with pytest.raises(UserError, match="torch sees 1 here"):
        gpu_index(1, visible=1, under_srun=False)


def test_a_job_that_is_started_after_one_of_this_process_does_not_meet_at_its_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    before = dict(os.environ)
    with ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here:
        assert here.world_size == 1 and os.environ["WORLD_SIZE"] == "1" and os.environ["MASTER_PORT"] != "0"
    assert dict(os.environ) == before
    with pytest.raises(ZeroDivisionError), ranks(LaunchConfig(device="cpu"), timeout_minutes=1):
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_no_action_of_one_rank_holds_a_collective() -> None:
    """Where it failed before it on one rank, the others would wait in it for the whole time-out."""
    with ranks(LaunchConfig(device="cpu"), timeout_minutes=1) as here:
        for inner in (
            lambda: broadcast_object(1),
            lambda: agree(None),
            lambda: gather(here, int),
            lambda: on_first(here, int),
            lambda: together(here, int),
        ):
            for outer in (together, gather, on_first):
                with pytest.raises(RuntimeError, match="A collective inside of an action"):
                    outer(here, inner)
        assert gather(here, lambda: 7) == [7] and on_first(here, lambda: None) is None
        with pytest.raises(UserError, match="mine"):
            on_first(here, lambda: refuse("mine"))
        assert together(here, lambda: 3) == 3


def refuse(text: str) -> None:
    raise UserError(text)
