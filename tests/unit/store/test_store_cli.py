"""`sparsekd store ACTION` as it is typed: what it says, what it refuses, what it leaves behind."""

import dataclasses
from pathlib import Path

import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.manifest import CodecSpec
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.config.checks import resolved_objective
from sparsekd.trainer.config.schema import ObjectiveConfig
from sparsekd.trainer.door.cli import main
from sparsekd.trainer.door.store_cli import ACTIONS
from sparsekd.trainer.run.errors import ConfigError


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_synthetic_store(Path("a"), synthetic_manifest(), {"train": 6, "heldout": 2}, seed=0)
    write_synthetic_store(Path("b"), synthetic_manifest(dataset={"name": "b"}), {"train": 3}, seed=9)
    return tmp_path


def test_each_action_has_help_and_says_what_comes_next(
    stores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store"]) == 0 and main(["store", "--help"]) == 0
    overview = capsys.readouterr().out
    for name in ACTIONS:
        assert f"  {name} " in overview
        assert main(["store", name, "--help"]) == 0
        assert f"usage: sparsekd store {name}" in capsys.readouterr().out
    for words, expected in {
        "inspect a --positions 1": "next: sparsekd store verify a",
        "verify a": "next: sparsekd train store.path=a student.path=STUDENT",
        "stats a --rows 2 --plot a.png": "next: sparsekd train store.path=a student.path=STUDENT",
        "subset a c --fraction 0.9 --seed 1": "next: sparsekd store inspect c   then: sparsekd train "
        "store.path=c",
        "reencode a d --k 2 --drop-draws": "next: sparsekd store compare a d",
        "compare a d": "next: sparsekd store stats d",
        "merge a b e": "next: sparsekd store inspect e",
        "export a f --split heldout --text": "pandas.read_parquet('f/heldout-000000.parquet')",
    }.items():
        assert main(["store", *words.split()]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        assert expected in out.strip().splitlines()[-1], words
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert open_store(Path("d")).manifest.record.k == 2 and open_store(Path("e")).rows("train") == 9
    for name in "cde":
        assert main(["store", "verify", name]) in (0, 2)  # few positions may not tell the alignment
        assert "sound: every byte" in capsys.readouterr().out


def test_a_store_with_heads_cut_short_is_shown_and_moved(
    stores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec = CodecSpec("compact", {"mass": 0.5, "frequent_ids": ""})
    write_synthetic_store(Path("cut"), synthetic_manifest(k=8, n=0, codec=codec), {"train": 4}, seed=0)
    for words in (
        "inspect cut --positions 99999999999999999999",
        "stats cut",
        "compare cut cut",
        "reencode cut d --codec compact",
    ):
        assert main(["store", *words.split()]) == 0, capsys.readouterr().err
    assert main(["store", "export", "cut", "f", "--text"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["store", "reencode", "cut", "e", "--mass", "0.95"]) == 2
    assert "give --mass of at most 0.5" in capsys.readouterr().err and not Path("e").exists()


def test_bad_words_are_one_sentence(stores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in {
        "shrink a": "'shrink' is not an action; there are inspect, verify",
        "inspect": "required: path",
        "inspect a b": "b is not expected behind its paths of store inspect",
        "inspect a --teacher": "--teacher belongs to store verify, not to store inspect",
        "inspect a --colour": "--colour is not a flag of store inspect",
        "inspect a --rows 0": "0 is below 1",
        "stats a --rows many": "'many' is no whole number",
        "stats a train.steps=3": "takes no settings, found train.steps=3",
        "stats nowhere": "not a logit store",
        "merge a b": "needs two stores or more",
        "subset a c": "needs a choice",
        "subset a c --rows 1:x --split train": "is no list of numbers",
        "subset a c --split train --rows 3:3": "names no number",
        "subset a c --fraction 0.5 --seed 99999999999999999999999": "seed is 99999999999999999999999",
        "subset a c --documents 99999999999999999999999": "documents holds 99999999999999999999999, expected",
        "subset a c --documents 4000000000:9000000000": "No row of a is chosen",
        "subset a c --split train --rows 0:3000000000": "has no row 6: it has 6 rows",
        "subset a c --split train --rows 9:99999999999999999999999": "rows holds 99999999999999999999998",
        "reencode a c": "changes nothing",
        "reencode a c --k 9": "k = 9 cannot be made",
        "reencode a b --k 4 --drop-draws": "b is another store",
        "compare a b": "rows of train is 6 and 3",
        "import x c --format pickle": "invalid choice: 'pickle'",
        "export a a": "a is no export",
        "verify a teacher.path=x": "takes no settings",
        "verify a --reseal": "--reseal says what --repair may do",
    }.items():
        assert main(["store", *words.split()]) == 2, words
        error = capsys.readouterr().err
        assert expected in error and error.startswith("sparsekd store: ") and error.count("\n") == 1, error
    assert not Path("c").exists()


def test_progress_goes_to_stderr_now_and_then(
    stores: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekd.trainer.run.console.SECONDS_BETWEEN_LINES", 0.0)
    assert main(["store", "stats", "a"]) == 0
    assert "store stats: 8/8 (100%) rows" in capsys.readouterr().err


def test_training_asks_an_imported_store_only_for_what_it_holds() -> None:
    def asked(rest: str, **settings: object) -> str:
        record = synthetic_manifest(k=4, n=0, temperatures=(1.0,)).record
        config = ObjectiveConfig(**settings)
        return resolved_objective(config, dataclasses.replace(record, rest=rest)).target_mode

    assert asked("exact") == asked("derived") == "tail_bucket"
    assert asked("unknown") == asked("unknown", target_mode="renormalized") == "renormalized"
    with pytest.raises(ConfigError, match=r"record\.rest is derived.*set objective\.temperature=1"):
        asked("derived", temperature=2.0)
    for mode in ("tail_bucket", "truncated", "sampled"):
        with pytest.raises(
            ConfigError, match=r"record\.rest is unknown.*objective\.target_mode=renormalized"
        ):
            asked("unknown", target_mode=mode)
    assert asked("unknown", kd_weight=0.0, ce_weight=1.0, target_mode="truncated") == "truncated"
