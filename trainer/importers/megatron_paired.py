"""Megatron-LM's cache version 3: tokens and top log-probabilities together, with checksums.

Layout, as of AAnoosheh/Megatron-LM commit 154f534 (megatron/training/distillation/v3_format.py, v3_storage.py
and v3_saver.py; the branch of the feature's author, its versions 1 and 2 are in NVIDIA/Megatron-LM). A cache
is a folder with

- `_v3_cache.json`: the run's settings, `format_version` 3 among them at the top;
- `dp{D}__{a}-{b}.tar` for each data-parallel rank D and run of samples a to b - 1, whose first member
  `_meta.json` repeats the settings;
- `dp{D}__{a}-{b}.tar.ready.json` once a tar is whole: `metadata` (the settings), `tar` (its name) and
  `records`, one per iteration in order: `start`, `end`, `sample_ids`, `record_id`, and for each of `inputs`
  and `targets` the `member`'s name, its `size` and `sha256`.

Members are named `{start}-{end}.inputs.pt.zst` and `.targets.pt.zst`: zstd around a dict that `torch.save`
wrote, with `format_version` and `record_id`.

- inputs: `sample_offsets` int64 [S + 1]; `tokens`, `labels`, `position_ids` int32 [N] and `loss_mask` bool or
  float32 [N], the rank's samples one behind the other; `cu_seqlens` and `cu_seqlens_padded`, None or one
  int32 tensor per sample with the borders of its documents, 0 to its length; `sample_ids`.
- targets: `values` [N, K], `indices_low` uint16 [N, K], and `bit_17`, the ids' 17th bits, eight to a byte,
  first entry first and most significant first. Values at or below -1e3 mark what is not kept.

Position t describes label t, the token that follows. Sample ids are as in the other versions: (m * ranks + d)
* micro-batch size + s behind `start`. Documents end at `cu_seqlens_padded` (at `cu_seqlens` where that is
None); with `reset_attention_mask` behind each end-of-document token. Otherwise attention crossed them, and a
sample is one document here.

Shapes: S samples of a rank in an iteration, N positions of all of them, K most entries of a position.
"""

import hashlib
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.document import (
    Document,
    Options,
    Source,
    labelled_document,
    one_line,
    source_files,
)
from sparsekd.trainer.importers.megatron_tars import (
    MOST_JSON_BYTES,
    TAR_NAME,
    check_end,
    listed,
    read_json,
    read_member,
    tensor_of,
    unpack_tensors,
)
from sparsekd.trainer.importers.torch_file import numbers_of

CACHE_NAME = "_v3_cache.json"
READY = ".ready.json"
KINDS = ("inputs", "targets")
DETAILS = (
    "generation",
    "dataset_identity",
    "teacher_checkpoint",
    "targets",
    "seq_length",
    "tokenizer",
    "inter_document_masking",
    "reset_attention_mask",
    "sft",
)
"""What the manifest keeps of the settings."""

COUNTS = {"dp_size_save": (1, 1 << 20), "mbs_save": (1, 1 << 20), "first_sample": (0, 1 << 48)}
"""Settings that give the order of samples, and their bounds."""


@dataclass(frozen=True)
class Tar:
    """One published tar.

    Attributes:
        file: the tar.
        rank: data-parallel.
        records: of `.ready.json`, checked to be objects with the fields that are read.
    """

    file: Path
    rank: int
    records: tuple[Mapping[str, Any], ...]

    @property
    def span(self) -> tuple[int, int]:
        """Returns its first sample, and one past its last."""
        return self.records[0]["start"], self.records[-1]["end"]


class Payload(NamedTuple):
    """One iteration of one rank.

    Attributes:
        where: its place, for messages.
        inputs: the dict of tokens and masks.
        targets: the dict of log-probabilities.
        offsets: int64 [S + 1].
    """

    where: str
    inputs: Mapping[str, Any]
    targets: Mapping[str, Any]
    offsets: NDArray[np.int64]


