"""What documents look like, and text that spells special tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus import encoding
from sparsekd.trainer.corpus.documents import Document
from sparsekd.trainer.corpus.encoding import tokenize_long
from sparsekd.trainer.corpus.findings import Formats, SpecialTokens, is_csv, is_json, is_markup
from sparsekd.trainer.corpus.tokenizer import END_OF_TEXT, tokenize, train_tokenizer
from sparsekd.trainer.run.errors import DataError

CODE = Path(json.__file__).read_text(encoding="utf-8")
LINES = "".join(json.dumps({"text": f"line {number} of text"}) + "\n" for number in range(5000))
TABLE = "".join(f"{number},some text,{number}\n" for number in range(20))


@pytest.mark.parametrize(
    ("text", "json_like", "markup_like", "csv_like"),
    [
        (LINES, True, False, False),
        ('{"text": "one"}', True, False, False),
        ('\n [\n  {"text": "one"},\n  {"text": 2}\n]\n', True, False, False),
        (json.dumps({"text": "x" * 100_000}), True, False, False),
        (json.dumps([{"text": "x" * 100}] * 1000, indent=2), True, False, False),
        ('{"never": closed', False, False, False),
        ("{curly} text", False, False, False),
        ("[1] a footnote", False, False, False),
        ('["a", "list"]', False, False, False),
        ("{" * 100_000, False, False, False),
        (CODE, False, False, False),
        ("", False, False, False),
        ("<!DOCTYPE html><p>One", False, True, False),
        ("\n<html lang=en>\n<p>One", False, True, False),
        ("<?xml version='1.0'?><a/>", False, True, False),
        ("<div><p>One</p><b>two</b></div>", False, True, False),
        ("<think>so</think> it is", False, False, False),
        ("<s>[INST] x [/INST] y</s>", False, False, False),
        ("1 < 2 </a></b></c>", False, False, False),
        (TABLE, False, False, True),
        (TABLE.replace(",", "\t"), False, False, True),
        (TABLE.replace(",", ", and, so, on", 1), False, False, False),
        ("a, b, c\n" * 3, False, False, False),
        ("One line.\n" * 30, False, False, False),
    ],
)
def test_what_a_text_looks_like(text: str, json_like: bool, markup_like: bool, csv_like: bool) -> None:
    assert (is_json(text), is_markup(text), is_csv(text)) == (json_like, markup_like, csv_like)


def formats_of(texts: list[str], **keys: object) -> Formats:
    formats = Formats(CorpusConfig(**keys))
    for index, text in enumerate(texts):
        formats.look(Document(text, text.encode(), 0, f"file-{index}"))
    return formats


def test_most_documents_decide() -> None:
    mixed = formats_of([CODE, LINES, LINES, CODE])
    mixed.check()
    assert mixed.lines() == [
        "2 of 4 documents are JSON, the first file-1: the markup is part of the training text; if it should "
        "not be, read JSON lines with corpus=jsonl"
    ]
    sentence = r"2 of 3 documents are JSON, the first file-1.*corpus=jsonl.*or set corpus\.allow=\[json\]"
    with pytest.raises(DataError, match=sentence):
        formats_of([CODE, LINES, LINES]).check()
    formats_of([CODE, LINES, LINES], allow=["json"]).check()
    # Fields may hold JSON: there the format is the one that is named.
    for_fields = formats_of([LINES, LINES], format="jsonl")
    for_fields.check()
    assert for_fields.lines() == []


def test_markup_and_tables_are_said() -> None:
    page = "<html><p>One</p></html>"
    assert formats_of([page, CODE], format="jsonl").lines() == [
        "1 of 2 documents look like HTML or XML, the first file-0: the markup is part of the training text; "
        "if it should not be, take the text out of it before"
    ]
    assert formats_of([CODE, TABLE]).lines() == [
        "1 of 2 documents look like CSV, the first file-1: the markup is part of the training text; if it "
        "should not be, read it with corpus=csv and corpus.text_field"
    ]
    assert formats_of([CODE, "text"]).lines() == []


def chat_tokenizer(start: bool = False) -> PreTrainedTokenizerBase:
    inner = Tokenizer.from_str(train_tokenizer([CODE], 400).backend_tokenizer.to_str())
    inner.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    inner.add_tokens(["<think>"])
    if start:
        place = inner.token_to_id("<s>")
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", place)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END_OF_TEXT, bos_token="<s>")


CHAT = "<|im_start|>user\nimport this<|im_end|>\n<|im_start|>assistant\n<think>no</think> yes<|im_end|>\n"


def special_of(texts: list[str], **keys: object) -> list[str]:
    special = SpecialTokens(chat_tokenizer(), CorpusConfig(**keys))
    for index, text in enumerate(texts):
        special.look(Document(text, text.encode(), 0, f"file-{index}"))
    return special.lines()


def test_spelled_special_tokens_are_said_with_the_remedy() -> None:
    assert special_of(["plain <think>", CODE]) == []
    (line,) = special_of(["plain", CHAT, CHAT + END_OF_TEXT])
    assert line == (
        "2 documents spell special tokens of the tokenizer (<|im_end|> in 2, <|im_start|> in 2, "
        "<|endoftext|> in 1), the first file-1: these stay text, several ids each, and none became a control "
        "token; if a chat template wrote them, set corpus.split_special_tokens=false"
    )
    remedy = "false, or part the files there with corpus.separator='<|endoftext|>'"
    assert special_of([f"one{END_OF_TEXT}two"])[0].endswith(remedy)
    assert "corpus.separator" not in special_of([f"one{END_OF_TEXT}two"], format="jsonl")[0]
    (line,) = special_of([CHAT], split_special_tokens=False)
    assert line.endswith("these became control tokens, as corpus.split_special_tokens=false asks")


def test_special_tokens_of_the_text_become_ids_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat_tokenizer()
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    split = tokenize(tokenizer, [CHAT])[0]
    parsed = tokenize(tokenizer, [CHAT], split_special_tokens=False)[0]
    assert not np.isin(split, [start, end]).any()
    assert (parsed == start).sum() == (parsed == end).sum() == 2 and len(parsed) < len(split)
    monkeypatch.setattr(encoding, "WINDOW_CHARACTERS", 1000)
    monkeypatch.setattr(encoding, "OVERLAP_CHARACTERS", 300)
    for made in (chat_tokenizer(), chat_tokenizer(start=True)):
        for text in (CHAT * 100, f"<s>{CHAT}" * 100):
            for choice in (True, False):
                whole = tokenize(made, [text], split_special_tokens=choice)[0]
                parts = list(tokenize_long(made, text, split_special_tokens=choice))
                assert len(parts) > 5 and np.array_equal(np.concatenate(parts), whole)


def test_a_start_token_that_the_text_brings_stands_once() -> None:
    tokenizer = chat_tokenizer(start=True)
    begin = tokenizer.bos_token_id
    ids = tokenize(tokenizer, [f"<s>{CHAT}", CHAT, "<s>", "x"], split_special_tokens=False)
    assert ids[0].tolist() == ids[1].tolist() and (ids[0] == begin).sum() == 1
    assert ids[2].tolist() == [begin, tokenizer.eos_token_id]
    assert (tokenize(tokenizer, [f"<s>{CHAT}"])[0] == begin).sum() == 1
