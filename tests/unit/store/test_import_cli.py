"""`sparsekd store import` as it is typed, on a capture of every format."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_stores import write_synthetic_store

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import document_of_position
from sparsekd.logit_store.synthetic import synthetic_manifest
from sparsekd.trainer.door.cli import main
from sparsekd.trainer.importers.formats import FORMATS

sys.path.append(str(Path(__file__).parent))
import captures
import captures_megatron as megatron

TEXTS = captures.texts(8, shortest=24)


def _table(name: str, rows: Callable[[], list[dict[str, Any]]]) -> Callable[[], None]:
    def write() -> None:
        writer = captures.write_table if name.endswith(".parquet") else captures.write_lines
        writer(Path(name), rows())

    return write


def _distillkit() -> None:
    captures.write_distillkit(Path("data"), TEXTS, captures.PLAIN)


def _megatron(version: int) -> Callable[[], None]:
    def write() -> None:
        megatron.write_megatron(Path("tars"), 2, version)
        manifest = synthetic_manifest(
            k=0, n=0, vocabulary_size=captures.V, sequence_length=megatron.LENGTH, rows_per_shard=4
        )
        write_synthetic_store(Path("tokens"), manifest, {"train": 16}, seed=0)

    return write


@dataclass(frozen=True)
class Case:
    """A capture, and what an import of it gives.

    Attributes:
        layout: name of its format.
        write: writes it below the current folder.
        source: its file or folder.
        k: head entries.
        rest: of the records.
        flags: beyond the tokenizer.
    """

    layout: str
    write: Callable[[], None]
    source: str
    k: int
    rest: str = "derived"
    flags: str = "--tokenizer hub"


NEMO = _table("nemo.jsonl", lambda: [captures.nemo_line(text, padded=2) for text in TEXTS])
VLLM = _table("vllm.jsonl", lambda: [captures.vllm_answer(text) for text in TEXTS])
TOPK = _table("topk.parquet", lambda: [captures.topk_row(text) for text in TEXTS])
TOPK_LIST = _table("topk.jsonl", lambda: [captures.topk_row(text, over_list=True) for text in TEXTS])
PREPARED = _table("prepared.parquet", lambda: [captures.axolotl_prepared(text, 4) for text in TEXTS])
LEGACY = _table("legacy.parquet", lambda: [captures.axolotl_prepared(text, 4, legacy=True) for text in TEXTS])
LISTS = _table("lists.jsonl", lambda: [captures.axolotl_offline(text, 4) for text in TEXTS])
OBJECTS = _table(
    "objects.parquet", lambda: [captures.axolotl_offline(text, 4, objects=True) for text in TEXTS]
)
CHAT = _table("chat.jsonl", lambda: [captures.api_chat(text, 4) for text in TEXTS])
ECHO = _table("echo.jsonl", lambda: [captures.api_completion(text) for text in TEXTS])
SAMPLES = _table("samples.jsonl", lambda: [captures.sampled_row(text) for text in TEXTS])
PAIRED = "cache"

CASES = {
    "distillkit": Case("distillkit", _distillkit, "data", 6),
    "nemo": Case("nemo", NEMO, "nemo.jsonl", 5),
    "vllm": Case("vllm", VLLM, "vllm.jsonl", 4),
    "api chat": Case("api", CHAT, "chat.jsonl", 5),
    "api completions": Case("api", ECHO, "echo.jsonl", 5),
    "samples": Case("samples", SAMPLES, "samples.jsonl", 0, "counts"),
    "topk": Case("topk", TOPK, "topk.parquet", 7),
    "topk over the list": Case("topk", TOPK_LIST, "topk.jsonl", 7, "unknown"),
    "axolotl prepared": Case("axolotl", PREPARED, "prepared.parquet", 5, "unknown"),
    "axolotl legacy": Case("axolotl", LEGACY, "legacy.parquet", 5, "unknown"),
    "axolotl lists": Case("axolotl", LISTS, "lists.jsonl", 5),
    "axolotl objects": Case("axolotl", OBJECTS, "objects.parquet", 5),
    "megatron 3": Case("megatron", lambda: megatron.write_paired(Path("cache"), 2), "cache", 3),
    "megatron 2": Case("megatron", _megatron(2), "tars", 3, flags="--tokens tokens"),
    "megatron 1": Case("megatron", _megatron(1), "tars", 3, flags="--tokens tokens"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("sparsekd.trainer.run.console.SECONDS_BETWEEN_LINES", float("inf"))
    captures.write_tokenizer(Path("hub"))
    return tmp_path


def run(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of `sparsekd store`."""
    capsys.readouterr()
    code = main(["store", *words.split()])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_format_is_tried() -> None:
    assert {case.layout for case in CASES.values()} == set(FORMATS)


