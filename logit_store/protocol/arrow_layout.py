"""The bytes of an Arrow IPC file of one-row batches: what Arrow writes of them, fixed here to the last byte.

A shard's file is one that any Arrow library opens, but neither its bytes nor what we make of them depend on a
library: headers are made here, and what is read is compared with what must stand there. So a header that was
mutated is never interpreted, by nobody, and a shard that one release of Arrow wrote is sound under any other.

The metadata are flatbuffers, which are made from their end to their beginning: an offset counts from the end
until it is known where the beginning is. Fields of a table are added in the order of Arrow's own generated
code (the widest first), so that the bytes are those of Arrow's C++ library (releases 18 to 26 agree).

Sources: Arrow's `format/Message.fbs`, `Schema.fbs` and `File.fbs`, and the columnar format's page on IPC.
"""

import functools
import struct
from collections.abc import Iterable, Sequence

MAGIC = b"ARROW1\0\0"
"""First bytes of every Arrow IPC file, padded to 8; the last are the same without padding."""

_CONTINUATION = 0xFFFFFFFF
_END = struct.pack("<II", _CONTINUATION, 0)
_METADATA_VERSION = 4  # V5, as the format counts from V1 = 0
_SCHEMA, _RECORD_BATCH = 1, 3  # members of the union MessageHeader
_INT, _BINARY, _FIXED_SIZE_LIST = 2, 4, 16  # members of the union Type


class _Flatbuffer:
    """Makes one flatbuffer as `flatbuffers::FlatBufferBuilder` does; offsets count from the end."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._widest = 1
        self._vtables: dict[bytes, int] = {}

    def _push(self, data: bytes) -> int:
        self._pieces.append(data)
        self._size += len(data)
        return self._size

    def _align(self, width: int, ahead: int = 0) -> None:
        """Fills up so that what follows `ahead` more bytes lies at a multiple of `width`."""
        self._widest = max(self._widest, width)
        self._push(bytes(-(self._size + ahead) % width))

    def _refer(self, target: int) -> bytes:
        """Returns the distance to a place made before, to be pushed next."""
        self._align(4)
        return struct.pack("<I", self._size - target + 4)

    def text(self, value: str) -> int:
        data = value.encode()
        self._align(4, len(data) + 1)
        self._push(data + b"\0")
        return self._push(struct.pack("<I", len(data)))

    def vector(self, targets: Sequence[int]) -> int:
        """Adds a vector of tables or texts."""
        self._align(4, 4 * len(targets))
        for target in reversed(targets):
            self._push(self._refer(target))
        return self._push(struct.pack("<I", len(targets)))

    def structs(self, data: bytes, count: int) -> int:
        """Adds a vector of structs of 8-byte members."""
        self._align(8 if data else 4, len(data))
        self._push(data)
        return self._push(struct.pack("<I", count))

    def table(self, *fields: tuple[int, str, int]) -> int:
        """Adds a table.

        Args:
            *fields: (slot, kind, value): kind is a letter of `struct`, or `offset` of something made before.
        """
        start = self._size
        places: dict[int, int] = {}
        for slot, kind, value in fields:
            if kind == "offset":
                places[slot] = self._push(self._refer(value))
            else:
                self._align(struct.calcsize(kind))
                places[slot] = self._push(struct.pack("<" + kind, value))
        self._align(4)
        here = self._size + 4
        slots = [here - places[slot] if slot in places else 0 for slot in range(max(places, default=-1) + 1)]
        vtable = struct.pack(f"<{2 + len(slots)}H", 4 + 2 * len(slots), here - start, *slots)
        # One table of fields serves all tables that are laid out alike; else it goes before the table itself.
        known = self._vtables.setdefault(vtable, here + len(vtable))
        self._push(struct.pack("<i", known - here))
        if known == here + len(vtable):
            self._push(vtable)
        return here

    def finish(self, root: int) -> bytes:
        self._align(self._widest, 4)
        self._push(self._refer(root))
        return b"".join(reversed(self._pieces))


def _field(into: _Flatbuffer, name: str, kind: int, kind_table: int, children: Sequence[int] = ()) -> int:
    """Adds a field that is never null."""
    text = into.text(name)
    child_vector = into.vector(children)
    return into.table(
        (5, "offset", child_vector), (3, "offset", kind_table), (0, "offset", text), (2, "B", kind)
    )


def _schema(into: _Flatbuffer, planes: Sequence[str], metadata: Sequence[tuple[str, str]]) -> int:
    """Adds the schema of a row: its number, its planes' checksums, its planes."""
    fields = [_field(into, "row", _INT, into.table((0, "i", 64), (1, "B", 1)))]
    item = _field(into, "item", _INT, into.table((0, "i", 32)))
    length = into.table((0, "i", len(planes)))
    fields.append(_field(into, "crc32", _FIXED_SIZE_LIST, length, [item]))
    fields += [_field(into, plane, _BINARY, into.table()) for plane in planes]
    field_vector = into.vector(fields)
    pairs = []
    for key, value in metadata:
        key_text = into.text(key)
        value_text = into.text(value)
        pairs.append(into.table((1, "offset", value_text), (0, "offset", key_text)))
    pair_vector = into.vector(pairs)
    return into.table((2, "offset", pair_vector), (1, "offset", field_vector))


