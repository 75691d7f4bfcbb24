"""Versions of the packages that decide numbers: which they are, and which are installed."""

from collections.abc import Sequence
from importlib import metadata

MODEL_PACKAGES = ("sparsekd", "torch", "transformers")
"""Those that can change a bit of what a model says."""

TRAINING_PACKAGES = ("sparsekd", "torch", "deepspeed", "transformers", "triton", "numpy", "pyarrow")
"""Those that can change one of what a training makes of its rows."""

INSTALLATION = (
    *TRAINING_PACKAGES[1:],
    "accelerate",
    "zstandard",
    "hydra-core",
    "wandb",
    "datasets",
    "matplotlib",
)
"""What `doctor` shows: those, and all that can be missing or too old."""


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """The installed versions by package; those that are not installed are left out."""
    found = {package: version_of(package) for package in packages}
    return {package: version for package, version in found.items() if version is not None}


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
