"""One mapping from Slurm's variables to the ones that torch.distributed reads.

Under `srun` every task is a rank: nothing else has to be started on the nodes. torchrun sets its own
variables, which win.
"""

import re
from collections.abc import Mapping

# Slurm's own rule of thumb for a port that two jobs of one node rarely share (as in many public templates).
FIRST_PORT = 20_000
PORT_SPAN = 20_000


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list such as `gpu[003-010,012],login1`.

    Raises:
        ValueError: The list is empty or does not begin with a host name.
    """
    match = re.match(r"([A-Za-z0-9_.-]+)(?:\[([0-9]+)[^\]]*\])?([A-Za-z0-9_.-]*)", node_list.strip())
    if match is None:
        raise ValueError(f"SLURM_JOB_NODELIST={node_list!r} does not begin with a host name.")
    prefix, first_number, suffix = match.groups()
    return prefix + (first_number or "") + suffix


def torch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to set so that torch.distributed finds the ranks of this job.

    Args:
        environment: The process's environment.

    Returns:
        RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT under srun; the same for
        one process where nothing is set; an empty mapping where torchrun has set them.

    Raises:
        ValueError: Slurm's variables contradict one another.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {}
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and "SLURM_NTASKS" in environment:
        rank, tasks = int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
        if not 0 <= rank < tasks:
            raise ValueError(
                f"SLURM_PROCID={rank} is not below SLURM_NTASKS={tasks}; start the job with srun."
            )
        node_list = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        # A requeued or second step of the job gets another port, so that a dying one cannot be joined.
        seed = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
        local_tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        return {
            "RANK": str(rank),
            "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
            "WORLD_SIZE": str(tasks),
            "LOCAL_WORLD_SIZE": local_tasks.group() if local_tasks else "1",
            "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(node_list)),
            "MASTER_PORT": environment.get("MASTER_PORT", str(FIRST_PORT + seed % PORT_SPAN)),
        }
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