def _encapsulated(flatbuffer: bytes) -> bytes:
    """Returns metadata as they stand in a stream: a marker, their length, and they, padded to 8."""
    padded = flatbuffer + bytes(-len(flatbuffer) % 8)
    return struct.pack("<II", _CONTINUATION, len(padded)) + padded


def file_header(planes: Sequence[str], metadata: Sequence[tuple[str, str]]) -> bytes:
    """Returns the bytes with which a shard's file begins: the magic and the message of its schema.

    Args:
        planes: names of the binary columns.
        metadata: (key, value) pairs of the schema.
    """
    into = _Flatbuffer()
    schema = _schema(into, planes, metadata)
    root = into.table((2, "offset", schema), (0, "h", _METADATA_VERSION), (1, "B", _SCHEMA))
    return MAGIC + _encapsulated(into.finish(root))


def file_footer(
    planes: Sequence[str], metadata: Sequence[tuple[str, str]], batches: Iterable[tuple[int, int]]
) -> bytes:
    """Returns the bytes with which a shard's file ends: the end of the stream, the footer, the magic.

    Args:
        planes: names of the binary columns.
        metadata: (key, value) pairs of the schema.
        batches: (offset, length) of each batch's message in the file.
    """
    into = _Flatbuffer()
    schema = _schema(into, planes, metadata)
    header = len(_batch_header(len(planes)))
    blocks = [struct.pack("<qi4xq", offset, header, length - header) for offset, length in batches]
    dictionaries = into.structs(b"", 0)
    batch_vector = into.structs(b"".join(blocks), len(blocks))
    root = into.table(
        (3, "offset", batch_vector),
        (2, "offset", dictionaries),
        (1, "offset", schema),
        (0, "h", _METADATA_VERSION),
    )
    footer = into.finish(root)
    return _END + footer + struct.pack("<I", len(footer)) + MAGIC[:6]


def is_end(data: memoryview) -> bool:
    """Returns whether the stream of messages ends where some data begin."""
    return data[: len(_END)] == _END


_BODY_LENGTH_AT = 40
"""Place of the body's length in a batch's message."""

_BUFFERS_AT = 88
"""Place of the first buffer's (offset, length) in a batch's message."""


@functools.lru_cache(maxsize=64)
def _batch_header(planes: int) -> bytes:
    """Returns marker and metadata of a batch of one row, with 0 for the body's length and for its buffers.

    Nodes are (length, nulls) of each column and of the list's items. Buffers are those of Arrow's columns,
    depth first: a bitmap of nulls, which is always empty here, and the values; for a binary column the
    bitmap, two offsets, and the bytes.
    """
    into = _Flatbuffer()
    lengths = [1, 1, planes] + [1] * planes
    nodes = into.structs(b"".join(struct.pack("<qq", length, 0) for length in lengths), len(lengths))
    buffers = into.structs(bytes(16 * (5 + 3 * planes)), 5 + 3 * planes)
    batch = into.table((0, "q", 1), (2, "offset", buffers), (1, "offset", nodes))
    root = into.table((3, "q", 0), (2, "offset", batch), (0, "h", _METADATA_VERSION), (1, "B", _RECORD_BATCH))
    return _encapsulated(into.finish(root))


