"""Rows without a single record: a store of padding, of prompts, or that its seed left out."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dense import write_rows
from kinds import CODEC_KINDS, WITH_MASS, manifest_of_kind

from sparsekd.logit_store.codecs.codec import CODECS
from sparsekd.logit_store.manifest import Manifest
from sparsekd.logit_store.planes import TABLE, empty_record
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import PADDING_DOCUMENT, Row, narrowed
from sparsekd.logit_store.synthetic import synthetic_rows
from sparsekd.logit_store.tools.combine import merge_stores, subset_store
from sparsekd.logit_store.tools.compare import compare_stores
from sparsekd.logit_store.tools.export import export_store
from sparsekd.logit_store.tools.inspect import inspect_text
from sparsekd.logit_store.tools.reencode import reencode_store
from sparsekd.logit_store.tools.stats import store_stats
from sparsekd.logit_store.tools.verify import verify_store

RULES = [
    ("next_token", "counted"),
    ("next_token", "all"),
    ("next_token", "sampled"),
    ("masked_token", "masked"),
    ("class", "counted"),
]
SHAPES = [
    (kind, k, n) for kind in CODEC_KINDS for k, n in ((3, 6), (3, 0), (0, 6)) if kind != WITH_MASS or not n
]


def _silent(row: Row) -> Row:
    """The row as padding: nothing counts, nothing is recorded."""
    bare = narrowed(row, np.zeros(len(row.token_ids), np.bool_))
    documents = np.full_like(row.segment_documents, PADDING_DOCUMENT)
    optional = {
        name: plane[:0] if name.startswith("feature") else plane for name, plane in bare.optional.items()
    }
    return dataclasses.replace(bare, segment_documents=documents, optional=optional)


def _rows(manifest: Manifest, seed: int = 0) -> list[Row]:
    return [_silent(row) for row in synthetic_rows(manifest, 3, seed)]


@pytest.mark.parametrize(("target", "rule"), RULES)
@pytest.mark.parametrize(("kind", "k", "n"), SHAPES)
def test_every_codec_stores_it(tmp_path: Path, kind: str, target: str, rule: str, k: int, n: int) -> None:
    manifest = manifest_of_kind(kind, target, rule, planes=True, k=k, n=n, tail_logprobs=n > 0)
    silent, loud = _rows(manifest), synthetic_rows(manifest, 3, 1)
    rows = [silent[0], loud[1], silent[1]]
    recorded = [int(row.recorded.sum()) for row in rows]
    assert recorded[0] == recorded[2] == 0
    path = write_rows(tmp_path / "store", manifest, {"train": rows})
    store = open_store(path)
    assert store.index("train").counts.tokens_recorded == recorded[1]
    reuse: dict[str, np.ndarray] = {}
    for index, count in enumerate(recorded):
        for found in (store.read_row("train", index), store.read_row("train", index, reuse)):
            assert found.teacher is not None and found.recorded is not None and found.recorded.sum() == count
            for plane in TABLE:
                if hasattr(found.teacher, plane.name):
                    array = getattr(found.teacher, plane.name)
                    assert array.dtype == plane.dtype and array.shape == (count, *plane.width(manifest))
    found, made = store.read_row("train", 0).teacher, empty_record(manifest)
    for field in dataclasses.fields(made):
        assert getattr(found, field.name).shape == getattr(made, field.name).shape
    assert verify_store(path).ok


@pytest.mark.parametrize("name", sorted(CODECS))
def test_every_tool_takes_it(tmp_path: Path, name: str) -> None:
    manifest = manifest_of_kind(name)
    one = write_rows(tmp_path / "one", manifest, {"train": _rows(manifest)})
    result = verify_store(one)
    assert result.ok and result.alignment is None and "sound" in result.text()
    page = inspect_text(one, positions=2)
    assert "at every position that the loss counts" in page
    stats = store_stats(one)
    assert stats.splits["train"].positions == 0 and "0 counted positions" in stats.text()
    table = pd.read_parquet(export_store(one, tmp_path / "table")[0])
    assert len(table) == 48 and table["entropy"].isna().all() and table["head_ids"].isna().all()
    compared = compare_stores(one, one)
    assert compared.positions == 0 and compared.divergences[0].worst is None and "-" in compared.text()
    for codec in sorted(CODECS):
        reencode_store(one, tmp_path / codec, codec=codec)
        assert open_store(tmp_path / codec).index("train").counts.tokens_recorded == 0
    reencode_store(one, tmp_path / "narrow", k=1, drop_draws=True)
    subset_store(one, tmp_path / "part", split="train", rows=[0, 2])
    other = write_rows(tmp_path / "other", manifest, {"train": synthetic_rows(manifest, 3, 5)})
    merge_stores([one, other], tmp_path / "both")
    for made in ("narrow", "part", "both"):
        assert verify_store(tmp_path / made).ok
