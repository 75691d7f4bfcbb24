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

The tars hold no tokens. They belong to a run of Megatron's data pipeline, so a token store has to bring them:
its row number g is Megatron's sample g, sample 0 the first one of the first iteration. Nothing in the files
proves that; `store verify` compares records and tokens afterwards. What a context-parallel rank above 0 wrote
is a slice of a sequence and is refused, and so is version 3.

Shapes: L positions of a row, K most entries of a position.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest, RecordSpec
from sparsekd.logit_store.places.paths import StorePath
from sparsekd.logit_store.protocol.reader import LogitStore
from sparsekd.logit_store.row import Row, narrowed, take_records
from sparsekd.logit_store.tools.derive import Progress, no_progress, write_stream
from sparsekd.trainer.importers.document import NOT_LISTED, Document, Source, source_files
from sparsekd.trainer.importers.records import put_in_order, record_of
from sparsekd.trainer.importers.store import (
    ImportResult,
    ImportSettings,
    Survey,
    Tally,
    file_identities,
)
from sparsekd.trainer.importers.torch_archive import load_torch_archive

TAR_NAME = re.compile(r"(?:cp(?P<cp>\d+)_)?dp(?P<dp>\d+)__(?P<first>\d+)(?:-(?P<last>\d+))?\.tar")
MEMBER_NAME = re.compile(r"(?P<first>\d+)(?:-(?P<last>\d+))?\.pt\.zst")
DETAILS: tuple[str, ...] = ("hash", "identifiers", "saver")
"""What the manifest keeps of `_meta.json`."""

NOT_KEPT = -999.0
"""Values at or below this mark entries outside of the nucleus: -1e3 and -1e4 are written."""


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


@dataclass(frozen=True)
class Listed:
    """What is listed for one sample.

    Attributes:
        where: the member, for messages.
        ids: int64 [L, K], `NOT_LISTED` outside of the nucleus.
        values: float64 [L, K].
    """

    where: str
    ids: NDArray[np.int64]
    values: NDArray[np.float64]