def read_paired(path: Path, options: Options) -> Source:
    """Opens a cache of version 3.

    Raises:
        StoreError: a file is missing, not finished or damaged, or a token store was given.
    """
    if options.tokens is not None:
        raise StoreError(
            f"{path} is a cache of version 3, which holds its tokens: give --tokenizer in place of --tokens."
        )
    folder = path if path.is_dir() else path.parent
    settings = _read(folder / CACHE_NAME)
    if settings.get("format_version") != 3:
        raise StoreError(
            f"{folder / CACHE_NAME} has format version {settings.get('format_version')}, expected 3."
        )
    for name, (least, most) in COUNTS.items():
        _integer(settings, name, least, most, f"{folder / CACHE_NAME}")
    groups = _groups(folder, settings)

    def documents() -> Iterator[Document]:
        for group in groups:
            yield from _documents_of(group, settings)

    return Source(
        files=tuple(tar.file for group in groups for tar in group),
        rest="derived",
        documents=documents,
        details={"megatron": {name: settings[name] for name in DETAILS if name in settings}},
    )


def _groups(folder: Path, settings: Mapping[str, Any]) -> list[list[Tar]]:
    """Returns the tars of all ranks for one run of samples after the other."""
    by_span: dict[tuple[int, int], dict[int, Tar]] = {}
    for file in source_files(folder, (".tar",), "Megatron-LM's tars"):
        tar = _tar(file, settings)
        by_span.setdefault(tar.span, {})[tar.rank] = tar
    groups = []
    expected = settings["first_sample"]
    for (start, end), tars in sorted(by_span.items()):
        if start != expected:
            raise StoreError(
                f"{folder}: the tars of samples {start} to {end - 1} come behind sample {expected}, which is "
                "missing or there twice: fetch all tars of the run, or move those behind the gap elsewhere."
            )
        ranks = settings["dp_size_save"]
        if sorted(tars) != list(range(ranks)):
            missing = next(rank for rank in range(ranks + 1) if rank not in tars)
            raise StoreError(
                f"{folder} has tars of {len(tars)} data-parallel ranks for samples {start} to {end - 1}, and "
                f"{ranks} wrote them: fetch that of rank {missing}."
            )
        groups.append([tars[rank] for rank in range(ranks)])
        expected = end
    return groups


def _tar(file: Path, settings: Mapping[str, Any]) -> Tar:
    match = TAR_NAME.fullmatch(file.name)
    if match is None:
        raise StoreError(
            f"{file} is no name of Megatron-LM's tars, such as dp0__0-64.tar: move it elsewhere."
        )
    ready = file.with_name(file.name + READY)
    if not ready.exists():
        raise StoreError(
            f"{file} has no {ready.name}, so it was not finished: fetch that file, or move the tars of these "
            "samples elsewhere to import those before."
        )
    content = _read(ready)
    if content.get("tar") != file.name:
        raise StoreError(f"{ready} describes {content.get('tar')!r}, expected {file.name}.")
    if content.get("metadata") != settings:
        raise StoreError(
            f"{ready} is of another run than {CACHE_NAME}: keep the runs in folders of their own."
        )
    records = content.get("records")
    if not isinstance(records, list) or not records:
        raise StoreError(f"{ready} lists no records: fetch it again.")
    rank = int(match["dp"])
    cursor = None
    for number, record in enumerate(records):
        where = f"{ready}, record {number}"
        cursor = _check_record(record, rank, cursor, settings, where)
    return Tar(file, rank, tuple(records))


