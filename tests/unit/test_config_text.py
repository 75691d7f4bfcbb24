"""Text settings: what was typed is what the configuration holds, and what cannot be kept is one sentence."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sparsekd.trainer.config.compose import as_yaml, compose_config
from sparsekd.trainer.config.options import options
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.door.cli import VERBS, main
from sparsekd.trainer.run.errors import ConfigError

# Read by Hydra or YAML as something else, or by neither.
TEXTS = [
    *("1e-3", "12e45678", "007", "1_000", "0x10", "1:30", "2024-01-01", ".5", "-1", "inf", "nan", "true"),
    *("True", "off", "yes", "~", "NULL", "None", "null", "null ", "???a", "a=b", "=a", "=", "a#b", "#a"),
    *("a  #b", "a(b)", "(a)", ")", "train[:1%]", "[a,b]", "{a:b}", "{", "a,b", "a,", ",a", "a:b", "a:"),
    *("b\\", "\\", "C:\\a\\b", "a\\,b", "a\\ b", "it's", "a'b", '"a', "'a", 'a"', "'a' 'b'", "'a','b'"),
    *('"a" "b"', "$", "$a", "{}", "%", "@a", "!a", "&a", "*.py", "?a", "|a", ">a", "`a`", "--", "- a"),
    *("glob(*)", "str(1)", "größe", "東京", "é\u0301", "\U0001f600", "a b", " a", "a ", " ", "", "a\tb"),
    *("a\nb", "a\r\n", " 'a' "),
]  # fmt: skip


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `--cfg` prints, read by a YAML reader that knows nothing of Hydra."""
    code = main(["train", *words, "--cfg"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    values = yaml.safe_load(captured.out)
    assert isinstance(values, dict)
    return values


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command is refused."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    return captured.err


def test_text_comes_back_as_typed_from_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    leaves = [leaf for leaf in options() if leaf.type_name in ("str", "str | None") and leaf.choices is None]
    optional = {leaf.key for leaf in leaves if leaf.type_name == "str | None"}
    assert len(optional) > 10 and "run.name" not in optional
    mappings = ("evaluate.models.kd", "++evaluate.models.ce", "+report.runs.kd", "++report.runs.ce")
    keys = [*(leaf.key for leaf in leaves if leaf.key != "run.name"), "++run.name", *mappings]
    for start in range(0, len(TEXTS), len(keys) // 2):
        texts = [TEXTS[(start + index) % len(TEXTS)] for index in range(len(keys))]
        values = printed([f"{key}={text}" for key, text in zip(keys, texts, strict=True)], capsys)
        for key, text in zip(keys, texts, strict=True):
            found: Any = values
            for name in key.lstrip("+").split("."):
                found = found[name]
            assert found == (None if text == "null" and key in optional else text), key


def test_the_real_command_line_keeps_text_of_every_kind() -> None:
    words = ["run.name=1e-3", "student.revision=12e45678", "report.title=a = b (c) # d, 'e' \"f\" {g} \\ ü"]
    words += ["corpus.paths=[data/p[0-9].txt, 007, a=b#c, 'x, y']", "evaluate.models={kd: true, ce: a=b}"]
    command = [sys.executable, "-m", "sparsekd.trainer.door.cli", "train", *words, "--cfg"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    values = yaml.safe_load(done.stdout)
    assert values["run"]["name"] == "1e-3" and values["student"]["revision"] == "12e45678"
    assert values["report"]["title"] == "a = b (c) # d, 'e' \"f\" {g} \\ ü"
    assert values["corpus"]["paths"] == ["data/p[0-9].txt", "007", "a=b#c", "x, y"]
    assert values["evaluate"]["models"] == {"kd": "true", "ce": "a=b"}


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("'a b'", "a b"),
        ('"a b"', "a b"),
        ("'it\\'s'", "it's"),
        ("'1e-3'", "1e-3"),
        ("'null'", "null"),
        ("''", ""),
        ("\"'a'\"", "'a'"),
        ("'C:\\a\\\\'", "C:\\a\\"),
        ("'a,b'", "a,b"),
    ],
)
def test_hydra_s_quotes_around_a_whole_value_are_quotes(
    typed: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = printed([f"run.name={typed}", f"student.revision={typed}", f"corpus.paths=[{typed},b]"], capsys)
    assert (values["run"]["name"], values["student"]["revision"]) == (text, text)
    assert values["corpus"]["paths"] == [text, "b"]


@pytest.mark.parametrize(
    ("typed", "elements"),
    [
        ("[]", []),
        ("[ ]", []),
        ("[1e-3,true,007,null, 0x10 ]", ["1e-3", "true", "007", "null", "0x10"]),
        ("[data/p[0-9].txt,*.{md},f(x)]", ["data/p[0-9].txt", "*.{md}", "f(x)"]),
        ("[a=b,c#d,it's,e f,g\\h]", ["a=b", "c#d", "it's", "e f", "g\\h"]),
        ("['x, y' ,\"z]\",'']", ["x, y", "z]", ""]),
        ("[${run.name},'${run.root}/x',\\${a}]", ["student", "runs/x", "${a}"]),
        ("[${oc.env:NOT_SET_HERE,'a'},b]", ["a", "b"]),
        ("${corpus.exclude}", []),
    ],
)
def test_elements_of_a_list_come_back_as_typed(typed: str, elements: list[str]) -> None:
    assert compose_config([f"corpus.paths={typed}"]).corpus.paths == elements


@pytest.mark.parametrize(
    ("typed", "entries"),
    [
        ("{}", {}),
        ("{kd: 1e-3, ce:true,a-1: a:b}", {"kd": "1e-3", "ce": "true", "a-1": "a:b"}),
        ("{kd: 'x, y', ce: \"a: b\"}", {"kd": "x, y", "ce": "a: b"}),
        ("{kd: ${run.root}/kd, ce: null}", {"kd": "runs/kd", "ce": "null"}),
    ],
)
def test_entries_of_a_mapping_come_back_as_typed(typed: str, entries: dict[str, str]) -> None:
    assert compose_config([f"evaluate.models={typed}"]).evaluate.models == entries


def test_an_interpolation_stays_one_and_can_be_escaped(tmp_path: Path) -> None:
    config = compose_config(
        [
            "run.name=${train.steps}",
            "run.root=a\\${b}",
            "student.revision=it's ${oc.env:NOT_SET_HERE,'x y'}",
        ]
    )
    assert (config.run.name, config.run.root, config.student.revision) == ("1000", "a${b}", "it's x y")
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    again = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(tmp_path / "config.yaml"))
    assert OmegaConf.to_object(again) == config


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("run.name=???", ["run.name=???", "missing"]),
        ("run.name=a${b", ["run.name=a${b", "\\${"]),
        ("run.name=${nonsense}", ["run.name", "nonsense", "\\${"]),
        ("run.name=a\u2028b", ["run.name", "character", "leave it out"]),
        ("corpus.paths=[[a,b],c]", ["corpus.paths", "'[a'", "in quotes"]),
        ("corpus.paths=['a]", ["corpus.paths", "in quotes"]),
        ("corpus.paths=[a\\,b]", ["corpus.paths", "in quotes"]),
        ("corpus.paths=[a,]", ["corpus.paths", "in quotes"]),
        ("corpus.paths=[???]", ["corpus.paths", "missing"]),
        ("corpus.paths=sort([2,1])", ["corpus.paths", "in quotes"]),
        ("evaluate.models={kd: a(1,2)}", ["evaluate.models", "'a(1'", "{name: 'a, b'}"]),
        ("evaluate.models={kd}", ["evaluate.models", "{name: text, other: text}"]),
        ("evaluate.models={true: x}", ["evaluate.models", "True", "str"]),
        ("evaluate.models.a.b=x", ["evaluate.models", "str"]),
        ("train.steps=1(2", ["train.steps", "expected int", "Optimizer steps"]),
        ("train.steps=1=2", ["train.steps", "expected int"]),
        ("train.steps=" + "9" * 5000, ["train.steps", "expected int"]),
        ("optimizer.betas=[0.9,(]", ["optimizer.betas", "[first,second]"]),
        ("student.config.x=a=b", ["student.config.x", "student.config.x='\"a=b\"'"]),
        ("run.name =x", ["'run.name '", "key=value"]),
        ("~run.name", ["~run.name", "set run.name=..."]),
        ("objective=1e-3", ["objective=1e-3 is not one of", "kd_ce"]),
        ("objective=null", ["objective=null is not one of"]),
        ("objective=kd,kd_ce", ["objective=kd,kd_ce", "sweep"]),
        ("objective.divergence=1e-3", ["objective.divergence=1e-3 is not one of"]),
        ("engine.dtype=float32,bfloat16", ["sweep"]),
    ],
)
def test_what_cannot_be_taken_is_one_sentence_that_says_how_to_write_it(
    word: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["train", word], capsys)
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ("run: {name: 1e-3}", ["run.name", "experiment/mine", "0.001", "in quotes"]),
        ("run: {name: off}", ["run.name", "experiment/mine", "False", "in quotes"]),
        ("student: {revision: 12345678}", ["student.revision", "12345678", "in quotes"]),
        ("run: {root: 1:30}", ["run.root", "90", "in quotes"]),
        ("corpus: {paths: [a, 007]}", ["experiment/mine", "'7'", "in quotes"]),
        ("corpus: {paths: [[a]]}", ["corpus.paths", "['a']", "not text"]),
        ("evaluate: {models: {kd: 5}}", ["experiment/mine", "'5'", "in quotes"]),
        ("evaluate: {models: {kd: {a: b}}}", ["evaluate.models", "{'a': 'b'}", "not text"]),
        ("run: {name: =}", ["mine.yaml", "line 2"]),
        ("run: {name: [}", ["mine.yaml", "line 2"]),
        ("train: {stpes: 5}", ["train.stpes", "experiment/mine"]),
    ],
)
def test_yaml_that_gives_a_text_key_something_else_is_refused(
    lines: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{lines}\n")
    said = refused(["train", "experiment=mine", "--config-dir", str(tmp_path)], capsys)
    for part in parts:
        assert part in said


def test_yaml_text_in_quotes_a_date_null_and_interpolations_are_taken(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nrun: {name: '1e-3', root: 2024-01-01}\nteacher: {revision: null}\n"
        "student: {revision: '${train.steps}'}\nevaluate: {models: {kd: 'true', ce: '${run.name}'}}\n"
    )
    config = compose_config(["experiment=mine"], config_directory=str(tmp_path))
    assert (config.run.name, config.run.root) == ("1e-3", "2024-01-01")
    assert (config.teacher.revision, config.student.revision) == (None, "1000")
    assert config.evaluate.models == {"kd": "true", "ce": "1e-3"}


@pytest.mark.parametrize("choice", ["1e-3", "007", "true", "null", "a=b"])
def test_a_choice_and_a_folder_of_groups_may_have_any_name(choice: str, tmp_path: Path) -> None:
    folder = tmp_path / "a=b (1)#,é it's ${run.name}"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / f"{choice}.yaml").write_text("# @package _global_\nrun: {name: found}\n")
    assert compose_config([f"experiment={choice}"], config_directory=str(folder)).run.name == "found"


