"""Conversations, pairs and ids from files to a token store, to a teacher's records, to steps of a student."""

import errno
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_templates as templates
import numpy as np
import pytest
from capture_world import config_for, make_teacher
from chat_templates import chat_tokenizer
from test_api import drive

from sparsekd.logit_store.places.files import files_below
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import Row, document_of_position, weights_of_positions
from sparsekd.logit_store.tools.inspect import inspect_text
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.corpus import encoding
from sparsekd.trainer.corpus.encoding import Block, Encoded, Encoder
from sparsekd.trainer.corpus.findings import Records
from sparsekd.trainer.corpus.kept import Kept
from sparsekd.trainer.corpus.prepare import run
from sparsekd.trainer.corpus.tokenizer import save_tokenizer
from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.teacher.capture import run as capture

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_environment")]

LENGTH = 48


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number}+1? <|im_end|>"},
                {"role": "assistant", "content": f"It is {number + 1}."},
                {"role": "user", "content": "Sure?" * (number % 3 + 1)},
                {"role": "assistant", "content": f"Yes: {number} and one."},
            ],
            "w": 1 + number % 2,
        }
        for number in range(count)
    ]


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text(
        "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)
    )
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(chat_tokenizer(templates.CHATML), folder)
    return folder


def prepared(path: Path, tokenizer: Path, store: Path, **keys: Any) -> LogitStore:
    config = Config()
    config.corpus.paths, config.corpus.format = [str(path)], "jsonl"
    config.corpus.tokenizer, config.corpus.sequence_length = str(tokenizer), LENGTH
    config.corpus.heldout_fraction = 0.3
    config.store.tokens, config.store.rows_per_shard = str(store), 8
    for key, value in keys.items():
        setattr(config.corpus, key, value)
    run(config)
    return open_store(store)


def rows_of(store: LogitStore, split: str = "train") -> list[Row]:
    return [store.read_row(split, index) for index in range(store.rows(split))]


def with_earlier(rows: list[Row]) -> list[tuple[set[int], Row]]:
    """Each row with the documents of the rows before it."""
    return [
        ({int(number) for before in rows[:index] for number in before.segment_documents}, row)
        for index, row in enumerate(rows)
    ]


def learned_texts(rows: list[Row]) -> dict[int, str]:
    """By document the labels that the loss counts, one after the other."""
    tokenizer, found = chat_tokenizer(None), {}
    for row in rows:
        owners = document_of_position(row)
        for place in np.flatnonzero(row.loss_mask):
            assert owners[place] == owners[place + 1]
            found.setdefault(int(owners[place]), []).append(int(row.token_ids[place + 1]))
    return {number: tokenizer.decode(ids) for number, ids in found.items()}


