"""What is said of a teacher that did not run: its stored records, and how far each figure can be trusted."""

from pathlib import Path

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.data.heldout import read_held_out
from sparsekd.trainer.quality.evaluate import _stored_teacher


@pytest.mark.parametrize(
    ("rest", "loss", "calibrated"),
    [("exact", "exact", True), ("derived", "lower bound", True), ("unknown", "lower bound", False)],
)
def test_the_loss_of_records_that_do_not_list_every_label_is_a_bound(
    rest: str, loss: str, calibrated: bool, tmp_path: Path
) -> None:
    manifest = synthetic_manifest(n=0, temperatures=(1.0,), rest=rest)
    write_synthetic_store(tmp_path, manifest, {"train": 2, "heldout": 3}, seed=1)
    store = open_store(tmp_path)
    figures = _stored_teacher(read_held_out(store, None), store).result.figures
    assert figures["loss"].kind == figures["perplexity"].kind == loss
    assert ("calibration_error" in figures) == calibrated
    assert figures["kl"].kind == figures["agreement"].kind == "exact"
