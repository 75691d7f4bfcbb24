"""The bytes of text files: decompressed, without a byte order mark, and refused where they are no UTF-8 text.

What a file begins with decides how it is read, not its name: so a `.jsonl` that was compressed on the way is
read, and a `.gz` that a browser unpacked. Nothing is read ahead of what is asked for: a small file that
unpacks to a huge one costs no more memory than its longest document, which is bounded.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from sparsekd.logit_store.errors import first_line
from sparsekd.trainer.run.errors import DataError

LARGEST_DOCUMENT = 256 << 20
"""Bytes of one document, or one line, at most: it is in memory as a whole, with its text beside it."""

LZMA_MEMORY = 256 << 20
"""A dictionary of xz may be 4 GiB; `xz -9` needs 65 MiB."""

COMPRESSIONS = {".gz": "gzip", ".zst": "Zstandard", ".bz2": "bzip2", ".xz": "xz"}

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ\x00": "xz",
}
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, as documents of offices and books are, too; unpack it or export its text",
    b"PAR1": "a Parquet file; read it with corpus=parquet",
    b"ARROW1": "an Arrow file; read its folder with corpus=dataset",
    b"%PDF-": "a PDF; export its text",
}
_OTHER_ENCODINGS = {  # UTF-32's little-endian mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_HEAD_BYTES = 512
_CHUNK_BYTES = 1 << 16


def without_compression(name: str) -> str:
    """A file's name without `.gz` and its like at the end."""
    stem, dot, suffix = name.rpartition(".")
    return stem if f"{dot}{suffix}" in COMPRESSIONS and stem else name


def open_text(path: Path) -> io.BufferedReader:
    """The bytes of a text file, decompressed, behind its byte order mark.

    Raises:
        DataError: It cannot be read, or its first bytes are those of something that is no UTF-8 text. Reading
            raises it too, where compressed data are damaged or end early.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    kind = _compression(head)
    expected = next((name for suffix, name in COMPRESSIONS.items() if path.name.endswith(suffix)), None)
    if not head and expected is not None:
        raise DataError(f"{path} is empty, expected {expected} data; copy it again.")
    stream: io.BufferedReader = io.BufferedReader(
        _Checked(_decompressed(path, kind), path, kind), _CHUNK_BYTES
    )
    try:
        _skip_mark(stream, path)
    except BaseException:
        stream.close()
        raise
    return stream


def read_whole(stream: io.BufferedReader, path: Path) -> bytes:
    """All bytes of a stream.

    Raises:
        DataError: They are more than `LARGEST_DOCUMENT`.
    """
    content = bytearray()
    while part := stream.read(1 << 20):
        content += part
        check_length(len(content), path)
    return bytes(content)


def check_length(length: int, path: Path) -> None:
    """Checks the bytes of one document of a text file.

    Raises:
        DataError: They are more than `LARGEST_DOCUMENT`.
    """
    if length > LARGEST_DOCUMENT:
        raise DataError(
            f"{path} has a document that is longer than {LARGEST_DOCUMENT:,} bytes, the most that one may "
            "have; cut the file by corpus.sample_by=paragraph or line, or by corpus.separator."
        )


def read_lines(stream: io.BufferedReader, path: Path) -> Iterator[bytes]:
    """The lines of a stream with their line breaks.

    Raises:
        DataError: One is longer than `LARGEST_DOCUMENT`.
    """
    number = 1
    while line := stream.readline(LARGEST_DOCUMENT + 1):
        if len(line) > LARGEST_DOCUMENT:
            raise DataError(
                f"{path}, line {number} is longer than {LARGEST_DOCUMENT:,} bytes, the most that one "
                "document may have; break it up."
            )
        yield line
        number += 1


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...

    def close(self) -> object: ...


class _Checked(io.RawIOBase):
    """A source whose failures are one sentence that names the file, and how far it could be read."""

    def __init__(self, source: _Source, path: Path, kind: str | None) -> None:
        self._source, self._path, self._kind = source, path, kind
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # a narrower buffer
        view, filled = memoryview(buffer), 0
        while filled < len(view):
            part = self._read(len(view) - filled)
            if not part:
                break
            view[filled : filled + len(part)] = part
            filled += len(part)
            self._done += len(part)
        return filled

    def _read(self, size: int) -> bytes:
        try:
            return self._source.read(size)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            reason = first_line(error)
            if self._kind is None:
                raise DataError(
                    f"{self._path} cannot be read behind byte {self._done:,}: {reason}."
                ) from error
            raise DataError(
                f"{self._path} is damaged or was cut short: its {self._kind} data give {self._done:,} bytes "
                f"of text and no more ({reason}); copy it again."
            ) from error

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Decompressed:
    """What bz2's and lzma's decoders make of a file, in no larger parts than were asked for.

    Their own file classes take no limit on memory, and let data behind the last stream pass.
    """

    def __init__(self, path: Path, make: Callable[[], _Decoder]) -> None:
        self._file, self._make = path.open("rb"), make
        self._decoder = make()

    def read(self, size: int) -> bytes:
        while True:
            data = b""
            if self._decoder.eof:
                data = self._decoder.unused_data.lstrip(b"\0") or self._file.read(_CHUNK_BYTES).lstrip(b"\0")
                if not data:
                    return b""
                self._decoder = self._make()
            elif self._decoder.needs_input:
                data = self._file.read(_CHUNK_BYTES)
                if not data:
                    raise EOFError("the end of the stream is missing")
            if part := self._decoder.decompress(data, size):
                return part

    def close(self) -> None:
        self._file.close()


def _compression(head: bytes) -> str | None:
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":  # between them stands how large the blocks are
        return "bzip2"
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:  # a frame to skip, which pzstd writes first
        return "Zstandard"
    return next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)


def _decompressed(path: Path, kind: str | None) -> _Source:
    match kind:
        case "gzip":
            return gzip.GzipFile(path, "rb")
        case "Zstandard":  # zstandard's own reader takes a file that was cut short for a whole one
            return pa.CompressedInputStream(pa.OSFile(str(path), mode="r"), "zstd")
        case "bzip2":
            return _Decompressed(path, bz2.BZ2Decompressor)
        case "xz":
            return _Decompressed(path, lambda: lzma.LZMADecompressor(memlimit=LZMA_MEMORY))
    return path.open("rb", buffering=0)


def _skip_mark(stream: io.BufferedReader, path: Path) -> None:
    head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    if head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        return
    for mark, name in _OTHER_ENCODINGS.items():
        if head.startswith(mark):
            raise DataError(
                f"{path} is {name} text, as its byte order mark says, expected UTF-8; convert it "
                f"(iconv -f {name} -t UTF-8)."
            )
    if len(head) >= 16 and (not any(head[::2]) or not any(head[1::2])) and any(head):
        raise DataError(
            f"{path} looks like UTF-16 text without a byte order mark (every other byte is 0), expected "
            "UTF-8; convert it (iconv -f UTF-16LE -t UTF-8, or UTF-16BE)."
        )
    for magic, what in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise DataError(f"{path} is no text but {what}.")
    if head[257:262] == b"ustar":
        raise DataError(f"{path} is a tar archive; unpack it, and give the folder as corpus.paths.")
