"""Sparsekd's own codecs as contestants of the store benchmark."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from store_data import DRAWN, SPLIT, THINNED, TOP_K, Case
from store_layout import Decoded, Layout, Read

from sparsekd.kernels.objective import Objective, needed_planes
from sparsekd.logit_store.codecs.codec import codec_of
from sparsekd.logit_store.codecs.frequency import compact_parameters
from sparsekd.logit_store.manifest import CodecSpec, Manifest, RecordSpec
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import Row, TeacherRecord
from sparsekd.logit_store.synthetic import write_synthetic_tokenizer

RAGGED_MASS = 0.99


def sampled_planes(record: RecordSpec) -> frozenset[str]:
    """What training with the target mode `sampled` reads of a record, besides the row's text."""
    objective = Objective(
        kd_weight=1.0,
        ce_weight=1.0,
        divergence="forward_kl",
        mixture=0.5,  # not read
        target_mode="sampled",
        temperature=record.draw_temperature,
        label_smoothing=0.0,
        z_loss=0.0,
    )
    return needed_planes(objective, k=record.k, n=record.n, on_grid=True)


class Ours(Layout):
    """A codec of sparsekd, through its own writer and reader: all checks are on, also those of reading."""

    is_ours = True
    lacks = ""

    def __init__(self, name: str, codec: str, case: Case, *, mass: float | None = None) -> None:
        self.name, self.codec, self.case, self.mass = name, codec, case, mass

    def manifest(self, manifest: Manifest, rows: Sequence[Row]) -> Manifest:
        """The manifest with this codec. `compact` counts the tokens of the rows, as `capture` does."""
        parameters = {}
        if self.codec == "compact":
            tokens = np.concatenate([row.token_ids for row in rows])
            counts = np.bincount(tokens, minlength=manifest.tokenizer.vocabulary_size)
            parameters = compact_parameters(counts, mass=self.mass)
        return replace(manifest, codec=CodecSpec(self.codec, parameters))

    def prepare(self, folder: Path, manifest: Manifest, rows: Sequence[Row]) -> None:
        tokenizer = write_synthetic_tokenizer(folder / "tokenizer", manifest.tokenizer.vocabulary_size)
        self._manifest = self.manifest(manifest, rows)
        create_store(folder / "store", self._manifest, tokenizer)

    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        write_shard(folder / "store", self._manifest, SPLIT, 0, rows)

    def finish(self, folder: Path) -> None:
        seal(folder / "store", {SPLIT: 1})

    def open(self, folder: Path) -> Read:
        store = open_store(folder / "store")
        return lambda index: _as_decoded(store.read_row(SPLIT, index).teacher)

    def size(self, folder: Path) -> int:
        """Shard and commit record. Manifest, index and tokenizer are a few kilobytes for a whole store."""
        return super().size(folder / "store" / "shards")

    def encode(self, row: Row) -> dict[str, bytes]:
        """The codec alone, without checks and files; after `prepare`."""
        return codec_of(self._manifest).encode(row, self._manifest)

    def decode(self, planes: dict[str, bytes]) -> Row:
        """The codec alone, without checks of the row's rules."""
        return codec_of(self._manifest).decode(planes, self._manifest)


class OursInPart(Ours):
    """The same, but a reader asks for some planes only, as training does."""

    def open(self, folder: Path) -> Read:
        store = open_store(folder / "store")
        names = sampled_planes(store.manifest.record)
        return lambda index: _as_decoded(store.read_part(SPLIT, index, names).teacher)


def _as_decoded(record: TeacherRecord | None) -> Decoded:
    assert record is not None
    return Decoded(
        record.head_ids, record.head_logprobs, record.log_rest, record.tail_ids, record.tail_counts
    )


def ours() -> list[Ours]:
    """sparsekd's contestants: every codec at k = 64; the default codec with draws, with fewer records than
    positions, and read in part."""
    named = [
        Ours("tkq8 (default)", "tkq8", TOP_K),
        Ours("plain", "plain", TOP_K),
        Ours("compact", "compact", TOP_K),
        Ours(f"compact, ragged to {RAGGED_MASS}", "compact", TOP_K, mass=RAGGED_MASS),
        Ours("fp16", "fp16", TOP_K),
        Ours("exact", "exact", TOP_K),
    ]
    for kept in DRAWN:
        for case in (kept, replace(kept, tail_logprobs=True)):
            named.append(Ours(f"tkq8, {case}", "tkq8", case))
    named += [Ours(f"tkq8, {case}", "tkq8", case) for case in THINNED]
    for case in (DRAWN[0], replace(DRAWN[0], tail_logprobs=True)):
        named.append(OursInPart(f"tkq8, {case}, planes of `sampled`", "tkq8", case))
    return named
