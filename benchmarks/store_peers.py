"""Other projects' layouts, re-implemented from their public descriptions for the store benchmark alone.

Each writes one file with what its project keeps, and reads any row of it. Where a project leaves a choice the
kinder one is taken: one row group, batch or member per row, so that a random row costs no more than itself.

L positions of a row, k head entries, n draws, E entries.
"""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from numpy.typing import NDArray
from store_data import TOP_K, Case, record_of
from store_layout import Decoded, Layout, Read

from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.row import NO_ID, Row
from sparsekd.trainer.importers.distillkit import Compression, decode_values, unpack_bits

ALL_SIDES = "log R, entropies, true token's log-probability, mask, documents, checksums"
ZSTD_LEVEL = 3


def head_alone(ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> Decoded:
    """What a layout gives back that keeps a head and nothing of the rest."""
    none = np.zeros((len(ids), 0), np.int32)
    return Decoded(ids, logprobs, None, none, none)


def flat_list(values: NDArray[Any], width: int) -> pa.Array:
    """Arrow's list column of [L, width], without a loop."""
    offsets = np.arange(0, values.size + 1, width, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))


class Raw(Layout):
    """int32 ids and float32 values at a fixed stride."""

    name, case = "int32 + fp32, raw", TOP_K
    lacks = ALL_SIDES

    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        with open(folder / "rows.bin", "wb") as file:
            for row in rows:
                record = record_of(row)
                for array in (row.token_ids, record.head_ids, record.head_logprobs):
                    file.write(np.ascontiguousarray(array).data)
        self._length = len(rows[0].token_ids)

    def open(self, folder: Path) -> Read:
        length, k = self._length, self.case.k
        file = open(folder / "rows.bin", "rb", buffering=0)  # noqa: SIM115 - read as long as the benchmark is

        def read(index: int) -> Decoded:
            file.seek(index * length * 4 * (1 + 2 * k))
            content = np.frombuffer(file.read(length * 4 * (1 + 2 * k)), "<i4")
            ids, values = content[length:].reshape(2, length, k)
            return head_alone(ids, values.view("<f4"))

        return read


class ArrowZstd(Layout):
    """Arrow IPC, one record batch per row, buffers compressed by Arrow's own ZSTD."""

    name, case = "Arrow int32 + fp16, ZSTD", TOP_K
    lacks = ALL_SIDES

    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        k = self.case.k
        options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
        names = ["token_id", "ids", "logprobs"]
        with pa.OSFile(str(folder / "rows.arrow"), "wb") as file:
            writer = None
            for row in rows:
                record = record_of(row)
                halves = record.head_logprobs.astype(np.float16)
                columns = [
                    pa.array(row.token_ids),
                    pa.FixedSizeListArray.from_arrays(pa.array(record.head_ids.ravel()), k),
                    pa.FixedSizeListArray.from_arrays(pa.array(halves.ravel()), k),
                ]
                batch = pa.record_batch(columns, names)
                writer = writer or pa.ipc.new_file(file, batch.schema, options=options)
                writer.write_batch(batch)
            if writer is not None:
                writer.close()

    def open(self, folder: Path) -> Read:
        options = pa.ipc.IpcReadOptions(use_threads=False)
        reader = pa.ipc.open_file(pa.OSFile(str(folder / "rows.arrow"), "rb"), options=options)

        def read(index: int) -> Decoded:
            batch = reader.get_batch(index)
            ids, values = (
                batch.column(name).values.to_numpy().reshape(len(batch), -1) for name in ("ids", "logprobs")
            )
            return head_alone(ids, values.astype(np.float32))

        return read


