"""Changes that a hostile stranger may make to a store: one function each, of (store taken apart, random).

All are generic over planes and codecs: they go by the store's own schema and by what its planes look like.
What is signed or counted above a change is made right again by `forgery`, so that only checks of the content
can find it.
"""

import base64
import copy
import io
import itertools
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import zstandard
from forgery import ForgedShard, Forgery, planes_of, row_of, text_of

from sparsekd.logit_store.protocol.arrow_layout import batch_message, file_footer, file_header

Mutator = Callable[[Forgery, random.Random], None]

NUMBERS = [
    0, 1, 2, 3, 7, 8, 15, 16, 17, 127, 128, 255, 256, 257, 65535, 65536, 65537, 2**20, 2**24, 2**28,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
]  # fmt: skip
SHAPES = [
    0, 1, 2, 3, 5, 15, 17, 24, 31, 64, 1000, 4096, 2**16, 2**18, 2**20, 2**22, 2**24, 2**27, 2**31 - 1, 2**40,
]  # fmt: skip
OTHERS: list[Any] = [
    None, True, False, 0.5, 1.0, -0.0, 1e300, float("nan"), float("inf"), "", "x", "0" * 64, "\ud800",
    "\x1b[2J\n", "../../x", "y" * 5000, [], [0], [[]], {}, {"x": 1},
]  # fmt: skip
LARGEST_PLANE = 8 << 20
MAGIC = bytes.fromhex("28b52ffd")


def _number(now: random.Random) -> int:
    return now.choice([1, 1, -1]) * now.choice(NUMBERS) + now.choice([0, 0, 0, -1, 1])


def _flipped(data: bytes, now: random.Random, most: int = 4) -> bytes:
    """The bytes with some changed: by a bit, or to a value that means something to many formats."""
    changed = bytearray(data)
    for _ in range(now.randint(1, most) if changed else 0):
        place = now.randrange(len(changed))
        changed[place] = now.choice([changed[place] ^ 1 << now.randrange(8), 0, 1, 127, 128, 255])
    return bytes(changed)


def _cut(data: bytes, now: random.Random) -> bytes:
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


# JSON


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from _places(value[key], (*path, key))


def _change_value(content: Any, now: random.Random) -> None:
    """Changes one value anywhere in a nested one."""
    path = now.choice(list(_places(content)))
    for key in path[:-1]:
        content = content[key]
    key, old = path[-1], content[path[-1]]
    kind = now.randrange(8)
    if kind < 3 and isinstance(old, (int, float)):
        content[key] = now.choice([old + now.choice([-1, 1, 8, 256]), _number(now), -old])
    elif kind == 4:
        del content[key]
    elif kind == 5 and isinstance(content, dict):
        content[now.choice(["", "x", "digest", "rows", str(key) + "_"])] = copy.deepcopy(old)
    elif kind == 6 and isinstance(content, list):
        now.choice([content.reverse, lambda: content.append(copy.deepcopy(old)), content.clear])()
    else:
        content[key] = now.choice([*OTHERS, _number(now), _number(now)])


def _changed_text(text: bytes, now: random.Random) -> bytes:
    """Changes a JSON text as text."""
    lines = text.splitlines(keepends=True)
    place = now.randrange(len(lines))
    deep = now.choice([20, 100, 3000, 100_000])
    nested = now.choice([b"[" * deep + b"]" * deep, b'{"x":' * deep + b"1" + b"}" * deep])
    key = lines[place].partition(b":")[0]
    changed = now.choice([
        lambda: [*lines[:place], lines[place], *lines[place:]],
        lambda: [*lines[:place], *lines[place + 1 :]],
        lambda: [*lines[:place], key + b": " + nested + b",\n", *lines[place + 1 :]],
        lambda: [*lines[:place], key + b": " + b"9" * deep + b",\n", *lines[place + 1 :]],
        lambda: [text.replace(b"\n", now.choice([b"", b"\r\n", b" \n"]))],
        lambda: [_flipped(text, now)],
        lambda: [_cut(text, now)],
        lambda: [text, text],
    ])  # fmt: skip
    return b"".join(changed())


def index_value(forged: Forgery, now: random.Random) -> None:
    for _ in range(now.randint(1, 3)):
        _change_value(forged.index, now)
    forged.index_is_forged = True


def index_text(forged: Forgery, now: random.Random) -> None:
    forged.files()
    forged.index_text = _changed_text(text_of(forged.index), now)


def table(forged: Forgery, now: random.Random) -> None:
    """Entries of rows and digests of records with other bytes, cut, longer, exchanged or empty."""
    change = now.choice([
        lambda data: _flipped(data, now),
        lambda data: _cut(data, now),
        lambda data: data + bytes(20),
        lambda data: data[20:40] + data[:20] + data[40:],
        lambda data: b"\xff" * len(data),
        lambda data: bytes(len(data)),
        lambda data: b"",
    ])  # fmt: skip
    forged.tables[now.choice(["train", "heldout"])] = change


