"""Captures that are tables of lists: NeMo-Aligner's, vLLM's, plain top logits, axolotl's. The files are
written here from the layouts' description."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.axolotl import read_axolotl
from sparsekd.trainer.importers.document import NOT_LISTED, Document, Options
from sparsekd.trainer.importers.nemo import read_nemo
from sparsekd.trainer.importers.topk import read_topk
from sparsekd.trainer.importers.vllm import read_vllm

sys.path.append(str(Path(__file__).parent))
import captures
from captures import Text, dense, top


def no_tokenizer() -> Any:
    raise AssertionError("nothing here needs a tokenizer")


OPTIONS = Options(tokenizer=no_tokenizer)


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a table, as Parquet or lines of JSON by the file's name."""
    (captures.write_table if file.suffix == ".parquet" else captures.write_lines)(file, rows)
    return file


# NeMo-Aligner


def test_nemo(tmp_path: Path) -> None:
    made = [dense(9, 0), dense(13, 1)]
    lines = [captures.nemo_line(made[0], padded=4), captures.nemo_line(made[1])]
    lines[0]["labels"][:3] = [-100] * 3  # where nothing counts, a label says nothing
    file = write(tmp_path / "lines.jsonl", lines)
    source = read_nemo(file, OPTIONS)
    assert source.rest == "derived"
    for document, (whole, logprobs) in zip(source.documents(), made, strict=True):
        np.testing.assert_array_equal(document.token_ids, whole)
        assert np.flatnonzero(document.loss_mask).tolist() == list(range(3, len(whole) - 1))
        ids, values = top(logprobs[:-1], 5)
        np.testing.assert_array_equal(document.head_ids[:-1], ids)
        np.testing.assert_allclose(document.head_logprobs[:-1], values)
    for line in lines:
        del line["log_sum_exp_logits"]
    source = read_nemo(write(file, lines), OPTIONS)
    assert source.rest == "unknown" and len(list(source.documents())) == 2


def test_nemo_s_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    good = json.dumps(captures.nemo_line(dense(9, 0)))
    line = captures.nemo_line(dense(9, 1))

    def message(second: str | bytes) -> str:
        file.write_bytes(f"{good}\n".encode() + (second.encode() if isinstance(second, str) else second))
        with pytest.raises(StoreError) as caught:
            list(read_nemo(file, OPTIONS).documents())
        return str(caught.value)

    def changed(**fields: Any) -> str:
        return message(json.dumps({**line, **fields}))

    assert "line 2 is no JSON" in message(good[:40]) and "cut off" in message(good[:40])
    assert "line 2 is no JSON" in message("[" * 100_000)
    assert "cannot be read as text" in message(b"\xff\xfe\n")
    assert "line 2 holds a list" in message("[1]")
    assert "have 8, 7, 8, 8 and 8 positions" in changed(labels=line["labels"][:-1])
    assert "position 4: the label is 299, but the next token is" in changed(
        labels=[*line["labels"][:4], 299, *line["labels"][5:]]
    )
    assert "loss_mask holds 0.5" in changed(loss_mask=[0.5] * 8)
    assert "topk_logits is no 2-dimensional list" in changed(topk_logits=[[1.0], [1.0, 2.0]])
    assert "tokens is no 1-dimensional list of integers" in changed(tokens=["a"] * 8)
    assert "in some lines and not in others" in message(
        json.dumps({name: value for name, value in line.items() if name[:3] != "log"})
    )
    assert "lacks labels" in message(json.dumps({name: line[name] for name in line if name != "labels"}))


# vLLM


def _check_answer(document: Document, text: Text, k: int) -> None:
    tokens, logprobs = text
    np.testing.assert_array_equal(document.token_ids, tokens)
    true = logprobs[np.arange(len(tokens) - 1), tokens[1:]]
    assert document.true_logprob is not None
    np.testing.assert_allclose(document.true_logprob[:-1], true)
    for place in range(len(tokens) - 1):
        used = document.head_ids[place] >= 0
        found = document.head_ids[place][used]
        order = np.argsort(-logprobs[place])
        # k, or one more where the true token is the next one.
        assert set(found) == set(order[: len(found)]) and len(found) in (k, k + 1)
        np.testing.assert_allclose(document.head_logprobs[place][used], logprobs[place, found])
    assert (document.head_ids[-1] == NOT_LISTED).all()


