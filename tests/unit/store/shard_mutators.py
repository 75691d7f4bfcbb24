"""Changes to the shards of a store: its planes, and the Arrow messages around them. See `mutators`."""

import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable

import pyarrow as pa
import zstandard
from forgery import ForgedShard, Forgery, planes_of, row_of

from sparsekd.logit_store.protocol.arrow_layout import batch_message, file_footer, file_header

NUMBERS = [
    0, 1, 2, 3, 7, 8, 15, 16, 17, 127, 128, 255, 256, 257, 65535, 65536, 65537, 2**20, 2**24, 2**28,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
]  # fmt: skip
LARGEST_PLANE = 8 << 20
MAGIC = bytes.fromhex("28b52ffd")


def number(now: random.Random) -> int:
    return now.choice([1, 1, -1]) * now.choice(NUMBERS) + now.choice([0, 0, 0, -1, 1])


def flipped(data: bytes, now: random.Random, most: int = 4) -> bytes:
    """The bytes with some changed: by a bit, or to a value that means something to many formats."""
    changed = bytearray(data)
    for _ in range(now.randint(1, most) if changed else 0):
        place = now.randrange(len(changed))
        changed[place] = now.choice([changed[place] ^ 1 << now.randrange(8), 0, 1, 127, 128, 255])
    return bytes(changed)


def cut(data: bytes, now: random.Random) -> bytes:
    """The bytes longer, shorter, or with a piece of them moved."""
    place = now.randint(0, len(data))
    piece = now.randint(0, 40)
    return now.choice([
        data[:place],
        data[place:],
        data[:place] + bytes(piece) + data[place:],
        data[:place] + data[place + piece :],
        data + data[:piece],
    ])  # fmt: skip


def a_shard(forged: Forgery, now: random.Random) -> ForgedShard:
    return forged.shards[now.choice(list(forged.shards))]


