"""Shards with right checksums and wrong content: a sentence, never a crash, a hang or a gibibyte."""

import ast
import io
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store import protocol
from sparsekd.logit_store.errors import DamagedStoreError, StoreError
from sparsekd.logit_store.protocol.arrow_layout import batch_message, file_footer, file_header, split_message
from sparsekd.logit_store.protocol.message import row_message, shard_header
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.recover import record_of_file
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.logit_store.tools.verify import verify_store

sys.path.append(str(Path(__file__).parent))
from forgery import Forgery, planes_of, row_of
from kinds import manifest_of_kind


def _schema(planes: list[str], metadata: dict[str, str] | None = None) -> pa.Schema:
    item = pa.field("item", pa.uint32(), nullable=False)
    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("crc32", pa.list_(item, len(planes)), nullable=False),
        *(pa.field(plane, pa.binary(), nullable=False) for plane in planes),
    ]
    return pa.schema(fields, metadata)


def _batch(schema: pa.Schema, row: int, crc32: list[int], stored: list[bytes]) -> pa.RecordBatch:
    crcs = pa.FixedSizeListArray.from_arrays(pa.array(crc32, pa.uint32()), type=schema.field("crc32").type)
    columns = [pa.array([value], pa.binary()) for value in stored]
    return pa.record_batch([pa.array([row], pa.int64()), crcs, *columns], schema=schema)


