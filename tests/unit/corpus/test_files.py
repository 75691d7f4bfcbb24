"""Files of folders and patterns: hidden ones, marks of tools and compressed copies are not documents."""

from pathlib import Path

import pytest

from sparsekd.trainer.corpus.files import list_files
from sparsekd.trainer.run.errors import DataError

TAKEN = ["a.txt", "b/c.txt", "b/__init__.py", "_notes.txt", "b/_data/d.txt"]
LEFT = [
    "._a.txt",
    ".DS_Store",
    "b/.hidden.txt",
    ".ipynb_checkpoints/a-checkpoint.txt",
    "b/.git/config",
    "_SUCCESS",
    "b/_metadata",
    "b/_committed_12",
    "_temporary/0/part.txt",
    "b/_delta_log/0.json",
    "__MACOSX/x.txt",
    "b/__pycache__/x.pyc",
    "Thumbs.db",
    "b/desktop.ini",
    "a.txt~",
    "#a.txt#",
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in TAKEN + LEFT:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def names_of(given: Path | str, include: str = "*", **keys: object) -> list[str]:
    return [file.name for file in list_files(str(given), include, [], **keys)]


def test_folders_give_no_hidden_and_no_marker_files(tree: Path) -> None:
    told: list[str] = []
    assert names_of(tree, left_out=told.append) == sorted(TAKEN)
    folders = [name for name in told if name.endswith("/")]
    assert all(any(name == one or name.startswith(one) for one in told) for name in LEFT)
    assert sorted(folders) == [
        ".ipynb_checkpoints/",
        "__MACOSX/",
        "_temporary/",
        "b/.git/",
        "b/__pycache__/",
        "b/_delta_log/",
    ]


@pytest.mark.parametrize("pattern", ["*", "**", "**/*"])
def test_patterns_give_no_hidden_and_no_marker_files(tree: Path, pattern: str) -> None:
    assert sorted(set(names_of(tree / pattern))) == sorted(TAKEN)


def test_a_name_of_the_users_own_is_taken(tree: Path) -> None:
    for name in LEFT:
        assert names_of(tree / name) == [Path(name).name]
    assert names_of(tree / ".ipynb_checkpoints") == ["a-checkpoint.txt"]
    assert names_of(tree / ".ipynb_checkpoints" / "*.txt") == ["a-checkpoint.txt"]
    assert names_of(tree / "b" / ".h*") == [".hidden.txt"]
    assert names_of(tree / "*" / "_metadata") == ["b/_metadata"]


def test_a_folder_of_nothing_else_says_so(tmp_path: Path) -> None:
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / ".x.txt").write_text("x")
    with pytest.raises(DataError, match=r"hidden files are taken only by name"):
        names_of(tmp_path)
    with pytest.raises(DataError, match=r"as a pattern .* matches no file .*hidden files are taken only by"):
        names_of(tmp_path / "*")


def test_include_sees_the_name_before_its_compression(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "b.jsonl.zst", "c.jsonl.xz", "d.jsonl.bz2", "e.jsonl.lz", "f.gz"):
        (tmp_path / name).write_text(name)
    told: list[str] = []
    taken = ["a.jsonl", "b.jsonl.zst", "c.jsonl.xz", "d.jsonl.bz2"]
    assert names_of(tmp_path, "*.jsonl", compressed=True, left_out=told.append) == taken
    assert told == ["a.jsonl.gz"]  # a copy of what is read anyway
    assert names_of(tmp_path, "*.gz", compressed=True) == ["a.jsonl.gz", "f.gz"]
    told.clear()
    given = f"{tmp_path}/[ab]*"
    found = list_files(given, "*", [], compressed=True, left_out=told.append)
    assert [file.name for file in found] == ["a.jsonl", "b.jsonl.zst"] and told == ["a.jsonl.gz"]
    found = list_files(str(tmp_path), "*.jsonl", ["a.jsonl"], compressed=True)
    assert found[0].name == "a.jsonl.gz", "the copy of a file that is left out is the only one"
    (tmp_path / "b.jsonl.gz").touch()
    assert names_of(tmp_path, "b*", compressed=True) == ["b.jsonl.gz"], "one of two"
    assert names_of(tmp_path, "*.jsonl") == ["a.jsonl"]