def _frames(plane: bytes) -> list[bytes] | None:
    """The zstd frames of a plane: itself, or those behind their lengths; None where it has none."""
    if plane.startswith(MAGIC):
        return [plane]
    for count in range(1, min(40, len(plane) // 4) + 1):
        lengths = struct.unpack_from(f"<{count}I", plane)
        if sum(lengths) == len(plane) - 4 * count:
            ends = [4 * count + sum(lengths[:place]) for place in range(count + 1)]
            return [plane[begin:end] for begin, end in itertools.pairwise(ends)]
    return None


def _joined(frames: list[bytes], plane: bytes) -> bytes:
    if plane.startswith(MAGIC):
        return b"".join(frames)
    return struct.pack(f"<{len(frames)}I", *(len(frame) for frame in frames)) + b"".join(frames)


def _zipped(plain: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(plain)


def _unzipped(frame: bytes) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=1 << 20)
    except zstandard.ZstdError:
        return b""


def refill(shard: ForgedShard, change: Callable[[bytes], bytes], prefix: str = "") -> None:
    """Changes the content of every frame of the planes whose name begins so, but of segments."""
    for place, message in enumerate(shard.messages):
        stored = planes_of(message, shard.planes)
        for name, plane in stored.items():
            if not name.startswith(prefix) or name.startswith("segment"):
                continue
            frames = _frames(plane)
            if frames is None:
                stored[name] = change(plane)
            else:
                stored[name] = _joined([_zipped(change(_unzipped(frame))) for frame in frames], plane)
        shard.messages[place] = _rebuilt(row_of(message), stored)


def _rebuilt(row: int, stored: dict[str, bytes]) -> bytes:
    return batch_message(row, [zlib.crc32(plane) for plane in stored.values()], list(stored.values()))


def _content(plain: bytes, now: random.Random) -> bytes:
    """Other content of a plane or a part of one, of the same length or another."""
    kind = now.randrange(10)
    if kind < 4:
        return flipped(plain, now, 1 + len(plain) // 8)
    if kind == 4:
        return bytes([now.choice([0, 1, 127, 128, 254, 255])]) * len(plain)
    if kind == 5:
        return cut(plain, now)
    if kind == 6:
        shuffled = list(plain)
        now.shuffle(shuffled)
        return bytes(shuffled)
    if kind == 7:
        return now.randbytes(len(plain))
    if kind == 8:
        return bytes(now.choice([0, 1, len(plain) * 1000, 1 << 24, 1 << 28]))
    return plain[::-1]


def _frame(frame: bytes, now: random.Random) -> bytes:
    """Another frame: of other content, or one that lies about itself."""
    plain = _unzipped(frame)
    kind = now.randrange(12)
    if kind < 6:
        return _zipped(_content(plain, now))
    if kind == 6:
        return flipped(frame, now)
    if kind == 7:
        return cut(frame, now)
    if kind == 8:
        return now.choice([
            zstandard.ZstdCompressor(write_checksum=False).compress(plain),
            zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(plain),
            _zipped(plain) + _zipped(plain),
            struct.pack("<II", 0x184D2A50, 8) + bytes(8) + _zipped(plain),  # behind a frame to be skipped
            b"",
        ])  # fmt: skip
    if kind == 9:  # content size of 8 bytes, one segment, checksum
        return MAGIC + bytes([0xE4]) + struct.pack("<Q", now.choice(NUMBERS) % 2**64) + frame[6:]
    if kind == 10:  # the largest window, content size of 8 bytes, checksum
        return MAGIC + bytes([0xC4, 0xFF]) + struct.pack("<Q", now.choice([0, len(plain), 2**40])) + frame[6:]
    return MAGIC + bytes([now.randrange(256), now.randrange(256)]) + frame[6:]


def plane_content(forged: Forgery, now: random.Random) -> None:
    shard = a_shard(forged, now)
    place = now.randrange(len(shard.messages))
    message = shard.messages[place]
    stored = planes_of(message, shard.planes)
    for _ in range(now.choice([1, 1, 1, 2, 5])):
        name = now.choice(list(stored))
        frames = _frames(stored[name])
        if frames is None:
            stored[name] = _content(stored[name], now)
        else:
            which = now.randrange(len(frames))
            frames[which] = _frame(frames[which], now)
            stored[name] = _joined(frames, stored[name])
            if now.random() < 0.1:
                stored[name] = flipped(stored[name], now)
    shard.messages[place] = _rebuilt(row_of(message), stored)


def plane_swap(forged: Forgery, now: random.Random) -> None:
    """Planes of one another, of another row, none, or very long ones."""
    shard = a_shard(forged, now)
    place = now.randrange(len(shard.messages))
    message = shard.messages[place]
    stored = planes_of(message, shard.planes)
    name = now.choice(list(stored))
    other = planes_of(now.choice(shard.messages), shard.planes)
    stored[name] = now.choice(
        [stored[now.choice(list(stored))], other[name], b"", bytes(1 << 16), bytes(1 << 22)]
    )
    shard.messages[place] = _rebuilt(row_of(message), stored)


# Arrow


def message_header(forged: Forgery, now: random.Random) -> None:
    """Changes numbers in the flatbuffer, which is all int32 and int64, or bytes of it."""
    shard = a_shard(forged, now)
    place = now.randrange(len(shard.messages))
    changed = bytearray(shard.messages[place])
    (metadata,) = struct.unpack_from("<I", changed, 4)
    for _ in range(now.randint(1, 3)):
        kind = now.choice("bbiq")
        at = now.randrange(0, metadata)
        at -= at % struct.calcsize(kind)
        (old,) = struct.unpack_from("<" + kind, changed, at)
        limit = 1 << (8 * struct.calcsize(kind) - 1)
        value = now.choice([old + 1, old - 1, old + 8, old * 2, number(now), 0])
        struct.pack_into("<" + kind, changed, at, (value + limit) % (2 * limit) - limit)
    shard.messages[place] = bytes(changed)


def message_body(forged: Forgery, now: random.Random) -> None:
    """Changes the row's number, checksums, offsets or padding."""
    shard = a_shard(forged, now)
    place = now.randrange(len(shard.messages))
    message = shard.messages[place]
    (metadata,) = struct.unpack_from("<I", message, 4)
    shard.messages[place] = message[: 8 + metadata] + now.choice([flipped, cut])(message[8 + metadata :], now)


def message_kind(forged: Forgery, now: random.Random) -> None:
    """Something else in the place of a batch, or batches in another order."""
    shard = a_shard(forged, now)
    place = now.randrange(len(shard.messages))
    message = shard.messages[place]
    other = a_shard(forged, now).messages
    stored = list(planes_of(message, shard.planes).values())
    fewer, more = stored[: now.randrange(1, len(stored) + 1)], [*stored, *stored[: now.randint(1, 3)]]
    shard.messages[place] = now.choice([
        lambda: file_header(shard.planes, shard.metadata)[8:],
        lambda: file_footer(shard.planes, shard.metadata, []),
        lambda: bytes(now.choice([1, 8, 300, 1 << 20])),
        lambda: _compressed(shard.planes, row_of(message), stored),
        lambda: now.choice(other),
        lambda: message + message,
        lambda: cut(message, now),
        lambda: batch_message(row_of(message), [0] * len(fewer), fewer),
        lambda: batch_message(row_of(message), [0] * len(more), more),
        lambda: batch_message(now.choice(NUMBERS[:26]), [0] * len(stored), stored),
    ])()  # fmt: skip
    if now.random() < 0.2:
        now.shuffle(shard.messages)


def _compressed(planes: list[str], row: int, stored: list[bytes]) -> bytes:
    """The batch as Arrow writes it with compressed bodies, one of them of very many zeros."""
    item = pa.field("item", pa.uint32(), nullable=False)
    crcs = pa.FixedSizeListArray.from_arrays(
        pa.array([0] * len(planes), pa.uint32()), type=pa.list_(item, len(planes))
    )
    columns = [pa.array([row], pa.int64()), crcs, *(pa.array([plane], pa.binary()) for plane in stored)]
    columns[2] = pa.array([bytes(1 << 24)], pa.binary())
    out = io.BytesIO()
    names = ["row", "crc32", *planes]
    batch = pa.record_batch(columns, names=names)
    with pa.ipc.new_stream(out, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        begin = out.tell()
        writer.write_batch(batch)
        return out.getvalue()[begin:]


def shard_frame(forged: Forgery, now: random.Random) -> None:
    """Another header or footer."""
    shard = a_shard(forged, now)
    header, footer = (
        file_header(shard.planes, shard.metadata),
        file_footer(shard.planes, shard.metadata, [(8, 8)]),
    )
    if now.random() < 0.5:
        shard.header = now.choice([flipped, cut])(header, now) or b"x"
    else:
        shard.footer = now.choice([flipped, cut])(footer, now)
