"""Stores of a hostile stranger: their content is changed, and every checksum above it made right again.

Checksums protect from accidents, not from people: who changes a plane can also make the crc32 of its batch,
the sha256 of its file, the digest of its record and that of the index. What is left to find it are the checks
of the content.
"""

import hashlib
import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.protocol.arrow_layout import file_footer, file_header, split_message
from sparsekd.logit_store.protocol.message import row_message
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import Row

DIGEST = re.compile(rb'"digest": "[0-9a-f]*"')


def text_of(content: object) -> bytes:
    """The canonical text of a value, also of one that no store may hold."""
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()


def signed(text: bytes) -> bytes:
    """The text with the digest that it must have, wherever it has one."""
    empty = DIGEST.sub(b'"digest": ""', text, count=1)
    digest = hashlib.sha256(empty).hexdigest().encode()
    return empty.replace(b'"digest": ""', b'"digest": "' + digest + b'"', 1)


def digest_in(text: bytes) -> str:
    match = DIGEST.search(text)
    return "" if match is None else match[0][11:-1].decode()


@dataclass
class ForgedShard:
    """One shard, in the parts that its checksums are made from.

    Attributes:
        planes: names of the stored planes.
        metadata: of the schema.
        messages: one batch per row.
        record: content of the commit record; what describes the file is made anew but for `kept`.
        kept: fields of the record that stay as they are.
        header: bytes of the header, where they are not to be made from `planes` and `metadata`.
        footer: likewise.
        record_text: of the record, where it is not to be made from `record`; only signed.
    """

    planes: list[str]
    metadata: list[tuple[str, str]]
    messages: list[bytes]
    record: dict[str, Any]
    kept: set[str] = field(default_factory=set)
    header: bytes | None = None
    footer: bytes | None = None
    record_text: bytes | None = None
    counted: list[int] = field(default_factory=list)

    def plane_bytes(self) -> dict[str, int] | None:
        """Stored bytes of each plane; None where a batch is none."""
        try:
            stored = [planes_of(message, self.planes) for message in self.messages]
        except ValueError:
            return None
        return {name: sum(len(planes[name]) for planes in stored) for name in self.planes}

    def entries(self) -> list[bytes]:
        """The entries of its rows in the index's table."""
        begin = len(file_header(self.planes, self.metadata) if self.header is None else self.header)
        entries = []
        for place, message in enumerate(self.messages):
            counted = self.counted[place] if place < len(self.counted) else 0
            entries.append(struct.pack("<QIII", begin, len(message), zlib.crc32(message), counted))
            begin += len(message)
        return entries

    def files(self) -> tuple[bytes, bytes]:
        """(Arrow file, signed commit record)."""
        header = file_header(self.planes, self.metadata) if self.header is None else self.header
        lengths = [len(message) for message in self.messages]
        offsets = [len(header) + sum(lengths[:place]) for place in range(len(lengths))]
        footer = self.footer
        if footer is None:
            footer = file_footer(self.planes, self.metadata, list(zip(offsets, lengths, strict=True)))
        data = b"".join([header, *self.messages, footer])
        made = {
            "offsets": offsets,
            "lengths": lengths,
            "crc32": [zlib.crc32(message) for message in self.messages],
            "file_bytes": len(data),
            "file_sha256": hashlib.sha256(data).hexdigest(),
        }
        if (stored := self.plane_bytes()) is not None:
            made["plane_bytes"] = stored
        self.record |= {name: value for name, value in made.items() if name not in self.kept}
        return data, signed(text_of(self.record) if self.record_text is None else self.record_text)


