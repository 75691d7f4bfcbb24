"""500 stores of a hostile stranger, each read by a child of its own; `make fuzz` reads 20,000.

In a process of its own: children are forked from one that has loaded no more than a reader needs.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz_store.py")
CASES, SEED = 500, 20_26

MISBEHAVING = """
import os, sys, time
sys.path.insert(0, {folder!r})
import fuzz_store
from pathlib import Path
fuzz_store.SECONDS = fuzz_store.SECONDS_ASLEEP = {seconds}
fuzz_store.base_stores = lambda folder: {{}}
fuzz_store.make_case = lambda stores, seed, number, path: path.mkdir() or "a case"

def spin():
    while True:
        pass

def misbehave(path, number):
    {what}

fuzz_store.read_case = misbehave
print(fuzz_store.run(range(1), 0, 1, None, 0))
"""


def test_hostile_stores_give_rows_or_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, FUZZ, "--cases", str(CASES), "--seed", str(SEED), "--keep", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=550)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.append(str(FUZZ.parent))
    from mutators import MUTATORS

    for mutator in MUTATORS:
        assert f" {mutator}: sentence" in done.stdout, "it was tried"
    assert f"{CASES} cases" in done.stdout and "'rows'" in done.stdout


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("os.kill(os.getpid(), 11)", "CRASH"),
        ("spin()", "HANG"),
        ("time.sleep(100)", "HANG"),
        ("bytearray(b'x' * 300_000_000) * 2; return 'rows'", "MEMORY"),
        ("raise KeyError('x')", "TRACEBACK"),
        ("import numpy; numpy.float32(1e38) * numpy.float32(1e38)", "TRACEBACK"),
        ("assert False, 'two ways'", "CONTRADICTION"),
        ("return 'rows'", "rows"),
        ("return 'one sentence'", "sentence"),
    ],
)
def test_what_may_not_be_is_noticed(what: str, kind: str) -> None:
    program = MISBEHAVING.format(folder=str(FUZZ.parent), what=what, seconds=1 if kind == "HANG" else 60)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert f"Counter({{'{kind}': 1}})" in done.stdout, done.stdout + done.stderr
