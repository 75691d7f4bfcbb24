"""Ranks: who takes part in this job, on which device, and the few collectives that the verbs need."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from sparsekd.launch.env import torch_variables
from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.config.schema import LaunchConfig
from sparsekd.trainer.run.errors import UserError

Result = TypeVar("Result")


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
    here because a different number changes the order of sums, and with it bits. A process that joins a group
    ends by `ending.run_as_process`: threads of the group may outlive it.

    Raises:
        UserError: cuda is asked for where there is none, or for more ranks than there are GPUs; or Slurm's
            variables contradict one another.
    """
    under_srun = "RANK" not in os.environ and "SLURM_STEP_ID" in os.environ
    try:
        variables = torch_variables(os.environ)
    except ValueError as error:
        raise UserError(str(error)) from error
    if variables.get("MASTER_PORT", os.environ.get("MASTER_PORT")) == "0":
        variables["MASTER_PORT"] = str(_free_port())
    with _environment(variables):
        yield from _joined(launch, timeout_minutes, under_srun=under_srun)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for a while: a job that this process starts later must not meet at this one's port."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _joined(launch: LaunchConfig, timeout_minutes: float, *, under_srun: bool) -> Iterator[Ranks]:
    """Joins the group that the variables name, and leaves it."""
    use_cuda = launch.device == "cuda" or (launch.device == "auto" and torch.cuda.is_available())
    if use_cuda and not torch.cuda.is_available():
        raise UserError(
            "launch.device=cuda, but torch sees no GPU here; use launch.device=cpu or see `sparsekd doctor`."
        )
    torch.set_num_threads(launch.threads_per_rank)
    local_rank = int(os.environ["LOCAL_RANK"])
    if use_cuda:
        visible = torch.cuda.device_count()
        device = torch.device("cuda", gpu_index(local_rank, visible=visible, under_srun=under_srun))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group(
        backend="nccl" if use_cuda else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if use_cuda else None,
    )
    try:
        yield Ranks(
            rank=dist.get_rank(), local_rank=local_rank, world_size=dist.get_world_size(), device=device
        )
    finally:
        dist.destroy_process_group()


def gpu_index(local_rank: int, *, visible: int, under_srun: bool) -> int:
    """Which of the visible GPUs a rank takes: its own number, or the only one that Slurm shows to its task.

    Raises:
        UserError: There are fewer GPUs than ranks on this machine.
    """
    if under_srun and visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"Rank {local_rank} of this machine has no GPU: torch sees {visible} here; start at most "
            f"{visible} ranks on each machine, or use launch.device=cpu."
        )
    return local_rank


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


def together(here: Ranks, action: Callable[[], Result]) -> Result:
    """Runs `action` on every rank; where it fails on one, all leave, so that none waits for another.

    An action that itself holds collectives must meet the same ones on every rank, also where it fails.

    Raises:
        UserError: On the first rank, where it failed on another; the message is that rank's.
        SystemExit: On the others, with code 2, where the failure is a sentence that the first rank says.
        Exception: Whatever else `action` raised here.
    """
    result: Result
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the other ranks have to hear of it before it goes up
        failure = error
    problem = agree(None if failure is None else _sentence(failure, here.rank))
    if failure is not None and not is_sentence(failure):
        raise failure
    if problem is not None:
        leave_together(here, failure or UserError(problem))
    return result


def leave_together(here: Ranks, error: Exception) -> NoReturn:
    """Ends a job for a reason that every rank knows: the first rank raises it, the others leave with 2."""
    if here.is_first:
        raise error
    raise SystemExit(2)


def is_sentence(error: BaseException) -> bool:
    """Whether an error is for the user: one sentence, without a traceback."""
    return isinstance(error, UserError | StoreError)


def _sentence(error: Exception, rank: int) -> str:
    if is_sentence(error):
        return str(error)
    return f"Rank {rank} failed with {type(error).__name__}: {error}"
