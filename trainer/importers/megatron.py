"""Megatron-LM's cached logits: tar files of top log-probabilities, one per data-parallel rank and checkpoint.

Layout, as of NVIDIA/Megatron-LM (megatron/training/distillation/logits_saver.py and utils.py; version 1 at
commit 0e099c7, version 2 at 10cc4f5). A tar is named `cp{C}_dp{D}__{I}.tar` or `dp{D}__{I}.tar`, I a number
or a range `a-b`. Its first member is `_meta.json` (`hash`, `identifiers`, `saver`); the others are
`{i}.pt.zst` or `{a}-{b}.pt.zst`, one per iteration in ascending order: zstd around what `torch.save` made of

- version 1: `values`, `indices_low`, `bit_17`: lists of tensors [sequence, samples, K], one per micro-batch;
- version 2: the same three as one tensor [sequence, samples of this rank, K] each, and `format_version`: 2.

`values` are log-probabilities over the whole vocabulary in float16, bfloat16 or float32; an id is
bit_17 * 65536 + indices_low. Under top-p, entries behind a position's nucleus have the value -1e3 or -1e4.
Sample s of micro-batch m of data-parallel rank d is sample (m * ranks + d) * micro-batch size + s of its
iteration; version 2 names ranks and micro-batch size in `saver`.

These tars hold no tokens. They belong to a run of Megatron's data pipeline, so a token store has to bring
them: its row number g is Megatron's sample g, sample 0 the first one of the first iteration. Nothing in the
files proves that; `store verify` compares records and tokens afterwards. What a context-parallel rank above 0
wrote is a slice of a sequence and is refused. Version 3 holds its tokens: see `megatron_paired`.

Shapes: L positions of a row, K most entries of a position.
"""

import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.row import Row
from sparsekd.trainer.importers.document import Document, Format, Options, Source, one_line, source_files
from sparsekd.trainer.importers.megatron_paired import CACHE_NAME, read_paired
from sparsekd.trainer.importers.megatron_tars import (
    TAR_NAME,
    check_end,
    listed,
    read_json,
    read_member,
    tensor_of,
    unpack_tensors,
)
from sparsekd.trainer.importers.torch_file import numbers_of

if TYPE_CHECKING:
    import torch

MEMBER_NAME = re.compile(r"(?P<first>\d{1,15})(?:-(?P<last>\d{1,15}))?\.pt\.zst")
DETAILS: tuple[str, ...] = ("hash", "identifiers", "saver")
"""What the manifest keeps of `_meta.json`."""

NAMES = ("values", "indices_low", "bit_17")


@dataclass(frozen=True)
class Capture:
    """A folder of Megatron-LM's tars.

    Attributes:
        path: the folder.
        files: of each data-parallel rank, in order of iterations.
        version: of the payload, 1 or 2.
        micro_batch: samples of a micro-batch; None where only the payload tells (version 1).
        details: what the first tar says about its data.
    """

    path: Path
    files: tuple[tuple[Path, ...], ...]
    version: int
    micro_batch: int | None
    details: dict[str, Any]


class Listed(NamedTuple):
    """What is listed for one sample.

    Attributes:
        where: the member, for messages.
        ids: int64 [L, K], `NOT_LISTED` outside of the nucleus.
        values: float64 [L, K].
    """

    where: str
    ids: NDArray[np.int64]
    values: NDArray[np.float64]


class Member(NamedTuple):
    """One iteration of one rank.

    Attributes:
        where: its place, for messages.
        span: first number of its name, and one past the last.
        data: its bytes.
    """

    where: str
    span: tuple[int, int]
    data: bytes


def read_megatron(path: Path, options: Options) -> Source:
    """Opens a folder of tars of any version.

    Raises:
        StoreError: a rank is missing, a file has another name, the layout is not one that is read, or the
            token store is missing (versions 1 and 2) or not wanted (version 3).
    """
    files = source_files(path, (".tar",), "Megatron-LM's tars")
    if (files[0].parent / CACHE_NAME).exists() or _version(_meta_of(files[0])) == 3:
        return read_paired(path, options)
    capture = open_megatron(path)
    tokens = options.tokens
    if tokens is None:
        raise StoreError(
            f"{files[0]} holds no tokens (version {capture.version} of Megatron-LM's tars): give --tokens, a "
            "token store whose row number g is the run's sample g."
        )

    def documents() -> Iterator[Document]:
        rows = tokens.rows(options.split)
        for number, sample in enumerate(listed_samples(capture)):
            if number >= rows:
                raise StoreError(
                    f"{path} has more samples than split {options.split} of {tokens.path} has rows ({rows}): "
                    "this is not the text that was captured."
                )
            yield _document(sample, tokens.read_row(options.split, number))

    return Source(
        files=tuple(file for rank in capture.files for file in rank),
        rest="derived",
        documents=documents,
        details={"megatron": capture.details},
        tokens=tokens,
        split=options.split,
    )