def test_vllm(tmp_path: Path) -> None:
    made = [dense(7, 0), dense(9, 1), dense(5, 2)]
    answers = [captures.vllm_answer(text) for text in made]
    completions = {
        "object": "text_completion",
        "choices": [{"index": number, **answers[number]} for number in (0, 1)],
    }
    chat = {"object": "chat.completion", "choices": [{"index": 0}], **answers[2]}
    (tmp_path / "answers.jsonl").write_text(json.dumps(completions) + "\n\n" + json.dumps(chat) + "\n")
    source = read_vllm(tmp_path, OPTIONS)
    assert source.gives_true
    for document, text in zip(source.documents(), made, strict=True):
        _check_answer(document, text, 4)
    (tmp_path / "answers.jsonl").unlink()
    for content, count in (([completions, chat], 3), (chat, 1)):
        (tmp_path / "one.json").write_text(json.dumps(content, indent=1))
        assert len(list(read_vllm(tmp_path / "one.json", OPTIONS).documents())) == count


def test_vllm_s_damage_is_named(tmp_path: Path) -> None:
    answer = captures.vllm_answer(dense(7, 0))
    tokens, positions = answer["prompt_token_ids"], answer["prompt_logprobs"]

    def message(**changes: Any) -> str:
        write(tmp_path / "answers.jsonl", [{**answer, **changes}])
        with pytest.raises(StoreError) as caught:
            list(read_vllm(tmp_path, OPTIONS).documents())
        return str(caught.value)

    assert "return_token_ids" in message(prompt_token_ids=None)
    assert "has no prompt_logprobs" in message(prompt_logprobs=None, choices=[{"index": 0}])
    assert "no answer of vLLM" in message(prompt_logprobs=None)
    assert "7 prompt_token_ids and 6 prompt_logprobs" in message(prompt_logprobs=positions[:-1])
    other = list(tokens)
    other[3] = next(token for token in range(captures.V) if str(token) not in positions[3])
    assert f"prompt_logprobs 3 does not hold its token {other[3]}" in message(prompt_token_ids=other)
    for entry in ({"rank": 1}, {"logprob": -3.0, "rank": float("inf")}):
        assert "has no logprob or rank" in message(
            prompt_logprobs=[None, {str(tokens[1]): entry}, *positions[2:]]
        )
    huge = {**positions[1], str(2**63): {"logprob": -3.0, "rank": 3}}
    assert f"prompt_logprobs 1, entry '{2**63}' is no id" in message(
        prompt_logprobs=[None, huge, *positions[2:]]
    )
    assert f"prompt_token_ids hold {2**63}" in message(prompt_token_ids=[2**63, *tokens[1:]])
    # One long list among 20,000 short ones would take gigabytes.
    one = {"5": {"logprob": -1.0, "rank": 1}}
    long = {**one, **{str(10 + n): {"logprob": -9.0, "rank": 2 + n} for n in range(20_000)}}
    found = message(prompt_token_ids=[5] * 20_001, prompt_logprobs=[None, long, *[one] * 19_999])
    assert "position 0 lists 20001 ids" in found


# Plain top logits


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_topk_over_the_vocabulary(tmp_path: Path, name: str) -> None:
    made = captures.texts(3, shortest=20)
    rows = [captures.topk_row(text, padded=2 * number) for number, text in enumerate(made)]
    source = read_topk(write(tmp_path / name, rows), OPTIONS)
    assert source.rest == "derived"
    for document, (tokens, logprobs) in zip(source.documents(), made, strict=True):
        np.testing.assert_array_equal(document.token_ids, tokens)
        ids, values = top(logprobs, 7)
        np.testing.assert_array_equal(document.head_ids, ids)
        np.testing.assert_allclose(document.head_logprobs, values, atol=1e-5)
        assert document.loss_mask.tolist() == [True] * (len(tokens) - 1) + [False]


def test_topk_over_the_list_has_no_normaliser(tmp_path: Path) -> None:
    made = captures.texts(3, shortest=20)
    rows = [captures.topk_row(text, over_list=True) for text in made]
    source = read_topk(write(tmp_path / "rows.parquet", rows), OPTIONS)
    assert source.rest == "unknown"
    for document, (_, logprobs) in zip(source.documents(), made, strict=True):
        np.testing.assert_allclose(document.head_logprobs, top(logprobs, 7)[1] + 11.5, atol=1e-5)
    plain = [{name: row[name] for name in ("input_ids", "token_ids", "top_values")} for row in rows]
    assert read_topk(write(tmp_path / "plain.parquet", plain), OPTIONS).rest == "unknown"
    rows[2] = captures.topk_row(made[2])
    # The first texts decide; here all are among them.
    assert read_topk(write(tmp_path / "rows.parquet", rows), OPTIONS).rest == "derived"
    with pytest.raises(StoreError, match="row 9: normalized_logits are a softmax over the vocabulary"):
        list(read_topk(write(tmp_path / "rows.parquet", [rows[0]] * 9 + [rows[2]]), OPTIONS).documents())


