"""The parts of the page that decide what it says."""

import pytest

from sparsekd.trainer.quality.result import Figure
from sparsekd.trainer.quality.table import figure_text
from sparsekd.trainer.report.curves import differing_settings
from sparsekd.trainer.report.page import apart, percent, visible


@pytest.mark.parametrize(
    ("places", "labels"),
    [([0.0, 50.0, 100.0], [0.0, 50.0, 100.0]), ([0.0, 97.0, 100.0], [0.0, 85.0, 100.0]), ([0.0], [0.0])],
)
def test_labels_keep_their_distance(places: list[float], labels: list[float]) -> None:
    assert apart(places) == labels
    assert apart([0.0, 1.0, 2.0, 99.0]) == [0.0, 15.0, 30.0, 99.0]


def test_texts() -> None:
    assert [percent(value) for value in (0.5, 0.0012, 2e-5, 0.0)] == ["50.0%", "0.1%", "1e-5", "0"]
    assert [visible(text) for text in ("a b", " ", "\n", "")] == ["a b", "\u2423", "\u21b5", "(nothing)"]
    assert figure_text("kl", Figure(1.0, "estimate")) == "~ 1.0000"
    assert figure_text("kl", Figure(1.0, "lower bound")) == ">= 1.0000"
    assert figure_text("acceptance", Figure(0.5, "upper bound")) == "<= 50.0%"
    assert figure_text("loss", Figure(1.0, "exact")) == "1.0000"
    assert figure_text("loss", None) == "-"


def test_differing_settings() -> None:
    runs = {"a": {"x": 1, "y": [1, 2], "only": 3}, "b": {"x": 1, "y": [1, 3]}}
    assert differing_settings(runs) == [("only", {"a": 3, "b": "-"}), ("y", {"a": [1, 2], "b": [1, 3]})]