class ParquetSplit(Layout):
    """Parquet, one row group per row, both lists byte-stream-split and zstd-3, page checksums on."""

    name, case = "Parquet int32 + fp16, byte-stream-split, zstd-3", TOP_K
    lacks = ALL_SIDES.replace(", checksums", "")

    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        schema = pa.schema(
            {"token_id": pa.int32(), "ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float16())}
        )
        split = dict.fromkeys(("ids.list.element", "logprobs.list.element"), "BYTE_STREAM_SPLIT")
        with pq.ParquetWriter(
            folder / "rows.parquet",
            schema,
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            use_dictionary=False,
            column_encoding=split,
            write_page_checksum=True,
        ) as writer:
            for row in rows:
                record = record_of(row)
                columns = [
                    pa.array(row.token_ids),
                    flat_list(record.head_ids, self.case.k),
                    flat_list(record.head_logprobs.astype(np.float16), self.case.k),
                ]
                arrays = [column.cast(field.type) for column, field in zip(columns, schema, strict=True)]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

    def open(self, folder: Path) -> Read:
        file = pq.ParquetFile(folder / "rows.parquet", page_checksum_verification=True)

        def read(index: int) -> Decoded:
            table = file.read_row_group(index, columns=["ids", "logprobs", "token_id"], use_threads=False)
            ids, values = (
                table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
                for name in ("ids", "logprobs")
            )
            shape = (table.num_rows, -1)
            return head_alone(ids.reshape(shape), values.reshape(shape).astype(np.float32))

        return read


class Megatron(Layout):
    """Megatron-LM's cached logits, version 2: fp16 values, uint16 low bits, bit 17 as a byte; `torch.save`,
    zstd-3, one tar member per iteration (here: per row)."""

    name, case = "Megatron-LM", TOP_K
    lacks = "token ids (the student replays the data pipeline), " + ALL_SIDES

    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        with tarfile.open(folder / "dp0__0.tar", "w") as tar:
            for index, row in enumerate(rows):
                record = record_of(row)
                # torch's shape: sequence, samples, k
                tensors = {
                    "values": torch.from_numpy(record.head_logprobs.astype(np.float16))[:, None],
                    "indices_low": torch.from_numpy((record.head_ids & 0xFFFF).astype(np.uint16))[:, None],
                    "bit_17": torch.from_numpy(record.head_ids >= 1 << 16)[:, None],
                    "format_version": 2,
                }
                plain = io.BytesIO()
                torch.save(tensors, plain)
                stored = compressor.compress(plain.getvalue())
                member = tarfile.TarInfo(f"{index}.pt.zst")
                member.size = len(stored)
                tar.addfile(member, io.BytesIO(stored))

    def open(self, folder: Path) -> Read:
        tar = tarfile.open(folder / "dp0__0.tar")  # noqa: SIM115 - read as long as the benchmark is
        members = tar.getmembers()
        decompressor = zstandard.ZstdDecompressor()

        def read(index: int) -> Decoded:
            stored = tar.extractfile(members[index])
            assert stored is not None
            plain = decompressor.decompress(stored.read())
            tensors = torch.load(io.BytesIO(plain), weights_only=True)
            low, high, values = (tensors[name][:, 0].numpy() for name in ("indices_low", "bit_17", "values"))
            return head_alone(low + (high.astype(np.int32) << 16), values.astype(np.float32))

        return read


RECOMMENDED = Compression(
    d=0,
    k=TOP_K.k,
    exact_k=16,
    exact_dtype="bfloat16",
    polynomial_terms=(0, 1, 2, 3, 4, "sqrt"),
    term_dtype="float32",
    residual_bins=(),
    delta_encoding=False,
    normalize_t=False,
)
"""DistillKit's recommended settings, at our k (its own is 128)."""

BUDGET = replace(RECOMMENDED, k=50, exact_k=1, polynomial_terms=(0, 1, "sqrt"))
"""DistillKit's budget pick."""


class DistillKit(Layout):
    """DistillKit's Parquet files: bit-packed ids, the first values in bfloat16, the others as a polynomial
    in the rank, fitted by least squares; its writer's default compression."""

    case = TOP_K
    lacks = ALL_SIDES

    def __init__(self, name: str, settings: Compression) -> None:
        self.name, self.settings = name, settings

    def prepare(self, folder: Path, manifest: Manifest, rows: Sequence[Row]) -> None:
        self.settings = replace(self.settings, d=manifest.tokenizer.vocabulary_size)
        ranks = np.arange(self.settings.k - self.settings.exact_k, dtype=np.float64)
        terms = [
            np.sqrt(ranks) if term == "sqrt" else ranks ** int(term)
            for term in self.settings.polynomial_terms
        ]
        self._fit = np.linalg.pinv(np.stack(terms, axis=1))

    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        names = ["input_ids", "compressed_logprobs", "bytepacked_indices"]
        writer = None
        for row in rows:
            record = record_of(row)
            values, ids = (
                self._values(record.head_logprobs[:, : self.settings.k]),
                pack_bits(record.head_ids[:, : self.settings.k], self.settings.id_bits),
            )
            columns = [
                flat_list(row.token_ids.astype(np.uint64), len(row.token_ids)),
                *(_one_text(flat_list(part, part.shape[1])) for part in (values, ids)),
            ]
            table = pa.Table.from_arrays(columns, names)
            writer = writer or pq.ParquetWriter(folder / "data_0.parquet", table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()

    def _values(self, logprobs: NDArray[np.float32]) -> NDArray[np.uint8]:
        exact = to_bfloat16(logprobs[:, : self.settings.exact_k])
        coefficients = (logprobs[:, self.settings.exact_k :] @ self._fit.T).astype("<f4")
        return np.concatenate([exact.view(np.uint8), coefficients.view(np.uint8)], axis=1)

    def open(self, folder: Path) -> Read:
        file = pq.ParquetFile(folder / "data_0.parquet")
        settings = self.settings

        def read(index: int) -> Decoded:
            table = file.read_row_group(index, use_threads=False)
            values, ids = (
                table.column(name).combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
                for name in ("compressed_logprobs", "bytepacked_indices")
            )
            logprobs = decode_values(values.reshape(-1, settings.value_bytes), settings)
            unpacked = unpack_bits(ids.reshape(-1, settings.id_bytes), settings.id_bits, settings.k)
            return head_alone(unpacked.astype(np.int32), logprobs.astype(np.float32))

        return read


def _one_text(positions: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, len(positions)], pa.int32()), positions)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Returns the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def pack_bits(ids: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Returns ids [L, k] as one stream of bits each, most significant first, filled to a byte."""
    stream = np.unpackbits(ids.astype(">u4").view(np.uint8).reshape(*ids.shape, 4), axis=2)
    return np.packbits(stream[:, :, 32 - bits :].reshape(len(ids), -1), axis=1)


@dataclass
class Sampled24(Layout):
    """Sparse Logit Sampling's record (arXiv 2503.16870): 17 bits of id and 7 of count for each distinct
    draw; a count of them per position and per row an offset are added, or nobody could read it."""

    case: Case = Case(0, 50)  # noqa: RUF009 - frozen
    name: str = "Sparse Logit Sampling, 24 bits a draw"
    lacks: str = "token ids, " + ALL_SIDES

    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        self._offsets = [0]
        with open(folder / "rows.bin", "wb") as file:
            for row in rows:
                record = record_of(row)
                used = record.tail_counts > 0
                words = (record.tail_ids[used].astype("<u4") << 7) | record.tail_counts[used].astype("<u4")
                file.write(used.sum(axis=1).astype(np.uint8))
                file.write(np.ascontiguousarray(words[:, None].view(np.uint8)[:, :3]).data)
                self._offsets.append(file.tell())
        self._length = len(rows[0].token_ids)
        np.array(self._offsets, "<i8").tofile(folder / "offsets.bin")

    def open(self, folder: Path) -> Read:
        length, n = self._length, self.case.n
        file = open(folder / "rows.bin", "rb", buffering=0)  # noqa: SIM115 - read as long as the benchmark is

        def read(index: int) -> Decoded:
            begin, end = self._offsets[index : index + 2]
            file.seek(begin)
            content = np.frombuffer(file.read(end - begin), np.uint8)
            used = np.arange(n) < content[:length, None]
            words = np.zeros((int(used.sum()), 4), np.uint8)
            words[:, :3] = content[length:].reshape(-1, 3)
            flat = words.view("<u4")[:, 0]
            ids, counts = np.full((length, n), NO_ID, np.int32), np.zeros((length, n), np.int32)
            ids[used], counts[used] = flat >> 7, flat & 127
            empty = np.zeros((length, 0), np.int32)
            return Decoded(empty, empty.astype(np.float32), None, ids, counts)

        return read


def peers() -> list[Layout]:
    """The other projects' contestants."""
    return [
        Megatron(),
        DistillKit("DistillKit, recommended terms", RECOMMENDED),
        DistillKit("DistillKit, budget (k=50)", BUDGET),
        ArrowZstd(),
        ParquetSplit(),
        Raw(),
        Sampled24(),
    ]
