"""A real Slurm cluster of two nodes on this machine, in a folder and on ports of its own.

The nodes are called 127.0.0.2 and 127.0.0.3: names that resolve on every Linux without a line in /etc/hosts.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

NODES = ("127.0.0.2", "127.0.0.3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")

# A dead node is seen after SlurmdTimeout; cred_expire is also how long a requeued job is held.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def missing_programs() -> list[str]:
    """What is not installed of Slurm and munge."""
    return [name for name in PROGRAMS if _program(name) is None]


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class Cluster:
    """The running cluster; `stop` ends it, and its keeper does where the tests die without a word."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def run(self, *words: str, **changes: str) -> str:
        """Runs a command against this cluster and returns what it prints; fails with that."""
        done = subprocess.run(
            words, env=self.environment | changes, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def field(self, job: int | str, name: str) -> str:
        """One field of a job, such as JobState, in the words of `scontrol show job`."""
        return self.fields(f"job {job}")[name]

    def fields(self, what: str) -> dict[str, str]:
        shown = self.run("scontrol", "--oneliner", "show", *what.split())
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, job: int | str, *states: str, seconds: float = 240) -> str:
        """Waits until a job is in one of these states, and returns it; fails where it ends in another."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        deadline = time.monotonic() + seconds
        while (state := self.field(job, "JobState")) not in states:
            late = time.monotonic() > deadline
            assert state not in final and not late, f"Job {job} is {state}, not {states}.\n{self.log()}"
            time.sleep(0.2)
        return state

    def log(self) -> str:
        return (self.folder / "slurmctld.log").read_text()[-4000:]

    def start_daemon(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                words, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        program = _program("slurmd")
        assert program is not None
        self.start_daemon(node, program, "-D", "-N", node)

    def kill_node(self, node: str) -> list[psutil.Process]:
        """As if a node lost its power: no connection is closed, nothing answers. Returns what stands."""
        self.daemons.pop(node).kill()
        running = processes_of(self.folder)
        still = [process for process in running if _variable(process, "SLURMD_NODENAME") == node]
        for process in still:
            process.send_signal(signal.SIGSTOP)
        return still

    def ranks_of(self, **variables: str) -> list[psutil.Process]:
        """The processes that srun started, of the job that has these variables."""
        wanted = {**variables, "SLURM_STEP_ID": "0"}
        return [
            process
            for process in processes_of(self.folder)
            if all(_variable(process, name) == text for name, text in wanted.items())
            and "slurmstepd" not in process.name()
        ]

    def freeze(self, job: int | str) -> list[psutil.Process]:
        """Stops a job's ranks where they are, however fast the machine is; returns them."""
        ranks = self.ranks_of(SLURM_JOB_ID=str(job))
        assert ranks, f"No rank of job {job} is alive."
        for process in ranks:
            process.send_signal(signal.SIGSTOP)
        return ranks

    def wait_for_nodes(self, *states: str) -> None:
        deadline = time.monotonic() + 60
        while set(self.run("sinfo", "--Node", "--noheader", "--format=%T").split()) - set(states):
            assert time.monotonic() < deadline, f"The nodes are not {states}:\n{self.log()}"
            time.sleep(0.2)


def start_cluster(folder: Path) -> Cluster:
    """Starts munged, slurmctld and two slurmd in `folder`, whose path must be short (a socket lies there)."""
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    configuration = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    controller, *ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 State=UNKNOWN"
        for node, port in zip(NODES, ports, strict=True)
    )
    configuration.write_text(
        _CONFIGURATION.format(folder=folder, host=host, controller=controller, nodes=nodes)
    )
    plain = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    plain = {name: text for name, text in plain.items() if name not in launchers}
    scripts = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    cluster = Cluster(
        folder, plain | {"SLURM_CONF": str(configuration), "PYTHONSAFEPATH": "1", "PATH": scripts}
    )
    munged, slurmctld = _program("munged"), _program("slurmctld")
    assert munged is not None and slurmctld is not None
    places = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
    places |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    options = [f"--{name}={folder / place}" for name, place in places.items()]
    cluster.start_daemon("munged", munged, "--foreground", "--force", *options)
    _wait_for(folder / "munge.socket")
    cluster.start_daemon("slurmctld", slurmctld, "-D", "-c")
    for node in NODES:
        cluster.start_node(node)
    cluster.wait_for_nodes("idle")
    return cluster


def end_cluster(folder: Path) -> None:
    """Kills every process of the cluster in `folder`: its daemons, and what its jobs have started."""
    for _ in range(5):  # a daemon may start another process while it is looked for
        found = processes_of(folder)
        for process in found:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if not found:
            return
        psutil.wait_procs(found, timeout=10)


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes that work for the cluster in `folder`: they inherit the name of its configuration."""
    wanted = str(folder / "slurm.conf")
    return [process for process in psutil.process_iter() if _variable(process, "SLURM_CONF") == wanted]


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name) if process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, OSError):
        return None


def thaw(ranks: Sequence[psutil.Process], *, when: signal.Signals, seconds: float = 180) -> None:
    """Lets frozen ranks go on when a signal has reached each of them."""
    deadline = time.monotonic() + seconds
    while not all(_has_come(process, when) for process in ranks):
        assert time.monotonic() < deadline, f"{when.name} does not come"
        time.sleep(0.1)
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def _has_come(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a signal waits for a frozen process, or has been taken: Slurm may wake it."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    waiting = [int(mask, 16) for mask in re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)$", text, re.MULTILINE)]
    return "\nState:\tT" not in text or any(mask >> (number - 1) & 1 for mask in waiting)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.05)


def start_keeper(folder: Path) -> "subprocess.Popen[bytes]":
    """A process that ends the cluster when this one is gone, however that came."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__)), str(folder)], stdin=subprocess.PIPE, start_new_session=True
    )


def submitted(printed: str) -> int:
    """The job's number in what `sbatch` printed."""
    found = re.search(r"Submitted batch job ([0-9]+)", printed)
    assert found is not None, printed
    return int(found[1])


if __name__ == "__main__":
    sys.stdin.buffer.read()  # ends when the tests' end of the pipe is closed, by them or by their death
    end_cluster(Path(sys.argv[1]))