FORMAT = Format(
    name="megatron",
    reads="Megatron-LM's tars: version 3, or 1 and 2 with --tokens",
    suffixes=(".tar",),
    fields=(),
    read=read_megatron,
    cannot_give=(
        "tokens and loss masks, in versions 1 and 2 (the token store's are taken, row by row)",
        "whether attention was cut at document borders, in versions 1 and 2",
    ),
    flags=("tokens", "split"),
)


def open_megatron(path: Path) -> Capture:
    """Opens a folder of tars of version 1 or 2 and checks that their names fit together.

    Raises:
        StoreError: a rank is missing, a file has another name, or the layout is not one that is read.
    """
    by_rank: dict[int, list[tuple[int, Path]]] = {}
    for file in source_files(path, (".tar",), "Megatron-LM's tars"):
        match = TAR_NAME.fullmatch(file.name)
        if match is None:
            raise StoreError(
                f"{file} is no name of Megatron-LM's tars, such as dp0__100.tar: move it elsewhere."
            )
        if int(match["cp"] or 0) > 0:
            raise StoreError(
                f"{file} is of context-parallel rank {match['cp']}, which holds a slice of each sequence: "
                "capture without context parallelism, or with a Megatron-LM that joins the ranks (its tars "
                "have no cp)."
            )
        by_rank.setdefault(int(match["dp"]), []).append((int(match["first"]), file))
    missing = next(rank for rank in range(len(by_rank) + 1) if rank not in by_rank)
    if missing < len(by_rank):
        raise StoreError(f"{path} has no tar of data-parallel rank {missing}: fetch all ranks' tars.")
    files = tuple(tuple(file for _, file in sorted(by_rank[rank])) for rank in range(len(by_rank)))
    meta = _meta_of(files[0][0])
    saver = meta.get("saver")
    saver = saver if isinstance(saver, dict) else {}
    version = _version(meta)
    if version not in (1, 2):
        raise StoreError(
            f"{files[0][0]} has format version {version} of Megatron-LM's tars; 1, 2 and 3 are read."
        )
    if saver.get("dp_size_save", len(files)) != len(files):
        raise StoreError(
            f"{path} has tars of {len(files)} data-parallel ranks, but {saver['dp_size_save']} wrote them: "
            "fetch all."
        )
    details: dict[str, Any] = {name: meta[name] for name in DETAILS if name in meta}
    micro_batch = saver.get("mbs_save")
    if version == 2 and not (isinstance(micro_batch, int) and micro_batch > 0):
        raise StoreError(
            f"{files[0][0]}: _meta.json lacks saver.mbs_save, without which samples have no order."
        )
    return Capture(path, files, version, micro_batch if version == 2 else None, details)


def listed_samples(capture: Capture) -> Iterator[Listed]:
    """Returns what is listed for each sample, in the order of the run; one sample is in memory, and one
    iteration of all ranks unpacked on disk.

    Raises:
        StoreError: an iteration is missing or damaged, or ranks differ in their shapes.
    """
    streams = [_members(files) for files in capture.files]
    expected: int | None = None
    for members in _in_step(streams, capture):
        first, end = members[0].span
        if expected is not None and first != expected:
            raise StoreError(
                f"{members[0].where} comes behind iteration {expected}, which is missing: fetch all tars of "
                "the run."
            )
        expected = end
        with tempfile.TemporaryDirectory(prefix="sparsekd-import-") as folder:
            ranks = [_micro_batches(member, Path(folder), capture) for member in members]
            counts = [len(rank) for rank in ranks]
            if len(set(counts)) != 1:
                raise StoreError(
                    f"{members[0].where}: ranks have {counts} micro-batches in this iteration, expected "
                    "equal numbers."
                )
            for micro_batch in range(counts[0]):
                for member, rank in zip(members, ranks, strict=True):
                    values, low, high = rank[micro_batch]
                    for sample in range(values.shape[1]):
                        ids, logprobs = listed(
                            values[:, sample], low[:, sample], numbers_of(high[:, sample].contiguous())
                        )
                        yield Listed(
                            f"{member.where}, micro-batch {micro_batch}, sample {sample}", ids, logprobs
                        )