def index_size(forged: Forgery, now: random.Random) -> None:
    """Claims more or fewer rows than there are, with counts and shards that fit."""
    content, size = json.loads(forged.manifest), now.choice([*SHAPES, 2**50])
    entry = forged.index["splits"][now.choice(["train", "heldout"])]
    entry["rows"], entry["shards"] = size, -(-size // content["rows_per_shard"])
    entry["counts"]["tokens"] = size * content["sequence_length"]


def _shard(forged: Forgery, now: random.Random) -> ForgedShard:
    return forged.shards[now.choice(list(forged.shards))]


def record_value(forged: Forgery, now: random.Random) -> None:
    shard = _shard(forged, now)
    shard.files()
    for _ in range(now.randint(1, 3)):
        if shard.record:
            _change_value(shard.record, now)
    shard.kept = {"offsets", "lengths", "crc32", "file_bytes", "file_sha256", "plane_bytes"}


def record_places(forged: Forgery, now: random.Random) -> None:
    """Lies about where rows are, in one list that is otherwise right."""
    shard = _shard(forged, now)
    shard.files()
    name = now.choice(["offsets", "lengths", "crc32"])
    values = shard.record[name]
    values[now.randrange(len(values))] = now.choice(
        [_number(now), now.choice(values) + 8, now.choice(values) - 8]
    )
    shard.kept = {name, now.choice(["file_bytes", name])}
    if now.random() < 0.3:
        shard.record["file_bytes"] = now.choice([2**40, 2**62])
        shard.kept.add("file_bytes")


def record_text(forged: Forgery, now: random.Random) -> None:
    shard = _shard(forged, now)
    shard.files()
    shard.record_text = _changed_text(text_of(shard.record), now)


def _fit_counts(forged: Forgery, length: object) -> None:
    """Makes the counts of positions those of another sequence length."""
    if type(length) is not int:
        return
    for shard in forged.shards.values():
        counts = shard.record["counts"]
        counts["tokens"] = length * len(shard.messages)
    for entry in forged.index["splits"].values():
        entry["counts"]["tokens"] = length * entry["rows"]


def manifest_value(forged: Forgery, now: random.Random) -> None:
    content = json.loads(forged.manifest)
    for _ in range(now.randint(1, 2)):
        _change_value(content, now)
    forged.set_manifest(text_of(content))
    _fit_counts(forged, content.get("sequence_length"))


def manifest_text(forged: Forgery, now: random.Random) -> None:
    forged.set_manifest(_changed_text(forged.manifest, now))


def manifest_shape(forged: Forgery, now: random.Random) -> None:
    """Other sizes, as far as possible with everything else made to fit them."""
    content = json.loads(forged.manifest)
    record, size = content["record"], now.choice(SHAPES)
    kind = now.choice(["sequence_length", "k", "n", "grid", "vocabulary", "rows", "codec"])
    if kind == "sequence_length":
        times = 2 ** now.choice([0, 1, 2, 8, 12, 16])
        content["sequence_length"] = now.choice([size, times * content["sequence_length"]])
        # Rows that are what the manifest says, and as sound as they were, up to the largest.
        large = list(forged.shards.values())[-1:] if times > 2**8 else list(forged.shards.values())
        for shard in large:
            _refill(shard, lambda plain: plain * times if len(plain) * times <= LARGEST_PLANE else b"")
    elif kind in ("k", "n"):
        ratio = size / max(1, record[kind])
        record[kind] = size
        if now.random() < 0.7 and size <= 2**20:
            for shard in forged.shards.values():
                _refill(
                    shard,
                    lambda plain: bytes(min(int(len(plain) * ratio), LARGEST_PLANE)),
                    f"{'head' if kind == 'k' else 'tail'}_",
                )
    elif kind == "grid":
        record["temperatures"] = [1.0 + place for place in range(min(size, 20_000))]
    elif kind == "vocabulary":
        content["tokenizer"]["vocabulary_size"] = size
    elif kind == "rows":
        content["rows_per_shard"] = size
    else:
        content["codec"]["name"] = now.choice(["exact", "tkq8", "compact", "fp16", "plain"])
        frame = zstandard.ZstdCompressor(write_checksum=True).compress(
            bytes(now.choice([0, 4, 400, 1 << 24]))
        )
        table = now.choice([_flipped(frame, now), frame, b"", bytes(100)])
        content["codec"]["parameters"] = now.choice([
            {},
            {"mass": now.choice([0, 1, 0.5, -1, 2, True, "x", None, 10**300])},
            {"frequent_ids": base64.b64encode(table).decode()},
            {"frequent_ids": now.choice([0, None, "&", [], "A" * 10_000])},
        ])  # fmt: skip
        if now.random() < 0.5:
            content["tokenizer"]["vocabulary_size"] = now.choice([2**31 - 1, 2**24, size])
    forged.set_manifest(text_of(content))
    _fit_counts(forged, content["sequence_length"])


# Planes


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


def _refill(shard: ForgedShard, change: Callable[[bytes], bytes], prefix: str = "") -> None:
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
        return _flipped(plain, now, 1 + len(plain) // 8)
    if kind == 4:
        return bytes([now.choice([0, 1, 127, 128, 254, 255])]) * len(plain)
    if kind == 5:
        return _cut(plain, now)
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
        return _flipped(frame, now)
    if kind == 7:
        return _cut(frame, now)
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
    shard = _shard(forged, now)
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
                stored[name] = _flipped(stored[name], now)
    shard.messages[place] = _rebuilt(row_of(message), stored)


def plane_swap(forged: Forgery, now: random.Random) -> None:
    """Planes of one another, of another row, none, or very long ones."""
    shard = _shard(forged, now)
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
    shard = _shard(forged, now)
    place = now.randrange(len(shard.messages))
    changed = bytearray(shard.messages[place])
    (metadata,) = struct.unpack_from("<I", changed, 4)
    for _ in range(now.randint(1, 3)):
        kind = now.choice("bbiq")
        at = now.randrange(0, metadata)
        at -= at % struct.calcsize(kind)
        (old,) = struct.unpack_from("<" + kind, changed, at)
        limit = 1 << (8 * struct.calcsize(kind) - 1)
        value = now.choice([old + 1, old - 1, old + 8, old * 2, _number(now), 0])
        struct.pack_into("<" + kind, changed, at, (value + limit) % (2 * limit) - limit)
    shard.messages[place] = bytes(changed)


def message_body(forged: Forgery, now: random.Random) -> None:
    """Changes the row's number, checksums, offsets or padding."""
    shard = _shard(forged, now)
    place = now.randrange(len(shard.messages))
    message = shard.messages[place]
    (metadata,) = struct.unpack_from("<I", message, 4)
    shard.messages[place] = message[: 8 + metadata] + now.choice([_flipped, _cut])(
        message[8 + metadata :], now
    )


def message_kind(forged: Forgery, now: random.Random) -> None:
    """Something else in the place of a batch, or batches in another order."""
    shard = _shard(forged, now)
    place = now.randrange(len(shard.messages))
    message = shard.messages[place]
    other = _shard(forged, now).messages
    stored = list(planes_of(message, shard.planes).values())
    fewer, more = stored[: now.randrange(1, len(stored) + 1)], [*stored, *stored[: now.randint(1, 3)]]
    shard.messages[place] = now.choice([
        lambda: file_header(shard.planes, shard.metadata)[8:],
        lambda: file_footer(shard.planes, shard.metadata, []),
        lambda: bytes(now.choice([1, 8, 300, 1 << 20])),
        lambda: _compressed(shard.planes, row_of(message), stored),
        lambda: now.choice(other),
        lambda: message + message,
        lambda: _cut(message, now),
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
    shard = _shard(forged, now)
    header, footer = (
        file_header(shard.planes, shard.metadata),
        file_footer(shard.planes, shard.metadata, [(8, 8)]),
    )
    if now.random() < 0.5:
        shard.header = now.choice([_flipped, _cut])(header, now) or b"x"
    else:
        shard.footer = now.choice([_flipped, _cut])(footer, now)


def rows_moved(forged: Forgery, now: random.Random) -> None:
    """Rows taken away, added or given to another shard, with indexes that say so."""
    shard = _shard(forged, now)
    now.choice([
        lambda: shard.messages.pop() if len(shard.messages) > 1 else None,
        lambda: shard.messages.append(shard.messages[0]),
        lambda: shard.messages.reverse(),
        lambda: shard.messages.extend(shard.messages * 3),
    ])()  # fmt: skip
    if now.random() < 0.5:
        for (split, number), each in forged.shards.items():
            entry = forged.index["splits"][split]
            entry["rows"] = (entry["rows"] if number else 0) + len(each.messages)
        _fit_counts(forged, json.loads(forged.manifest)["sequence_length"])


def other_files(forged: Forgery, now: random.Random) -> None:
    """The tokenizer's files, and files that nobody expects."""
    name = now.choice(list(forged.others) or ["x"])
    forged.others[name] = now.choice([b"", _flipped(forged.others.get(name, b"x"), now), bytes(1 << 20)])
    forged.others[
        now.choice(["shards/x", "quarantine/train/000000.arrow", "tokenizer/x", ".tmp-1", name])
    ] = b"x"


MUTATORS: dict[str, tuple[Mutator, int]] = {
    "index value": (index_value, 2),
    "index text": (index_text, 1),
    "index table": (table, 2),
    "index size": (index_size, 1),
    "record value": (record_value, 2),
    "record places": (record_places, 2),
    "record text": (record_text, 1),
    "manifest value": (manifest_value, 2),
    "manifest text": (manifest_text, 1),
    "manifest shape": (manifest_shape, 3),
    "plane content": (plane_content, 8),
    "plane swap": (plane_swap, 1),
    "message header": (message_header, 4),
    "message body": (message_body, 2),
    "message kind": (message_kind, 2),
    "shard header or footer": (shard_frame, 1),
    "rows moved": (rows_moved, 1),
    "other files": (other_files, 1),
}
"""Name -> (mutator, how often it is taken)."""
