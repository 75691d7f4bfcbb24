"""What the tests of `capture` share; see capture_world.py."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# pytest's importlib mode adds no folder by itself.
sys.path.insert(0, str(Path(__file__).parent))

from capture_world import make_teacher, make_tokens


@pytest.fixture
def own_environment() -> Iterator[None]:
    """A run in this process sets torch's variables; they must not reach the next one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    return make_teacher(tmp_path_factory.mktemp("llama") / "teacher", "llama", tokenizer=tokens / "tokenizer")
