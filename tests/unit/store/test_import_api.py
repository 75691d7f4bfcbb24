"""Teachers that give no logits: answers of APIs with a few log-probabilities, and sampled labels."""

import gzip
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from transformers import AddedToken

from sparsekd.kernels.objective import Objective
from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import Row, weights_of_positions
from sparsekd.logit_store.tools.inspect import inspect_text
from sparsekd.logit_store.tools.stats import store_stats
from sparsekd.trainer.config.checks import resolved_objective
from sparsekd.trainer.corpus.tokenizer import train_tokenizer
from sparsekd.trainer.importers.token_bytes import TokenIds
from sparsekd.trainer.quality.score import kinds

sys.path.append(str(Path(__file__).parent))
import captures
from test_import_cli import place, run

__all__ = ["place"]

TEXT = captures.dense(24, 1)
PROMPT, K = 4, 5


def imported(lines: list[Any], capsys: pytest.CaptureFixture[str], flags: str = "") -> LogitStore:
    """Imports lines of JSON into `new`, which it opens."""
    captures.write_lines(Path("lines.jsonl"), lines)
    code, _, error = run(f"import lines.jsonl new --codec exact --tokenizer hub {flags}", capsys)
    assert code == 0, error
    return open_store(Path("new"))


def row_of(store: LogitStore) -> Row:
    assert store.rows("train") == 1
    return store.read_row("train", 0)