@pytest.mark.parametrize("name", CASES)
def test_a_capture_becomes_a_sound_store(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    case = CASES[name]
    case.write()
    words = f"import {case.source} new --codec exact --teacher-name big --rows-per-shard 2 {case.flags}"
    code, out, error = run(words, capsys)
    assert code == 0, error
    assert f"documents of {case.layout} in" in out and "next: sparsekd store verify new" in out
    for phrase in FORMATS[case.layout].cannot_give:
        assert f"not given  {phrase}" in out
    store = open_store(Path("new"))
    record = store.manifest.record
    assert (record.k, record.rest) == (case.k, case.rest)
    assert store.manifest.teacher is not None and store.manifest.teacher.name == "big"
    assert store.manifest.tokenizer.vocabulary_size == captures.V
    imported = store.manifest.dataset["imported"]
    assert imported["format"] == case.layout
    assert all(f"not given  {phrase}" in out for phrase in imported["not_given"])
    code, out, error = run("verify new", capsys)
    assert code == 0, out + error
    if "--tokens" not in case.flags:  # those tokens are not the captured text
        assert "aligned: the records describe the tokens that follow them" in out, out
    code, out, error = run("inspect new", capsys)
    assert code == 0 and "big" in out, error
    assert not list(Path("temporary").iterdir())
    # Again, with the format named: nothing changes.
    digest = store.digest
    assert run(f"{words} --format {case.layout}", capsys)[0] == 0
    assert open_store(Path("new")).digest == digest


def test_megatron_s_samples_meet_the_rows_of_a_token_store(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _megatron(2)()
    words = "import tars new --tokens tokens --codec exact"
    code, _, error = run(f"{words} --k 4", capsys)
    assert code == 2 and "lists 3 ids" in error
    code, out, error = run(words, capsys)
    assert code == 0 and "tokens and loss masks" in out, error
    store, tokens = open_store(Path("new")), open_store(Path("tokens"))
    assert store.rows("train") == 16 and store.manifest.dataset["token_store"] == tokens.digest
    assert store.manifest.rows_per_shard == tokens.manifest.rows_per_shard == 4
    assert store.manifest.dataset["imported"]["megatron"]["identifiers"] == {"seed": 1}
    for number in range(16):
        row, source = store.read_row("train", number), tokens.read_row("train", number)
        np.testing.assert_array_equal(row.token_ids, source.token_ids)
        np.testing.assert_array_equal(row.loss_mask, source.loss_mask)
        np.testing.assert_array_equal(document_of_position(row), document_of_position(source))
        ids, values = megatron.sample(number)
        assert row.teacher is not None
        counted = row.loss_mask
        np.testing.assert_array_equal(row.teacher.head_ids, ids[counted, :3])
        np.testing.assert_allclose(row.teacher.head_logprobs, values[counted, :3], rtol=1e-3)
    write_synthetic_store(Path("few"), tokens.manifest, {"train": 7}, seed=0)
    code, _, error = run("import tars other --tokens few", capsys)
    assert code == 2 and "more samples than split train of few has rows (7)" in error
    assert not Path("other").exists()


def test_help_tells_the_formats(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("import --help", capsys)
    assert code == 0
    for name, layout in FORMATS.items():
        assert f"  {name} " in out and layout.reads in out
        assert all(phrase in out for phrase in layout.cannot_give)
        assert all(f"--{flag}" in out for flag in layout.flags)


def test_what_is_no_capture_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    captures.write_lines(Path("text.jsonl"), [{"text": "a"}])
    Path("blank.jsonl").write_text("")
    Path("notes.txt").write_text("")
    captures.write_lines(Path("vllm.jsonl"), [captures.vllm_answer(TEXTS[0])])
    megatron.write_paired(Path("cache"), 1)
    _megatron(2)()
    for words, expected in {
        "nowhere new --tokenizer hub": "nowhere is not there",
        "empty new --tokenizer hub": "empty has no file that ends in",
        "text.jsonl new --tokenizer hub": "is of no format that is read by its name and fields (text)",
        "blank.jsonl new --tokenizer hub": "is of no format that is read",
        "notes.txt new --tokenizer hub": "is of no format that is read",
        "vllm.jsonl new": "--format vllm needs --tokenizer",
        "vllm.jsonl new --tokenizer hub --tokens tokens": "--tokens does not belong",
        "vllm.jsonl new --tokenizer hub --alignment legacy": "--alignment does not belong",
        "vllm.jsonl new --tokenizer hub --split heldout": "--split does not belong",
        "vllm.jsonl new --tokenizer empty": "--tokenizer empty cannot be used (",
        "vllm.jsonl new --tokenizer hub --format distillkit": "has the columns prompt_logprobs, ",
        "tars new": "or --tokens: a token store",
        "tars new --tokenizer hub": "holds no tokens (version 2",
        "tars new --tokenizer hub --tokens tokens": "--tokenizer is the token store's",
        "tars new --tokens tokens --sequence-length 4": "--sequence-length is the token store's",
        "tars new --tokens tokens --split heldout": "more samples than split heldout",
        "cache new --tokens tokens": "is a cache of version 3, which holds its tokens",
        "cache new --tokenizer hub --split heldout": "--split is of the token store",
    }.items():
        code, _, error = run(f"import {words}", capsys)
        assert code == 2 and expected in error and error.count("\n") == 1, f"{words}: {error}"
        assert not Path("new").exists()