def test_topk_s_damage_is_named(tmp_path: Path) -> None:
    rows = [captures.topk_row(text) for text in captures.texts(2, shortest=12)]

    def message(**fields: Any) -> str:
        file = write(tmp_path / "rows.jsonl", [rows[0], {**rows[1], **fields}])
        with pytest.raises(StoreError) as caught:
            list(read_topk(file, OPTIONS).documents())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    row = rows[1]
    assert "line 2 has 14 input_ids and 15 token_ids" in message(input_ids=row["input_ids"][:-1])
    assert "has 15 token_ids and 14 top_values" in message(top_values=row["top_values"][1:])
    short = [row["top_values"][0][:-1], *row["top_values"][1:]]
    assert "position 0 lists 7 token_ids and 6 top_values" in message(top_values=short)
    hot = (np.array(row["top_values"]) / 2).tolist()
    assert "is not the softmax of the logit" in message(top_values=hot)
    wrong = [[7.0] * 7, *row["normalized_logits"][1:]]
    assert "the probability 7 is not the softmax" in message(normalized_logits=wrong)
    assert "attention_mask is no run of ones" in message(attention_mask=[1, 0] + [1] * 13)
    assert "input_ids holds double, expected integers" in message(input_ids=[0.5] * 15)
    assert "input_ids is null, expected a list" in message(input_ids=None)
    assert "token_ids holds int64, expected a list for each position" in message(token_ids=[1] * 15)
    assert "is no table of one kind of value" in message(token_ids=[[1, "a"]] * 15)
    del row["normalized_logits"]
    assert "line 2 lacks normalized_logits, which the first rows have" in message()
    table = pa.table(
        {"input_ids": [[1, 2]], "token_ids": [[[1, None], [2, 3]]], "top_values": [[[1.0] * 2] * 2]}
    )
    pq.write_table(table, tmp_path / "nulls.parquet")
    with pytest.raises(StoreError, match="row 0: token_ids holds nulls"):
        list(read_topk(tmp_path / "nulls.parquet", OPTIONS).documents())
    with pytest.raises(StoreError, match="lacks the columns input_ids, top_values; it has token_ids"):
        read_topk(write(tmp_path / "less.parquet", [{"token_ids": [[1]]}]), OPTIONS)
    (tmp_path / "arrow").mkdir()
    (tmp_path / "arrow/data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(StoreError, match=r"holds Arrow files, .*to_parquet"):
        read_topk(tmp_path / "arrow", OPTIONS)


def test_a_small_file_that_unfolds_to_gigabytes_is_not_read(tmp_path: Path) -> None:
    flat = pa.repeat(pa.scalar(7, pa.int8()), 1 << 25)
    column = pa.LargeListArray.from_arrays(pa.array([0, len(flat)], pa.int64()), flat)
    pq.write_table(pa.table({"input_ids": column}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 50_000
    from sparsekd.trainer.importers.columns import read_rows

    with pytest.raises(StoreError, match=r"row group 0, input_ids.*: 33,554,432 values in .* made to fill"):
        next(read_rows([tmp_path / "bomb.parquet"], ["input_ids"]))


# axolotl


@pytest.mark.parametrize("legacy", [False, True])
def test_axolotl_s_prepared_columns(tmp_path: Path, legacy: bool) -> None:
    made = captures.texts(3, shortest=12)
    rows = [captures.axolotl_prepared(text, 4, legacy=legacy) for text in made]
    source = read_axolotl(write(tmp_path / "train.parquet", rows), OPTIONS)
    assert source.rest == "unknown"
    for document, (tokens, logprobs) in zip(source.documents(), made, strict=True):
        np.testing.assert_array_equal(document.token_ids, tokens)
        counted = np.flatnonzero(document.loss_mask)
        assert counted.tolist() == list(range(3, len(tokens) - 1))
        for place in counted:
            ids, values = captures.with_own(logprobs[place], int(tokens[place + 1]), 5)
            np.testing.assert_array_equal(document.head_ids[place], ids)
            expected = np.array(values) - np.log(np.exp(values).sum())
            np.testing.assert_allclose(document.head_logprobs[place], expected)
    assert (document.head_ids[~document.loss_mask] == NOT_LISTED).all()


def test_axolotl_s_alignment_is_asked_for_where_it_is_not_certain(tmp_path: Path) -> None:
    row = captures.axolotl_prepared(dense(12, 0), 4)
    row["target_mask"] = [[1] * 5] * 11 + [[0] * 5]  # as the first version of all wrote it
    file = write(tmp_path / "train.parquet", [row])
    with pytest.raises(StoreError, match=r"row 0: target_mask fits labels neither way.*--alignment legacy"):
        list(read_axolotl(file, OPTIONS).documents())
    (document,) = read_axolotl(file, Options(no_tokenizer, alignment="current")).documents()
    assert np.flatnonzero(document.loss_mask).tolist() == list(range(3, 11))
    (moved,) = read_axolotl(file, Options(no_tokenizer, alignment="legacy")).documents()
    np.testing.assert_array_equal(moved.head_ids[3], document.head_ids[4])


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
@pytest.mark.parametrize("objects", [False, True])
def test_axolotl_s_conversations(tmp_path: Path, name: str, objects: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(captures.write_tokenizer(tmp_path / "tokenizer"))
    options = Options(lambda: tokenizer)
    made = captures.texts(3, shortest=12)
    rows = [captures.axolotl_offline(text, 4, objects=objects) for text in made]
    source = read_axolotl(write(tmp_path / name, rows), options)
    assert source.rest == "derived"
    for document, (tokens, logprobs) in zip(source.documents(), made, strict=True):
        np.testing.assert_array_equal(document.token_ids, tokens)
        counted = np.flatnonzero(document.loss_mask)
        assert counted.tolist() == list(range(3, len(tokens) - 1))
        for place in counted:
            ids, values = captures.with_own(logprobs[place], int(tokens[place + 1]), 5)
            np.testing.assert_array_equal(document.head_ids[place], ids)
            np.testing.assert_allclose(document.head_logprobs[place], values)
    # The teacher may have described every token, and a template may mark the answers.
    whole = captures.axolotl_offline(made[2], 1)
    whole["messages"] = captures.axolotl_offline(made[2], 4)["messages"]
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    (document,) = read_axolotl(write(tmp_path / "whole.parquet", [whole]), options).documents()
    assert (document.head_ids[:-1] != NOT_LISTED).any(axis=1).all()
    assert np.flatnonzero(document.loss_mask).tolist() == list(range(3, len(made[2][0]) - 1))


def test_axolotl_s_damage_is_named(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(captures.write_tokenizer(tmp_path / "tokenizer"))
    prepared = captures.axolotl_prepared(dense(12, 0), 4)
    offline = captures.axolotl_offline(dense(30, 0), 4)
    objects = captures.axolotl_offline(dense(30, 0), 4, objects=True)

    def message(row: dict[str, Any], *, alignment: str | None = None, **fields: Any) -> str:
        file = write(tmp_path / "rows.jsonl", [{**row, **fields}])
        with pytest.raises(StoreError) as caught:
            list(read_axolotl(file, Options(lambda: tokenizer, alignment=alignment)).documents())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has 12 input_ids and [12, 12, 11, 12]" in message(
        prepared, target_logprobs=prepared["target_logprobs"][1:]
    )
    assert "position 0 lists 5 target_token_ids and 4 target_logprobs" in message(
        prepared, target_logprobs=[prepared["target_logprobs"][0][1:], *prepared["target_logprobs"][1:]]
    )
    assert "the label is 7 and the token" in message(prepared, labels=[7] * 12)
    assert "expected input_ids, labels" in message({"text": "a"})
    assert "leave --alignment away" in message(offline, alignment="legacy")
    assert "lacks target_token_ids" in message({name: offline[name] for name in ("messages", "logprobs")})
    lists = objects["llm_text_generation_vllm_logprobs"]
    assert "hold no objects with token and logprob" in message(
        objects, llm_text_generation_vllm_logprobs=[[{"token": "w5", "logprob": -1.0}], *lists[1:]]
    )
    assert "0 of 26 lists hold the token" in message(offline, target_token_ids=[[0, 1, 2, 3, 4]] * 26)
    turned = [{"role": "assistant", "content": "w7 w8"}]
    assert "has 26 logprobs and its messages 2 tokens" in message(offline, messages=turned)
    assert "cannot be spelled by the tokenizer's chat template" in message(offline, messages=[3])
    tokenizer.chat_template = None
    assert "the tokenizer has none" in message(offline)
