"""Megatron-LM's caches as it writes them, made by other code than the readers': for the tests of imports."""

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

sys.path.append(str(Path(__file__).parent))
from captures import EOS, PAD, V, dense, top

LENGTH, RANKS, MICRO, BATCHES = 23, 2, 2, 2  # 23 * k entries: samples begin inside a byte of 17th bits
SAMPLES = RANKS * MICRO * BATCHES
"""Of an iteration."""


def sample(number: int, k: int = 4, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and values [LENGTH, k] of a sample, every third position with one entry fewer."""
    _, logprobs = dense(LENGTH + 1, 100 + number)
    ids, values = top(logprobs[:-1], k)
    ids = ids + offset
    ids[::3, k - 1], values[::3, k - 1] = -1, -1e4
    return ids, values


def samples_of(iteration: int, rank: int) -> list[int]:
    """Returns the numbers of a rank's samples in an iteration, micro-batch by micro-batch."""
    return [
        iteration * SAMPLES + (batch * RANKS + rank) * MICRO + place
        for batch in range(BATCHES)
        for place in range(MICRO)
    ]


def saved(value: Any) -> bytes:
    """Returns zstd around what torch.save makes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())


def megatron_payload(numbers: list[int], version: int, offset: int = 0) -> bytes:
    """Returns what a rank writes for an iteration in version 1 or 2."""
    parts = [sample(number, offset=offset) for number in numbers]
    ids = torch.from_numpy(np.stack([part for part, _ in parts], axis=1))
    values = torch.from_numpy(np.stack([part for _, part in parts], axis=1)).to(torch.float16)
    whole = {"values": values, "indices_low": (ids & 0xFFFF).to(torch.uint16), "bit_17": (ids >> 16).bool()}
    if version == 1:
        return saved({name: list(tensor.split(MICRO, dim=1)) for name, tensor in whole.items()})
    return saved({**whole, "format_version": 2})


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    """Writes a tar of these members."""
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_megatron(folder: Path, iterations: int, version: int, offset: int = 0) -> None:
    """Writes a cache of version 1 or 2, two iterations in a tar."""
    folder.mkdir()
    saver: dict[str, Any] = {"k": 4, "save_dtype": "fp16"}
    if version == 2:
        saver |= {"format_version": 2, "mbs_save": MICRO, "dp_size_save": RANKS, "gbs_save": SAMPLES}
    meta = json.dumps({"hash": "0" * 32, "identifiers": {"seed": 1}, "saver": saver}).encode()
    for rank in range(RANKS):
        for first in range(0, iterations, 2):
            inside = range(first, min(first + 2, iterations))
            span = f"{first * SAMPLES}-{(inside[-1] + 1) * SAMPLES}" if version == 2 else f"{inside[-1]}"
            members = {"_meta.json": meta}
            for iteration in inside:
                start = iteration * SAMPLES
                name = f"{start}-{start + SAMPLES}" if version == 2 else f"{iteration}"
                members[name + ".pt.zst"] = megatron_payload(samples_of(iteration, rank), version, offset)
            write_tar(folder / f"{'dp' if version == 2 else 'cp0_dp'}{rank}__{span}.tar", members)


Edit = Callable[[dict[str, Any], dict[str, Any]], None]


def paired_members(
    iteration: int,
    rank: int,
    *,
    borders: list[int] | None = None,
    edit: Edit | None = None,
    offset: int = 0,
) -> dict[str, Any]:
    """Returns what a rank writes for an iteration in version 3: its description and its members' bytes."""
    numbers = samples_of(iteration, rank)
    made = [dense(LENGTH + 1, 100 + number)[0] for number in numbers]
    listed = [sample(number, offset=offset) for number in numbers]
    ids = torch.from_numpy(np.concatenate([ids for ids, _ in listed]))
    record = f"run:dp{rank}:{iteration}"
    mask = torch.ones(len(numbers) * LENGTH, dtype=torch.bool)
    mask[::LENGTH] = False
    labels = torch.from_numpy(np.concatenate([tokens[1:] for tokens in made])).int()
    inputs: dict[str, Any] = {
        "format_version": 3,
        "sample_offsets": torch.arange(len(numbers) + 1) * LENGTH,
        "tokens": torch.from_numpy(np.concatenate([tokens[:-1] for tokens in made])).int(),
        "labels": torch.where(mask, labels, -100),
        "position_ids": torch.arange(LENGTH).repeat(len(numbers)).int(),
        "loss_mask_encoding": "bool",
        "loss_mask": mask,
        "cu_seqlens": None if borders is None else [torch.tensor(borders).int() for _ in numbers],
        "cu_seqlens_padded": None,
        "record_id": record,
        "sample_ids": numbers,
    }
    high = np.packbits((ids.reshape(-1).numpy() >> 16 & 1).astype(np.uint8))
    targets: dict[str, Any] = {
        "format_version": 3,
        "values": torch.from_numpy(np.concatenate([values for _, values in listed])).half(),
        "indices_low": (ids & 0xFFFF).to(torch.uint16),
        "bit_17": torch.from_numpy(high),
        "record_id": record,
    }
    if edit is not None:
        edit(inputs, targets)
    start = iteration * SAMPLES
    return {
        "start": start,
        "end": start + SAMPLES,
        "sample_ids": numbers,
        "record_id": record,
        "inputs": saved(inputs),
        "targets": saved(targets),
    }


def write_paired(
    folder: Path,
    iterations: int,
    *,
    borders: list[int] | None = None,
    edit: Edit | None = None,
    offset: int = 0,
    **settings: Any,
) -> None:
    """Writes a cache of version 3, two iterations in a tar.

    Args:
        folder: for the cache.
        iterations: how many.
        borders: of the documents in each sample.
        edit: applied to inputs and targets of every record before they are saved.
        offset: of the ids.
        **settings: beside the usual ones.
    """
    folder.mkdir()
    meta = {
        "format_version": 3,
        "generation": "run",
        "dp_size_save": RANKS,
        "mbs_save": MICRO,
        "gbs_save": SAMPLES,
        "first_sample": 0,
        "seq_length": LENGTH,
        "reset_attention_mask": False,
        "tokenizer": {"vocab_size": V, "eod": EOS, "pad": PAD},
        **settings,
    }
    (folder / "_v3_cache.json").write_text(json.dumps(meta))
    for first in range(0, iterations, 2):
        inside = range(first, min(first + 2, iterations))
        for rank in range(RANKS):
            name = f"dp{rank}__{first * SAMPLES}-{(inside[-1] + 1) * SAMPLES}.tar"
            records, members = [], {"_meta.json": json.dumps(meta, sort_keys=True).encode()}
            for iteration in inside:
                record = paired_members(iteration, rank, borders=borders, edit=edit, offset=offset)
                for kind in ("inputs", "targets"):
                    data = record[kind]
                    member = f"{record['start']}-{record['end']}.{kind}.pt.zst"
                    members[member] = data
                    digest = hashlib.sha256(data).hexdigest()
                    record[kind] = {"member": member, "sha256": digest, "size": len(data)}
                records.append(record)
            write_tar(folder / name, members)
            ready = {"metadata": meta, "tar": name, "records": records}
            (folder / (name + ".ready.json")).write_text(json.dumps(ready))