def _check_record(
    record: Any, rank: int, expected: int | None, settings: Mapping[str, Any], where: str
) -> int:
    """Checks what `.ready.json` says of an iteration; returns its end."""
    if not isinstance(record, dict):
        raise StoreError(f"{where} is no object: fetch it again.")
    start = _integer(record, "start", 0, 1 << 48, where)
    end = _integer(record, "end", start + 1, start + (1 << 24), where)
    if expected is not None and start != expected:
        raise StoreError(f"{where} begins with sample {start}, expected {expected}: fetch it again.")
    ranks, size = settings["dp_size_save"], settings["mbs_save"]
    samples = [
        start + (micro_batch * ranks + rank) * size + sample
        for micro_batch in range((end - start) // (ranks * size))
        for sample in range(size)
    ]
    if (end - start) % (ranks * size) or record.get("sample_ids") != samples:
        raise StoreError(
            f"{where}: sample_ids are not those of rank {rank} of {ranks} with micro-batches of {size}: the "
            "order of the samples is not known; fetch it again."
        )
    for kind in KINDS:
        part = record.get(kind)
        name = f"{start}-{end}.{kind}.pt.zst"
        if (
            not isinstance(part, dict)
            or part.get("member") != name
            or not isinstance(part.get("sha256"), str)
        ):
            raise StoreError(f"{where}: {kind} is no description of the member {name}: fetch it again.")
        _integer(part, "size", 1, 1 << 40, f"{where}, {kind}")
    return end


def _documents_of(group: list[Tar], settings: Mapping[str, Any]) -> Iterator[Document]:
    """Returns the documents of one run of samples, in the order of the run."""
    spans = [[(record["start"], record["end"]) for record in tar.records] for tar in group]
    if any(span != spans[0] for span in spans):
        raise StoreError(
            f"{group[0].file}: its iterations are not those of the other ranks: fetch all again."
        )
    size = settings["mbs_save"]
    with ExitStack() as stack:
        try:
            for item in group:
                check_end(item.file)
            tars = [stack.enter_context(tarfile.open(item.file, "r:")) for item in group]
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise StoreError(
                f"{group[0].file} or its other ranks are damaged ({one_line(error)})."
            ) from error
        for number in range(len(spans[0])):
            with tempfile.TemporaryDirectory(prefix="sparsekd-import-") as folder:
                ranks = [
                    _payload(tar, item, item.records[number], Path(folder))
                    for tar, item in zip(tars, group, strict=True)
                ]
                for first in range(0, len(ranks[0].offsets) - 1, size):
                    for rank in ranks:
                        for sample in range(first, first + size):
                            yield from _sample(rank, sample, settings)


def _payload(tar: tarfile.TarFile, item: Tar, record: Mapping[str, Any], folder: Path) -> Payload:
    loaded = []
    for kind in KINDS:
        where = f"{item.file}, {record[kind]['member']}"
        try:
            data = read_member(tar, tar.getmember(record[kind]["member"]), where)
        except KeyError:
            raise StoreError(f"{where} is not there: the tar is damaged; fetch it again.") from None
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
            raise StoreError(f"{where} cannot be read ({one_line(error)}): fetch the tar again.") from error
        if len(data) != record[kind]["size"] or hashlib.sha256(data).hexdigest() != record[kind]["sha256"]:
            raise StoreError(
                f"{where} differs from its checksum in {item.file.name}{READY}: fetch both again."
            )
        payload = unpack_tensors(data, folder, where)
        if payload.get("format_version") != 3 or payload.get("record_id") != record.get("record_id"):
            raise StoreError(
                f"{where} is the record {payload.get('record_id')!r}, expected {record.get('record_id')!r} "
                "of version 3: inputs and targets do not belong together."
            )
        loaded.append(payload)
    inputs, targets = loaded
    where = f"{item.file}, samples {record['start']} to {record['end'] - 1}"
    offsets = _checked(inputs, targets, len(record["sample_ids"]), where)
    return Payload(where, inputs, targets, offsets)


def _checked(inputs: dict[str, Any], targets: dict[str, Any], samples: int, where: str) -> NDArray[np.int64]:
    """Checks kinds and shapes of all tensors; returns the samples' borders."""
    offsets = numbers_of(tensor_of(inputs, "sample_offsets", "integers", where)).astype(np.int64)
    if offsets.shape != (samples + 1,) or offsets[0] != 0 or (np.diff(offsets) < 1).any():
        raise StoreError(f"{where}: sample_offsets are not {samples + 1} ascending numbers from 0.")
    total = int(offsets[-1])
    for name in ("tokens", "labels", "loss_mask"):
        mask = inputs.get(name)
        fractions = name == "loss_mask" and getattr(mask, "is_floating_point", bool)()
        tensor = tensor_of(inputs, name, "fractions" if fractions else "integers", where)
        if tensor.shape != (total,):
            raise StoreError(f"{where}: {name} has shape {list(tensor.shape)}, expected [{total}].")
    values = tensor_of(targets, "values", "fractions", where)
    low = tensor_of(targets, "indices_low", "integers", where)
    bits = tensor_of(targets, "bit_17", "integers", where)
    packed = -(-values.numel() // 8)
    if values.ndim != 2 or len(values) != total or low.shape != values.shape or bits.shape != (packed,):
        raise StoreError(
            f"{where}: values, indices_low and bit_17 have shapes {list(values.shape)}, {list(low.shape)} "
            f"and {list(bits.shape)}, expected [{total}, K] twice and an eighth of its entries."
        )
    if bits.element_size() != 1:
        raise StoreError(f"{where}: bit_17 is {bits.dtype}, expected bytes.")
    return offsets


def _sample(payload: Payload, number: int, settings: Mapping[str, Any]) -> Iterator[Document]:
    """Returns the documents of one sample."""
    where = f"{payload.where}, sample {number} of its rank"
    start, end = int(payload.offsets[number]), int(payload.offsets[number + 1])
    tokens, labels, mask = (
        numbers_of(payload.inputs[name][start:end]) for name in ("tokens", "labels", "loss_mask")
    )
    weights = mask.astype(np.float32)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise StoreError(f"{where}: loss_mask holds a number that is no weight, expected 0 or more.")
    values = payload.targets["values"]
    width = values.shape[1]
    # Bits are packed over all positions: a sample may begin inside a byte.
    bits = np.unpackbits(
        numbers_of(payload.targets["bit_17"][start * width // 8 : -(-end * width // 8)]).view(np.uint8)
    )
    skip = start * width % 8
    high = bits[skip : skip + (end - start) * width].reshape(-1, width)
    ids, logprobs = listed(values[start:end], payload.targets["indices_low"][start:end], high)
    counted = weights > 0
    plain = bool((weights[counted] == 1).all())
    borders = _borders(payload, number, tokens, settings, where)
    for first, last in pairwise(borders):
        yield labelled_document(
            f"{where}, positions {first} to {last - 1}",
            tokens[first:last].astype(np.int64),
            labels[first:last].astype(np.int64),
            counted[first:last],
            ids[first:last],
            logprobs[first:last],
            None if plain else weights[first:last],
        )


def _borders(
    payload: Payload, number: int, tokens: NDArray[Any], settings: Mapping[str, Any], where: str
) -> list[int]:
    """Returns where the documents of a sample begin, then its length."""
    import torch

    for name in ("cu_seqlens_padded", "cu_seqlens"):
        rows = payload.inputs.get(name)
        if rows is None:
            continue
        if not isinstance(rows, list) or len(rows) != len(payload.offsets) - 1:
            raise StoreError(f"{where}: {name} is no list of one tensor per sample.")
        row = rows[number]
        borders = (
            row.tolist()
            if isinstance(row, torch.Tensor) and row.ndim == 1 and not row.is_floating_point()
            else []
        )
        if borders[:1] != [0] or borders[-1:] != [len(tokens)] or (np.diff(borders) < 1).any():
            raise StoreError(f"{where}: {name} does not ascend from 0 to {len(tokens)}.")
        return [int(border) for border in borders]
    tokenizer = settings.get("tokenizer")
    end_of_document = tokenizer.get("eod") if isinstance(tokenizer, dict) else None
    inner: list[int] = []
    if settings.get("reset_attention_mask") and end_of_document is not None:
        inner = [int(place) + 1 for place in np.flatnonzero(tokens[:-1] == end_of_document)]
    return [0, *inner, len(tokens)]


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return read_json(stream.read(MOST_JSON_BYTES + 1), str(file))
    except OSError as error:
        raise StoreError(f"{file} cannot be read ({error.strerror}): fetch it again.") from error


def _integer(content: Mapping[str, Any], name: str, least: int, most: int, where: str) -> int:
    value = content.get(name)
    if type(value) is not int or not least <= value <= most:
        raise StoreError(f"{where}: {name} is {value!r}, expected an integer from {least} to {most}.")
    return value
