"""The page: complete, self-contained, and drawn from what evaluate wrote."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparsekd.trainer import report as room
from sparsekd.trainer.config.compose import as_yaml
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.quality import evaluate
from sparsekd.trainer.quality.result import load_evaluation
from sparsekd.trainer.quality.table import headline, result_table
from sparsekd.trainer.report import report
from sparsekd.trainer.run.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).parent))
from quality_world import make_world

pytestmark = pytest.mark.integration

# Elements that have no end tag.
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.used: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            elif name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                (self.used if str(value).startswith("#") else self.fetched).append(str(value))
            self.used += re.findall(r"url\((#[^)]+)\)", str(value))
            assert not name.startswith("on"), name

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judged world with two run folders, whose document text tries to be markup."""
    folder = tmp_path_factory.mktemp("report")
    make_world(folder, k=4, n=6, documents=30, steps=(20, 8, 4))
    for number, name in enumerate(("kd", "ce")):
        run_folder = folder / "runs" / name
        run_folder.mkdir(parents=True)
        config = Config()
        config.objective.kd_weight, config.objective.ce_weight = 1.0 - number, float(number)
        (run_folder / "config.yaml").write_text(as_yaml(config))
        (run_folder / "env.json").write_text(json.dumps({"versions": {"torch": "9.9.9"}}))
        lines = [
            {"kind": kind, "step": step, "tokens": 100 * step, "ce": 7.0 / step + number}
            for step in (1, 2, 4, 8)
            for kind in ("train", "heldout")
        ]
        torn = '{"kind": "train", "st'
        (run_folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + torn)
    config = _config(folder)
    evaluate.run(config)
    return folder


def _config(folder: Path) -> Config:
    config = Config()
    config.run.root = str(folder)
    config.store.path = str(folder / "store")
    config.launch.device = "cpu"
    config.evaluate.models = {"kd": str(folder / "kd"), "ce": str(folder / "ce")}
    config.evaluate.bootstrap_samples = 200
    config.report.runs = {"kd": str(folder / "runs" / "kd"), "ce": str(folder / "runs" / "ce")}
    config.report.title = "<script>alert('title')</script>"
    config.report.continuation_tokens = 8
    config.teacher.path = str(folder / "teacher")
    return config


def test_the_page_needs_nothing_but_itself(world: Path) -> None:
    report.run(_config(world))
    text = (world / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert not {"script", "link", "iframe", "object", "img", "base"} & set(page.tags)
    assert "@import" not in text and "http://" not in text and "https://" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert page.open == []
    assert "alert('title')" in page.text
    assert len(page.ids) == len(set(page.ids))
    assert {use.removeprefix("#") for use in page.used} <= set(page.ids)


def test_the_page_says_what_was_found(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(world)
    report.run(config)
    printed = capsys.readouterr().out
    page = Page((world / "report.html").read_text(encoding="utf-8"))
    result = load_evaluation(world / "evaluation")
    assert result.margin is not None
    assert f"{abs(result.margin.value):.4f} nats per token" in page.text
    for model in result.models:
        assert f"{model.figures['loss'].value:.4f}" in page.text
    assert page.tags.count("svg") == 5  # curves, documents, calibration, two breakdowns
    assert page.tags.count("figcaption") == 5
    assert "objective.kd_weight" in page.text and "store.codec" not in page.text
    assert "torch 9.9.9" in page.text
    assert result.store["digest"][:16] in page.text
    assert page.text.count("the document") >= 3
    # The console says it too, and ends with the page and the next command.
    assert printed.index(result_table(result)) < printed.index(headline(result))
    assert re.fullmatch(
        r"written: .*report\.html .*\nnext: .*report\.html", "\n".join(printed.splitlines()[-2:])
    )
    again = (world / "report.html").read_bytes()
    report.run(config)
    assert (world / "report.html").read_bytes() == again


def test_less_is_less_but_still_a_page(world: Path, tmp_path: Path) -> None:
    """Without runs, continuations, baseline and teacher there is still something to see."""
    config = _config(world)
    config.store.path = str(world / "tokens")
    config.evaluate.path = config.report.evaluation = str(tmp_path / "bare")
    config.evaluate.models, config.evaluate.baseline = {"kd": str(world / "kd")}, None
    config.report.runs, config.report.continuations = {}, 0
    config.report.path = str(tmp_path / "deep" / "page.html")
    evaluate.run(config)
    report.run(config)
    page = Page((tmp_path / "deep" / "page.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 2 and page.open == []


def test_what_is_refused(world: Path, tmp_path: Path) -> None:
    config = _config(world)
    config.report.evaluation = str(tmp_path)
    with pytest.raises(DataError, match="run `sparsekd evaluate` first"):
        report.run(config)
    config = _config(world)
    config.report.runs = {"kd": str(tmp_path)}
    config.report.continuations = 0
    with pytest.raises(DataError, match=r"has no metrics\.jsonl"):
        report.run(config)
    config = _config(world)
    config.store.path = str(world / "tokens")
    with pytest.raises(DataError, match="not the store of the evaluation"):
        report.run(config)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_a_package_that_draws(world: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in ("page", "figures"):
        monkeypatch.delitem(sys.modules, f"sparsekd.trainer.report.{name}", raising=False)
        monkeypatch.delattr(room, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"needs {package}, .*pip install 'sparsekd\[eval\]'"):
        report.run(_config(world))
