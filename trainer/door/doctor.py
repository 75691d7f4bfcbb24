"""`sparsekd doctor`: what this environment is, and each problem with its remedy."""

import importlib.util
import ipaddress
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparsekd.trainer.run.console import readable_seconds, size_text
from sparsekd.trainer.run.versions import INSTALLATION, version_of

# ZeRO and the data loader exchange through /dev/shm; containers often leave it at 64 MiB.
SHARED_MEMORY_BYTES = 512 * 1024**2

SECONDS_OF_A_BUILD = 600.0
"""No extension of DeepSpeed's takes longer to compile; what is older waits for nobody."""

NETWORK_FILE_SYSTEMS = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "cifs", "afs", "panfs", "fuse.sshfs",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One check: `problem` is None where all is well, else one sentence; `remedy` says what to do."""

    name: str
    state: str
    problem: str | None = None
    remedy: str | None = None


def run(run_root: Path | None = None) -> int:
    """Prints versions and findings; returns 0 when nothing is wrong, else 2.

    Args:
        run_root: Folder of run folders, whose disk is looked at, too.
    """
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in INSTALLATION:
        print(f"  {package:<13} {version_of(package) or 'not installed'}")
    checks: tuple[Callable[[], Finding], ...] = (
        python_version, kernels_collision, accelerator, deepspeed_toolchain, extension_locks, shared_memory,
        start_up, tracking, slurm, node_name,
    )  # fmt: skip
    findings = [check() for check in checks]
    if run_root is not None:
        findings.append(room_for_checkpoints(run_root))
    print()
    for finding in findings:
        mark = "ok  " if finding.problem is None else "FIX "
        print(f"{mark} {finding.name}: {finding.problem or finding.state}")
        if finding.remedy is not None:
            print(f"     -> {finding.remedy}")
    problems = sum(finding.problem is not None for finding in findings)
    print(
        f"\n{problems} problem(s). next: sparsekd prepare --help"
        if problems == 0
        else f"\n{problems} problem(s)."
    )
    return 0 if problems == 0 else 2


def python_version() -> Finding:
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("python", found)
    return Finding("python", found, f"python {found} is not supported", "use Python 3.11 or 3.12")


def kernels_collision() -> Finding:
    """Whether a bare `import kernels` would find this project's folder instead of Hugging Face's library."""
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        return Finding("name `kernels`", "no bare module of that name; nothing collides")
    own = spec.origin is not None and Path(spec.origin).with_name("objective.py").exists()
    if not own:
        return Finding("name `kernels`", "Hugging Face's library is found under its own name")
    return Finding(
        "name `kernels`",
        "collision",
        "`import kernels` finds sparsekd's folder, and transformers would take it for Hugging Face's library",
        "start by the console script `sparsekd`, or set PYTHONSAFEPATH=1 so that the current folder is not "
        "searched",
    )


def accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        if importlib.util.find_spec("triton") is None:
            return Finding(
                "accelerator",
                "cuda",
                f"{torch.cuda.device_count()} GPU(s), but triton is not installed: the fused loss cannot run",
                "pip install 'sparsekd[gpu]'",
            )
        return Finding(
            "accelerator",
            f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}",
        )
    if torch.version.cuda is not None:
        return Finding(
            "accelerator",
            "none",
            f"torch was built for CUDA {torch.version.cuda} but sees no GPU",
            "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES; on a CPU machine set launch=cpu",
        )
    return Finding("accelerator", "none; everything runs on the CPU (gloo, loss implementation `torch`)")


def deepspeed_toolchain() -> Finding:
    """DeepSpeed compiles an operation at its first run on a CPU, and needs a compiler and ninja for it."""
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if "ninja" in missing and importlib.util.find_spec("ninja") is not None:
        missing.remove("ninja")
    if not missing:
        return Finding("DeepSpeed's compiler", "g++ and ninja are here")
    return Finding(
        "DeepSpeed's compiler",
        "missing",
        f"{' and '.join(missing)} not found: DeepSpeed cannot compile its operations",
        "install g++ (Debian: apt-get install g++) and ninja (pip install ninja)",
    )


def extension_locks() -> Finding:
    """A process killed while torch compiled an extension leaves a lock; later ones wait for it in silence."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    # Below the default root there is one folder more, for Python's and CUDA's version.
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    ages = {path: time.time() - _modified(path) for path in locks}
    stale = sorted(path for path, age in ages.items() if age > SECONDS_OF_A_BUILD)
    if stale:
        return Finding(
            "torch's extensions",
            "locked",
            f"{stale[0]} is {readable_seconds(ages[stale[0]])} old: a build was most likely killed, and "
            "every start that needs this extension waits for its lock without a word",
            f"when nothing compiles any more: rm {' '.join(map(str, stale))}",
        )
    return Finding("torch's extensions", f"{root}: {'being compiled now' if locks else 'no lock'}")


def shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("/dev/shm", "not present on this system")
    size = shutil.disk_usage("/dev/shm").total
    state = f"{size / 1024**2:,.0f} MiB"
    if size >= SHARED_MEMORY_BYTES:
        return Finding("/dev/shm", state)
    return Finding(
        "/dev/shm",
        state,
        f"only {state}: NCCL may fail to start",
        "start the container with --shm-size=8g or --ipc=host",
    )


def tracking() -> Finding:
    has_key = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in _read(Path.home() / ".netrc")
    state = (
        "W&B key found: runs are online"
        if has_key
        else "no W&B key: runs are kept offline in their run folder"
    )
    return Finding("tracking", state)


def start_up() -> Finding:
    """Where the packages lie, of which every rank opens some thousand files when it starts."""
    kind = _file_system(Path(sys.prefix))
    if kind not in NETWORK_FILE_SYSTEMS:
        return Finding("start-up", f"{sys.prefix} is on {kind}")
    return Finding(
        "start-up",
        f"{sys.prefix} is on {kind}, of which every rank opens some 10,000 files when it starts: with many "
        "ranks use an image or a local copy (docs/operations.md, Start-up)",
    )


def node_name() -> Finding:
    """Whether other nodes can reach this one by its name, under which gloo and NCCL make it known."""
    name, several = socket.gethostname(), _nodes() > 1
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except OSError as error:
        found, why = set(), f"does not resolve ({error.strerror})"
    else:
        why = f"resolves to loopback alone ({', '.join(sorted(found))})"
    reached = sorted(address for address in found if not ipaddress.ip_address(address).is_loopback)
    if reached:
        return Finding("node's name", f"{name} is {', '.join(reached)}")
    if not several:
        return Finding("node's name", f"{name} {why}; no matter on one node")
    return Finding(
        "node's name",
        name,
        f"{name} {why}: the other nodes would wait for this one until the time-out",
        "put its address into DNS or /etc/hosts on every node, or name the interface: "
        "GLOO_SOCKET_IFNAME=eth0 (and NCCL_SOCKET_IFNAME)",
    )


def room_for_checkpoints(root: Path) -> Finding:
    """Whether the disk takes one more checkpoint, as large as the largest there is."""
    existing = next(place for place in (root, *root.absolute().parents) if place.exists())
    if not os.access(existing, os.W_OK):
        return Finding(
            "room for runs", str(existing), f"{existing} cannot be written", "choose another run.root"
        )
    free = shutil.disk_usage(existing).free
    sizes = [
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in root.glob("*/checkpoints/step-*")
    ]
    state = f"{existing}: {size_text(free)} free"
    if not sizes:
        return Finding("room for runs", f"{state}; no checkpoint there yet to compare with")
    # The new one is whole before the oldest is removed.
    state += f", the largest checkpoint has {size_text(max(sizes))}"
    if free > max(sizes):
        return Finding("room for runs", state)
    return Finding(
        "room for runs",
        state,
        f"{state}: the next one finds no room",
        "remove old runs, lower train.keep_checkpoints, or choose another run.root",
    )


def slurm() -> Finding:
    from sparsekd.launch.env import torch_variables

    if "SLURM_JOB_ID" not in os.environ:
        return Finding("Slurm", "not inside a job")
    try:
        variables = torch_variables(os.environ)
    except (KeyError, ValueError) as error:
        return Finding("Slurm", "inside a job", f"variables cannot be read: {error}", "start ranks with srun")
    return Finding("Slurm", f"rank {variables.get('RANK', '0')} of {variables.get('WORLD_SIZE', '1')}")


def _nodes() -> int:
    """Nodes of the job that this shell or rank belongs to, by Slurm's or torchrun's variables."""
    found = [os.environ.get(name, "") for name in ("SLURM_JOB_NUM_NODES", "NNODES")]
    return max([int(text) for text in found if text.isdecimal()], default=1)


def _file_system(place: Path) -> str:
    """The kind of file system that a place is on, as the kernel names it."""
    lines = [line.split() for line in _read(Path("/proc/mounts")).splitlines()]
    absolute = place.resolve()
    above = [(len(Path(words[1]).parts), words[2]) for words in lines if absolute.is_relative_to(words[1])]
    return max(above)[1] if above else "an unknown file system"


def _modified(path: Path) -> float:
    """Seconds since the epoch; now for a file that is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not there, or not for this user: then it holds nothing of use here
        return ""