def _written_by_arrow(schema: pa.Schema, batches: list[pa.RecordBatch], **options) -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_file(out, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return out.getvalue()


@pytest.mark.parametrize("seed", range(40))
def test_our_bytes_are_those_of_arrow(seed: int) -> None:
    random = np.random.default_rng(seed)
    planes = [f"plane{'_' * random.integers(9)}{place}" for place in range(random.integers(1, 20))]
    metadata = {"k" * (place + 1): "é" * random.integers(40) for place in range(random.integers(1, 7))}
    schema = _schema(planes, metadata)
    ours = file_header(planes, list(metadata.items()))
    batches, places = [], []
    for row in range(random.integers(0, 6)):
        stored = [random.bytes(random.choice([0, 1, 7, 8, 9, 100])) for _ in planes]
        crc32 = random.integers(0, 2**32, len(planes)).tolist()
        batches.append(_batch(schema, row, crc32, stored))
        message = batch_message(row, crc32, stored)
        assert split_message(message, len(planes)) == (row, tuple(crc32), stored)
        places.append((len(ours), len(message)))
        ours += message
    ours += file_footer(planes, list(metadata.items()), places)
    # Arrow writes header and footer also of no batches.
    assert ours == _written_by_arrow(schema, batches)


def test_the_protocol_needs_no_arrow() -> None:
    """What no library interprets, no library of another release or with another fault interprets."""
    for file in Path(protocol.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "pyarrow" for name in names), file


def test_every_changed_bit_of_a_header_is_refused_or_means_nothing() -> None:
    stored = [b"", b"x" * 9, b"y" * 30]
    message = batch_message(5, [1, 2, 3], stored)
    header = len(message) - struct.unpack_from("<q", message, 40)[0]
    for place in range(header):
        for bit in range(8):
            changed = bytearray(message)
            changed[place] ^= 1 << bit
            with pytest.raises(ValueError):
                split_message(bytes(changed), 3)
    for length in range(len(message)):
        with pytest.raises(ValueError):
            split_message(message[:length], 3)
    with pytest.raises(ValueError, match="body has"):
        split_message(message + bytes(8), 3)
    for count in (1, 2, 4, 50):
        with pytest.raises(ValueError):
            split_message(message, count)


@pytest.fixture
def forged(tmp_path: Path) -> Forgery:
    manifest = synthetic_manifest(splits=("train",))
    write_synthetic_store(tmp_path / "sound", manifest, {"train": 4}, seed=0)
    return Forgery.of(tmp_path / "sound")


def _compressed(message: bytes, planes: list[str]) -> bytes:
    stored = planes_of(message, planes)
    stored[planes[0]] = bytes(1 << 26)  # 67 MB of zeros in some kilobytes
    schema = _schema(planes)
    batch = _batch(schema, row_of(message), [0] * len(planes), list(stored.values()))
    return _serialized(batch, compression="zstd")


def _serialized(batch: pa.RecordBatch, **options) -> bytes:
    file = _written_by_arrow(batch.schema, [batch], **options)
    stream = pa.BufferReader(file)
    stream.seek(8)
    pa.ipc.read_message(stream)  # the schema
    begin = stream.tell()
    pa.ipc.read_message(stream)
    return file[begin : stream.tell()]


def _two_rows(message: bytes, planes: list[str]) -> bytes:
    batch = _batch(
        _schema(planes), row_of(message), [0] * len(planes), list(planes_of(message, planes).values())
    )
    return _serialized(pa.Table.from_batches([batch, batch]).combine_chunks().to_batches()[0])


def _with_null(message: bytes, planes: list[str]) -> bytes:
    schema = pa.schema([field.with_nullable(True) for field in _schema(planes)])
    columns = [pa.array([row_of(message)], pa.int64()), pa.nulls(1, schema.field("crc32").type)]
    return _serialized(
        pa.record_batch([*columns, *(pa.nulls(1, pa.binary()) for _ in planes)], schema=schema)
    )


def _schema_message(message: bytes, planes: list[str]) -> bytes:
    return file_header(planes, [])[8:]


def _dictionary(message: bytes, planes: list[str]) -> bytes:
    names = pa.array(["a"]).dictionary_encode()
    schema = pa.schema([pa.field("row", names.type)])
    return _serialized(pa.record_batch([names], schema=schema))  # the dictionary goes before the batch


def _wild_offset(message: bytes, planes: list[str]) -> bytes:
    """The header that ended the process: a buffer that begins somewhere in the address space."""
    changed = bytearray(message)
    struct.pack_into("<q", changed, 88 + 16 * 7, 1 << 40)
    return bytes(changed)


def _wild_offsets_in_the_body(message: bytes, planes: list[str]) -> bytes:
    changed = bytearray(message)
    (metadata,) = struct.unpack_from("<I", message, 4)
    (place,) = struct.unpack_from("<q", message, 88 + 16 * 6)
    struct.pack_into("<ii", changed, 8 + metadata + place, -(2**31), 2**31 - 1)
    return bytes(changed)


FORGERIES: dict[str, Callable[[bytes, list[str]], bytes]] = {
    "compressed": _compressed,
    "two rows": _two_rows,
    "nulls": _with_null,
    "a schema": _schema_message,
    "a dictionary": _dictionary,
    "wild offset": _wild_offset,
    "wild offsets in the body": _wild_offsets_in_the_body,
    "half": lambda message, planes: message[: len(message) // 2],
    "eight bytes": lambda message, planes: bytes(8),
}


@pytest.mark.parametrize("kind", sorted(FORGERIES))
def test_a_forged_batch_gives_a_sentence(tmp_path: Path, forged: Forgery, kind: str) -> None:
    shard = forged.shards["train", 0]
    shard.messages[1] = FORGERIES[kind](shard.messages[1], shard.planes)
    path = forged.write(tmp_path / "store")
    store = open_store(path)
    with pytest.raises(DamagedStoreError, match=r"row 1") as caught:
        store.read_row("train", 1)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    for other in (0, 2, 3):
        assert store.read_row("train", other).teacher is not None
    result = verify_store(path)
    assert result.damaged == (("train", 0),) and len(result.problems) == 1
    with pytest.raises(StoreError):
        record_of_file(path, store.manifest, "train", 0)


def test_segments_longer_than_the_row_are_found_before_there_is_room_for_them(tmp_path: Path) -> None:
    """Planes that stand at every position but padding are as long as the segments say."""
    manifest = manifest_of_kind("plain", planes=True)
    write_synthetic_store(tmp_path / "sound", manifest, {"train": 1}, seed=0)
    forged = Forgery.of(tmp_path / "sound")
    shard = forged.shards["train", 0]
    stored = planes_of(shard.messages[0], shard.planes)
    documents = len(stored["segment_documents"]) // 8
    assert documents > 1
    stored["segment_starts"] = np.full(documents, -(2**31), np.int32).tobytes()
    shard.messages[0] = row_message(0, [stored[name] for name in shard.planes])
    path = forged.write(tmp_path / "store")
    said = r"row 0, plane segment_starts: its segments have 2\d{9} positions, at most 16 fit"
    with pytest.raises(DamagedStoreError, match=said):
        open_store(path).read_row("train", 0)
    assert not verify_store(path).ok


def test_a_forged_header_or_footer_is_no_sound_store(tmp_path: Path, forged: Forgery) -> None:
    """Readers of ours do not need them, but other programs do."""
    shard = forged.shards["train", 0]
    sound = shard.metadata
    manifest = open_store(forged.write(tmp_path / "sound again")).manifest
    assert verify_store(tmp_path / "sound again").ok
    for number, (header, footer, words) in enumerate(
        [
            (file_header(shard.planes[::-1], sound), None, "its header is not"),
            (None, bytes(100), "its footer is not"),
            (None, file_footer(shard.planes, sound, [(0, 8)] * 3), "its footer is not"),
        ]
    ):
        shard.header, shard.footer = header, footer
        path = forged.write(tmp_path / str(number))
        result = verify_store(path)
        assert not result.ok and words in result.problems[0], result.problems
        with pytest.raises(StoreError):
            record_of_file(path, manifest, "train", 0)
    assert shard_header(manifest, "train", 0) == file_header(shard.planes, sound)


def test_a_plane_whose_own_checksum_is_wrong_is_found(tmp_path: Path, forged: Forgery) -> None:
    shard = forged.shards["train", 0]
    stored = list(planes_of(shard.messages[0], shard.planes).values())
    assert row_message(0, stored) == shard.messages[0]
    shard.messages[0] = batch_message(0, [7] * len(stored), stored)
    path = forged.write(tmp_path / "store")
    (problem,) = verify_store(path).problems
    assert "row 0, plane token_ids: its own checksum differs" in problem
