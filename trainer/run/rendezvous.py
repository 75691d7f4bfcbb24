"""How the ranks of a job find one another, within a time of its own; who is not there is named."""

import itertools
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from sparsekd.logit_store.errors import first_line
from sparsekd.logit_store.typed_json import parse_json, typed
from sparsekd.trainer.run.errors import Stopped, UserError
from sparsekd.trainer.run.process import Process, this_process
from sparsekd.trainer.run.stop import StopWatch

_SECONDS_ON_THIS_MACHINE = 20.0
"""What a rank gives another on its own machine to begin to listen."""

_MOST_NAMED = 8
_SECONDS_BETWEEN_LOOKS = 1.0

_STOPPED = "The job was asked to stop before its ranks had met"
"""Begins what the first rank tells the others where it was."""

_meetings = itertools.count()
"""Numbers of the meetings that this process takes part in: equal on every rank."""


@dataclass(frozen=True)
class Place:
    """Where a job's ranks meet, by the variables of torch.distributed."""

    rank: int
    world_size: int
    local_world_size: int
    host: str
    port: int

    @staticmethod
    def of_environment() -> "Place":
        """The place that RANK, WORLD_SIZE, MASTER_ADDR, ... name.

        Raises:
            UserError: One of them is missing, or no number.
        """
        try:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            return Place(rank, world_size, local, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        except KeyError as missing:
            raise UserError(
                f"RANK is set, but {missing.args[0]} is not: start the job by torchrun or srun, or unset "
                "RANK."
            ) from None
        except ValueError as error:
            raise UserError(
                f"RANK, WORLD_SIZE, LOCAL_WORLD_SIZE and MASTER_PORT are numbers ({error}): start the job by "
                "torchrun or srun."
            ) from None


def meet(place: Place, *, minutes: float, watch: StopWatch | None = None) -> tuple[Store, list[Process]]:
    """Waits until all ranks are there; returns the store by which a process group is made, and who is who.

    A request to stop that comes meanwhile ends the wait of the first rank, and so of all. One that another
    rank alone has is for later, when ranks can speak with one another.

    Args:
        place: Where they meet.
        minutes: That the first rank waits for the others.
        watch: What asks this process to stop.

    Raises:
        Stopped: The first rank was asked to stop; or this one, and it found no first rank.
        UserError: An address that names no machine, a first rank that is not there, or other ranks that did
            not come in time: on the first rank with their numbers.
        SystemExit: On the others, with 2, where the first rank says it.
    """
    watch, me = watch or StopWatch(), this_process()
    try:
        store = _store(place, minutes)
    except UserError as error:
        _leave_if_asked(watch, error)
        raise
    try:
        verdict = _verdict(store, place, me, minutes, watch)
    except (DistError, RuntimeError) as error:  # RuntimeError: what torch before 2.9 raises
        _leave_if_asked(watch, error)
        host = "torchrun" if _is_launchers() else "rank 0"
        raise UserError(
            f"{me} met {host} at {place.host}:{place.port} and lost it ({first_line(error)[:200]}); its "
            "output says why."
        ) from error
    if not verdict:
        raise SystemExit(2)
    if verdict.startswith(_STOPPED):
        raise Stopped(verdict)
    processes = [typed(Process, part, "a rank") for part in parse_json(verdict.encode(), "the ranks")]
    lasting = _own_store(place, store, minutes) if _is_launchers() else store
    return PrefixStore("group", lasting), processes


def _verdict(store: Store, place: Place, me: Process, minutes: float, watch: StopWatch) -> str:
    """Who came, as JSON; or what a first rank that leaves tells the others, empty for an error of its own.

    Raises:
        DistError or RuntimeError: The store cannot be reached any more.
        Stopped: The first rank, which is this one, was asked to stop.
        UserError: Others did not come in time to this one, the first.
    """
    store.set(f"rank/{place.rank}", json.dumps(asdict(me)))
    if place.rank != 0:
        store.set_timeout(timedelta(minutes=minutes, seconds=30))
        return store.get("verdict").decode()
    verdict, problem = _attendance(store, place, minutes, watch)
    store.set("verdict", verdict)
    if problem is not None:
        time.sleep(1.0)  # the others read it from this process
        raise problem
    return verdict


def _is_launchers() -> bool:
    """Whether the ranks meet in a store of torchrun's own process, which counts its restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _own_store(place: Place, store: Store, minutes: float) -> Store:
    """A store of the first rank's, which outlives a launcher: ranks that lose theirs still save together.

    Raises:
        UserError: It cannot be reached.
    """
    timeout = timedelta(minutes=minutes)
    try:
        if place.rank == 0:
            own = TCPStore(place.host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            store.set("own port", str(own.port))
            return own
        port = int(store.get("own port"))
        return TCPStore(place.host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except (DistError, RuntimeError) as error:
        raise UserError(
            f"Ranks met at {place.host}:{place.port}, but not at a port of rank 0's own "
            f"({first_line(error)[:200]}): the machines must reach one another at every port."
        ) from error


def _leave_if_asked(watch: StopWatch, error: Exception) -> None:
    """Where a wait ended in vain and this process is asked to stop, that is what it leaves for.

    Raises:
        Stopped: It is.
    """
    if watch.request is not None:
        raise Stopped(f"{_STOPPED} ({watch.request}); nothing was begun") from error


def _store(place: Place, minutes: float) -> PrefixStore:
    """Connects to the first rank's store, or makes it."""
    listens = place.rank == 0 and not _is_launchers()
    addresses = _addresses(place.host)
    is_here = all(address.startswith("127.") or address == "::1" for address in addresses)
    seconds = min(_SECONDS_ON_THIS_MACHINE, minutes * 60) if is_here else minutes * 60
    try:
        store = TCPStore(
            place.host,
            # One process alone is found by nobody: of many that start at once each gets a port of its own.
            0 if listens and place.world_size == 1 else place.port,
            is_master=listens,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )
    except (DistError, RuntimeError) as error:
        raise UserError(_no_store(place, listens, is_here, error)) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # torchrun's ranks meet in one store: a later group of this process must not find the addresses of an
    # earlier one, and wait for it without end.
    return PrefixStore(f"sparsekd/{attempt}/{next(_meetings)}", store)


def _no_store(place: Place, listens: bool, is_here: bool, error: Exception) -> str:
    where = f"{place.host}:{place.port}"
    if listens:
        return (
            f"Rank 0 cannot listen at {where} ({first_line(error)[:200]}): another program has this port, "
            "or the address is of another machine; set MASTER_PORT or MASTER_ADDR for all ranks."
        )
    if is_here and place.world_size > place.local_world_size:
        return (
            f"Rank {place.rank} on {socket.gethostname()} finds no rank 0 at {where}, which is a loopback "
            f"address: this machine's /etc/hosts sends the name {place.host} back to itself. Set MASTER_ADDR "
            "to an address by which every machine reaches that of rank 0."
        )
    return (
        f"Rank {place.rank} on {socket.gethostname()} waited for rank 0 at {where} and did not reach it "
        "(launch.start_minutes): rank 0 was not started or has ended, or a firewall is between them."
    )


def _addresses(host: str) -> list[str]:
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(host, None)]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={host} names no machine as seen from {socket.gethostname()} "
            f"({error.strerror or error}): set MASTER_ADDR to an address of the machine of rank 0, or add "
            "the name to /etc/hosts."
        ) from error


