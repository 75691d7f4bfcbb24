"""Imports run downward only, and what must answer at once does not import torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ("config", "run", "models", "data", "state")
ROOMS = ("corpus", "teacher", "student", "quality", "report", "export", "planning", "generation")
READS = {"generation": ("corpus",)}
"""Rooms that know another: prompts are read as a corpus's records are."""
PLAIN = {
    "sparsekd.trainer.quality.result",
    "sparsekd.trainer.quality.table",
    "sparsekd.trainer.planning.measured",
}
"""Data types, and how they print: what a room may know of another."""
GROUND_FLOOR = {
    "kernels": {"torch", "triton", "numpy"},
    "logit_store": {"numpy", "pyarrow", "zstandard", "tokenizers", "matplotlib", "obstore", "fsspec"},
}


IMPORTERS = ("import_module", "__import__")

# Not installed with the package, or slow to import: a module needs them in the function that does.
ON_USE = {"tokenizers", "matplotlib", "obstore", "fsspec"}


def imported_modules(path: Path) -> set[str]:
    """Whatever a module imports, also inside of functions, for types alone, and by name at run time."""
    return imports_of(path.read_text(), path)


def imports_of(text: str, path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            below = {f"{module}.{name.name}" for name in node.names if is_module(f"{module}.{name.name}")}
            found |= below or {module}
        elif isinstance(node, ast.Call) and called(node) in IMPORTERS:
            name = node.args[0] if node.args else None
            assert isinstance(name, ast.Constant), f"{path} imports by a name that nobody can see"
            found.add(str(name.value))
    return found


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.removeprefix("sparsekd.").split("."))
    return name.startswith("sparsekd.") and (place.is_dir() or place.with_suffix(".py").is_file())


def test_no_way_to_import_is_overlooked() -> None:
    door = "sparsekd.trainer.door.cli"
    for text in (
        f"import {door}",
        "from sparsekd.trainer.door import cli",
        "def inside():\n    from sparsekd.trainer.door.cli import main",
        "if TYPE_CHECKING:\n    from sparsekd.trainer.door.cli import main",
        f"importlib.import_module('{door}')",
        f"import_module('{door}')",
        f"__import__('{door}')",
    ):
        assert imports_of(text, ROOT) == {door}, text
    assert imports_of("from sparsekd.trainer import door", ROOT) == {"sparsekd.trainer.door"}
    with pytest.raises(AssertionError, match="nobody can see"):
        imports_of("import_module(name)", ROOT)


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
    return {module.split(".")[2] for module in trainer_modules_of(path) - PLAIN}


def trainer_modules_of(path: Path) -> set[str]:
    return {module for module in imported_modules(path) if module.startswith("sparsekd.trainer.")}


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
        assert {module.split(".")[2] for module in trainer_modules_of(path)} <= {*SHARED}, path


def test_plain_data_types_know_no_room() -> None:
    for module in PLAIN:
        path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert rooms_of(path) <= {*SHARED}, path
        assert not {name.split(".")[0] for name in imported_modules(path)} & {"torch", "transformers"}, path


def test_the_trainer_s_imports_run_one_way() -> None:
    places = {
        ".".join(("sparsekd", *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in (ROOT / "trainer").glob("**/*.py")
    }
    left = {name: trainer_modules_of(path) & places.keys() for name, path in places.items()}
    while leaves := {name for name, below in left.items() if not below & left.keys()}:
        left = {name: below for name, below in left.items() if name not in leaves}
    assert not left, f"these import one another: {sorted(left)}"


def test_launch_needs_the_standard_library_alone() -> None:
    for path in sorted((ROOT / "launch").glob("**/*.py")):
        for module in imported_modules(path):
            assert module.split(".")[0] in sys.stdlib_module_names or module.startswith("sparsekd.launch"), (
                path
            )


def test_rooms_do_not_import_one_another() -> None:
    for room in ROOMS:
        known = {room, *SHARED, *READS.get(room, ())}
        for path in modules_of(room):
            assert rooms_of(path) <= known, path


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
        for folder in ("kernels", "logit_store", "trainer", "launch", "conf", "sparsekd", "benchmarks")
        for path in (ROOT / folder).glob("**/*.py")
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert not long, f"files of more than 500 lines tell more than one story: {long}"
