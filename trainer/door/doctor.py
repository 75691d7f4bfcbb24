"""`sparsekd doctor`: what this environment is, and each problem with its remedy."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch", "triton", "deepspeed", "transformers", "accelerate", "pyarrow", "zstandard", "numpy",
    "hydra-core", "wandb", "datasets", "matplotlib",
)  # fmt: skip

# ZeRO and the data loader exchange through /dev/shm; containers often leave it at 64 MiB.
SHARED_MEMORY_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class Finding:
    """One check: `problem` is None where all is well, else one sentence; `remedy` says what to do."""

    name: str
    state: str
    problem: str | None = None
    remedy: str | None = None


def run() -> int:
    """Prints versions and findings; returns 0 when nothing is wrong, else 2."""
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        print(f"  {package:<13} {version(package) or 'not installed'}")
    checks: tuple[Callable[[], Finding], ...] = (
        python_version, kernels_collision, accelerator, deepspeed_toolchain, shared_memory, tracking, slurm,
    )  # fmt: skip
    findings = [check() for check in checks]
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


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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


def slurm() -> Finding:
    from sparsekd.launch.env import torch_variables

    if "SLURM_JOB_ID" not in os.environ:
        return Finding("Slurm", "not inside a job")
    try:
        variables = torch_variables(os.environ)
    except (KeyError, ValueError) as error:
        return Finding("Slurm", "inside a job", f"variables cannot be read: {error}", "start ranks with srun")
    return Finding("Slurm", f"rank {variables.get('RANK', '0')} of {variables.get('WORLD_SIZE', '1')}")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