def open_megatron(path: Path) -> Capture:
    """Opens a folder of tars and checks that their names fit together.

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
    if sorted(by_rank) != list(range(len(by_rank))):
        missing = min(set(range(max(by_rank) + 1)) - by_rank.keys())
        raise StoreError(f"{path} has no tar of data-parallel rank {missing}: fetch all ranks' tars.")
    files = tuple(tuple(file for _, file in sorted(by_rank[rank])) for rank in range(len(by_rank)))
    meta = _meta_of(files[0][0])
    saver = meta.get("saver")
    saver = saver if isinstance(saver, dict) else {}
    version = saver.get("format_version", 1)
    if version not in (1, 2):
        raise StoreError(
            f"{files[0][0]} has format version {version} of Megatron-LM's tars; 1 and 2 are read."
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
    """Returns what is listed for each sample, in the order of the run; one iteration of all ranks is in
    memory.

    Raises:
        StoreError: an iteration is missing or damaged, or ranks differ in their shapes.
    """
    streams = [_members(files) for files in capture.files]
    expected: int | None = None
    for number, members in enumerate(_in_step(streams, capture)):
        first, end = members[0][1]
        if expected is not None and first != expected:
            raise StoreError(
                f"{members[0][0]} comes behind iteration {expected}, which is missing: fetch all tars of "
                "the run."
            )
        expected = end
        blocks = [_micro_batches(where, data, capture) for where, _, data in members]
        counts = [len(rank) for rank in blocks]
        if len(set(counts)) != 1:
            raise StoreError(
                f"{capture.path}, iteration {number}: ranks have {counts} micro-batches, expected equal "
                "numbers."
            )
        for micro_batch in range(counts[0]):
            for rank, (where, _, _) in enumerate(members):
                ids, values = blocks[rank][micro_batch]
                for sample in range(ids.shape[1]):
                    yield Listed(
                        f"{where}, micro-batch {micro_batch}, sample {sample}",
                        ids[:, sample],
                        values[:, sample],
                    )


def import_megatron(
    capture: Capture,
    tokens: LogitStore,
    split: str,
    target: StorePath,
    settings: ImportSettings,
    progress: Progress = no_progress,
) -> ImportResult:
    """Joins Megatron-LM's log-probabilities with the rows of a token store, in order, into a new store.

    Args:
        capture: what `open_megatron` opened.
        tokens: the token store whose row g is sample g.
        split: of the token store.
        target: the new store, its other splits empty.
        settings: how; the tokenizer is the token store's, and `sequence_length` and `rows_per_shard` are not
            looked at.
        progress: told of samples, files and shards.

    Raises:
        StoreError: there are more samples than rows, their length differs, or an entry is damaged.
    """
    source = _source(capture)
    survey = _survey(capture, tokens, split, source, settings, progress)
    files = [file for rank in capture.files for file in rank]
    manifest = replace(
        tokens.manifest,
        dataset={
            **tokens.manifest.dataset,
            "token_store": tokens.digest,
            "imported": {
                "format": source.format,
                "files": file_identities(files, progress),
                "samples": survey.documents + survey.skipped,
                "masked_positions": survey.masked,
                "not_given": list(source.cannot_give),
                **source.details,
            },
        },
        record=RecordSpec(
            k=survey.k, n=0, temperatures=(1.0,), draw_temperature=1.0, seed=0, rest=source.rest
        ),
        teacher=settings.teacher,
        codec=settings.codec,
    )
    content: dict[str, Iterator[Row]] = {name: iter(()) for name in manifest.splits}
    content[split] = _rows(capture, tokens, split, manifest)
    digest = write_stream(target, manifest, tokens.tokenizer_path, content, progress)
    return ImportResult(digest, survey, source)


def _source(capture: Capture) -> Source:
    return Source(
        format="megatron-lm",
        files=tuple(file for rank in capture.files for file in rank),
        rest="derived",
        cannot_give=(
            "tokens and loss masks (the token store's are taken, row by row)",
            "log R (1 - the sum of what is listed, at temperature 1 only)",
            "the entropies (lower bounds: what is not listed counts as one outcome)",
            "log-probabilities of true tokens that are not listed (upper bounds)",
            "whether attention was cut at document borders",
        ),
        documents=lambda: iter(()),
        details={"megatron": capture.details},
    )


def _survey(
    capture: Capture,
    tokens: LogitStore,
    split: str,
    source: Source,
    settings: ImportSettings,
    progress: Progress,
) -> Survey:
    size, rows = tokens.manifest.tokenizer.vocabulary_size, tokens.rows(split)
    tally = Tally()
    for number, listed in enumerate(listed_samples(capture)):
        if number >= rows:
            raise StoreError(
                f"{capture.path} has more samples than split {split} of {tokens.path} has rows ({rows}): "
                "this is not the text that was captured."
            )
        tally.add(_document(listed, tokens.read_row(split, number)), source.rest, size)
        progress("samples read", number + 1, 0)
    if not tally.documents:
        raise StoreError(
            f"{capture.path} has no sample with a token that counts: there is nothing to import."
        )
    return tally.survey(settings, tokens.manifest.sequence_length, 0)


def _rows(capture: Capture, tokens: LogitStore, split: str, manifest: Manifest) -> Iterator[Row]:
    size, spec = manifest.tokenizer.vocabulary_size, manifest.record
    for number, listed in enumerate(listed_samples(capture)):
        row = tokens.read_row(split, number)
        document = _document(listed, row)
        checked = put_in_order(document, spec.rest, size)
        record = record_of(document, checked, spec.rest, spec.k, size)
        row = narrowed(row, checked.listed >= spec.k)
        yield replace(row, teacher=take_records(record, row.loss_mask))


def _document(listed: Listed, row: Row) -> Document:
    length = len(row.token_ids)
    if len(listed.ids) != length:
        raise StoreError(
            f"{listed.where} has {len(listed.ids)} positions, but the token store's rows have {length}: "
            "prepare the tokens with the sequence length of the captured run."
        )
    return Document(
        where=listed.where,
        token_ids=row.token_ids.astype(np.int64),
        loss_mask=row.loss_mask,
        head_ids=listed.ids,
        head_logprobs=listed.values,
        true_logprob=np.full(length, np.nan),
    )


def _micro_batches(
    where: str, data: bytes, capture: Capture
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Returns (ids, values), each [sequence, samples, K], of every micro-batch of a member."""
    try:
        plain = zstandard.ZstdDecompressor().stream_reader(data).read()
    except zstandard.ZstdError as error:
        raise StoreError(f"{where} cannot be decompressed ({error}): fetch it again.") from error
    payload = load_torch_archive(plain, where)
    names = ("values", "indices_low", "bit_17")
    if not isinstance(payload, dict) or not all(name in payload for name in names):
        raise StoreError(f"{where} lacks {', '.join(names)}: it is no member of Megatron-LM's tars.")
    parts = [payload[name] for name in names]
    if capture.version == 2:
        assert capture.micro_batch is not None
        size = capture.micro_batch
        if not all(isinstance(part, np.ndarray) and part.ndim == 3 for part in parts):
            raise StoreError(f"{where} does not hold three tensors of three dimensions, as version 2 does.")
        samples = parts[0].shape[1]
        if samples % size:
            raise StoreError(f"{where} has {samples} samples, which are no micro-batches of {size}.")
        parts = [[part[:, start : start + size] for start in range(0, samples, size)] for part in parts]
    found = []
    if not all(isinstance(part, list) for part in parts) or len({len(part) for part in parts}) != 1:
        raise StoreError(f"{where} does not hold three lists of equal length, as version 1 does.")
    for values, low, high in zip(*parts, strict=True):
        arrays = (values, low, high)
        if not all(isinstance(item, np.ndarray) and item.ndim == 3 for item in arrays):
            raise StoreError(f"{where} does not hold tensors of three dimensions.")
        if not values.shape == low.shape == high.shape:
            raise StoreError(
                f"{where}: values, indices_low and bit_17 have shapes {[item.shape for item in arrays]}."
            )
        kept = values > NOT_KEPT
        ids = low.astype(np.int64) + (high.astype(np.int64) << 16)
        logprobs = values.astype(np.float64)
        bad = ~kept & ~(values <= NOT_KEPT)  # NaN
        if bad.any():
            raise StoreError(
                f"{where}, position {np.argwhere(bad)[0][0]}: a value is no number: capture it again."
            )
        found.append((np.where(kept, ids, NOT_LISTED), np.where(kept, logprobs, -np.inf)))
    return found


