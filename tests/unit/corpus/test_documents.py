"""Reading documents: every format, a fixed order, and sentences that say where a file is broken."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.documents import CorpusDigest, read_documents
from sparsekd.trainer.corpus.files import list_files, source_name
from sparsekd.trainer.run.errors import ConfigError, DataError


def texts_of(**keys: object) -> list[str]:
    return [document.text for document in read_documents(CorpusConfig(**keys))]


def write_tree(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode("utf-8"))


TREE = {
    "b.txt": "bee",
    "a/z.txt": "zed",
    "a/test/t.txt": "inner test",
    "test/u.txt": "outer test",
    "c.md": "sea",
}


def test_folder_is_searched_recursively_and_sorted_by_relative_path(tmp_path: Path) -> None:
    for name in reversed(sorted(TREE)):  # created in an order other than the sorted one
        write_tree(tmp_path, {name: TREE[name]})
    assert texts_of(paths=[str(tmp_path)]) == ["inner test", "zed", "bee", "sea", "outer test"]


def test_include_and_exclude_select_inside_folders(tmp_path: Path) -> None:
    write_tree(tmp_path, TREE)
    assert texts_of(paths=[str(tmp_path)], include="*.txt", exclude=["*/test/*"]) == ["zed", "bee"]
    assert texts_of(paths=[str(tmp_path)], exclude=["a/*", "test/*"]) == ["bee", "sea"]


def test_order_and_names_do_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    seen = []
    for place in ("one", "two/deeper"):
        folder = tmp_path / place / "corpus"
        write_tree(folder, TREE)
        documents = list(read_documents(CorpusConfig(paths=[str(folder)])))
        seen.append([(document.text, document.place) for document in documents])
        assert source_name(str(folder)) == "corpus"
    assert seen[0] == seen[1]


def test_source_name_is_never_absolute_and_keeps_hub_names() -> None:
    assert source_name("/data/texts") == "texts"
    assert source_name("/data/*.txt") == "*.txt"
    assert source_name("organisation/some-dataset") == "organisation/some-dataset"


def test_glob_patterns_and_single_files(tmp_path: Path) -> None:
    write_tree(tmp_path, TREE)
    assert texts_of(paths=[f"{tmp_path}/**/*.txt"]) == ["inner test", "zed", "bee", "outer test"]
    assert texts_of(paths=[f"{tmp_path}/c.md", f"{tmp_path}/b.txt"]) == ["sea", "bee"]
    # Folders that a pattern matches are searched like given ones; ** does not count their files twice.
    assert texts_of(paths=[f"{tmp_path}/t*"]) == ["outer test"]
    assert sorted(texts_of(paths=[f"{tmp_path}/**"])) == sorted(TREE.values())


def test_a_path_that_exists_is_not_read_as_a_pattern(tmp_path: Path) -> None:
    write_tree(tmp_path, {"[a].txt": "brackets", "a.txt": "plain"})
    assert texts_of(paths=[f"{tmp_path}/[a].txt"]) == ["brackets"]


def test_text_is_taken_as_it_is(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a.txt": "one\r\ntwo\rthree\n\ufeffnot a mark"})
    assert texts_of(paths=[str(tmp_path)]) == ["one\r\ntwo\rthree\n\ufeffnot a mark"]


def test_max_documents_takes_the_first(tmp_path: Path) -> None:
    write_tree(tmp_path, TREE)
    assert texts_of(paths=[str(tmp_path)], max_documents=2) == ["inner test", "zed"]


def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes("höl".encode() + b"\xe9t")
    with pytest.raises(DataError, match=r"bad\.txt is not UTF-8: byte 0xe9 at offset 4"):
        texts_of(paths=[str(tmp_path)])


def test_missing_paths_have_their_sentences(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpus\.paths is not set"):
        texts_of(paths=[])
    with pytest.raises(DataError, match="neither a file nor a folder, and as a pattern it matches nothing"):
        texts_of(paths=[str(tmp_path / "nothing")])
    write_tree(tmp_path, TREE)
    with pytest.raises(DataError, match=r"holds no file with corpus\.include='\*\.rst'"):
        texts_of(paths=[str(tmp_path)], include="*.rst")


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a.txt": "text"})
    os.symlink(tmp_path, tmp_path / "loop")
    assert [file.name for file in list_files(str(tmp_path), "*", [])] == ["a.txt"]


def write_lines(path: Path, lines: list[str]) -> list[str]:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [str(path)]


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("one", "zwei \u00fc \U0001f600", "")]
    lines += ["", '{"text": null}']
    paths = write_lines(tmp_path / "a.jsonl", lines)
    documents = list(read_documents(CorpusConfig(format="jsonl", paths=paths)))
    assert [document.text for document in documents] == ["one", "zwei \u00fc \U0001f600", "", ""]
    assert [document.place for document in documents] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:5"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text" "x"}', r"a\.jsonl, line 2 is not JSON: .* at column 9"),
        ('{"body": "x"}', r"a\.jsonl, line 2 has no field 'text', found the fields \['body'\]"),
        ("[1]", r"a\.jsonl, line 2 has no field 'text', found list"),
        ('{"text": 3}', r"a\.jsonl, line 2: 'text' is of type int"),
        ('{"text": "x\\ud800"}', r"a\.jsonl:2: the text holds .* at character 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    paths = write_lines(tmp_path / "a.jsonl", ['{"text": "good"}', line])
    with pytest.raises(DataError, match=sentence):
        texts_of(format="jsonl", paths=paths)


def test_jsonl_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2 is not UTF-8: byte 0xff at offset 10 of the line"):
        texts_of(format="jsonl", paths=[str(tmp_path / "a.jsonl")])


def test_parquet_is_read_over_batches_and_row_groups(tmp_path: Path) -> None:
    texts = [f"document {index}" for index in range(2500)]
    table = pa.table({"other": range(2500), "body": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    documents = list(read_documents(CorpusConfig(format="parquet", paths=[str(tmp_path)], text_field="body")))
    assert [document.text for document in documents] == texts
    assert documents[2400].place == "a.parquet:2400"


def test_parquet_problems_are_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["x"], "number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has no column 'text', found \['body', 'number'\]"):
        texts_of(format="parquet", paths=[str(tmp_path)])
    with pytest.raises(DataError, match=r"a\.parquet, row 0: 'number' is of type int"):
        texts_of(format="parquet", paths=[str(tmp_path)], text_field="number")
    (tmp_path / "a.parquet").write_bytes(b"not a parquet file")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        texts_of(format="parquet", paths=[str(tmp_path)])


def test_saved_datasets_and_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"text {index}" for index in range(30)]
    table = datasets.Dataset.from_dict({"text": texts, "label": list(range(30))})
    table.save_to_disk(tmp_path / "saved")
    assert texts_of(format="dataset", paths=[str(tmp_path / "saved")]) == texts
    datasets.DatasetDict({"validation": table}).save_to_disk(tmp_path / "splits")
    assert texts_of(format="dataset", paths=[str(tmp_path / "splits")], dataset_split="validation") == texts
    with pytest.raises(DataError, match=r"has no split 'train', found \['validation'\]"):
        texts_of(format="dataset", paths=[str(tmp_path / "splits")])
    with pytest.raises(DataError, match=r"has no column 'body', found \['text', 'label'\]"):
        texts_of(format="dataset", paths=[str(tmp_path / "saved")], text_field="body")
    # A folder with data files goes the way of a hub name, through load_dataset.
    (tmp_path / "hub").mkdir()
    write_lines(tmp_path / "hub" / "train.jsonl", [json.dumps({"text": text}) for text in texts])
    assert texts_of(format="dataset", paths=[str(tmp_path / "hub")]) == texts
    with pytest.raises(DataError, match="cannot be loaded"):
        texts_of(format="dataset", paths=[str(tmp_path / "nothing")])


def test_missing_datasets_package_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'sparsekd\[teacher\]'"):
        texts_of(format="dataset", paths=["organisation/name"])


def test_digest_knows_borders_and_order() -> None:
    def digest(parts: list[bytes]) -> str:
        total = CorpusDigest()
        for part in parts:
            total.add(part)
        return total.hexdigest()

    distinct = [[b"ab", b"c"], [b"a", b"bc"], [b"c", b"ab"], [b"abc"], [b"ab", b"c", b""]]
    assert len({digest(parts) for parts in distinct}) == len(distinct)
    assert digest([b"ab", b"c"]) == digest([b"ab", b"c"])


def weights_of(**fields: object) -> list[float]:
    return [document.weight for document in read_documents(CorpusConfig(weight_field="w", **fields))]


def test_weights_of_documents_in_every_format(tmp_path: Path) -> None:
    rows = [{"text": f"text {index}", "w": weight} for index, weight in enumerate([1, 0.1, 0, 2.5])]
    paths = write_lines(tmp_path / "a.jsonl", [json.dumps(row) for row in rows])
    stored = [1.0, float(np.float32(0.1)), 0.0, 2.5]
    assert weights_of(format="jsonl", paths=paths) == stored
    columns = {"w": [row["w"] * 1.0 for row in rows], "text": [row["text"] for row in rows]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert weights_of(format="parquet", paths=[str(tmp_path / "a.parquet")]) == stored
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    assert weights_of(format="dataset", paths=[str(tmp_path / "saved")]) == stored
    # Without the field all weigh 1, and the corpus is another one.
    plain = CorpusConfig(format="jsonl", paths=paths)
    assert [document.weight for document in read_documents(plain)] == [1.0] * 4


@pytest.mark.parametrize("weight", ["-1", "NaN", "Infinity", "1e39", "true", "null", '"1"', "[1]"])
def test_a_bad_weight_is_named(tmp_path: Path, weight: str) -> None:
    lines = ['{"text": "good", "w": 1}', f'{{"text": "bad", "w": {weight}}}']
    paths = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: 'w' is .*expected a finite number, 0 or more"):
        weights_of(format="jsonl", paths=paths)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    paths = write_lines(tmp_path / "a.jsonl", ['{"text": "good", "w": 1}', '{"text": "none"}'])
    with pytest.raises(DataError, match=r"line 2 has no field 'w'.*set corpus\.weight_field to the weight's"):
        weights_of(format="jsonl", paths=paths)
    with pytest.raises(ConfigError, match="a text file has no fields"):
        weights_of(format="text", paths=paths)
