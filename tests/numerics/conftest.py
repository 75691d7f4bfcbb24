"""Triton without a GPU, and the float64 oracle, for the tests of this folder."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

# Read by Triton when it is imported. With a GPU the same tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The module oracle.py of this folder, which no import path leads to."""
    name = "sparsekd_numerics_oracle"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("oracle.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