def test_every_type_of_the_schema_is_text_or_is_left_to_hydra() -> None:
    # A new type, such as list[str] | None, needs its place in trainer/config/text.py.
    text = {"str", "str | None", "list[str]", "dict[str, str]"}
    others = {
        "int",
        "int | None",
        "float",
        "float | None",
        "bool",
        "list[float]",
        "list[Any]",
        "dict[str, Any]",
        "dict[Any, Any]",
    }
    assert {leaf.type_name for leaf in options()} <= text | others


# A printable character of any script, often one that Hydra, OmegaConf or YAML reads as more than itself.
CHARACTER = st.one_of(
    st.sampled_from("$${{}}\\\\''\"\"=#(),[]:&*!|>%@~+-_ 01exn.\t\n"),
    st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]),
)


@st.composite
def typed_and_meant(draw: st.DrawFn) -> tuple[str, str]:
    """A value as somebody types it, and the text that it stands for."""
    text = draw(st.text(CHARACTER, max_size=12))
    if "${" in text or text == "???":
        text = "".join(character for character in text if character not in "$?")
    bare = text.strip(" \t")
    if bare[:1] in ("'", '"') and bare[-1:] == bare[:1]:
        return f"x{text}", f"x{text}"
    if draw(st.booleans()) and "'" not in text and "\\" not in text:
        return f"'{text}'", text
    return text, text


