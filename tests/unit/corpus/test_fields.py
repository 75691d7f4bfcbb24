"""Fields in fields, and rows of CSV."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.documents import read_documents
from sparsekd.trainer.corpus.fields import lookup
from sparsekd.trainer.run.errors import ConfigError, DataError


def read(path: Path, format: str, **keys: object) -> list[tuple[str, float]]:
    config = CorpusConfig(paths=[str(path)], format=format, **keys)
    return [(document.text, document.weight) for document in read_documents(config)]


def test_a_name_with_dots_leads_inside_unless_it_is_a_name_itself() -> None:
    assert lookup({"data": {"text": 1}}, "data.text") == 1
    assert lookup({"data": {"text": 1}, "data.text": 2}, "data.text") == 2
    assert lookup({"a": {"b": {"c": 1}}}, "a.b.c") == 1
    assert lookup({"a": {"b": {"c": 1}}, "a.b": {"c": 2}}, "a.b.c") == 2
    assert lookup({"a": {"b.c": 3}, "a.b": {"d": 2}}, "a.b.c") == 3
    assert lookup({"data": None}, "data.text") is None
    for record in ({"data": {"body": 1}}, {"data": "text"}, {"data": [{"text": 1}]}, {"text": 1}, {}):
        with pytest.raises(KeyError):
            lookup(record, "data.text")


ROWS = [
    {"data": {"text": "one", "id": 1}, "meta": {"score": {"w": 0.5}}},
    {"data": {"text": None, "id": 2}, "meta": {"score": {"w": 2.0}}},
    {"data": None, "meta": {"score": {"w": 1.0}}},
    {"data": {"text": "four", "id": 4}, "meta": {"score": {"w": 0.0}}},
]
READ = [("one", 0.5), ("", 2.0), ("", 1.0), ("four", 0.0)]
KEYS = {"text_field": "data.text", "weight_field": "meta.score.w"}


def write(folder: Path, rows: list[dict[str, object]]) -> dict[str, Path]:
    datasets = pytest.importorskip("datasets")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return {"jsonl": folder / "a.jsonl", "parquet": folder / "a.parquet", "dataset": folder / "saved"}


@pytest.mark.parametrize("format", ["jsonl", "parquet", "dataset"])
def test_fields_in_fields(tmp_path: Path, format: str) -> None:
    path = write(tmp_path, ROWS)[format]
    assert read(path, format, **KEYS) == READ
    with pytest.raises(
        DataError, match=r"has no (field|column) 'data.body', found .*'data\.text'.*text_field"
    ):
        read(path, format, text_field="data.body")
    with pytest.raises(DataError, match=r"'meta.score' is .*expected a finite number"):
        read(path, format, text_field="data.text", weight_field="meta.score")
    with pytest.raises(DataError, match=r"'data' is of type dict, expected text"):
        read(path, format, text_field="data")


@pytest.mark.parametrize("format", ["jsonl", "parquet", "dataset"])
def test_a_name_that_has_a_dot_wins(tmp_path: Path, format: str) -> None:
    path = write(tmp_path, [{"data": {"text": "inner"}, "data.text": "own"}])[format]
    assert read(path, format, text_field="data.text") == [("own", 1.0)]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": ' + "[" * 100_000, r"line 1 cannot be read as JSON \(.*recursion"),
        ('{"text": ' + "9" * 5000 + "}", r"line 1 cannot be read as JSON \(Exceeds the limit"),
    ],
)
def test_hostile_json_is_one_sentence(tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=sentence):
        read(tmp_path / "a.jsonl", "jsonl")


TABLE = [
    ["id", "text", "w"],
    ["1", "plain", "1"],
    ["2", 'a "quoted", text', "0.1"],
    ["3", "over\nthree\r\nlines", "0"],
    ["4", "", "2.5"],
    ["5", "\u00fcber; x" * 50_000, "1"],  # longer than the csv module's own limit
]


@pytest.mark.parametrize(
    ("name", "delimiter", "keys"),
    [
        ("a.csv", ",", {}),
        ("a.tsv", "\t", {}),
        ("a.txt", "\t", {"delimiter": r"\t"}),
        ("a.csv", ";", {"delimiter": ";"}),
    ],
)
def test_csv(tmp_path: Path, name: str, delimiter: str, keys: dict[str, str]) -> None:
    path = tmp_path / name
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # as Excel writes it
        csv.writer(file, delimiter=delimiter).writerows([*TABLE[:3], [], *TABLE[3:]])
    config = CorpusConfig(paths=[str(path)], format="csv", weight_field="w", **keys)
    documents = list(read_documents(config))
    assert [document.text for document in documents] == [row[1] for row in TABLE[1:]]
    assert [document.weight for document in documents] == [1.0, float(np.float32(0.1)), 0.0, 2.5, 1.0]
    assert [document.place for document in documents] == [f"{name}:{line}" for line in (2, 3, 5, 8, 9)]


def test_folders_of_csv_and_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\none, two\n".replace(", ", " "))
    (tmp_path / "b.tsv").write_text("id\ttext\n1\ttwo, three\n")
    assert read(tmp_path, "csv", include="*.[ct]sv") == [("one two", 1.0), ("two, three", 1.0)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("id,body\n1,x\n", r"line 1 has no column 'text', found \['id', 'body'\]"),
        ("text,text\n1,x\n", r"line 1 names the column 'text' 2 times"),
        ("id,text\n1,x\n2,a,b\n", r"line 3 has 3 cells, the first line names 2 columns"),
        ("id,text\n1,x\n2\n", r"line 3 has 1 cells, the first line names 2 columns"),
        ('id,text\n1,x\n2,"never\nclosed\n', r"in the row that begins at line 3 \(unexpected end of data\)"),
        ('id,text\n1,x\n2,"a"b\n', r"in the row that begins at line 3 \(',' expected after '\"'\)"),
        ("id,text\n1,x\r2,y\n", r"in the row that begins at line 2 \(new-line character"),
        ("id,text\n1,\udcff\n", r"line 2 is not UTF-8: byte 0xff at offset 2 of the line"),
    ],
)
def test_csv_problems_are_named(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "a.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"a\.csv.*" + sentence):
        read(tmp_path / "a.csv", "csv")


def test_csv_weights_and_delimiters_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,w\nx,heavy\n")
    with pytest.raises(DataError, match=r"line 2: 'w' is 'heavy', expected a finite number, 0 or more"):
        read(tmp_path / "a.csv", "csv", weight_field="w")
    for delimiter in (";;", "", '"', r"\n"):
        with pytest.raises(ConfigError, match=r"corpus\.delimiter=.* expected one character other than"):
            read(tmp_path / "a.csv", "csv", delimiter=delimiter)
    with pytest.raises(ConfigError, match=r"only csv has cells"):
        read(tmp_path / "a.csv", "text", delimiter=";")
