"""Which implementation runs: what `impl=auto` means for the loss and for the teacher's statistics."""

import os

import torch

from sparsekd.kernels.loss import default_impl
from sparsekd.trainer.run.errors import ConfigError


def implementation_that_runs(impl: str, device: torch.device, *, key: str) -> str:
    """The implementation for a setting and a device; the caller announces it.

    Args:
        impl: The setting; "auto" is triton on a GPU where the package is installed, and torch elsewhere.
        device: Where it is to run.
        key: The setting's name, for the message.

    Raises:
        ConfigError: triton was asked for and does not run there.
    """
    best = default_impl(device)
    if impl == "auto":
        return best
    # Triton's interpreter runs on any device, for tests.
    if impl == "triton" and best != "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        found = "the package is not installed" if device.type == "cuda" else f"the device is {device.type}"
        raise ConfigError(f"{key}=triton needs a GPU and the package triton, but {found}; use {key}=torch.")
    return impl
