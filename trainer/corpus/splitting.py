"""Documents out of one text file: a file as a whole, its paragraphs, its lines, or what a separator parts."""

import io
from collections.abc import Iterator
from pathlib import Path

from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.run.streams import check_length, read_lines, read_whole

_CHUNK_BYTES = 1 << 20


def split_text(
    stream: io.BufferedReader, path: Path, sample_by: str, separator: str | None
) -> Iterator[tuple[str, int | None]]:
    """Yields the documents of a text file and the line where each begins; None for a file as a whole.

    Of documents that are parts of a file, blank ones are no documents, and the line breaks at both ends
    belong to what separates them. No more than one document is in memory.

    Args:
        stream: The file.
        path: Its path, for messages.
        sample_by: "document", "paragraph" (between blank lines) or "line".
        separator: What stands between documents, instead.

    Raises:
        DataError: Bytes that are not UTF-8, or a document that is too long.
    """
    gap = b""
    if separator is not None:
        gap = separator.encode("utf-8")
        parts = _separated(stream, path, gap)
    elif sample_by == "document":
        yield _decoded(read_whole(stream, path), path, 0), None
        return
    elif sample_by == "line":
        parts = ([line] for line in read_lines(stream, path))
    else:
        parts = _paragraphs(read_lines(stream, path), path)
    offset, line = 0, 1
    for part in parts:
        content = b"".join(part)
        begin = len(content) - len(content.lstrip(b"\r\n"))
        if content.strip():
            text = _decoded(content, path, offset).strip("\r\n")
            yield text, line + content[:begin].count(b"\n")
        offset += len(content) + len(gap)
        line += content.count(b"\n") + gap.count(b"\n")


def _decoded(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {offset + error.start} cannot "
            "be decoded; convert the file or leave it out with corpus.exclude."
        ) from error


def _paragraphs(lines: Iterator[bytes], path: Path) -> Iterator[list[bytes]]:
    """The lines between blank ones, and each blank one; together they are the file."""
    part: list[bytes] = []
    length = 0
    for line in lines:
        if not line.strip():
            yield from (part, [line])
            part, length = [], 0
            continue
        part.append(line)
        length += len(line)
        check_length(length, path)
    yield part


def _separated(stream: io.BufferedReader, path: Path, separator: bytes) -> Iterator[list[bytes]]:
    """What stands between separators."""
    buffer = bytearray()
    while chunk := stream.read(_CHUNK_BYTES):
        searched = max(0, len(buffer) - len(separator) + 1)
        buffer += chunk
        while (end := buffer.find(separator, searched)) >= 0:
            yield [bytes(buffer[:end])]
            del buffer[: end + len(separator)]
            searched = 0
        check_length(len(buffer), path)
    yield [bytes(buffer)]