def _document(sample: Listed, row: Row) -> Document:
    length = len(row.token_ids)
    if len(sample.ids) != length:
        raise StoreError(
            f"{sample.where} has {len(sample.ids)} positions, but the token store's rows have {length}: "
            "prepare the tokens with the sequence length of the captured run."
        )
    return Document(
        where=sample.where,
        token_ids=row.token_ids.astype(np.int64),
        loss_mask=row.loss_mask,
        head_ids=sample.ids,
        head_logprobs=sample.values,
        segment_starts=row.segment_starts.astype(np.int64),
        segment_documents=row.segment_documents,
    )


def _micro_batches(
    member: Member, folder: Path, capture: Capture
) -> list[tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]]:
    """Returns values, lower bits and 17th bits, each [sequence, samples, K], of every micro-batch of a
    member."""
    where = member.where
    payload = unpack_tensors(member.data, folder, where)
    if capture.version == 2:
        values = tensor_of(payload, "values", "fractions", where)
        size = capture.micro_batch or 1
        samples = values.shape[1] if values.ndim == 3 else 0
        if samples % size:
            raise StoreError(f"{where} has {samples} samples, which are no micro-batches of {size}.")
        values, low, high = _checked(payload, where)
        parts = [slice(start, start + size) for start in range(0, samples, size)]
        return [(values[:, part], low[:, part], high[:, part]) for part in parts]
    lists = [payload.get(name) for name in NAMES]
    if not all(isinstance(part, list) for part in lists) or len({len(part or ()) for part in lists}) != 1:
        raise StoreError(f"{where} does not hold three lists of equal length, as version 1 does.")
    return [_checked(dict(zip(NAMES, parts, strict=True)), where) for parts in zip(*lists, strict=True)]


def _checked(payload: dict[str, Any], where: str) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    values = tensor_of(payload, "values", "fractions", where)
    low, high = (tensor_of(payload, name, "integers", where) for name in NAMES[1:])
    if values.ndim != 3 or not values.shape == low.shape == high.shape:
        shapes = [list(part.shape) for part in (values, low, high)]
        raise StoreError(
            f"{where}: {', '.join(NAMES)} have shapes {shapes}, expected three equal ones of [sequence, "
            "samples, K]."
        )
    return values, low, high


def _in_step(streams: list[Iterator[Member]], capture: Capture) -> Iterator[list[Member]]:
    """Returns the members of one iteration of all ranks at a time."""
    while True:
        members = [next(stream, None) for stream in streams]
        present = [member for member in members if member is not None]
        if not present:
            return
        if len(present) != len(members):
            rank = members.index(None)
            raise StoreError(
                f"{capture.path}: data-parallel rank {rank} ends before {present[0].where}: fetch all tars "
                "of the run."
            )
        other = next((member for member in present if member.span != present[0].span), None)
        if other is not None:
            raise StoreError(
                f"{capture.path}: {present[0].where} and {other.where} are not of one iteration: a rank "
                "lacks one; fetch all tars of the run."
            )
        yield present


def _members(files: tuple[Path, ...]) -> Iterator[Member]:
    """Returns each iteration of one rank, in order."""
    for file in files:
        try:
            check_end(file)
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    match = MEMBER_NAME.fullmatch(member.name)
                    if match is None:
                        continue
                    where, first = f"{file}, {member.name}", int(match["first"])
                    last = int(match["last"]) if match["last"] else first + 1
                    yield Member(where, (first, last), read_member(tar, member, where))
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
            raise StoreError(f"{file} is damaged ({one_line(error)}): fetch it again.") from error


def _meta_of(file: Path) -> dict[str, Any]:
    """Returns what `_meta.json`, the first member, says."""
    try:
        with tarfile.open(file, "r:") as tar:
            member = tar.next()
            if member is None or member.name != "_meta.json":
                raise StoreError(f"{file} does not begin with _meta.json: it is no tar of Megatron-LM's.")
            return read_json(read_member(tar, member, f"{file}, _meta.json"), f"{file}, _meta.json")
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise StoreError(f"{file} has no readable _meta.json ({one_line(error)}): fetch it again.") from error


def _version(meta: dict[str, Any]) -> Any:
    """Returns the version, which stands at the top since version 3 and in `saver` before."""
    saver = meta.get("saver")
    before = saver.get("format_version", 1) if isinstance(saver, dict) else 1
    return meta.get("format_version", before)
