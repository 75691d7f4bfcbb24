"""What the benchmarks' pages say of the code that made them."""

import os
import shutil
import subprocess
from pathlib import Path

import page
import pytest

from sparsekd import kernels, logit_store


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of one commit, with a page among its results."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "page.md").write_text("old")
    (tmp_path / "code.py").write_text("1")
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_is_named_and_whether_files_differ_from_it(checkout: Path) -> None:
    head = (checkout / ".git" / "HEAD").read_text().split()[1]
    commit = f"of commit `{(checkout / '.git' / head).read_text()[:12]}`"
    (checkout / "benchmarks" / "results" / "page.md").write_text("new")  # a page is no code
    assert page.commit_of(checkout) == f"{commit}, unchanged"
    (checkout / "code.py").write_text("2")
    assert page.commit_of(checkout) == f"{commit} **with changes in 1 file that are not committed**"
    (checkout / "more.py").write_text("")
    assert page.commit_of(checkout) == f"{commit} **with changes in 2 files that are not committed**"


def test_where_git_knows_nothing_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert page.commit_of(tmp_path) == "of no known commit (git knows none here)"
    monkeypatch.setenv("PATH", os.devnull)
    assert page.commit_of(tmp_path) == "of no known commit (git knows none here)"


@pytest.mark.parametrize("change", ["content", "name", "new file", "configuration"])
def test_the_digest_is_that_of_every_source_file(tmp_path: Path, change: str) -> None:
    room = tmp_path / "code" / "room"
    room.mkdir(parents=True)
    (room / "one.py").write_text("1")
    (room / "two.yaml").write_text("2")
    before = page.digest_of([tmp_path / "code"])
    (room / "page.md").write_text("no source")
    assert page.digest_of([tmp_path / "code"]) == before
    if change == "content":
        (room / "one.py").write_text("3")
    elif change == "name":
        (room / "one.py").rename(room / "three.py")
    elif change == "new file":
        (room / "three.py").write_text("")
    else:
        (room / "two.yaml").write_text("3")
    assert page.digest_of([tmp_path / "code"]) != before


def test_the_running_code_is_the_package_that_python_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    monkeypatch.setattr(page, "digest_of", lambda found: folders.extend(found) or "digest")
    assert page.running_code().digest == "digest"
    for module in (kernels, logit_store):
        assert Path(module.__file__).resolve().parent in folders
    assert page.ROOT / "benchmarks" in folders
    monkeypatch.setattr(page, "ROOT", Path("/elsewhere"))
    assert "imported from outside this checkout" in page.running_code().commit


def test_a_page_begins_with_code_and_cache() -> None:
    code = page.Code("of commit `abc`, unchanged", "0123")
    words = {"machine": "a machine", "packages": ["numpy", "no-such-package"]}
    made, _, cache = page.made_by("store.py", ["--cache", "/somewhere/cache"], code, cache="", **words)
    assert made.startswith("Written by `benchmarks/store.py --cache cache` on ")
    assert "code of commit `abc`, unchanged, digest `0123`: a machine; numpy " in made
    assert "no-such-package not installed, Python 3." in made
    assert cache == "No cache was used: this run made everything itself."
    assert page.made_by("store.py", [], code, cache="An old one.", **words)[2] == (
        "**A cache was used.** An old one."
    )