def _attendance(
    store: Store, place: Place, minutes: float, watch: StopWatch
) -> tuple[str, UserError | Stopped | None]:
    """Who came, as JSON for all; or what to tell the others, and what to raise here."""
    began, names = time.monotonic(), [f"rank/{rank}" for rank in range(place.world_size)]
    while not _are_there(store, names, min(_SECONDS_BETWEEN_LOOKS, minutes * 60)):
        if watch.request is not None:
            stopped = f"{_STOPPED} ({watch.request}); nothing was begun"
            return stopped, Stopped(stopped)
        waited = time.monotonic() - began
        missing = [rank for rank, name in enumerate(names) if not store.check([name])]
        if missing and waited >= minutes * 60:
            return "", UserError(
                f"{_ranks(missing)} of {place.world_size} did not come to {place.host}:{place.port} within "
                f"{waited:.0f} s (launch.start_minutes): start all of them, with the same "
                "MASTER_ADDR and MASTER_PORT; the output of those that are missing says more."
            )
    # Each is JSON already.
    return "[" + ",".join(store.get(name).decode() for name in names) + "]", None


def _are_there(store: Store, names: Sequence[str], seconds: float) -> bool:
    """Whether a store has all of these, now or within some seconds."""
    try:
        store.wait(list(names), timedelta(seconds=seconds))
    except (DistError, RuntimeError):
        return False
    return True


def _ranks(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
    listed = ", ".join(map(str, numbers[:_MOST_NAMED]))
    return f"{'Rank' if len(numbers) == 1 else 'Ranks'} {listed}{more}"


def require_reachable(processes: Sequence[Process]) -> None:
    """Checks that gloo will give other machines an address of this one that they can reach.

    Raises:
        UserError: This machine's own name is one of loopback, and the ranks are on several machines.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or len({process.machine for process in processes}) == 1:
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = ""
    if not address or address.startswith("127."):
        found = f"is {address}" if address else "does not resolve"
        raise UserError(
            f"This machine's name {name} {found} here, by which the ranks on other machines cannot reach it: "
            "set GLOO_SOCKET_IFNAME to its network interface (such as eth0), or mend /etc/hosts."
        )
