"""Codecs that err: rows are written through encoders and decoders that change something on the way."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.logit_store.codecs.codec import CODECS, Arrays, Codec
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.manifest import Manifest, manifest_from_json, manifest_to_json
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row, planes_of_row, row_of_planes
from sparsekd.logit_store.synthetic import synthetic_rows, write_synthetic_tokenizer

Change = Callable[[Arrays], None]
"""Changes copies of a row's arrays in place, or puts others in their place."""

AT = 2
"""Number of the record that is changed."""


class FaultyStore:
    """A store to which rows are given one at a time, by codecs that may err."""

    def __init__(self, path: Path, manifest: Manifest, patch: pytest.MonkeyPatch) -> None:
        self.path, self.manifest = path, manifest
        self._patch, self._shards = patch, 0
        tokenizer = write_synthetic_tokenizer(path.with_name("tokenizer"), manifest.tokenizer.vocabulary_size)
        create_store(path, manifest, tokenizer)

    def write(self, row: Row, *, encode: Change | None = None, decode: Change | None = None) -> None:
        """Writes a shard with a codec whose encoder is given, or whose decoder gives, changed arrays."""

        class Faulty(Codec):
            def encode(self, row: Row, manifest: Manifest) -> dict[str, bytes]:
                return super().encode(row if encode is None else changed_row(row, encode), manifest)

            def decode_planes(self, *arguments: Any) -> Arrays:
                arrays = super().decode_planes(*arguments)
                return arrays if decode is None else _changed(arrays, decode)

        name = self.manifest.codec.name
        sound = CODECS[name]
        fields = {field.name: getattr(sound, field.name) for field in dataclasses.fields(sound)}
        with self._patch.context() as patch:
            patch.setitem(CODECS, name, Faulty(**fields))
            write_shard(self.path, self.manifest, "train", self._shards, [row])
        self._shards += 1

    def refuses(self, planes: str, row: Row, **changes: Change) -> None:
        """Asserts that a row is not written because of one of these planes, and leaves nothing."""
        folder = self.path / "shards/train"
        before = sorted(item.name for item in folder.rglob("*.*"))
        with pytest.raises(StoreError) as caught:
            self.write(row, **changes)
        message = str(caught.value)
        told = re.search(r"row \d+: the codec (\w+) does not give back (\w+)(\[|, whose shape| \()", message)
        assert told is not None and told[1] == self.manifest.codec.name, message
        assert re.fullmatch(planes, told[2]), message
        assert "nothing of the shard was written" in message and message.count(". ") == 0
        assert sorted(item.name for item in folder.rglob("*.*")) == before

    def rows(self) -> list[Row]:
        seal(self.path, {"train": self._shards})
        store = open_store(self.path)
        return [store.read_row("train", index) for index in range(self._shards)]


def _changed(arrays: Mapping[str, np.ndarray], change: Change) -> Arrays:
    copies = {name: array.copy() for name, array in arrays.items()}
    change(copies)
    return copies


def changed_row(row: Row, change: Change) -> Row:
    return row_of_planes(_changed(planes_of_row(row), change))


def rich_row(manifest: Manifest) -> Row:
    """A row in which there is something to change: runs, labels, a count above 1."""
    return changed_row(_rich_row(manifest_to_json(manifest)), lambda arrays: None)


@functools.cache
def _rich_row(text: str) -> Row:
    manifest = manifest_from_json(text, "here")
    for seed in itertools.count():
        (row,) = synthetic_rows(manifest, 1, seed)
        record = row.teacher
        assert record is not None
        if (
            row.optional["weights"].size > 1
            and row.loss_mask.sum() > 2
            and len(record.entropy) > AT + 3
            and record.true_logprob[AT] < -0.1
            and record.log_rest[AT, 1] > 0.1
            and (manifest.record.n == 0 or record.tail_counts[AT, :2].tolist() == [2, 1])
        ):
            return row
    raise AssertionError("unreachable")
