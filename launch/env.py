"""One mapping from Slurm's variables to the ones that torch.distributed reads.

Under `srun` every task is a rank: nothing else has to be started on the nodes. torchrun sets its own
variables, which win.
"""

import itertools
import math
import re
import reprlib
import shutil
import subprocess
from collections.abc import Mapping

# Above the ports of services, and below those that Linux gives to any connection (from 32,768 on): there a
# port may be taken at random.
FIRST_PORT = 10_000
PORT_SPAN = 19_997
"""A prime, so that no multiple of the numbers below meets another one early."""

# Steps of one start take neighbouring ports, the next start of a requeued job lies 64 further, the next job
# 2,049: so 9 jobs in a row, each with up to 32 starts of 64 steps, share no port.
_PORTS_PER_START = 64
_PORTS_PER_JOB = 2_049

_SECONDS_FOR_SCONTROL = 10.0

_MOST_HOSTS = 1 << 20
"""Slurm itself takes 65,533 nodes at most."""

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_NUMBERS = re.compile(r"\[([0-9][0-9,-]*)\]")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_SHORT = reprlib.Repr()
_SHORT.maxstring = 100

_TASKS = re.compile(r"([1-9][0-9]{0,8})(?:\(x([1-9][0-9]{0,8})\))?")


def hosts(node_list: str) -> list[str]:
    """The hosts of a Slurm node list, in Slurm's order: as `scontrol` reads it, where it is there and can.

    Raises:
        ValueError: The text is not such a list, or names more than 2^20 hosts.
    """
    return _by_scontrol(node_list) or parsed_hosts(node_list)


def _by_scontrol(node_list: str) -> list[str]:
    """What `scontrol show hostnames` prints; nothing where it is not there, fails, or prints no names."""
    if shutil.which("scontrol") is None or not node_list[:1].isalnum():
        return []
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", node_list],
            capture_output=True,
            text=True,
            timeout=_SECONDS_FOR_SCONTROL,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    names = done.stdout.split()
    return names if done.returncode == 0 and all(map(_NAME.fullmatch, names)) else []


def parsed_hosts(node_list: str) -> list[str]:
    """The hosts of a Slurm node list such as `gpu[003-010,012],rack[1-2]node[3-4],login1`, in Slurm's order.

    Each bracket is a list of numbers and ranges, which keep their leading zeros; of several brackets in one
    name the last varies fastest, as `scontrol show hostnames` prints them.

    Raises:
        ValueError: The text is not such a list, or names more than 2^20 hosts.
    """
    found: list[str] = []
    place, text = 0, node_list.strip()
    while place < len(text) or not found:
        parts: list[list[str]] = []
        while place < len(text) and text[place] != ",":
            if (name := _NAME.match(text, place)) is not None:
                parts.append([name[0]])
                place = name.end()
            elif parts and (numbers := _NUMBERS.match(text, place)) is not None:
                parts.append(_numbers(numbers[1], node_list))
                place = numbers.end()
            else:
                break
        if not parts or (place < len(text) and text[place] != ",") or text.endswith(","):
            raise _not_a_list(node_list, f"no host name at character {place + 1}")
        _require_few(math.prod(map(len, parts)) + len(found), node_list)
        found += map("".join, itertools.product(*parts))
        place += 1
    return found


def _numbers(listed: str, node_list: str) -> list[str]:
    """The numbers in a bracket, with their leading zeros."""
    found: list[str] = []
    for piece in listed.split(","):
        match = _RANGE.fullmatch(piece)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise _not_a_list(node_list, f"{_SHORT.repr(piece)} in a bracket is neither number nor range")
        first, last = int(match[1]), int(match[2] or match[1])
        _require_few(last - first + 1 + len(found), node_list)
        found += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return found


def _require_few(count: int, node_list: str) -> None:
    if count > _MOST_HOSTS:
        raise _not_a_list(node_list, f"more than {_MOST_HOSTS:,} hosts")


