"""The files of a corpus: which are taken from folders and patterns, in an order of names alone."""

import fnmatch
import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.run.streams import without_compression

# What tools leave beside data under names that are not hidden: Spark, Delta Lake, editors, desktops. Not all
# names with a leading underscore, as Spark and pyarrow have it: `__init__.py` is a document.
MARKER_FILES = (
    "_SUCCESS",
    "_metadata",
    "_common_metadata",
    "_committed_*",
    "_started_*",
    "Thumbs.db",
    "desktop.ini",
    "*~",
    "#*#",
)
MARKER_FOLDERS = (
    "_temporary",
    "_delta_log",
    "_spark_metadata",
    "__MACOSX",
    "__pycache__",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
)

LeftOut = Callable[[str], None]
"""Is told of each hidden or marker file or folder that is left out, by its relative name."""


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus: where it is now, and its name relative to what was given."""

    path: Path
    name: str


def source_name(given: str) -> str:
    """The name of one of `corpus.paths` in the manifest: its last part (stores travel), a hub name whole."""
    is_hub_name = not Path(given).is_absolute() and given.count("/") == 1 and not Path(given).exists()
    return given if is_hub_name and not glob.has_magic(given) else Path(given).name


def list_files(
    given: str,
    include: str,
    exclude: list[str],
    *,
    compressed: bool = False,
    left_out: LeftOut = lambda name: None,
    key: str = "corpus.paths",
) -> list[SourceFile]:
    """The files of one path, sorted by relative name.

    Hidden files, and those with which tools mark folders, are taken only where they are given by name.

    Args:
        given: A file, a folder (searched recursively; links to folders are not followed) or a glob pattern,
            in which `**` stands for any depth. A path that exists is never read as a pattern.
        include: Pattern of file names taken from folders.
        exclude: Patterns of relative paths inside folders that are left out. The path is matched with and
            without a leading slash, so that `*/test/*` also matches a folder `test` at the top.
        compressed: Whether `include` also takes names behind which `.gz` and its like stand. Of files that
            differ in that alone, only the plain one is taken, or else the first.
        left_out: Is told what is left out, unless a pattern of the user's own says so.
        key: Of the configuration, that gives the path, for messages.

    Raises:
        DataError: Nothing is there, or nothing is left.
    """
    path = Path(given)
    walk = _Walk(include, exclude, compressed, left_out)
    if path.is_file():
        return [SourceFile(path, path.name)]
    if path.is_dir():
        found = list(walk.files_below(path))
        if not found:
            raise DataError(
                f"{key}: the folder {given} holds no file with corpus.include={include!r} that "
                f"corpus.exclude={exclude} leaves (hidden files are taken only by name); check the patterns."
            )
        return _ordered(found, left_out if compressed else None)
    matches = sorted(glob.glob(given, recursive=True))
    if not matches:
        raise DataError(
            f"{key}: {given} is neither a file nor a folder, and as a pattern it matches nothing; "
            "check the path (relative paths start where the command was started)."
        )
    is_named = not glob.has_magic(Path(given).name)
    files = []
    for match in matches:
        below = _below_pattern(match, given)
        # A wildcard matches no leading dot: a hidden name in a match was asked for.
        *folders, name = Path(below).parts or (".",)
        if any(_matches(folder, MARKER_FOLDERS) for folder in folders) or (
            not is_named and _matches(name, MARKER_FILES if Path(match).is_file() else MARKER_FOLDERS)
        ):
            left_out(below)
        elif Path(match).is_file():
            files.append(SourceFile(Path(match), below))
        elif not given.rstrip("/").endswith("**"):  # `**` names the folders whose files it names too
            files += [SourceFile(file.path, f"{below}/{file.name}") for file in walk.files_below(Path(match))]
    if not files:
        raise DataError(
            f"{key}: as a pattern {given} matches no file with corpus.include={include!r} that "
            f"corpus.exclude={exclude} leaves (hidden files are taken only by name); check the patterns."
        )
    return _ordered(files, left_out if compressed else None)


@dataclass(frozen=True)
class _Walk:
    """How folders are searched."""

    include: str
    exclude: list[str]
    compressed: bool
    left_out: LeftOut

    def files_below(self, folder: Path) -> Iterator[SourceFile]:
        # A folder that matches `x` has nothing inside that `x/*` leaves: it need not be entered.
        whole_folders = [pattern.removesuffix("/*") for pattern in self.exclude if pattern.endswith("/*")]
        for parent, folders, names in os.walk(folder):
            below = os.path.relpath(parent, folder).replace(os.sep, "/")
            prefix = "" if below == "." else f"{below}/"
            kept = [name for name in folders if not _is_excluded(prefix + name, whole_folders)]
            folders[:] = [name for name in kept if not _is_hidden(name, MARKER_FOLDERS)]
            for name in set(kept) - set(folders):
                self.left_out(f"{prefix}{name}/")
            for name in names:
                relative = prefix + name
                path = Path(parent, name)
                if self._is_included(name) and not _is_excluded(relative, self.exclude) and path.is_file():
                    if _is_hidden(name, MARKER_FILES):
                        self.left_out(relative)
                    else:
                        yield SourceFile(path, relative)

    def _is_included(self, name: str) -> bool:
        return fnmatch.fnmatchcase(name, self.include) or (
            self.compressed and fnmatch.fnmatchcase(without_compression(name), self.include)
        )


def _ordered(files: list[SourceFile], left_out: LeftOut | None) -> list[SourceFile]:
    """Files by their names; with `left_out`, which is told, without compressed copies of others."""
    if left_out is None:
        return sorted(files, key=lambda file: file.name)
    kept: dict[str, SourceFile] = {}
    for file in sorted(files, key=lambda file: (file.name != without_compression(file.name), file.name)):
        first = kept.setdefault(without_compression(file.name), file)
        if first is not file:
            left_out(file.name)
    return sorted(kept.values(), key=lambda file: file.name)


def _is_excluded(relative: str, patterns: list[str]) -> bool:
    return _matches(relative, patterns) or _matches(f"/{relative}", patterns)


def _is_hidden(name: str, markers: tuple[str, ...]) -> bool:
    return name.startswith(".") or _matches(name, markers)


def _matches(name: str, patterns: list[str] | tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _below_pattern(match: str, pattern: str) -> str:
    """`match` relative to the part of `pattern` before its first wildcard."""
    fixed = []
    for part in Path(pattern).parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(match).relative_to(Path(*fixed)).as_posix()