def _in_step(
    streams: list[Iterator[tuple[str, tuple[int, int], bytes]]], capture: Capture
) -> Iterator[list[tuple[str, tuple[int, int], bytes]]]:
    """Returns the members of one iteration of all ranks at a time."""
    while True:
        members = [next(stream, None) for stream in streams]
        present = [member for member in members if member is not None]
        if not present:
            return
        if len(present) != len(members):
            rank = members.index(None)
            raise StoreError(
                f"{capture.path}: data-parallel rank {rank} ends before {present[0][0]}: fetch all tars of "
                "the run."
            )
        if len({span for _, span, _ in present}) != 1:
            raise StoreError(
                f"{capture.path}: {present[0][0]} and "
                f"{next(m for m in present if m[1] != present[0][1])[0]} are not of one iteration: a rank "
                "lacks one; fetch all tars of the run."
            )
        yield present


def _members(files: tuple[Path, ...]) -> Iterator[tuple[str, tuple[int, int], bytes]]:
    """Returns (place, (first, one past the last), data) of each iteration of one rank, in order."""
    for file in files:
        _check_end(file)
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    match = MEMBER_NAME.fullmatch(member.name)
                    if match is None or not member.isreg():
                        continue
                    content = tar.extractfile(member)
                    assert content is not None
                    first = int(match["first"])
                    last = int(match["last"]) if match["last"] else first + 1
                    yield f"{file}, {member.name}", (first, last), content.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise StoreError(f"{file} is damaged ({error}): fetch it again.") from error


def _check_end(file: Path) -> None:
    """Refuses a tar without its end, two blocks of zeros: tarfile takes one that was cut off for a shorter
    one."""
    with file.open("rb") as stream:
        stream.seek(max(file.stat().st_size - 2 * tarfile.BLOCKSIZE, 0))
        if stream.read() != bytes(2 * tarfile.BLOCKSIZE):
            raise StoreError(f"{file} is cut off: fetch it again.")


def _meta_of(file: Path) -> dict[str, Any]:
    try:
        with tarfile.open(file, "r:") as tar:
            content = tar.extractfile("_meta.json")
            assert content is not None
            meta = json.loads(content.read())
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError, AssertionError) as error:
        raise StoreError(f"{file} has no readable _meta.json ({error}): fetch it again.") from error
    if not isinstance(meta, dict):
        raise StoreError(f"{file}: _meta.json holds no object.")
    return meta
