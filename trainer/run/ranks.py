"""Ranks: who takes part in this job, on which device, and the few collectives that the verbs need."""

import itertools
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store

from sparsekd.launch.env import torch_variables
from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.config.schema import LaunchConfig
from sparsekd.trainer.run.errors import ConfigError, UserError
from sparsekd.trainer.run.process import Process
from sparsekd.trainer.run.rendezvous import Place, meet, require_reachable
from sparsekd.trainer.run.stop import StopWatch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    processes: tuple[Process, ...] = ()
    """Of all ranks, in their order."""
    began: float = field(default_factory=time.monotonic)
    """When it joined the job, in seconds of the monotonic clock."""
    store: Store | None = field(default=None, compare=False, repr=False)
    """By which the ranks met; None for one that has met nobody."""
    timeout_seconds: float = math.inf
    """Of a collective."""
    waits: "itertools.count[int]" = field(default_factory=itertools.count, compare=False, repr=False)
    """Numbers of the waits in which this rank takes part (see `waiting`): equal on every rank."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def on_this_machine(self) -> list[int]:
        """Ranks of this one's machine, itself among them."""
        machine = self.processes[self.rank].machine
        return [rank for rank, process in enumerate(self.processes) if process.machine == machine]


@contextmanager
def ranks(launch: LaunchConfig, *, timeout_minutes: float, watch: StopWatch | None = None) -> Iterator[Ranks]:
    """Joins the job's process group for the length of a `with` block.

    Reads torchrun's variables or Slurm's; without either the job is one process. Threads per rank are set
    here because a different number changes the order of sums, and with it bits. A process that joins a group
    ends by `ending.run_as_process`: threads of the group may outlive it.

    Args:
        launch: How the job is started.
        timeout_minutes: Of each collective.
        watch: What asks this process to stop, also while ranks wait for one another; None where nothing does.

    Raises:
        Stopped: The first rank was asked to stop before all ranks were there, or this one was and the others
            never came.
        UserError: cuda is asked for where there is none, or for more ranks than there are GPUs; Slurm's
            variables contradict one another; or the ranks do not find one another in time.
    """
    under_srun = "RANK" not in os.environ and "SLURM_STEP_ID" in os.environ
    try:
        variables = torch_variables(os.environ)
    except ValueError as error:
        raise UserError(str(error)) from error
    if variables.get("MASTER_PORT", os.environ.get("MASTER_PORT")) == "0":
        variables["MASTER_PORT"] = str(_free_port())
    with _environment(variables):
        yield from _joined(launch, timeout_minutes, watch or StopWatch(), under_srun=under_srun)


@contextmanager
def one_process(launch: LaunchConfig, *, timeout_minutes: float, what: str) -> Iterator[Ranks]:
    """`ranks` for what works in one process alone.

    Raises:
        UserError: As `ranks`, or there are several processes; the message calls the work `what`.
    """
    with ranks(launch, timeout_minutes=timeout_minutes) as here:
        if here.world_size != 1:
            raise ConfigError(
                f"{what} runs in one process, but was started with {here.world_size}; start it without "
                "torchrun or srun."
            )
        yield here


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


def _joined(
    launch: LaunchConfig, timeout_minutes: float, watch: StopWatch, *, under_srun: bool
) -> Iterator[Ranks]:
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
    place = Place.of_environment()
    store, processes = meet(place, minutes=launch.start_minutes, watch=watch)
    if not use_cuda:
        require_reachable(processes)
    dist.init_process_group(
        backend="nccl" if use_cuda else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if use_cuda else None,
    )
    here = Ranks(
        place.rank,
        local_rank,
        place.world_size,
        device,
        tuple(processes),
        store=store,
        timeout_seconds=timeout_minutes * 60,
    )
    try:
        yield here
    except BaseException:
        # With NCCL this waits for ranks that may be dead: the process ends without (see `ending`).
        if not use_cuda:
            dist.destroy_process_group()
        raise
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
    _require_collective_is_allowed()
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def agree(problem: str | None) -> str | None:
    """The first problem that any rank met, told to every rank, so that all leave together and none hangs."""
    _require_collective_is_allowed()
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found is not None), None)


def gather(here: Ranks, action: Callable[[], Result]) -> list[Result]:
    """Runs `action` on every rank and returns all results, in the order of ranks; else as `together`."""
    result, failure = _outcome(action)
    everyones: list[Any] = [None] * here.world_size
    told = None if failure is None else _sentence(failure, here.rank)
    _require_collective_is_allowed()
    dist.all_gather_object(everyones, (told, result))
    _leave_if_failed(here, failure, next((told for told, _ in everyones if told is not None), None))
    return [result for _, result in everyones]


def together(here: Ranks, action: Callable[[], Result]) -> Result:
    """Runs `action` on every rank; where it fails on one, all leave, so that none waits for another.

    An action holds no collectives: where it failed before one, the others would wait in it.

    Raises:
        UserError: On the first rank, where it failed on another; the message is that rank's.
        SystemExit: On the others, with code 2, where the failure is a sentence that the first rank says.
        Exception: Whatever else `action` raised here.
    """
    result, failure = _outcome(action)
    _leave_if_failed(here, failure, agree(None if failure is None else _sentence(failure, here.rank)))
    return result  # type: ignore[return-value]  # None only with a failure


def on_first(here: Ranks, action: Callable[[], Result]) -> Result:
    """Runs `action` on the first rank alone; its result, or that it failed, reaches all in one collective.

    Raises:
        SystemExit: On the others, with code 2, where it failed.
        Exception: On the first rank: whatever `action` raised.
    """
    result, failure = _outcome(action) if here.is_first else (None, None)
    failed, result = broadcast_object((failure is not None, result))
    if failure is not None:
        raise failure
    if failed:
        raise SystemExit(2)
    return result


_alone = threading.local()


@contextmanager
def without_collectives() -> Iterator[None]:
    """Refuses collectives of this thread for the length of a `with` block."""
    _alone.acts = True
    try:
        yield
    finally:
        _alone.acts = False


def _outcome(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """What an action returns or raises, while collectives are forbidden."""
    _require_collective_is_allowed()
    try:
        with without_collectives():
            return action(), None
    except Exception as error:  # whatever it is, the other ranks have to hear of it before it goes up
        return None, error


def _require_collective_is_allowed() -> None:
    if getattr(_alone, "acts", False):
        raise RuntimeError(
            "A collective inside of an action that each rank runs for itself: where one rank fails before "
            "it, the others wait for the whole time-out."
        )


def _leave_if_failed(here: Ranks, failure: Exception | None, problem: str | None) -> None:
    if failure is not None and not is_sentence(failure):
        raise failure
    if problem is not None:
        leave_together(here, failure or UserError(problem))


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
