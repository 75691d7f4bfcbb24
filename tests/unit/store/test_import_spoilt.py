"""`sparsekd store import` on spoilt captures of every format: one sentence each, nothing half-written."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zstandard

sys.path.append(str(Path(__file__).parent))
import captures
import captures_megatron as megatron
from test_import_cli import CASES, place, run

__all__ = ["place"]


def _cut(file: str, share: float = 0.6) -> Callable[[], None]:
    def change() -> None:
        content = Path(file).read_bytes()
        Path(file).write_bytes(content[: int(len(content) * share)])

    return change


def _rows(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    """Changes the fourth row of a table."""

    def spoil() -> None:
        path = Path(file)
        parquet = path.suffix == ".parquet"
        rows = pq.read_table(path).to_pylist() if parquet else list(map(json.loads, path.open()))
        change(rows[3])
        (captures.write_table if parquet else captures.write_lines)(path, rows)

    return spoil


def _set(field: str, position: int, entry: int, value: float) -> Callable[[dict[str, Any]], object]:
    return lambda row: row[field][position].__setitem__(entry, value)


def _bits(change: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    """Changes the first row of DistillKit's second file."""

    def spoil() -> None:
        rows = pq.read_table("data/data_1.parquet").to_pylist()
        change(rows[0])
        table = pa.Table.from_pylist(rows, captures.DISTILLKIT_SCHEMA)
        pq.write_table(table, "data/data_1.parquet")

    return spoil


def _settings(**changed: Any) -> Callable[[], None]:
    def spoil() -> None:
        Path("data/compression_config.yaml").write_text(yaml.safe_dump({**captures.PLAIN, **changed}))

    return spoil


