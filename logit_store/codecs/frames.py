"""zstd frames with a checksum each, and planes that consist of several of them.

Bytes of one kind stand together in a frame of their own (all low bytes of the ids, all high ones), because
zstd's entropy coder keeps one table per block: mixed, the bytes that repeat would pay for those that do not.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

ZSTD_LEVEL = 1
"""Higher levels are slower and, on these planes, not smaller: only the entropy coder finds anything."""

# The less zstd looks for repetitions, the better: of 258,048 bytes of code differences level 3 makes 104,875,
# level 1 100,933, level 1 with the smallest hash table and the longest minimum match 97,572, and fastest.
_ZSTD_HASH_LOG = 6
_ZSTD_MIN_MATCH = 7


class PlaneError(Exception):
    """A stored plane cannot be decoded.

    Attributes:
        plane: its name.
    """

    def __init__(self, plane: str, reason: str) -> None:
        super().__init__(reason)
        self.plane = plane


_contexts = threading.local()  # zstd contexts may not be shared between threads, and are dear to make


def compress_frame(plain: Any) -> bytes:
    """Returns one zstd frame with content size and content checksum.

    Args:
        plain: bytes, or a contiguous array.
    """
    if not hasattr(_contexts, "compressor"):
        parameters = zstandard.ZstdCompressionParameters.from_level(
            ZSTD_LEVEL,
            hash_log=_ZSTD_HASH_LOG,
            min_match=_ZSTD_MIN_MATCH,
            write_checksum=True,
            write_content_size=True,
        )
        _contexts.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    return _contexts.compressor.compress(plain)


def frame_size(stored: Any, plane: str) -> int:
    """Returns the number of bytes that a zstd frame says it holds; nothing is unpacked.

    Raises:
        PlaneError: it is no zstd frame with a checksum and a size.
    """
    try:
        header = zstandard.get_frame_parameters(stored)
    except zstandard.ZstdError as error:
        raise PlaneError(plane, f"its zstd frame cannot be read ({error})") from error
    if not header.has_checksum:
        raise PlaneError(plane, "its zstd frame has no checksum")
    return header.content_size


def decompress_frame(stored: Any, plane: str, size: int | None, *, at_most: int) -> bytes:
    """Returns the content of a zstd frame.

    Args:
        stored: buffer of the whole frame and nothing else.
        plane: its name, for messages.
        size: bytes that the content must have; None when the caller judges it.
        at_most: bytes that it may have; more is refused before anything is allocated.

    Raises:
        PlaneError: it is no such frame, or its checksum differs.
    """
    found = frame_size(stored, plane)
    if found > at_most or (size is not None and found != size):
        wanted = f"at most {at_most}" if size is None else str(size)
        raise PlaneError(plane, f"its zstd frame holds {found} bytes, expected {wanted}")
    try:
        if not hasattr(_contexts, "decompressor"):
            _contexts.decompressor = zstandard.ZstdDecompressor()
        if found == 0:
            return _check_empty(_contexts.decompressor.decompressobj(), stored, plane)
        return _contexts.decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PlaneError(plane, f"its zstd frame cannot be read ({error})") from error


def _check_empty(stream: Any, stored: Any, plane: str) -> bytes:
    """Returns no bytes, after the look at the frame that zstandard's short cut for size 0 leaves out."""
    longest = 32  # a header of at most 14 bytes, an empty block of 3, a checksum of 4
    if len(memoryview(stored)) > longest or stream.decompress(stored) or not stream.eof or stream.unused_data:
        raise PlaneError(plane, "its zstd frame says that it is empty, but is not")
    return b""


def join_parts(parts: Sequence[Any]) -> bytes:
    """Returns a plane of several parts: the length of each frame as uint32, then the frames.

    Args:
        parts: bytes or contiguous arrays, not compressed.
    """
    frames = [compress_frame(part) for part in parts]
    return b"".join([np.array([len(frame) for frame in frames], "<u4").tobytes(), *frames])


def split_parts(stored: Any, plane: str, count: int) -> list[memoryview]:
    """Returns the frames of a plane of `count` parts, without copying them.

    Raises:
        PlaneError: the lengths do not add up to the plane's.
    """
    view = memoryview(stored).cast("B")
    if len(view) < 4 * count:
        raise PlaneError(plane, f"it has {len(view)} bytes, expected {count} lengths of 4")
    lengths = np.frombuffer(view[: 4 * count], "<u4").tolist()
    if sum(lengths) != len(view) - 4 * count:
        raise PlaneError(
            plane,
            f"its parts of {sum(lengths)} bytes do not fill the {len(view) - 4 * count} bytes there are",
        )
    frames, begin = [], 4 * count
    for length in lengths:
        frames.append(view[begin : begin + length])
        begin += length
    return frames
