"""starts.jsonl says what each start of a run was, and what train.allow let it change."""

import json
from pathlib import Path

import pytest
from synthetic_stores import write_synthetic_store
from test_api import drive

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.run.folder import STARTS_NAME, append_line
from sparsekd.trainer.state.record import read_commit

pytestmark = pytest.mark.integration


def test_allowed_changes_go_on_and_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer schedule, another objective and a longer store, at once; later starts find them their own."""
    manifest = synthetic_manifest(vocabulary_size=97, sequence_length=32, rows_per_shard=8)
    short, longer, other = (tmp_path / name for name in ("short", "longer", "other"))
    write_synthetic_store(short, manifest, {"train": 22, "heldout": 5}, seed=3)
    write_synthetic_store(longer, manifest, {"train": 30, "heldout": 5}, seed=3)
    shorter_rows = synthetic_manifest(vocabulary_size=97, sequence_length=16, rows_per_shard=8)
    write_synthetic_store(other, shorter_rows, {"train": 22, "heldout": 5}, seed=3)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    changes = "train.steps=6;objective=kd_ce;train.checkpoint_every=1"
    on_other = changes.replace("train.steps=6", "train.steps=7")
    allow = "train.allow=[store,schedule,objective]"
    printed = drive(
        short,
        tmp_path / "runs",
        "run;train.steps=4",
        f"run;{changes}",
        f"run;{changes};train.allow=[schedule]",
        f"run;{changes};{allow};store.path={longer};tracking=disabled",
        f"run;{on_other};store.path={longer};schedule.kind=constant;tracking=disabled",
        f"run;{on_other};store.path={other};{allow};tracking=disabled",
    )
    ends = [line.split()[0] for line in printed.splitlines() if line.startswith(("trained ", "refused "))]
    assert ends == ["trained", *2 * ["refused"], "trained", *2 * ["refused"]]
    for sentence in ("train.allow=[objective]", "train.allow=[schedule]", "a store of another kind"):
        assert sentence in printed
    assert "Changed here, as train.allow has it: objective.ce_weight 0.0 -> 0.5" in printed

    folder = tmp_path / "runs" / "run"
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 4]
    first, second = starts
    assert first["checkpoint"] is None and first["allowed"] == []
    assert second["checkpoint"].endswith("step-00000004") and len(second["allowed"]) == 3
    assert open_store(longer).digest[:12] in second["allowed"][0]
    assert f"run.root={tmp_path / 'runs'}" in first["overrides"] and "train.steps=4" in first["overrides"]
    for start in starts:
        assert start["slurm"] == {"job": "77", "restarts": "2"} and start["host"] and start["world_size"] == 1
        assert start["threads_per_rank"] == 1 and start["versions"]["torch"] and "git" in start
    # The place in the data is the number of rows so far, in the order of the longer store.
    commit = read_commit(folder / "checkpoints" / "step-00000006")
    assert commit.rows_consumed == 6 * 4 and commit.store_digest == open_store(longer).digest


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    place = tmp_path / STARTS_NAME
    append_line(place, "1")
    with place.open("a") as file:
        file.write('{"time": "20')
    append_line(place, "2")
    append_line(place, "3")
    assert place.read_text().splitlines() == ["1", '{"time": "20', "2", "3"]
