"""Ranks: who takes part in this job, on which device, and the few collectives that the verbs need."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sparsekd.launch.env import torch_variables
from sparsekd.trainer.config import LaunchConfig
from sparsekd.trainer.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def ranks(launch: LaunchConfig, *, timeout_minutes: float) -> Iterator[Ranks]:
    """Joins the job's process group for the length of a `with` block.

    Reads torchrun's variables or Slurm's; without either the job is one process. Threads per rank are set
    here because a different number changes the order of sums, and with it bits.

    Raises:
        UserError: cuda is asked for where there is none.
    """
    os.environ.update(torch_variables(os.environ))
    if os.environ["MASTER_PORT"] == "0":
        os.environ["MASTER_PORT"] = str(_free_port())
    use_cuda = launch.device == "cuda" or (launch.device == "auto" and torch.cuda.is_available())
    if use_cuda and not torch.cuda.is_available():
        raise UserError(
            "launch.device=cuda, but torch sees no GPU here; use launch.device=cpu or see `sparsekd doctor`."
        )
    torch.set_num_threads(launch.threads_per_rank)
    local_rank = int(os.environ["LOCAL_RANK"])
    if use_cuda:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group(
        backend="nccl" if use_cuda else "gloo", timeout=timedelta(minutes=timeout_minutes)
    )
    try:
        yield Ranks(
            rank=dist.get_rank(), local_rank=local_rank, world_size=dist.get_world_size(), device=device
        )
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def broadcast_object(value: Any) -> Any:
    """The first rank's `value`, on every rank: decisions are made once, so that no rank waits for another."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def agree(problem: str | None) -> str | None:
    """The first problem that any rank met, told to every rank, so that all leave together and none hangs."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found is not None), None)
