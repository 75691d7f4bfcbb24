"""What becomes a prompt, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparsekd.trainer.config.generate import GenerateConfig
from sparsekd.trainer.generation.prompts import read_prompts
from sparsekd.trainer.run.errors import DataError

USER = {"role": "user", "content": "Why?"}


def read(tmp_path: Path, *records: Any, **settings: Any) -> Any:
    place = tmp_path / "prompts.jsonl"
    place.write_text(
        "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records)
    )
    return read_prompts(GenerateConfig(prompts=[str(place)], **settings))


@pytest.mark.parametrize(
    ("record", "settings", "asked"),
    [
        ({"prompt": " Why? "}, {}, [USER]),
        ({"prompt": [USER]}, {}, [USER]),
        ({"messages": [USER, {"role": "assistant", "content": "So."}]}, {}, [USER]),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
            {},
            [USER],
        ),
        ({"instruction": "Why?", "input": "", "output": "So."}, {}, [USER]),
        ({"instruction": "Add.", "input": "1 1"}, {}, [{"role": "user", "content": "Add.\n\n1 1"}]),
        (
            {"instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}]},
            {},
            [{"role": "user", "content": "Add.\n\n1 1"}],
        ),
        ({"a": "Why"}, {"template": "{a}?"}, [USER]),
        ("Why", {"template": "{topic}?", "format": "lines"}, [USER]),
        ({"prompt": "Why?"}, {"system": "Be kind."}, [{"role": "system", "content": "Be kind."}, USER]),
        (
            {"messages": [{"role": "system", "content": "Own."}, USER]},
            {"system": "Be kind."},
            [{"role": "system", "content": "Own."}, USER],
        ),
    ],
)
def test_records_become_prompts(tmp_path: Path, record: Any, settings: Any, asked: Any) -> None:
    prompts = read(tmp_path, record, **settings)
    assert [prompt.messages for prompt in prompts.entries] == [asked]
    assert prompts.entries[0].place == "prompts.jsonl:1"


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ('{"prompt": ', "is not JSON"),
        ("[]", "found list"),
        ({"text": "Why?"}, "has no field 'prompt', found the fields \\['text'\\]"),
        ({"prompt": "  "}, "is empty"),
        ({"prompt": 7}, "of type int, expected a list"),
        ({"messages": [{"role": "system", "content": "x"}]}, "without a question"),
        ({"messages": []}, "without a question"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "the role 'robot'"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"prompt": "Why?", "tools": "{"}, "tools"),
    ],
)
def test_a_record_that_makes_no_prompt_is_one_sentence_or_counted(
    tmp_path: Path, record: Any, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence) as found:
        read(tmp_path, {"prompt": "Good?"}, record)
    assert "line 2" in str(found.value)
    prompts = read(tmp_path, {"prompt": "Good?"}, record, failed="skip")
    assert len(prompts.entries) == 1
    assert [tally.first for tally in prompts.unusable.values()] == ["prompts.jsonl:2"]


def test_equal_prompts_are_asked_once_and_order_decides_the_identity(tmp_path: Path) -> None:
    first = read(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a "})
    assert len(first.entries) == 2
    assert (first.repeated.count, first.repeated.first) == (1, "prompts.jsonl:3")
    assert read(tmp_path, {"prompt": "b"}, {"prompt": "a"}).digest != first.digest
    with_tools = read(tmp_path, {"prompt": "a", "tools": [{"name": "now"}]})
    assert with_tools.entries[0].digest != first.entries[0].digest
    with pytest.raises(DataError, match="hold no prompt"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"generate\.prompts: .*nowhere"):
        read_prompts(GenerateConfig(prompts=[str(tmp_path / "nowhere")]))
