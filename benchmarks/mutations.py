"""Single-line mutations of `kernels/`, each run against the numerics tests; what survives is a hole in them.

    python benchmarks/mutations.py --count 150 --seed 0 --out mutations.jsonl

Every mutation is made in a copy, never in the checkout. One that the tests let through is run by all of
them before it counts as a survivor, so a whole run takes hours: it goes on where the file of results ends.
Survivors are to be read: some are equivalent (a tuning constant, a mask that only saves work).
"""

import argparse
import ast
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NUMERICS = ROOT / "tests" / "numerics"
TIMEOUT_SECONDS = 900
ADDRESS_SPACE_BYTES = 24 * 1024**3

# Files whose tests know them best come first; the others follow, and end with the first that fails.
OF_TEACHER = ("test_teacher.py", "test_teacher_triton.py", "test_teacher_memory.py")
OF_LOSS = (
    "test_pieces.py",
    "test_upstream.py",
    "test_fused.py",
    "test_two_weights.py",
    "test_divergences.py",
    "test_invariants.py",
    "test_edges.py",
    "test_loss.py",
    "test_memory.py",
    "test_needed_planes.py",
    "test_objective.py",
    "test_values.py",
    "test_temperature.py",
    "test_vocabulary_parallel.py",
)
FIRST = {
    "memory.py": "test_memory.py",
    "objective.py": "test_objective.py",
    "shard.py": "test_vocabulary_parallel.py",
    "temperature.py": "test_temperature.py",
    "values.py": "test_values.py",
}
# Checks of arguments and how fast it is: neither is a number of the loss.
LEFT_OUT = ("_check", "_expect", "default_impl", "warps_of", "num_warps", "positions_rule")

OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.And: (" and ", " or "),
    ast.Or: (" or ", " and "),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
CALLS = {"maximum": "minimum", "minimum": "maximum", "amax": "amin", "max": "min", "min": "max"}


class Mutation(NamedTuple):
    """One line of a file, and what it becomes."""

    file: str
    line: int  # from 1
    before: str
    after: str


def mutations_of(path: Path) -> Iterator[Mutation]:
    """Yields every mutation of a file's functions."""
    source = path.read_text()
    lines = source.splitlines()

    def replaced(line: int, start: int, end: int, old: str, new: str) -> Iterator[Mutation]:
        """The one place of `old` between two columns of a line, counted from 1 and in characters."""
        text = lines[line - 1]
        place = text.find(old, start, end)
        if place >= 0:
            after = text[:place] + new + text[place + len(old) :]
            yield Mutation(path.name, line, text, after)

    def visit(node: ast.AST) -> Iterator[Mutation]:
        if isinstance(node, (ast.Raise, ast.Assert, ast.AnnAssign, ast.arg, ast.JoinedStr)):
            return
        name = getattr(node, "name", getattr(getattr(node, "func", None), "id", getattr(node, "arg", None)))
        if isinstance(name, str) and name.startswith(LEFT_OUT):
            return
        pairs: list[tuple[ast.expr, ast.AST, ast.expr]] = []
        if isinstance(node, ast.BinOp):
            pairs = [(node.left, node.op, node.right)]
        elif isinstance(node, ast.Compare):
            pairs = [(node.left, node.ops[0], node.comparators[0])]
        elif isinstance(node, ast.BoolOp):
            pairs = [(node.values[0], node.op, node.values[1])]
        for left, operator, right in pairs:
            known = OPERATORS.get(type(operator))
            if known and left.end_lineno == right.lineno and left.end_col_offset is not None:
                yield from replaced(right.lineno, left.end_col_offset, right.col_offset, *known)
        if isinstance(node, ast.Constant) and node.lineno == node.end_lineno and node.end_col_offset:
            value = node.value
            if isinstance(value, bool):
                new = str(not value)
            elif isinstance(value, (int, float)):
                new = "1" if value == 0 else repr(value * 2)
            else:
                return
            old = lines[node.lineno - 1][node.col_offset : node.end_col_offset]
            yield from replaced(node.lineno, node.col_offset, node.end_col_offset, old, new)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
            signs = {ast.USub: "-", ast.Not: "not ", ast.Invert: "~"}
            yield from replaced(
                node.lineno, node.col_offset, node.operand.col_offset, signs[type(node.op)], ""
            )
        if isinstance(node, ast.Attribute) and node.attr in CALLS and node.end_col_offset:
            begin = node.end_col_offset - len(node.attr)
            assert node.end_lineno is not None
            yield from replaced(node.end_lineno, begin, node.end_col_offset, node.attr, CALLS[node.attr])
        for field, value in ast.iter_fields(node):
            if field in ("returns", "annotation", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith(LEFT_OUT):
            for statement in node.body:
                yield from visit(statement)


def all_mutations() -> list[Mutation]:
    """Every mutation of `kernels/`, each once, in the files' order."""
    return list(
        dict.fromkeys(each for path in sorted((ROOT / "kernels").glob("*.py")) for each in mutations_of(path))
    )


def tests_of(file: str) -> list[str]:
    """The tests to run, the likeliest to fail first."""
    tests = OF_TEACHER if "teacher" in file else OF_LOSS
    first = FIRST.get(file)
    ordered = [first, *tests] if first else [*tests]
    return [str(NUMERICS / name) for name in dict.fromkeys(ordered)]


def _with_little_memory() -> None:
    """Keeps a mutation that asks for all of the machine's memory from getting it."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))


def survives(mutation: Mutation, place: Path) -> bool:
    """Whether all tests pass with the mutation, made in a copy of the package in an empty folder."""
    package = place / "sparsekd"
    shutil.copytree(ROOT / "sparsekd", package)
    for folder in ("conf", "launch", "logit_store", "trainer"):
        (package / folder).symlink_to(ROOT / folder)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    target = package / "kernels" / mutation.file
    lines = target.read_text().splitlines(keepends=True)
    lines[mutation.line - 1] = mutation.after + "\n"
    target.write_text("".join(lines))
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests_of(mutation.file)]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
            preexec_fn=_with_little_memory,
        )
    except subprocess.TimeoutExpired:
        return False  # a loop without end is noticed
    # Below 0 a signal ended it: a wrong address, or no memory.
    if done.returncode > 2:
        raise RuntimeError(
            f"pytest ended with {done.returncode} at {mutation}: {done.stdout[-2000:].decode()}"
        )
    return done.returncode == 0


def main() -> None:
    """Runs a choice of mutations and prints the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=150, help="how many mutations")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--out", type=Path, required=True, help="results, one a line; those there are kept")
    parser.add_argument("--only", default="", help="files whose names hold this")
    arguments = parser.parse_args()
    found = [each for each in all_mutations() if arguments.only in each.file]
    chosen = random.Random(arguments.seed).sample(found, min(arguments.count, len(found)))
    known: dict[Mutation, bool] = {}
    if arguments.out.exists():
        for line in arguments.out.read_text().splitlines():
            *mutation, survived = json.loads(line)
            known[Mutation(*mutation)] = survived
    for mutation in chosen:
        if mutation in known:
            continue
        with tempfile.TemporaryDirectory() as place:
            known[mutation] = survives(mutation, Path(place))
        with arguments.out.open("a") as file:
            file.write(json.dumps([*mutation, known[mutation]]) + "\n")
    survivors = [mutation for mutation in chosen if known[mutation]]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations are noticed (of {len(found)} possible)")
    for mutation in survivors:
        print(f"{mutation.file}:{mutation.line}\n  - {mutation.before.strip()}\n  + {mutation.after.strip()}")


if __name__ == "__main__":
    main()