@functools.lru_cache(maxsize=64)
def _numbers(planes: int) -> struct.Struct:
    """Returns the layout of the buffers' offsets and lengths of a batch."""
    return struct.Struct(f"<{2 * (5 + 3 * planes)}q")


def _padded(length: int) -> int:
    return (length + 7) & -8


def _layout(sizes: Sequence[int]) -> tuple[bytes, list[int], int]:
    """Returns (marker and metadata, place of each plane's two offsets in the body, length of the body).

    Args:
        sizes: bytes of each plane.
    """
    crcs = 4 * len(sizes)
    place = 8 + _padded(crcs)
    numbers = [0, 0, 0, 8, 8, 0, 8, 0, 8, crcs]
    places = []
    for size in sizes:
        numbers += (place, 0, place, 8, place + 8, size)
        places.append(place)
        place += 8 + _padded(size)
    header = bytearray(_batch_header(len(sizes)))
    struct.pack_into("<q", header, _BODY_LENGTH_AT, place)
    _numbers(len(sizes)).pack_into(header, _BUFFERS_AT, *numbers)
    return bytes(header), places, place


def batch_message(row: int, crc32: Sequence[int], planes: Sequence[bytes | memoryview]) -> bytes:
    """Returns the message of a batch of one row: marker, metadata and body.

    Args:
        row: its number.
        crc32: of each plane.
        planes: stored bytes of each.
    """
    header, _, _ = _layout([len(plane) for plane in planes])
    parts: list[bytes | memoryview] = [header, struct.pack("<q", row), struct.pack(f"<{len(crc32)}I", *crc32)]
    parts.append(bytes(-4 * len(crc32) % 8))
    for plane in planes:
        parts += (struct.pack("<ii", 0, len(plane)), plane, bytes(-len(plane) % 8))
    return b"".join(parts)


def _sizes(view: memoryview, count: int) -> tuple[int, ...]:
    """Returns the planes' lengths as a message's header has them.

    Raises:
        ValueError: there is no such header, or a length lies outside of the message.
    """
    least = len(_batch_header(count)) + 8 + _padded(4 * count)
    if len(view) < least:
        raise ValueError(f"it has {len(view)} bytes, fewer than the {least} that {count} empty planes make")
    sizes = _numbers(count).unpack_from(view, _BUFFERS_AT)[15::6]
    if min(sizes) < 0 or max(sizes) > len(view):
        raise ValueError("a plane's length lies outside of the batch")
    return sizes


def split_message(message: bytes | memoryview, count: int) -> tuple[int, tuple[int, ...], list[memoryview]]:
    """Returns (number of the row, crc32 of each plane, stored bytes of each plane, not copied).

    Only the planes' lengths are taken from the message; everything else that Arrow would go by must be what
    these lengths make of it.

    Args:
        message: the batch's bytes.
        count: number of the planes.

    Raises:
        ValueError: it is not the message of a batch of one row with that many planes; says what is not.
    """
    view = memoryview(message).cast("B")
    sizes = _sizes(view, count)
    header, places, body_length = _layout(sizes)
    expected = len(header)
    if view[:expected] != header:
        raise ValueError("its Arrow header is not that of one row, without nulls, compression or gaps")
    body = view[expected:]
    if len(body) != body_length:
        raise ValueError(f"its body has {len(body)} bytes, expected {body_length}")
    planes = []
    for place, size in zip(places, sizes, strict=True):
        begin = place + 8
        if body[place:begin] != struct.pack("<ii", 0, size):
            raise ValueError("a plane's offsets are not its length")
        planes.append(body[begin : begin + size])
    (row,) = struct.unpack_from("<q", body)
    return row, struct.unpack_from(f"<{count}I", body, 8), planes


def plane_offsets(message: bytes | memoryview, count: int) -> list[int]:
    """Returns where in a message that can be split the stored bytes of each plane begin."""
    header, places, _ = _layout(_sizes(memoryview(message).cast("B"), count))
    return [len(header) + place + 8 for place in places]


def message_length(data: memoryview, count: int) -> int:
    """Returns the length of the batch's message that begins some data, by the planes' lengths in it.

    Raises:
        ValueError: no batch of that many planes begins there.
    """
    header, _, body_length = _layout(_sizes(data, count))
    return len(header) + body_length
