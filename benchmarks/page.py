"""What the pages of all benchmarks share: how they were made, and Markdown tables."""

import argparse
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("conf", "kernels", "launch", "logit_store", "trainer")
SOURCES = (".py", ".yaml")
DIGITS = 12
"""Of commit and digest, on pages and in names of folders."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Code:
    """The code of a run; taken before anything is measured, since files may change meanwhile.

    Attributes:
        commit: in words, with how many files differ from it.
        digest: the first digits of a sha256 over every source file of the package and of the benchmarks. Two
            runs of one digest ran the same code, whatever git says.
    """

    commit: str
    digest: str


def running_code() -> Code:
    """The code that runs: the package as Python finds it, and these files."""
    folders = [_package_folder(name) for name in PACKAGES]
    digest = digest_of([*folders, ROOT / "benchmarks"])
    if any(folder.parent != ROOT for folder in folders):
        return Code("of no known commit (sparsekd is imported from outside this checkout)", digest)
    return Code(commit_of(ROOT), digest)


def _package_folder(name: str) -> Path:
    spec = find_spec(f"sparsekd.{name}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).resolve().parent


def digest_of(folders: Iterable[Path]) -> str:
    """The digest of all source files below some folders, by their names and content."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCES):
            content = path.read_bytes()
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:DIGITS]


def commit_of(folder: Path) -> str:
    """The commit of a checkout in words, and how many files differ from it; pages do not count."""
    commit, count = commit_and_changes(folder)
    if commit == UNKNOWN:
        return "of no known commit (git knows none here)"
    if not count:
        return f"of commit `{commit}`, unchanged"
    return f"of commit `{commit}` **with changes in {count} file{'s' * (count > 1)} that are not committed**"


def commit_and_changes(folder: Path) -> tuple[str, int]:
    """The commit of a checkout, `UNKNOWN` without one, and how many files differ from it."""
    try:
        commit = _git(folder, "rev-parse", f"--short={DIGITS}", "HEAD").strip()
        changed = _git(folder, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN, 0
    return commit, len(changed.splitlines())


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def command_line(
    about: str | None, *, smoke: str = "everything at its smallest: does it run?"
) -> argparse.ArgumentParser:
    """The command line of a benchmark, with the flags that all have.

    Args:
        about: the script's own description.
        smoke: what --smoke does.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help=smoke)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    return parser


def page_and_picture(out: Path, name: str) -> tuple[Path, Path]:
    """Where a page goes and the picture beside it, in a folder that is made."""
    out.mkdir(parents=True, exist_ok=True)
    return out / f"{name}.md", out / f"{name}.png"


def made_by(
    script: str, words: Sequence[str], code: Code, *, cache: str, machine: str, packages: Sequence[str]
) -> list[str]:
    """The first lines of every page.

    Args:
        script: its file name.
        words: of its command line; of paths only the last name is shown.
        code: that ran.
        cache: what was not made by this run, in a sentence; empty where everything was.
        machine: hardware and how it was used.
        packages: whose versions are named.
    """
    shown = [Path(word).name if "/" in word else word for word in words]
    return [
        f"Written by `{' '.join([f'benchmarks/{script}', *shown])}` on {date.today().isoformat()}, code "
        f"{code.commit}, digest `{code.digest}`: {machine}; {versions(packages)}.",
        "",
        f"**A cache was used.** {cache}" if cache else "No cache was used: this run made everything itself.",
    ]


def versions(packages: Sequence[str]) -> str:
    """Versions of packages and of Python."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def processor() -> str:
    """The processor in words."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: Iterable[int]) -> list[str]:
    """A Markdown table, and an empty line behind it.

    Args:
        head: names of its columns.
        rows: its cells.
        words: columns that are words and stand on the left; the others are numbers.
    """
    left = set(words)
    rule = [" --- |" if column in left else " ---: |" for column in range(len(head))]
    lines = ["| " + " | ".join(head) + " |", "|" + "".join(rule)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]