@pytest.mark.parametrize("form", ["chat", "completions"])
def test_an_answer_is_the_dense_distribution_s(
    place: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    tokens, logprobs = TEXT
    chat = form == "chat"
    line = captures.api_chat(TEXT, PROMPT, K) if chat else captures.api_completion(TEXT, K)
    row = row_of(imported([line], capsys))
    first = PROMPT - 1 if chat else 0
    np.testing.assert_array_equal(row.token_ids, tokens)
    np.testing.assert_array_equal(np.flatnonzero(row.loss_mask), np.arange(first, len(tokens) - 1))
    ids, values = captures.top(logprobs[first:-1], K)
    record = row.teacher
    assert record is not None
    np.testing.assert_array_equal(record.head_ids, ids)
    np.testing.assert_allclose(record.head_logprobs, values, rtol=1e-6)
    np.testing.assert_allclose(np.exp(record.log_rest[:, 0]), 1 - np.exp(values).sum(axis=1), rtol=1e-4)
    true = logprobs[np.arange(first, len(tokens) - 1), tokens[first + 1 :]]
    np.testing.assert_allclose(record.true_logprob, true, rtol=1e-6)


def test_each_choice_is_a_document_behind_its_prompt(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = captures.api_chat(TEXT, PROMPT, K)
    del line["messages"]
    line |= {"prompt_token_ids": [7, 8, 9], "choices": line["choices"] * 2}
    rows = imported([line], capsys, "--rows-per-shard 2")
    assert rows.rows("train") == 2
    for number in (0, 1):
        assert rows.read_row("train", number).token_ids.tolist() == [7, 8, 9, *TEXT[0][PROMPT:]]
    alone = {"logprobs": line["choices"][0]["logprobs"], "prompt": "w7 w8"}
    captures.write_lines(Path("alone.jsonl"), [alone])
    assert run("import alone.jsonl other --tokenizer hub", capsys)[0] == 0
    assert open_store(Path("other")).read_row("train", 0).token_ids.tolist() == [7, 8, *TEXT[0][PROMPT:]]


def test_answers_weigh_what_a_judge_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = captures.api_chat(TEXT, PROMPT, K)
    choice = line["choices"][0]
    judged = line | {"choices": [choice | {"weight": 0.25}, choice, choice | {"weight": 0}], "weight": 3}
    store = imported([judged, line], capsys, "--rows-per-shard 4")
    rows = [store.read_row("train", index) for index in range(store.rows("train"))]
    found = [set(weights_of_positions(row)[row.loss_mask].tolist()) for row in rows]
    assert found == [{0.25}, {3.0}, set(), {1.0}]
    for wrong in (-1, "much", True, None, math.nan, 1e31):
        captures.write_lines(Path("wrong.jsonl"), [line | {"weight": wrong}])
        code, _, error = run("import wrong.jsonl wrong --tokenizer hub", capsys)
        assert code == 2 and "line 1 has the weight" in error and "expected a number from 0 to" in error
        assert not Path("wrong").exists()


def test_compressed_lines_are_the_same_lines(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = imported([captures.api_chat(TEXT, PROMPT, K)], capsys)
    content = Path("lines.jsonl").read_bytes()
    for name, packed in (
        ("a.jsonl.gz", gzip.compress(content)),
        ("a.jsonl.zst", zstandard.compress(content)),
    ):
        Path(name).write_bytes(packed)
        code, _, error = run(f"import {name} {name}-new --codec exact --tokenizer hub", capsys)
        assert code == 0, error
        row, other = row_of(expected), row_of(open_store(Path(f"{name}-new")))
        np.testing.assert_array_equal(row.token_ids, other.token_ids)
        assert row.teacher is not None and other.teacher is not None
        np.testing.assert_array_equal(row.teacher.head_logprobs, other.teacher.head_logprobs)
    Path("a.jsonl.gz").write_bytes(gzip.compress(content)[:-9])
    code, _, error = run("import a.jsonl.gz cut --tokenizer hub", capsys)
    assert code == 2 and "a.jsonl.gz is damaged or was cut short" in error and not Path("cut").exists()


def test_a_line_that_unpacks_without_end_is_not_read(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekd.trainer.run.streams.LARGEST_DOCUMENT", 1 << 16)
    monkeypatch.setattr("sparsekd.trainer.importers.jsonl.LARGEST_DOCUMENT", 1 << 16)
    Path("line.jsonl.gz").write_bytes(gzip.compress(b'{"input_ids": [' + b"1, " * (1 << 20)))
    Path("array.jsonl.gz").write_bytes(gzip.compress(b"[\n" + b"1,\n" * (1 << 20)))
    for name, expected in (("line", "line 1 is longer than"), ("array", "is one JSON text of more than")):
        code, _, error = run(f"import {name}.jsonl.gz new --format samples --tokenizer hub", capsys)
        assert code == 2 and expected in error and error.count("\n") == 1, error


def test_every_token_of_a_byte_level_tokenizer_is_known_by_its_bytes() -> None:
    text = "Grüße, 東京! naïve \U0001f600 résumé\n\tdef f(x):\n"
    tokenizer = train_tokenizer([text], 262)
    ids = TokenIds(tokenizer)
    spelled = [tokenizer.backend_tokenizer.id_to_token(number) for number in range(len(tokenizer))]
    for number, name in enumerate(spelled):
        if number in tokenizer.added_tokens_decoder:
            assert ids.id_of(name, None, "here") == number
    # What a text is cut into are pieces of its bytes, whole characters or not.
    encoded = tokenizer(text)["input_ids"]
    letters = {letter: byte for byte, letter in _gpt2_letters().items()}
    pieces = [bytes(letters[letter] for letter in spelled[number]) for number in encoded]
    assert b"".join(pieces) == text.encode() and any(b"\xf0" in piece or b"\xe6" in piece for piece in pieces)
    assert [ids.id_of("?", list(piece), "here") for piece in pieces] == encoded
    broken = next(piece for piece in pieces if "\ufffd" in piece.decode(errors="replace"))
    escaped = "bytes:" + "".join(f"\\x{byte:02x}" for byte in broken)
    assert ids.id_of(escaped, None, "here") == encoded[pieces.index(broken)]
    with pytest.raises(
        StoreError, match=r"may be one of several ids.*generate, then prepare, then train obj"
    ):
        ids.id_of("\ufffd", list("\ufffd".encode()), "here")
    with pytest.raises(StoreError, match=r"is none of --tokenizer.s.*generate, then prepare, then train obj"):
        ids.id_of(" elsewhere", None, "here")


def _gpt2_letters() -> dict[int, str]:
    """Byte -> letter, by transformers' own table."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def test_samples_are_draws_and_nothing_else_is_claimed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = captures.sampled_row(TEXT, 12)
    line["sampled_ids"][3] = None
    line["sampled_ids"][6].append(7)
    store = imported([line], capsys)
    spec = store.manifest.record
    assert (spec.k, spec.n, spec.temperatures, spec.rest) == (0, 12, (1.0,), "counts")
    row = row_of(store)
    asked = [place for place in range(len(TEXT[0]) - 1) if place != 3]
    np.testing.assert_array_equal(np.flatnonzero(row.loss_mask), asked)
    record = row.teacher
    assert record is not None
    for index, position in enumerate(asked):
        ids, counts = np.unique(line["sampled_ids"][position][:12], return_counts=True)
        found = record.tail_counts[index] > 0
        np.testing.assert_array_equal(record.tail_ids[index, found], ids)
        np.testing.assert_array_equal(record.tail_counts[index, found], counts)
    assert (record.log_rest == 0).all()  # all of the mass is outside of a head of nothing
    # What no draw tells is said to be unknown wherever it would be read.
    page = inspect_text(Path("new"))
    assert re.search(r"teacher's loss \(nats\) +unknown", page) and "draws alone" in page
    assert re.search(r"true +\?  'w", page)
    stats = store_stats(Path("new")).text()
    assert "teacher's loss" not in stats.replace("the teacher's loss and", "") and "draws alone" in stats
    assert kinds(spec, teacher_runs=False) == {}


def test_samples_behind_the_last_token_speak_of_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = captures.sampled_row(TEXT)
    line["sampled_ids"][-1] = [1] * 12
    row = row_of(imported([line], capsys))
    np.testing.assert_array_equal(np.flatnonzero(row.loss_mask), np.arange(len(TEXT[0]) - 1))


def test_tokens_that_spell_the_same_bytes_are_no_guess() -> None:
    """A token that was added beside one of the vocabulary; an answer that names its id is still read."""
    tokenizer = train_tokenizer(["the cat and the dog and the bird"] * 9, 270)
    ids = TokenIds(tokenizer)
    (the,) = tokenizer(" the")["input_ids"]
    assert ids.id_of(" the", None, "here") == the
    tokenizer.add_tokens([AddedToken(" the", normalized=False)])
    both = TokenIds(tokenizer)
    for spelled in (None, list(b" the")):
        with pytest.raises(StoreError, match="may be one of several ids"):
            both.id_of(" the", spelled, "here")
    assert both.id_of(f"token_id:{the}", None, "here") == the


def test_samples_train_sampled_at_temperature_1_alone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsekd.trainer.config.schema import ObjectiveConfig
    from sparsekd.trainer.run.errors import ConfigError

    spec = imported([captures.sampled_row(TEXT)], capsys).manifest.record
    found: Objective = resolved_objective(ObjectiveConfig(), spec)
    assert found.target_mode == "sampled"
    for changed in ({"temperature": 2.0}, {"target_mode": "tail_bucket"}):
        with pytest.raises(ConfigError):
            resolved_objective(ObjectiveConfig(**changed), spec)


def test_manifests_of_draws_alone_have_no_head(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported([captures.sampled_row(TEXT)], capsys)
    manifest = json.loads(Path("new/MANIFEST.json").read_text())
    manifest["record"]["k"] = 2
    Path("new/MANIFEST.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with pytest.raises(StoreError, match=r"record\.rest.*another unless k = 0, n > 0"):
        open_store(Path("new"))