@dataclass
class Forgery:
    """A whole store; see `ForgedShard`.

    Attributes:
        manifest: its bytes.
        index: content of the index; digests and sums of file lengths are made anew.
        index_text: of the index, where it is not to be made from `index`; only signed.
        index_is_forged: whether what the index says of planes is to stay as it is.
        tables: what is done to the table of a split's rows, by the split; its digest is made anew.
        shards: (split, number) -> shard.
        others: the other files.
    """

    manifest: bytes
    index: dict[str, Any]
    shards: dict[tuple[str, int], ForgedShard]
    others: dict[str, bytes]
    index_text: bytes | None = None
    index_is_forged: bool = False
    tables: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> "Forgery":
        """Takes a sound store apart."""
        files = {
            file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()
        }
        manifest, index = files.pop("MANIFEST.json"), json.loads(files.pop("INDEX.json"))
        shards = {}
        for split, entry in index["splits"].items():
            files.pop(f"index/{split}-{entry['table_sha256'][:16]}.bin", None)
            for number in range(entry["shards"]):
                stem = f"shards/{split}/{number // 1000:03d}/{number:06d}"
                shards[split, number] = _taken_apart(
                    files.pop(stem + ".arrow"), json.loads(files.pop(stem + ".json"))
                )
        return cls(manifest, index, shards, files)

    def set_manifest(self, text: bytes) -> None:
        """Takes another manifest, in every place that names its digest."""
        self.manifest = text
        digest = hashlib.sha256(text).hexdigest()
        for shard in self.shards.values():
            shard.record["manifest_sha256"] = digest
            shard.metadata = [
                (key, digest if key == "sparsekd.manifest_sha256" else value) for key, value in shard.metadata
            ]

    def write(self, path: Path) -> Path:
        """Writes the store with right checksums; returns its folder."""
        for name, data in self.files().items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path

    def files(self) -> dict[str, bytes]:
        files = dict(self.others)
        sizes: dict[str, int] = {}
        stored: dict[str, Counter[str]] = {}
        rows: dict[str, list[bytes]] = {}
        digests: dict[str, list[bytes]] = {}
        for (split, number), shard in self.shards.items():
            data, record = shard.files()
            files[f"shards/{split}/{number // 1000:03d}/{number:06d}.arrow"] = data
            files[f"shards/{split}/{number // 1000:03d}/{number:06d}.json"] = record
            entry = self.index["splits"][split]
            rows.setdefault(split, []).extend(shard.entries())
            digests.setdefault(split, []).append(bytes.fromhex(digest_in(record)))
            sizes[split] = sizes.get(split, 0) + len(data)
            entry["file_bytes"] = sizes[split]
            planes = shard.plane_bytes()
            stored.setdefault(split, Counter()).update(planes or {})
            if planes is not None and not self.index_is_forged:
                entry["plane_bytes"] = dict(stored[split])
        for split, entries in rows.items():
            table = self.tables.get(split, bytes)(b"".join(entries + digests[split]))
            sha256 = hashlib.sha256(table).hexdigest()
            files[f"index/{split}-{sha256[:16]}.bin"] = table
            if isinstance(self.index["splits"].get(split), dict):
                self.index["splits"][split]["table_sha256"] = sha256
        self.index["manifest_sha256"] = hashlib.sha256(self.manifest).hexdigest()
        files["INDEX.json"] = signed(text_of(self.index) if self.index_text is None else self.index_text)
        files["MANIFEST.json"] = self.manifest
        return files


def _taken_apart(data: bytes, record: dict[str, Any]) -> ForgedShard:
    # By the library, not by our own reader of its bytes.
    import pyarrow as pa

    schema = pa.ipc.read_schema(pa.py_buffer(data[8:]))
    places = zip(record["offsets"], record["lengths"], strict=True)
    return ForgedShard(
        planes=schema.names[2:],
        metadata=[(key.decode(), value.decode()) for key, value in schema.metadata.items()],
        messages=[data[offset : offset + length] for offset, length in places],
        record=record,
        counted=list(record["counted"]),
    )


def planes_of(message: bytes, names: list[str]) -> dict[str, bytes]:
    """The stored planes of a batch. Raises ValueError where it is none; Arrow's own reader may die of it."""
    _, _, stored = split_message(message, len(names))
    return {name: bytes(plane) for name, plane in zip(names, stored, strict=True)}


def row_of(message: bytes) -> int:
    """The row's number in a sound batch, which begins its body."""
    (metadata,) = struct.unpack_from("<I", message, 4)
    return int(struct.unpack_from("<q", message, 8 + metadata)[0])


def swap_row(path: Path, target: Path, split: str, index: int, row: Row) -> Path:
    """Writes a store in which a row of the first shard is another, whatever rules that breaks."""
    forgery, manifest = Forgery.of(path), open_store(path).manifest
    shard, stored = forgery.shards[split, 0], codec_of(manifest).encode(row, manifest)
    shard.messages[index] = row_message(index, [stored[name] for name in shard.planes])
    return forgery.write(target)
