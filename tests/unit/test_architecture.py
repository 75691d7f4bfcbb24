"""Imports run downward only, and what must answer at once does not import torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ("config", "run", "models", "data", "state")
ROOMS = ("corpus", "teacher", "student", "quality", "report", "export", "planning")
PLAIN = {"sparsekd.trainer.quality.result", "sparsekd.trainer.quality.table"}
"""Data types, and how they print: what a room may know of another."""
GROUND_FLOOR = {
    "kernels": {"torch", "triton", "numpy"},
    "logit_store": {"numpy", "pyarrow", "zstandard", "tokenizers", "matplotlib", "obstore"},
}


# Not installed with the package, or slow to import: a module needs them in the function that does.
ON_USE = {"tokenizers", "matplotlib", "obstore"}


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", GROUND_FLOOR)
def test_ground_floor_imports_only_its_own_libraries(package: str) -> None:
    files = sorted((ROOT / package).glob("**/*.py"))
    assert files
    for path in files:
        for module in imported_modules(path):
            top = module.split(".")[0]
            if top == "sparsekd":
                assert module.startswith(f"sparsekd.{package}"), f"{path} imports {module}"
            else:
                assert top in sys.stdlib_module_names | GROUND_FLOOR[package], f"{path} imports {module}"


def test_the_store_imports_at_its_top_only_what_it_always_needs() -> None:
    for path in sorted((ROOT / "logit_store").glob("**/*.py")):
        tree = ast.parse(path.read_text())
        top = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
        top |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not {module.split(".")[0] for module in top} & ON_USE, path


def rooms_of(path: Path) -> set[str]:
    """The trainer's rooms that a module imports, also inside of functions; plain data types do not count."""
    modules = {module for module in imported_modules(path) if module.startswith("sparsekd.trainer.")}
    return {module.split(".")[2] for module in modules - PLAIN}


def modules_of(room: str) -> list[Path]:
    found = sorted((ROOT / "trainer" / room).glob("**/*.py"))
    assert found
    return found


def test_every_room_has_its_place_in_the_house() -> None:
    there = {path.name for path in (ROOT / "trainer").iterdir() if (path / "__init__.py").is_file()}
    assert there == {"door", "importers", *SHARED, *ROOMS}
    assert [path.name for path in (ROOT / "trainer").glob("*.py")] == ["__init__.py"]


def test_shared_rooms_know_shared_rooms_alone() -> None:
    for path in [path for room in SHARED for path in modules_of(room)]:
        assert rooms_of(path) <= {*SHARED}, path


def test_rooms_do_not_import_one_another() -> None:
    for room in ROOMS:
        for path in modules_of(room):
            assert rooms_of(path) <= {room, *SHARED}, path


def test_importers_know_no_room() -> None:
    for path in modules_of("importers"):
        assert rooms_of(path) <= {"importers", "config", "run"}, path


@pytest.mark.parametrize(
    "statement",
    [
        "from sparsekd.trainer.door.cli import main; main(['train', '--help'])",
        "from sparsekd.trainer.door.cli import main; main(['train', 'experiment=demo', '--cfg'])",
        "from sparsekd.trainer.door.cli import main; main(['train', 'objective.kd_wait=1'])",
        "import sparsekd.trainer.planning.plan",
        "import sparsekd.logit_store.tools.inspect, sparsekd.logit_store.tools.verify",
        "import sparsekd.logit_store.protocol.writer",
        "from sparsekd.trainer.door.cli import main; main(['store', '--help'])",
        "from sparsekd.trainer.door.cli import main; main(['store', 'import', '--help'])",
        "from sparsekd.trainer.door.cli import main; main(['store', 'stats', '/nowhere'])",
        "import sparsekd.logit_store.tools.compare, sparsekd.logit_store.tools.stats_plot",
        "import sparsekd.logit_store.tools.export",
        "import sparsekd.logit_store.tools.combine, sparsekd.trainer.importers.formats",
    ],
)
def test_light_commands_do_not_import_torch(statement: str) -> None:
    code = f"{statement}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_files_stay_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("kernels", "logit_store", "trainer", "launch", "conf", "benchmarks")
        for path in (ROOT / folder).glob("**/*.py")
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert not long, f"files of more than 500 lines tell more than one story: {long}"