def _not_a_list(node_list: str, why: str) -> ValueError:
    return ValueError(
        f"The node list {_SHORT.repr(node_list)} of Slurm cannot be read ({why}); set MASTER_ADDR to the "
        "host of rank 0."
    )


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """The tasks of one node, by a list such as `8(x2),4`: two nodes with 8 and one with 4.

    Args:
        tasks_per_node: As SLURM_STEP_TASKS_PER_NODE has it.
        node: Number of the node in the step, from 0.

    Raises:
        ValueError: The text is no such list, or has no such node.
    """
    listed = f"SLURM_STEP_TASKS_PER_NODE={_SHORT.repr(tasks_per_node)}"
    runs: list[tuple[int, int]] = []  # tasks, on so many nodes
    for piece in tasks_per_node.split(","):
        match = _TASKS.fullmatch(piece)
        if match is None:
            raise ValueError(
                f"{listed} cannot be read, expected a list such as 8(x2),4; start the job with srun."
            )
        runs.append((int(match[1]), int(match[2] or 1)))
    before = 0
    for tasks, nodes in runs:
        before += nodes
        if node < before:
            return tasks
    raise ValueError(
        f"SLURM_NODEID={node} is not one of the {before} nodes of {listed}; start the job with srun."
    )


def master_port(job: int, step: int, restart: int) -> int:
    """The port at which the ranks of a job's step meet: another one for another job, step or start.

    Args:
        job: SLURM_JOB_ID.
        step: SLURM_STEP_ID.
        restart: SLURM_RESTART_COUNT, how often the job was requeued. The ranks of its earlier start may not
            all be dead when the next one begins, and would otherwise be joined.
    """
    return FIRST_PORT + (_PORTS_PER_JOB * job + _PORTS_PER_START * restart + step) % PORT_SPAN


def array_share(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which job of how many of a Slurm array this is, from 0: (0, 1) outside of one.

    Raises:
        ValueError: Slurm's variables cannot be read.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 0, 1
    count = max(1, _number(environment, "SLURM_ARRAY_TASK_COUNT", "1"))
    first = _number(environment, "SLURM_ARRAY_TASK_MIN", "0")
    step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", "1"))
    # A list such as --array=1,5,6 has no step: then two may take the same share, and nothing is left out.
    return (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // step % count, count


def torch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to set so that torch.distributed finds the ranks of this job.

    Args:
        environment: The process's environment.

    Returns:
        RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT under srun; the same for
        one process where nothing is set; an empty mapping where torchrun has set them.

    Raises:
        ValueError: Slurm's variables contradict one another, or cannot be read.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {}
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and "SLURM_NTASKS" in environment:
        return _variables_of_step(environment)
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }


def _variables_of_step(environment: Mapping[str, str]) -> dict[str, str]:
    rank, tasks = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_NTASKS")
    if rank >= tasks:
        raise ValueError(f"SLURM_PROCID={rank} is not below SLURM_NTASKS={tasks}; start the job with srun.")
    if tasks > 1 and "SLURM_PTY_PORT" in environment:
        raise ValueError(
            f"This is an interactive shell in a step of {tasks} tasks, of which one has a terminal: the "
            "others would never come. Start the job from salloc with srun, or take a shell of one task (srun "
            "--ntasks=1 --pty bash)."
        )
    node, local_rank = _number(environment, "SLURM_NODEID"), _number(environment, "SLURM_LOCALID")
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    local_tasks = tasks_on_node(per_node, node)
    if local_rank >= local_tasks:
        raise ValueError(
            f"SLURM_LOCALID={local_rank} is not below the {local_tasks} tasks that "
            f"SLURM_STEP_TASKS_PER_NODE={per_node!r} gives to node {node}; start the job with srun."
        )
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if address is None:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        address = hosts(nodes)[0]
    if port is None:
        job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
        port = str(master_port(job, step, _number(environment, "SLURM_RESTART_COUNT", "0")))
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(local_tasks),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def _number(environment: Mapping[str, str], name: str, absent: str = "") -> int:
    text = environment.get(name, absent)
    if re.fullmatch(r"[0-9]{1,18}", text) is None:
        raise ValueError(f"{name}={_SHORT.repr(text)} is not a number from 0; start the job with srun.")
    return int(text)