def _answer(position: int, change: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    return _rows("vllm.jsonl", lambda row: change(row["prompt_logprobs"][position]))


def _chat(position: int, change: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    return _rows("chat.jsonl", lambda row: change(row["choices"][0]["logprobs"]["content"][position]))


def _bomb(file: str, column: str) -> Callable[[], None]:
    """Replaces a column by four million equal numbers in some kilobytes."""

    def spoil() -> None:
        table = pq.read_table(file)
        flat = pa.repeat(pa.scalar(7, pa.int8()), 1 << 22)
        bomb = pa.LargeListArray.from_arrays(pa.array([0, *[len(flat)] * len(table)], pa.int64()), flat)
        index = table.column_names.index(column)
        pq.write_table(table.set_column(index, column, bomb), file, compression="zstd")

    return spoil


def _payload(change: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    """Writes a cache of version 2 whose only iteration was changed."""

    def spoil() -> None:
        for file in Path("tars").iterdir():
            file.unlink()
        meta = {"saver": {"format_version": 2, "mbs_save": megatron.MICRO}}
        parts = [megatron.sample(number) for number in (0, 1)]
        ids = torch.from_numpy(np.stack([ids for ids, _ in parts], axis=1))
        payload = {
            "values": torch.from_numpy(np.stack([values for _, values in parts], axis=1)).half(),
            "indices_low": (ids & 0xFFFF).to(torch.uint16),
            "bit_17": (ids >> 16).bool(),
        }
        made = change(payload)
        data = made if isinstance(made, bytes) else megatron.saved(payload)
        members = {"_meta.json": json.dumps(meta).encode(), "0-8.pt.zst": data}
        megatron.write_tar(Path("tars/dp0__0-8.tar"), members)

    return spoil


def _paired(edit: megatron.Edit) -> Callable[[], None]:
    def spoil() -> None:
        for file in Path("cache").iterdir():
            file.unlink()
        Path("cache").rmdir()
        megatron.write_paired(Path("cache"), 2, edit=edit)

    return spoil


def _elsewhere() -> None:
    """Has a description name a member outside of its folder."""
    file = Path("cache/dp1__0-16.tar.ready.json")
    content = json.loads(file.read_text())
    content["records"][0]["inputs"]["member"] = "../../hub/tokenizer.json"
    file.write_text(json.dumps(content))


NAN = float("nan")
VALUES_OF_NAN = list(np.float32(NAN).tobytes())

SPOILT: dict[str, tuple[str, Callable[[], None], str]] = {
    "distillkit, cut off": (
        "distillkit",
        _cut("data/data_1.parquet"),
        "data_1.parquet cannot be read as",
    ),
    "distillkit, lengths": (
        "distillkit",
        _bits(lambda row: row["bytepacked_indices"].pop()),
        "data_1.parquet, row 0 has 30 input_ids, 29 compressed_logprobs and 28",
    ),
    "distillkit, id": (
        "distillkit",
        _bits(lambda row: row["bytepacked_indices"].__setitem__(2, [255] * 7)),
        "data_1.parquet, row 0, position 2, entry 0: 511 is not an id of the tokenizer",
    ),
    "distillkit, NaN": (
        "distillkit",
        _bits(lambda row: row["compressed_logprobs"].__setitem__(2, VALUES_OF_NAN * 6)),
        "data_1.parquet, row 0, position 2, entry 0: nan is no finite value",
    ),
    "distillkit, token": (
        "distillkit",
        _bits(lambda row: row["input_ids"].__setitem__(4, 2**63)),
        "position 4: token id 4611686018427387904 is not in the tokenizer",
    ),
    "distillkit, size": ("distillkit", _bomb("data/data_1.parquet", "input_ids"), "made to fill the memory"),
    "distillkit, k": ("distillkit", _settings(k=1 << 40), "breaks the rule that"),
    "nemo, cut off": ("nemo", _cut("nemo.jsonl"), "is no JSON"),
    "nemo, lengths": ("nemo", _rows("nemo.jsonl", lambda row: row["labels"].pop()), "line 4: tokens, labels"),
    "nemo, id": (
        "nemo",
        _rows("nemo.jsonl", _set("topk_token_ids", 5, 0, 300)),
        "position 5, entry 0: 300 is",
    ),
    "nemo, NaN": ("nemo", _rows("nemo.jsonl", _set("topk_logits", 5, 0, NAN)), "position 5, entry 0: nan is"),
    "nemo, size": (
        "nemo",
        _rows("nemo.jsonl", lambda row: row.update(tokens=[10**400] * 34)),
        "tokens is no 1-dimensional list of integers",
    ),
    "vllm, cut off": ("vllm", _cut("vllm.jsonl"), "is no JSON"),
    "vllm, lengths": (
        "vllm",
        _rows("vllm.jsonl", lambda row: row["prompt_logprobs"].pop()),
        "line 4 has 33 prompt_token_ids and 32 prompt_logprobs",
    ),
    "vllm, id": (
        "vllm",
        _answer(5, lambda entries: entries.update({"300": {"logprob": -1.0, "rank": 1}})),
        "300 is not an id of the tokenizer",
    ),
    "vllm, NaN": (
        "vllm",
        _answer(5, lambda entries: [entry.update(logprob=NAN) for entry in entries.values()]),
        "line 4, position 4, entry 0: nan is no finite value",
    ),
    "api, cut off": ("api chat", _cut("chat.jsonl"), "is no JSON"),
    "api, lengths": (
        "api completions",
        _rows("echo.jsonl", lambda row: row["choices"][0]["logprobs"]["tokens"].pop()),
        "line 4 has 32 tokens, 33 token_logprobs and 33 top_logprobs",
    ),
    "api, id": (
        "api completions",
        _rows(
            "echo.jsonl",
            lambda row: row["choices"][0]["logprobs"]["top_logprobs"][5].update({"token_id:300": -9.0}),
        ),
        "line 4, position 4, entry 5: 300 is not an id of the tokenizer",
    ),
    "api, token": (
        "api chat",
        _chat(5, lambda entry: entry["top_logprobs"][1].update(token="zebra", bytes=None)),
        "line 4, token 5 of the answer: the token 'zebra' is none of --tokenizer's",
    ),
    "api, bytes": (
        "api chat",
        _chat(5, lambda entry: entry["top_logprobs"][1].update(bytes=[256])),
        "token 5 of the answer: the bytes of the token",
    ),
    "api, lost": (
        "api chat",
        _chat(5, lambda entry: entry["top_logprobs"][1].update(token="\ufffd", bytes=None)),
        "may be one of several ids",
    ),
    "api, twice": (
        "api chat",
        _chat(5, lambda entry: entry["top_logprobs"].append(entry["top_logprobs"][0])),
        "token 5 of the answer lists the token",
    ),
    "api, NaN": (
        "api chat",
        _chat(5, lambda entry: entry["top_logprobs"][1].update(logprob=NAN)),
        "token 5 of the answer has the logprob nan, expected a number of at most 0",
    ),
    "api, positive": (
        "api chat",
        _chat(5, lambda entry: entry["top_logprobs"][1].update(logprob=0.5)),
        "token 5 of the answer has the logprob 0.5, expected a number of at most 0",
    ),
    "api, sum": (
        "api chat",
        _chat(5, lambda entry: [one.update(logprob=-0.1) for one in entry["top_logprobs"]]),
        "line 4, position 8: the listed probabilities sum to 4.5",
    ),
    "api, none": (
        "api chat",
        _chat(5, lambda entry: entry.update(top_logprobs=[])),
        "token 5 of the answer has 0 top_logprobs, expected 1 to 1,000",
    ),
    "api, line": (
        "api chat",
        lambda: Path("chat.jsonl").write_text(json.dumps({"choices": [{"logprobs": None}], "prompt": "w5"})),
        "line 1 has no logprobs: ask with",
    ),
    "samples, cut off": ("samples", _cut("samples.jsonl"), "is no JSON"),
    "samples, lengths": (
        "samples",
        _rows("samples.jsonl", lambda row: row["sampled_ids"].pop()),
        "line 4 has 33 input_ids and 32 sampled_ids",
    ),
    "samples, id": (
        "samples",
        _rows("samples.jsonl", _set("sampled_ids", 5, 0, 300)),
        "line 4, position 5, entry 0: 300 is not an id of the tokenizer",
    ),
    "samples, NaN": (
        "samples",
        _rows("samples.jsonl", _set("sampled_ids", 5, 0, NAN)),
        "sampled_ids holds double, expected integers",
    ),
    "topk, cut off": ("topk", _cut("topk.parquet"), "topk.parquet cannot be read as Parquet"),
    "topk, lengths": (
        "topk",
        _rows("topk.parquet", lambda row: row["input_ids"].pop()),
        "row 3 has 32 input_ids and 33 token_ids",
    ),
    "topk, id": (
        "topk",
        _rows("topk.parquet", _set("token_ids", 5, 0, -7)),
        "position 5, entry 0: -7 is not",
    ),
    "topk, twice": (
        "topk",
        _rows("topk.parquet", lambda row: row["token_ids"][5].__setitem__(0, row["token_ids"][5][1])),
        "is listed twice",
    ),
    "topk, NaN": ("topk", _rows("topk.parquet", _set("top_values", 5, 0, NAN)), "row 3, position 5, entry"),
    "topk, size": ("topk", _bomb("topk.parquet", "token_ids"), "made to fill the memory"),
    "axolotl, cut off": ("axolotl lists", _cut("lists.jsonl"), "is no JSON"),
    "axolotl, lengths": (
        "axolotl prepared",
        _rows("prepared.parquet", lambda row: row["target_mask"].pop()),
        "row 3 has 33 input_ids and [33, 33, 33, 32]",
    ),
    "axolotl, id": (
        "axolotl prepared",
        _rows("prepared.parquet", _set("target_token_ids", 5, 0, 300)),
        "row 3, position 5, entry 0: 300 is not an id of the tokenizer",
    ),
    "axolotl, NaN": (
        "axolotl objects",
        _rows(
            "objects.parquet", lambda row: row["llm_text_generation_vllm_logprobs"][2][0].update(logprob=NAN)
        ),
        "row 3, position 5, entry 0: nan is no finite value",
    ),
    "axolotl, size": (
        "axolotl prepared",
        _bomb("prepared.parquet", "target_mask"),
        "made to fill the memory",
    ),
    "megatron 2, cut off": ("megatron 2", _cut("tars/dp1__0-16.tar"), "dp1__0-16.tar is cut off"),
    "megatron 2, lengths": (
        "megatron 2",
        _payload(lambda made: made.update({name: part[:-1] for name, part in made.items()})),
        "0-8.pt.zst, micro-batch 0, sample 0 has 22 positions, but the token store's rows have 23",
    ),
    "megatron 2, id": (
        "megatron 2",
        _payload(lambda made: made.update(bit_17=~made["bit_17"])),
        "is not an id of the tokenizer",
    ),
    "megatron 2, NaN": (
        "megatron 2",
        _payload(lambda made: made["values"].__setitem__((4, 1, 0), NAN)),
        "micro-batch 0, sample 1, position 4, entry 0: nan is no finite value",
    ),
    "megatron 2, pickle": (
        "megatron 2",
        _payload(lambda made: made.update(hook=print)),
        "0-8.pt.zst holds more than plain tensors (__builtin__.print)",
    ),
    "megatron 3, cut off": ("megatron 3", _cut("cache/dp1__0-16.tar", 0.3), "dp1__0-16.tar is cut off"),
    "megatron 3, lengths": (
        "megatron 3",
        _paired(lambda inputs, _: inputs.update(labels=inputs["labels"][:-1])),
        "labels has shape [91], expected [92]",
    ),
    "megatron 3, id": (
        "megatron 3",
        _paired(lambda _, targets: targets["bit_17"].fill_(255)),
        "is not an id of the tokenizer",
    ),
    "megatron 3, NaN": (
        "megatron 3",
        _paired(lambda _, targets: targets["values"].__setitem__((4, 0), NAN)),
        "position 4, entry 0: nan is no finite value",
    ),
    "megatron 3, path": ("megatron 3", _elsewhere, "no description of the member 0-8.inputs.pt.zst"),
    "megatron 3, size": (
        "megatron 3",
        _paired(lambda _, targets: targets.update(values=torch.zeros(1).half().expand(1 << 30, 1 << 10))),
        "a tensor of shape [1073741824, 1024] in 2 bytes",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_capture_is_one_sentence_and_no_store(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    which, spoil, expected = SPOILT[name]
    case = CASES[which]
    if name.endswith("size"):  # the same in small: a real one takes seconds to write
        monkeypatch.setattr("sparsekd.trainer.importers.columns.FREE_VALUES", 1 << 16)
        monkeypatch.setattr("sparsekd.trainer.importers.columns.MOST_EXPANSION", 20)
    case.write()
    spoil()
    code, out, error = run(f"import {case.source} new {case.flags}", capsys)
    assert code == 2 and not out
    assert expected in error, error
    sentence = error.removeprefix("sparsekd store: ")
    assert sentence != error and error.count("\n") == 1 and error.endswith(".\n"), error
    assert not re.search(r"Traceback|Error\b", sentence), error
    assert not Path("new").exists() and not list(Path("temporary").iterdir())


@pytest.mark.parametrize("known", [True, False])
def test_a_member_that_unpacks_to_too_much_is_not_unpacked(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    content = bytes(10_000_000)
    compressor = zstandard.ZstdCompressor(write_content_size=known)
    monkeypatch.setattr("sparsekd.trainer.importers.megatron_tars.MOST_BYTES", 5_000_000)
    CASES["megatron 2"].write()
    _payload(lambda _: compressor.compress(content))()
    code, _, error = run("import tars new --tokens tokens", capsys)
    assert code == 2 and "0-8.pt.zst unpacks to more than 5,000,000 bytes" in error
    assert not Path("new").exists() and not list(Path("temporary").iterdir())


@pytest.mark.parametrize("name", CASES)
def test_random_damage_is_one_sentence_or_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    case = CASES[name]
    case.write()
    source = Path(case.source)
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    whole = {file: file.read_bytes() for file in files}
    for seed in range(4):
        random = np.random.default_rng([11, seed])
        file = files[int(random.integers(len(files)))]
        content = bytearray(whole[file])
        for spot in random.integers(len(content), size=(1, 1, 8, 64)[seed]):
            content[spot] = int(random.integers(256))
        file.write_bytes(bytes(content))
        code, _, error = run(f"import {source} new{seed} --format {case.layout} {case.flags}", capsys)
        assert (code, error) == (0, "") or (code == 2 and error.count("\n") == 1), f"{file}, {seed}: {error}"
        assert Path(f"new{seed}").exists() == (code == 0)
        file.write_bytes(whole[file])
