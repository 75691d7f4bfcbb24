"""Bytes of text files: compressed ones in bounded memory, marks of byte order, and what is no text at all."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.documents import CorpusDigest, read_documents
from sparsekd.trainer.run import streams
from sparsekd.trainer.run.errors import DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
KINDS = {"gz": "gzip", "zst": "Zstandard", "bz2": "bzip2", "xz": "xz"}
TEXTS = [f"line {number} \u00e4 {os.urandom(40).hex()}" for number in range(3000)]
CONTENT = {
    "text": "\n".join(TEXTS).encode(),
    "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(),
    "csv": ("text\n" + "\n".join(TEXTS) + "\n").encode(),
}
MARK = codecs.BOM_UTF8


def texts_of(path: Path, format: str = "text", **keys: object) -> list[str]:
    return [
        document.text for document in read_documents(CorpusConfig(paths=[str(path)], format=format, **keys))
    ]


@pytest.mark.parametrize("format", CONTENT)
@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_hold_what_they_held(tmp_path: Path, format: str, suffix: str) -> None:
    (tmp_path / "plain").write_bytes(CONTENT[format])
    plain = texts_of(tmp_path / "plain", format)
    assert len(plain) == (1 if format == "text" else len(TEXTS))
    packed = COMPRESS[suffix](CONTENT[format])
    (tmp_path / f"a.{format}.{suffix}").write_bytes(packed)
    assert texts_of(tmp_path / f"a.{format}.{suffix}", format) == plain
    # Joined files are read as a whole, and what a file is does not depend on its name.
    half = len(CONTENT[format]) // 2
    parts = COMPRESS[suffix](CONTENT[format][:half]) + COMPRESS[suffix](CONTENT[format][half:])
    (tmp_path / "no-name").write_bytes(parts)
    assert texts_of(tmp_path / "no-name", format) == plain


def test_a_file_named_after_a_compression_that_was_taken_off(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(CONTENT["jsonl"])
    assert texts_of(tmp_path / "a.jsonl.gz", "jsonl") == TEXTS
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz is empty, expected gzip data; copy it again"):
        texts_of(tmp_path / "b.jsonl.gz", "jsonl")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_truncated_archive_is_one_sentence(tmp_path: Path, suffix: str) -> None:
    packed = COMPRESS[suffix](CONTENT["jsonl"])
    path = tmp_path / f"a.jsonl.{suffix}"
    sentence = (
        rf"a\.jsonl\.{suffix} is damaged or was cut short: its {KINDS[suffix]} data give [\d,]+ bytes of"
    )
    for left in (12, len(packed) // 2, len(packed) - 1):
        path.write_bytes(packed[:left])
        with pytest.raises(DataError, match=sentence) as refused:
            texts_of(path, "jsonl")
        assert "\n" not in str(refused.value)
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0x55
    damaged[len(packed) // 2 + 7] ^= 0x55
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.jsonl\." + suffix):
        texts_of(path, "jsonl")
    path.write_bytes(packed + b"rubbish that was appended")
    with pytest.raises(DataError, match=sentence):
        texts_of(path, "jsonl")


BOMB = """
import resource, sys
from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.run import streams
from sparsekd.trainer.corpus.documents import read_documents
from sparsekd.trainer.run.errors import DataError
path, format = sys.argv[1:]
streams.LARGEST_DOCUMENT = 8 << 20
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    count = sum(1 for _ in read_documents(CorpusConfig(paths=[path], format=format)))
except DataError as error:
    print(error)
else:
    print(count, "documents")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bomb_is_not_allocated(tmp_path: Path, suffix: str) -> None:
    """400 MB without a line break in less than 2 MB: no more than one longest document is in memory."""
    (tmp_path / "a").write_bytes(COMPRESS[suffix](bytes(4_000_000)) * 100)
    for format in ("text", "jsonl"):
        done = subprocess.run(
            [sys.executable, "-c", BOMB, str(tmp_path / "a"), format],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            check=True,
        )
        sentence, megabytes = done.stdout.splitlines()
        assert "longer than 8,388,608 bytes, the most that one" in sentence
        assert int(megabytes) < 80


def test_an_xz_file_may_not_ask_for_gigabytes(tmp_path: Path) -> None:
    small = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    (tmp_path / "a.xz").write_bytes(lzma.compress(b"text", filters=small))
    assert texts_of(tmp_path / "a.xz") == ["text"]
    packed = bytearray(lzma.compress(b"text", filters=small))
    assert packed[14:17] == b"\x21\x01\x10"  # LZMA2, one byte of properties: a dictionary of 1 MiB
    packed[16] = 0x22  # 512 MiB
    header = bytes(packed[12 : 12 + (packed[12] + 1) * 4 - 4])
    packed[12 + len(header) : 16 + len(header)] = struct.pack("<I", zlib.crc32(header))
    (tmp_path / "a.xz").write_bytes(packed)
    with pytest.raises(DataError, match=r"a\.xz is damaged .*[Mm]emory"):
        texts_of(tmp_path / "a.xz")


@pytest.mark.parametrize("format", CONTENT)
def test_a_mark_of_byte_order_is_no_text(tmp_path: Path, format: str) -> None:
    (tmp_path / "plain").write_bytes(CONTENT[format])
    (tmp_path / "marked").write_bytes(MARK + CONTENT[format])
    (tmp_path / "packed").write_bytes(gzip.compress(MARK + CONTENT[format]))
    digests = set()
    for name in ("plain", "marked", "packed"):
        digest = CorpusDigest()
        for document in read_documents(CorpusConfig(paths=[str(tmp_path / name)], format=format)):
            digest.add(document.content)
        digests.add(digest.hexdigest())
    assert len(digests) == 1
    assert texts_of(tmp_path / "marked", format) == texts_of(tmp_path / "plain", format)


def test_marks_inside_joined_files_and_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(MARK + b'{"text": "one"}\n' + MARK + b'{"text": "\\ufefftwo"}\n')
    assert texts_of(tmp_path / "a.jsonl", "jsonl") == ["one", "two"]
    (tmp_path / "only").write_bytes(MARK)
    assert texts_of(tmp_path / "only") == [""]


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16-LE", "UTF-16-BE", "UTF-32"])
@pytest.mark.parametrize("format", CONTENT)
def test_other_encodings_are_refused_by_name(tmp_path: Path, encoding: str, format: str) -> None:
    text = 'text\n{"text": "a long enough line"}\n'
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=rf"a\.txt .*{encoding[:6]} text.*expected UTF-8; convert it \(iconv"):
        texts_of(tmp_path / "a.txt", format)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"PK\x03\x04 some", r"is no text but a zip archive"),
        (b"PAR1 some", r"is no text but a Parquet file; read it with corpus=parquet"),
        (b"%PDF-1.4 some", r"is no text but a PDF"),
        (bytes(257).replace(b"\0", b"n", 9) + b"ustar  \0" + bytes(300), r"is a tar archive; unpack it"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, content: bytes, sentence: str) -> None:
    for name, data in (("a", content), ("a.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=sentence):
            texts_of(tmp_path / name)


def test_a_longest_line_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LARGEST_DOCUMENT", 100)
    line = json.dumps({"text": "x" * 87})
    assert len(line) == 99
    (tmp_path / "a").write_text(f"{line}\n{line}\n")
    assert texts_of(tmp_path / "a", "jsonl") == ["x" * 87] * 2
    (tmp_path / "a").write_text(f"{line}\n {line}\n")
    with pytest.raises(DataError, match=r"a, line 2 is longer than 100 bytes"):
        texts_of(tmp_path / "a", "jsonl")