@pytest.mark.parametrize(("weight", "jobs"), [(0.25, 1), (0.0, 2)])
def test_a_rationale_weighs_what_was_asked(
    tmp_path: Path, tokenizer: Path, weight: float, jobs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """At each position stands the weight of the token that follows: its label."""
    records = conversations(24)
    for number, record in enumerate(records):
        first = record["messages"][1]
        first["content"] = f"<think>{number} and 1 </think>" + first["content"]
    path = write_lines(tmp_path / "chats.jsonl", records)
    keys = {"weight_field": "w", "rationale_weight": weight, "packing": "none", "jobs": jobs}
    tokens = prepared(path, tokenizer, tmp_path / "tokens", **keys, sequence_length=256)
    assert "of rationales in 24 records, the first chats.jsonl:1, weigh what" in capsys.readouterr().out
    assert tokens.manifest.dataset["rationale"] == {"weight": weight, "marks": ["<think>", "</think>"]}
    words, seen = chat_tokenizer(None), 0
    for split in ("train", "heldout"):
        for row in rows_of(tokens, split):
            number = int(row.segment_documents[0])
            weights = weights_of_positions(row)
            own = 1 + number % 2
            texts = [
                words.decode(row.token_ids[np.flatnonzero(weights[:-1] == each) + 1])
                for each in (own, own * weight)
            ]
            learned = words.decode(row.token_ids[np.flatnonzero(row.loss_mask) + 1])
            answers = [turn["content"] for turn in records[number]["messages"] if turn["role"] == "assistant"]
            whole = "".join(f"{answer}<|im_end|>" for answer in answers)
            thought = f"{number} and 1 "
            assert texts[1] == thought and thought + "</think>" not in texts[0]
            assert learned == (whole if weight else whole.replace(thought, "", 1))
            seen += 1
    assert seen == 24


def test_answers_alone_are_recorded_and_trained(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = conversations(40)
    path = write_lines(tmp_path / "chats.jsonl", records)
    tokens = prepared(path, tokenizer, tmp_path / "tokens", weight_field="w")
    printed = capsys.readouterr().out
    assert "records are read as corpus.kind=conversation, by messages" in printed
    assert "40 documents spell special tokens of the tokenizer (<|im_end|> in 40)" in printed
    assert tokens.manifest.dataset["kind"] == "conversation" and "left_out" not in tokens.manifest.dataset
    assert tokens.manifest.tokenizer.chat_template_digest is not None
    whole, boundaries = 0, 0
    for split in ("train", "heldout"):
        rows = rows_of(tokens, split)
        texts = learned_texts(rows)
        for row in rows:  # the first token of a row is no label
            boundaries += int(document_of_position(row)[0] >= 0)
            weights, owners = weights_of_positions(row), document_of_position(row)
            assert all(
                weight == 1 + owner % 2 for weight, owner in zip(weights, owners, strict=True) if owner >= 0
            )
        for number, text in texts.items():
            answers = [turn["content"] for turn in records[number]["messages"] if turn["role"] == "assistant"]
            whole += text == "".join(f"{answer}<|im_end|>" for answer in answers)
        assert f" {sum(row.loss_mask.sum() for row in rows):,} of them learned, " in printed
    assert whole >= 40 - boundaries
    pieces = sum(int(row.segment_documents[0] in seen) for seen, row in with_earlier(rows_of(tokens)))
    pieces += sum(
        int(row.segment_documents[0] in seen) for seen, row in with_earlier(rows_of(tokens, "heldout"))
    )
    assert pieces > 0 and f"prepare: {pieces:,} rows begin inside of a record" in printed

    teacher = make_teacher(tmp_path / "teacher", "llama", tokenizer=tokenizer, vocab_size=440)
    capture(config_for(tmp_path / "tokens", teacher, tmp_path / "store"))
    store = open_store(tmp_path / "store")
    for split in ("train", "heldout"):
        for before, row in zip(rows_of(tokens, split), rows_of(store, split), strict=True):
            assert row.teacher is not None and row.recorded is not None
            assert np.array_equal(row.recorded, before.loss_mask)
            assert len(row.teacher.head_ids) == before.loss_mask.sum() < len(before.loss_mask)
    page = inspect_text(tmp_path / "store", positions=3)
    assert "kind: conversation" in page and "It is" in page
    printed = drive(
        tmp_path / "store", tmp_path / "runs", "chat;train.steps=2;schedule.warmup_steps=0;tracking=disabled"
    )
    assert "trained" in printed, printed
    lines = (tmp_path / "runs" / "chat" / "metrics.jsonl").read_text()
    assert '"step": 2' in lines


def test_what_cannot_be_used_is_refused_or_counted(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records: list[Any] = conversations(30)
    silent = {"messages": [{"role": "user", "content": "Hello?"}]}
    path = write_lines(tmp_path / "a.jsonl", [*records, silent, '{"messages": [{"role": "us'])
    with pytest.raises(DataError, match=r"a\.jsonl, line 31: 'messages' has no message of the assistant"):
        prepared(path, tokenizer, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    store = prepared(path, tokenizer, tmp_path / "skipped", invalid="skip")
    assert store.manifest.dataset["left_out"] == {"no JSON": 1, "no assistant turn": 1}
    assert sum(store.manifest.dataset["documents"].values()) == 30
    printed = capsys.readouterr().out
    assert "prepare: 1 left out: no JSON, the first a.jsonl:32" in printed
    assert "prepare: 1 left out: no assistant turn, the first a.jsonl:31" in printed
    # So is text that is none, in a line of bytes, in JSON's own way, and rows of tables.
    (tmp_path / "bytes.jsonl").write_bytes(
        b"".join(json.dumps(record).encode() + b"\n" for record in records)
        + b'{"messages": "\xff"}\n'
        + b'{"prompt": "\\ud800", "completion": "a"}\n'
    )
    store = prepared(tmp_path / "bytes.jsonl", tokenizer, tmp_path / "decoded", invalid="skip")
    assert store.manifest.dataset["left_out"] == {"half of a surrogate pair": 1, "no UTF-8": 1}
    # What the template refuses is found before the store is begun.
    shutil.copytree(tokenizer, tmp_path / "strict")
    (tmp_path / "alternating.jinja").write_text(templates.GEMMA)
    broken = records[0] | {"messages": records[0]["messages"][1:]}
    path = write_lines(tmp_path / "b.jsonl", [*records, broken])
    keys = {"chat_template": str(tmp_path / "alternating.jinja")}
    with pytest.raises(DataError, match=r"b\.jsonl:31: the chat template refuses .*roles must alternate"):
        prepared(path, tokenizer, tmp_path / "refused", **keys)
    assert not (tmp_path / "refused").exists()
    found = prepared(path, tokenizer, tmp_path / "other", invalid="skip", **keys)
    assert found.manifest.dataset["left_out"] == {"refused by the chat template": 1}
    assert found.manifest.tokenizer.chat_template_digest != store.manifest.tokenizer.chat_template_digest


def test_long_documents_and_a_split_of_ones_own(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs: list[Any] = [{"prompt": f"{number} and", "completion": f" {number + 1}"} for number in range(20)]
    pairs[3] = {"prompt": "long", "completion": " words" * 40}
    pairs[5] = {"prompt": "long" * 40, "completion": " word"}
    own = write_lines(tmp_path / "own.jsonl", [{"prompt": "own", "completion": " one"}])
    path = write_lines(tmp_path / "a.jsonl", pairs)
    stores = {}
    for truncation in ("split", "cut", "drop"):
        keys = {"truncation": truncation, "heldout_paths": [str(own)], "max_documents": 18}
        stores[truncation] = prepared(path, tokenizer, tmp_path / truncation, **keys)
    ending = "<|endoftext|>"
    for truncation, left_out, documents in (
        ("split", None, 18),
        ("cut", {"nothing to learn": 1}, 17),
        ("drop", {"longer than a row": 2}, 16),
    ):
        store = stores[truncation]
        dataset = store.manifest.dataset
        assert dataset["heldout"] == {"by": "place"} and dataset.get("left_out") == left_out
        assert dataset["documents"] == {"train": documents, "heldout": 1, "empty": 0}
        assert [source["documents"] for source in dataset["sources"]] == [18, 1]
        rows = rows_of(store)
        assert learned_texts(rows_of(store, "heldout")) == {18: f" one{ending}"}
        numbers = {int(number) for row in rows for number in row.segment_documents if number >= 0}
        assert len(numbers) == documents
        owners = np.concatenate([document_of_position(row) for row in rows])
        assert (np.bincount(owners[owners >= 0]).max() > LENGTH) == (truncation == "split")
    printed = capsys.readouterr().out
    assert "2 documents cut at a row's length, the first a.jsonl:4" in printed
    assert "1 left out: nothing to learn, the first a.jsonl:6" in printed
    assert "1 held out from places of their own" in printed


def test_a_conversation_a_row(tmp_path: Path, tokenizer: Path) -> None:
    records = conversations(12)
    path = write_lines(tmp_path / "a.jsonl", records)
    store = prepared(path, tokenizer, tmp_path / "tokens", packing="none", sequence_length=128)
    rows = [*rows_of(store), *rows_of(store, "heldout")]
    assert len(rows) == 12 and all(set(row.segment_documents.tolist()) - {-1} for row in rows)
    for number, text in learned_texts(rows).items():
        answers = [turn["content"] for turn in records[number]["messages"] if turn["role"] == "assistant"]
        assert text == "".join(f"{answer}<|im_end|>" for answer in answers)


@pytest.mark.parametrize("is_full", [False, True])
def test_conversations_are_encoded_once_where_there_is_room(
    is_full: bool, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere once more, to the same store."""
    path = write_lines(tmp_path / "a.jsonl", conversations(30))
    keys = {"truncation": "cut", "weight_field": "w"}
    prepared(path, tokenizer, tmp_path / "first", **keys)
    blocks: list[int] = []
    encode, keep = Encoder.encode, Kept.add

    def counted(encoder: Encoder, block: Block, records: Records) -> Iterator[list[Encoded]]:
        blocks.extend(number for number, _ in block)
        return encode(encoder, block, records)

    def full(*words: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    def kept(where: Kept, batch: list[Encoded]) -> None:
        keep(where, batch)
        if is_full:  # behind the first block
            monkeypatch.setattr(pickle, "dump", full)

    monkeypatch.setattr(Encoder, "encode", counted)
    monkeypatch.setattr(Kept, "add", kept)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2000)
    prepared(path, tokenizer, tmp_path / "second", **keys)
    assert blocks == [*range(30)] * (2 if is_full else 1)
    for name in files_below(tmp_path / "first"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_a_split_of_a_dataset_is_held_out(tmp_path: Path, tokenizer: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {
        "train": datasets.Dataset.from_list(conversations(9)),
        "test": datasets.Dataset.from_list(conversations(12)[9:]),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    keys = {"format": "dataset", "heldout_split": "test"}
    store = prepared(tmp_path / "saved", tokenizer, tmp_path / "tokens", **keys)
    assert {split: set(learned_texts(rows_of(store, split))) for split in ("train", "heldout")} == {
        "train": set(range(9)),
        "heldout": {9, 10, 11},
    }
    with pytest.raises(DataError, match=r"has no split 'other', found .*set corpus\.heldout_split"):
        prepared(tmp_path / "saved", tokenizer, tmp_path / "no", **keys | {"heldout_split": "other"})


def test_ids_that_were_made_before(tmp_path: Path, tokenizer: Path) -> None:
    records = [{"input_ids": [7, 8 + number, 9], "labels": [-100, 8 + number, 9]} for number in range(30)]
    store = prepared(write_lines(tmp_path / "a.jsonl", records), tokenizer, tmp_path / "tokens")
    texts = {**learned_texts(rows_of(store)), **learned_texts(rows_of(store, "heldout"))}
    decode = chat_tokenizer(None).decode
    for number, text in texts.items():  # a row's border may part one
        assert text in (decode([8 + number, 9]), decode([8 + number]), decode([9]))
    assert len(texts) == 30
    records[4]["input_ids"][0] = 9999
    with pytest.raises(DataError, match=r"b\.jsonl:5: input_ids hold 9999, and the tokenizer has"):
        prepared(write_lines(tmp_path / "b.jsonl", records), tokenizer, tmp_path / "no")
