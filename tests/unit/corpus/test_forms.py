"""What records hold: by their fields, in every format, and in the spellings that people have."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus.bodies import Body, Conversation, Pair, TokenIds
from sparsekd.trainer.corpus.documents import Document, read_documents
from sparsekd.trainer.corpus.fields import RecordError
from sparsekd.trainer.corpus.forms import Forms, filled
from sparsekd.trainer.run.errors import ConfigError, DataError


def documents(path: Path, format: str = "jsonl", **keys: Any) -> list[Document]:
    return list(read_documents(CorpusConfig(paths=[str(path)], format=format, tokenizer="any", **keys)))


def bodies(folder: Path, *records: Any, **keys: Any) -> list[Body | None]:
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return [document.body for document in documents(folder / "a.jsonl", **keys)]


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = Conversation([USER, ANSWER], None)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [USER | {"name": None}, ANSWER | {"tool_calls": None}], "tools": None},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [USER, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER], "id": 3},
        {"messages": json.dumps([USER, ANSWER])},
    ],
)
def test_spellings_of_one_conversation(tmp_path: Path, record: dict[str, Any]) -> None:
    assert bodies(tmp_path, record) == [CHAT]
    assert bodies(tmp_path, {"data": record}, messages_field=f"data.{next(iter(record))}") == [CHAT]


def test_pairs(tmp_path: Path) -> None:
    both = {"prompt": "q", "completion": "a"}
    alpaca = {"instruction": "q", "input": "", "output": "a"}
    assert bodies(tmp_path, both) == [Pair("q", "a")]
    assert bodies(tmp_path, alpaca, alpaca | {"input": "x"}) == [Pair("q\n\n", "a"), Pair("q\n\nx\n\n", "a")]
    assert bodies(tmp_path, both, kind="conversation") == [CHAT]
    assert bodies(tmp_path, alpaca, kind="conversation") == [CHAT]
    assert bodies(tmp_path, {"prompt": [USER], "completion": [ANSWER]}) == [
        Conversation([USER, ANSWER], None, given=1)
    ]
    asked = {"question": "q", "answer": "a"}
    assert bodies(tmp_path, asked, prompt_field="question", completion_field="answer") == [Pair("q", "a")]
    made = bodies(tmp_path, asked, template=r"Q: {question}\nA:", completion_field="answer")
    assert made == [Pair("Q: q\nA:", "a")]


def test_texts_of_several_fields(tmp_path: Path) -> None:
    records = [{"title": "One", "body": "first", "text": "other"}, {"title": "Two", "body": ""}]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps(record) + "\n" for record in [*records, {"body": "third"}, {"title": None}])
    )
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    template = r"{title}\n\n{body}"
    for keys in ({}, {"kind": "text"}):
        found = documents(path, template=template, **keys)
        assert [document.text for document in found] == ["One\n\nfirst", "Two", "third", ""]
        assert all(document.body is None for document in found)
    table = documents(tmp_path / "a.parquet", "parquet", template=template)
    assert [document.text for document in table] == ["One\n\nfirst", "Two"]
    # With a completion it is a pair's prompt, as it was.
    asked = {"text": "t", "question": "q", "answer": "a"}
    assert bodies(tmp_path, asked, template="{question}", completion_field="answer") == [Pair("q", "a")]
    with pytest.raises(DataError, match=r"has no field 'titel', found .*set corpus\.template to fields"):
        bodies(tmp_path, *records, template="{titel}")
    with pytest.raises(ConfigError, match=r"corpus\.template=.* with corpus\.format=text"):
        documents(path, "text", template="{title}")


def test_what_the_system_says_in_a_field_of_its_own(tmp_path: Path) -> None:
    chat = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    system = {"role": "system", "content": "Be brief."}
    begun = Conversation([system, USER, ANSWER], None)
    assert bodies(tmp_path, chat | {"system": "Be brief."}) == [begun]
    assert bodies(tmp_path, *(chat | {"system": empty} for empty in ("", " ", None)), chat) == [CHAT] * 4
    assert bodies(tmp_path, {"messages": [system, USER, ANSWER], "system": "Other."}) == [begun]
    assert bodies(tmp_path, chat | {"s": "Be brief."}, system_field="s") == [begun]
    assert bodies(tmp_path, chat | {"system": "Be brief."}, system_field=None) == [CHAT]
    alpaca = {"instruction": "q", "input": "", "output": "a", "system": "Be brief."}
    assert bodies(tmp_path, alpaca, kind="conversation") == [begun]
    given = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "system": "Be brief."}
    (found,) = bodies(tmp_path, given)
    assert isinstance(found, Conversation) and found.answers == [4]
    (tmp_path / "a.csv").write_text('conversations,system\n"[{""from"":""human"",""value"":""q""},')
    with (tmp_path / "a.csv").open("a") as file:
        file.write('{""from"":""gpt"",""value"":""a""}]",Be brief.\n')
    assert [document.body for document in documents(tmp_path / "a.csv", "csv")] == [begun]
    with pytest.raises(RecordError, match=r"system's field is of type int, .*corpus\.system_field=null"):
        bodies(tmp_path, chat | {"system": 3})


def test_calls_in_the_words_of_others(tmp_path: Path) -> None:
    function = {"name": "add", "arguments": {"a": 1}}
    wanted = Conversation(
        [
            USER,
            {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], "content": ""},
            {"role": "tool", "content": "2"},
            ANSWER,
        ],
        None,
    )
    said = [("human", "q"), ("function_call", json.dumps(function)), ("observation", "2"), ("gpt", "a")]
    sharegpt = [{"from": who, "value": value} for who, value in said]
    openai = [
        USER,
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "content": "2"},
        ANSWER,
    ]
    several = [*sharegpt[:1], {"from": "function_call", "value": json.dumps([function])}, *sharegpt[2:]]
    for messages in (sharegpt, several, openai):
        assert bodies(tmp_path, {"messages": messages}) == [wanted]
    for value in ("add(1)", "[]", "3", '{"arguments": {}}'):
        sharegpt[1]["value"] = value
        with pytest.raises(RecordError, match="line 1: message 2 of 'messages': the call is"):
            bodies(tmp_path, {"messages": sharegpt})


ALPACA = "Below is a task.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


def test_templates_leave_paragraphs_of_empty_fields_away() -> None:
    for value in ("", None, " "):
        record = {"instruction": "Go", "input": value}
        assert filled(ALPACA, record, "") == "Below is a task.\n\n### Instruction:\nGo\n\n### Response:\n"
    assert filled(ALPACA, {"instruction": "Go", "input": "x\n\ny"}, "") == (
        "Below is a task.\n\n### Instruction:\nGo\n\n### Input:\nx\n\ny\n\n### Response:\n"
    )
    assert filled("{{{a}}}", {"a": "x"}, "") == "{x}"
    assert filled("{a} {b}", {"a": "", "b": "y"}, "") == " y"
    with pytest.raises(RecordError, match="'a' is of type int, expected text"):
        filled("{a}", {"a": 3}, "here")


WORSE = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("record", "body"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, Pair("q", "a")),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
            Conversation([USER, ANSWER], None, given=1),
        ),
        ({"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, CHAT),
        ({"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, WORSE], "score_chosen": 1.0}, CHAT),
        ({"messages": [USER, ANSWER], "rejected": [USER, WORSE]}, CHAT),
    ],
)
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_of_a_preference_the_chosen_is_learned_and_the_rejected_counted(
    tmp_path: Path, record: dict[str, Any], body: Body, format: str
) -> None:
    records = [record, record | {"rejected": None}, record]
    if format == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    else:
        parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    config = CorpusConfig(paths=[str(tmp_path / f"a.{format}")], format=format, tokenizer="any")
    forms = Forms(config)
    assert [document.body for document in read_documents(config, forms=forms)] == [body] * 3
    assert forms.rejected == 2
    assert forms.lines()[-1].startswith("2 records have a 'rejected' answer beside the one that is learned")


def test_a_template_that_names_no_field_of_any_record_is_refused(tmp_path: Path) -> None:
    """`input` may be empty in some; a name that was misspelled lacks in all."""
    (tmp_path / "a.jsonl").write_text(
        '{"instruction": "q", "input": "x", "output": "a"}\n'
        '{"instruction": "q", "input": "", "output": "a"}\n'
    )
    for template, lacking in (("{instruction}\n\n{input}", None), ("{instrution}\n\n{input}", "instrution")):
        config = CorpusConfig(paths=[str(tmp_path / "a.jsonl")], format="jsonl", template=template)
        forms = Forms(config)
        made = list(read_documents(config, skipped=lambda reason, place: None, forms=forms))
        if lacking is None:
            assert len(made) == 2
            forms.check()
        else:
            with pytest.raises(DataError, match=f"names the field '{lacking}', which no record has"):
                forms.check()


def test_ids_with_labels_and_masks(tmp_path: Path) -> None:
    ids = {"input_ids": [5, 6, 7, 0]}
    for record, expected in (
        (ids, [True] * 4),
        (ids | {"labels": [-100, 6, 7, -100]}, [False, True, True, False]),
        (ids | {"loss_mask": [0, 0, 1, 1]}, [False, False, True, True]),
        (ids | {"completion_mask": [False, True, True, True]}, [False, True, True, True]),
        (ids | {"labels": [-100, 6, 7, 0], "assistant_masks": [1, 1, 0, 1]}, [False, True, False, True]),
    ):
        (body,) = bodies(tmp_path, record)
        assert isinstance(body, TokenIds) and body.token_ids.dtype == np.int32
        assert (body.token_ids.tolist(), body.counted.tolist()) == ([5, 6, 7, 0], expected)
    (padded,) = bodies(tmp_path, ids | {"attention_mask": [0, 1, 1, 0], "labels": [-100, -100, 7, -100]})
    assert isinstance(padded, TokenIds)
    assert (padded.token_ids.tolist(), padded.counted.tolist()) == ([6, 7], [False, True])


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"messages": []}, "'messages' holds no messages"),
        ({"messages": None}, "'messages' is of type NoneType, expected a list"),
        ({"messages": {"role": "user"}}, "'messages' is of type dict, expected a list"),
        ({"messages": "hello"}, r"'messages' is a text but no JSON \("),
        ({"messages": [USER]}, r"has no message of the assistant.*corpus\.invalid=skip"),
        ({"messages": ["hello"]}, "message 1 of 'messages' is of type str, expected an object"),
        (
            {"messages": [USER, {"role": "robot", "content": "x"}]},
            "message 2 .* has the role 'robot', expected",
        ),
        ({"messages": [USER, {"content": "x"}]}, "message 2 .* has the role None"),
        ({"messages": [USER, ANSWER | {"content": " \n"}]}, r"message 2 .*\(assistant\) is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"\(assistant\) is empty"),
        ({"messages": [USER | {"content": 3}, ANSWER]}, "has content of type int, expected text"),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "url": "x"}]}, ANSWER]},
            "has content of the type image_url, expected text alone",
        ),
        ({"messages": [USER, ANSWER], "tools": [3]}, "a tool is no object"),
        (
            {"messages": [USER, ANSWER | {"tool_calls": True}]},
            "'tool_calls' is of type bool, expected a list",
        ),
        ({"messages": [USER, ANSWER | {"tool_calls": {"name": "x"}}]}, "'tool_calls' is of type dict"),
        ({"messages": [USER, ANSWER | {"tool_calls": ["x"]}]}, "a call of a tool is no object"),
        ({"messages": [USER, ANSWER | {"score": float("nan")}]}, "mend the record"),
        ({"prompt": "q", "completion": ""}, "'completion' is empty"),
        ({"prompt": ["q"], "completion": [ANSWER]}, "is of type str, expected an object"),
        ({"prompt": 3, "completion": "a"}, "'prompt' is of type int, expected text"),
        ({"input_ids": [1, -2]}, "input_ids hold -2"),
        ({"input_ids": [1, 2**40]}, f"input_ids hold {2**40}"),
        ({"input_ids": [1, 2**70]}, "too large a number"),
        ({"input_ids": [1, 2.5]}, "something else than integers"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids and 1 labels, expected equal numbers"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, r"labels\[0\] is 2 where input_ids have 1.*not shifted"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask hold other numbers"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask is 0 between tokens"),
    ],
)
def test_records_that_cannot_be_used(tmp_path: Path, record: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 1" + ".*" + sentence):
        bodies(tmp_path, record)
    sound = {
        name: {
            "messages": [USER, ANSWER],
            "prompt": "q",
            "completion": "a",
            "input_ids": [1],
            "labels": [1],
            "loss_mask": [1],
        }.get(name)
        for name in record
    }
    skipped: list[tuple[str, str]] = []
    (tmp_path / "b.jsonl").write_text(f'{json.dumps(record)}\n{{"mess\n{json.dumps(sound)}\n')
    config = CorpusConfig(paths=[str(tmp_path / "b.jsonl")], format="jsonl", invalid="skip", tokenizer="any")
    kept = list(read_documents(config, skipped=lambda reason, place: skipped.append((reason, place))))
    assert [document.place for document in kept] == ["b.jsonl:3"]
    assert [place for _, place in skipped] == ["b.jsonl:1", "b.jsonl:2"] and skipped[1][0] == "no JSON"


def test_a_table_fills_with_nulls_what_a_message_has_not(tmp_path: Path) -> None:
    call = [
        {"function": {"name": "f", "arguments": {"x": 1}}},
        {"function": {"name": "g", "arguments": {"y": 2}}},
    ]
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": call}]
    records = [{"messages": messages, "tools": [{"name": "f"}], "other": 1}, {"messages": [USER, ANSWER]}]
    (expected,) = bodies(tmp_path, records[0])
    assert isinstance(expected, Conversation) and expected.messages[1]["tool_calls"] == call
    datasets = pytest.importorskip("datasets")
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    for format, name in (("parquet", "a.parquet"), ("dataset", "saved")):
        first, second = documents(tmp_path / name, format)
        assert (first.body, second.body) == (expected, CHAT)
    cells = [json.dumps(value).replace('"', '""') for value in (messages, records[0]["tools"])]
    (tmp_path / "a.csv").write_text(f'messages,tools\n"{cells[0]}","{cells[1]}"\n')
    assert documents(tmp_path / "a.csv", "csv")[0].body == expected


def test_what_records_hold_is_told_by_the_first(tmp_path: Path) -> None:
    def forms_of(record: dict[str, Any], **keys: Any) -> Forms:
        (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
        config = CorpusConfig(paths=[str(tmp_path / "a.jsonl")], format="jsonl", tokenizer="any", **keys)
        forms = Forms(config)
        list(read_documents(config, forms=forms))
        return forms

    assert forms_of({"text": "x"}).lines() == []
    assert forms_of({"messages": [USER, ANSWER]}).lines() == [
        "records are read as corpus.kind=conversation, by messages"
    ]
    both = forms_of({"text": "x", "messages": [USER, ANSWER]})
    assert both.kind == "text"
    assert both.lines() == ["records are read as corpus.kind=text, by text, and not by messages"]
    assert forms_of({"text": "x", "messages": [USER, ANSWER]}, kind="conversation").lines() == []
    with pytest.raises(DataError, match=r"line 1 has no field 'text', found the fields \['body'\]"):
        forms_of({"body": "x"})
    with pytest.raises(DataError, match=r"neither messages .*\['text'\]; set corpus\.messages_field"):
        forms_of({"text": "x"}, kind="conversation")
    with pytest.raises(RecordError, match=r"line 2 has neither messages nor a prompt"):
        bodies(tmp_path, {"messages": [USER, ANSWER]}, {"text": "x"})


def test_a_file_may_be_one_list_of_records(tmp_path: Path) -> None:
    records = [{"instruction": f"q{n}", "input": "", "output": "a, ]["} for n in range(3)]
    for name, text in (("a.json", json.dumps(records)), ("b.json", json.dumps(records, indent=2) + "\n")):
        (tmp_path / name).write_text(text)
        found = documents(tmp_path / name)
        assert [document.body for document in found] == [Pair(f"q{n}\n\n", "a, ][") for n in range(3)]
        assert [document.place for document in found] == [f"{name}:{n}" for n in (1, 2, 3)]
    for text, sentence in (
        (json.dumps(records)[:-9], r"record 3 is not JSON \(.*perhaps cut short"),
        (json.dumps(records)[:-1], r"record 4 is not JSON"),
        ("[" * 100_000, r"record 1 is not JSON \(.*recursion"),
        ('[{"text": "x"}]\n{"text": "y"}', "is a list of records with more text behind it"),
        ('[{"text": "x"}, 3]', "record 2 is of type int, expected an object"),
    ):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(DataError, match=r"c\.json,? " + sentence):
            documents(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("[]")
    assert documents(tmp_path / "d.json") == []


def test_equal_contents_are_one_document_to_the_held_out_choice(tmp_path: Path) -> None:
    record = {"messages": [USER, ANSWER], "id": 1}
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(record | {"id": n, "x": n}) + "\n" for n in range(2))
    )
    first, second = documents(tmp_path / "a.jsonl")
    assert first.content == second.content
    other = json.dumps({"messages": [USER, ANSWER, USER]})
    (tmp_path / "b.jsonl").write_text(other + "\n")
    assert documents(tmp_path / "b.jsonl")[0].content != first.content


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"kind": "pair", "format": "text"}, "a text file has no fields"),
        ({"kind": "conversation", "tokenizer": None}, r"needs corpus\.tokenizer, whose chat template"),
        ({"template": "{a"}, r"corpus\.template='\{a' cannot be read"),
        ({"template": "no fields"}, "expected names of fields in braces"),
        ({"template": "{a!r}"}, "expected names of fields in braces"),
        ({"template": "{}"}, "expected names of fields in braces"),
        ({"template": "{a}", "prompt_field": "b"}, "both say what the prompt is"),
        ({"chat_template_kwargs": {"messages": 1}}, "has the name 'messages'"),
        ({"heldout_split": "test"}, "only datasets have splits"),
        ({"heldout_split": "train", "format": "dataset"}, "contradict each other"),
    ],
)
def test_keys_that_do_not_fit(keys: dict[str, Any], sentence: str) -> None:
    config = CorpusConfig(**{"paths": ["x"], "format": "jsonl", "tokenizer": "any"} | keys)
    with pytest.raises(ConfigError, match=sentence):
        list(read_documents(config))