@settings(max_examples=60, deadline=None)
@given(values=st.lists(typed_and_meant(), min_size=6, max_size=6))
@example(values=[("'", "'"), ("\\", "\\"), ("\\'", "\\'"), ("'\\", "'\\"), ("=", "="), ("", "")])
def test_any_printable_text_comes_back_as_typed(values: list[tuple[str, str]]) -> None:
    keys = ("run.name", "run.root", "report.title", "export.path", "teacher.path", "evaluate.models.kd")
    words = [f"{key}={typed}" for key, (typed, _) in zip(keys, values, strict=True)]
    config = compose_config(words)
    found = [config.run.name, config.run.root, config.report.title, config.export.path, config.teacher.path]
    found.append(config.evaluate.models["kd"])
    optional = ("export.path", "teacher.path")
    expected = [
        None if typed == "null" and key in optional else text
        for key, (typed, text) in zip(keys, values, strict=True)
    ]
    assert found == expected
    assert yaml.safe_load(as_yaml(config))["run"] == {"name": expected[0], "root": expected[1]}


@settings(max_examples=40, deadline=None)
@given(elements=st.lists(st.text(CHARACTER, max_size=8), max_size=6))
def test_elements_of_a_list_come_back_as_typed_or_are_refused_with_a_hint(elements: list[str]) -> None:
    elements = [element.replace("$", "").replace("???", "") for element in elements]
    try:
        found = compose_config([f"corpus.paths=[{','.join(elements)}]"]).corpus.paths
    except ConfigError as error:
        assert "in quotes" in str(error) and "\n" not in str(error)
        return
    assert ",".join(found) == ",".join(element.strip(" \t") for element in elements) or any(
        quote in element for element in elements for quote in "'\""
    )


@pytest.mark.parametrize(
    "word", ["hydra.run.dir=x", "+hydra.a=1", "~hydra.a", "hydra/launcher=basic", "hydra=x"]
)
def test_settings_of_hydra_itself_are_refused_by_every_verb(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in VERBS.keys() - {"store", "doctor"}:
        said = refused([verb, word], capsys)
        assert word in said and "Hydra itself" in said
    assert word in refused(["doctor", word], capsys)
    assert "Hydra itself" in refused(["store", "verify", "no/such/store", "--teacher", "hydra.a=1"], capsys)


def test_no_verb_takes_a_word_without_a_look(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("nonsense=1", "nonsense"):
        for verb in VERBS:
            assert "nonsense" in refused([verb, word], capsys)
        assert word in refused(["store", "inspect", "no/such/store", word], capsys)
    for flag in ("--teacher", "--repair"):
        said = refused(["store", "verify", "no/such/store", flag, "nonsense=1"], capsys)
        assert "'nonsense' is not a configuration key" in said
    assert "doctor takes run.root=... alone, found --cfg" in refused(["doctor", "--cfg"], capsys)
