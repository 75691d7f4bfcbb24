"""Documents out of one text file: paragraphs, lines, and what a separator parts."""

import gzip
from pathlib import Path

import pytest

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus import splitting
from sparsekd.trainer.corpus.documents import read_documents
from sparsekd.trainer.run import streams
from sparsekd.trainer.run.errors import ConfigError, DataError


def read(path: Path, **keys: object) -> list[tuple[str, str]]:
    config = CorpusConfig(paths=[str(path)], **keys)
    return [(document.text, document.place.partition(":")[2]) for document in read_documents(config)]


TEXT = "\ufeff\n\n One\ntwo \r\n  \t\r\n\r\nthree\r\n\n\nfour\n  five\n"


def test_paragraphs_lines_and_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode())
    paragraphs = [(" One\ntwo ", "3"), ("three", "7"), ("four\n  five", "10")]
    assert read(path, sample_by="paragraph") == paragraphs
    lines = [(" One", "3"), ("two ", "4"), ("three", "7"), ("four", "10"), ("  five", "11")]
    assert read(path, sample_by="line") == lines
    assert read(path) == [(TEXT.removeprefix("\ufeff"), "")]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(tmp_path / "a.txt.gz", sample_by="paragraph") == paragraphs
    path.write_bytes(b"")
    assert read(path, sample_by="line") == read(path, sample_by="paragraph") == []


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_separators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(splitting, "_CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes("one\n\n1\n<|endoftext|>\ntwo \u00e4<|endoftext|><|endoftext|>three<|endof\n".encode())
    found = [("one\n\n1", "1"), ("two \u00e4", "5"), ("three<|endof", "5")]
    assert read(path, separator="<|endoftext|>") == found
    path.write_bytes(b"one\n---\ntwo --- 2\n---\n\n---\n")
    assert read(path, separator=r"\n---\n") == [("one", "1"), ("two --- 2", "3")]


def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\n\nt\xffo\n")
    for keys in ({"sample_by": "line"}, {"sample_by": "paragraph"}, {"separator": "\n\n"}):
        with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 0xff at offset 8 cannot be decoded"):
            read(path, **keys)


def test_no_document_is_longer_than_memory_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LARGEST_DOCUMENT", 100)
    path = tmp_path / "a.txt"
    path.write_text(f"{'x' * 98}\n\n" * 5)
    assert len(read(path, sample_by="line")) == len(read(path, sample_by="paragraph")) == 5
    for keys in ({}, {"separator": "y"}):
        with pytest.raises(DataError, match=r"longer than 100 bytes.*cut the file by corpus\.sample_by"):
            read(path, **keys)
    path.write_text(f"{'x' * 98}\n" * 5)
    with pytest.raises(DataError, match=r"longer than 100 bytes.*cut the file by corpus\.sample_by"):
        read(path, sample_by="paragraph")


def test_keys_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"sample_by=line with corpus\.format=jsonl: there each record is a"
    ):
        read(tmp_path, sample_by="line", format="jsonl")
    with pytest.raises(ConfigError, match=r"separator=x with corpus\.format=csv"):
        read(tmp_path, separator="x", format="csv")
    with pytest.raises(ConfigError, match="both say where documents end"):
        read(tmp_path, separator="x", sample_by="line")
    with pytest.raises(ConfigError, match=r"corpus\.separator is empty"):
        read(tmp_path, separator="")
