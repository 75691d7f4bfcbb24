"""Rules that leave answers out: each meets what it is for, and nothing else."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsekd.trainer.config.generate import CleanConfig
from sparsekd.trainer.generation.answers import message_of
from sparsekd.trainer.generation.cleaning import Cleaning, repetition_of
from sparsekd.trainer.run.errors import ConfigError, UserError

PROSE = (
    "The tide comes in twice a day, since the earth turns below two bulges of water; the one faces the moon, "
    "which pulls at it, and the other stands where the pull is least."
)


def answer(
    text: str | None, number: int = 0, finish: str = "stop", question: str = "Why?", **more: Any
) -> Any:
    return {
        "prompt": f"{number:064x}",
        "sample": number,
        "place": "p.jsonl:1",
        "finish_reason": finish,
        "messages": [{"role": "user", "content": question}],
        "answer": None if text is None else {"role": "assistant", "content": text, **more},
    }


def cleaned(answers: list[Any], **rules: Any) -> tuple[list[str], dict[str, int]]:
    cleaning = Cleaning(CleanConfig(**rules))
    kept = [record["messages"][-1]["content"] for record in cleaning.records(iter(answers))]
    assert cleaning.kept == len(kept)
    return kept, {rule: tally.count for rule, tally in cleaning.left_out.items()}


def test_each_rule_leaves_out_what_it_is_for() -> None:
    answers = [
        answer(PROSE, 0),
        answer(PROSE.upper() + "  ", 1),  # the same but for case and spaces
        answer(PROSE, 2, question="What is the tide?"),
        answer("", 3),
        answer(None, 4),
        answer("It is cut in the", 5, finish="length"),
        answer("and on and on " * 60, 6),
        answer("I'm sorry, but I can't help with that.", 7),
        answer("He said: " + "x " * 9 + PROSE[::-1] + " I'm sorry.", 8),
        answer("", 9, tool_calls=[{"function": {"name": "now", "arguments": "{}"}}]),
        answer("ok", 10),
    ]
    kept, left_out = cleaned(answers, refusals=[r"^i.m sorry"], min_characters=3, max_characters=1000)
    assert kept == [PROSE, PROSE, answers[8]["answer"]["content"], ""]
    assert left_out == {
        **{"exact duplicate": 1, "empty": 1, "no answer": 1, "cut off": 1, "repetition": 1},
        **{"refusal": 1, "too short": 1},
    }
    kept, left_out = cleaned(answers, duplicates="none", cut_off="keep", repetition=1.0)
    assert len(kept) == 9 and left_out == {"no answer": 1, "empty": 1}


def test_repetition_is_the_share_of_what_stood_before() -> None:
    assert repetition_of(PROSE) == 0
    assert repetition_of("short") == 0
    # 160 characters, once more: 145 different stretches at the beginning, of 305 in all.
    twice = "".join(chr(0x4E00 + index) for index in range(160)) * 2
    assert repetition_of(twice) == pytest.approx(1 - 160 / 305)


def test_near_duplicates_are_those_above_the_similarity() -> None:
    pytest.importorskip("datasketch")
    dice = random.Random(0)
    vocabulary = ["".join(dice.choices("abcdefghijklmnop", k=6)) for _ in range(4000)]
    texts, alike = [], 0
    for _ in range(60):
        words = dice.choices(vocabulary, k=80)
        texts.append(" ".join(words))
        words[dice.randrange(80)] = "changed"  # 9 + 6 or so of 550 stretches
        texts.append(" ".join(words))
        alike += 1
        words[::4] = dice.choices(vocabulary, k=20)  # more than half of all stretches
        texts.append(" ".join(words))
    answers = [answer(text, number) for number, text in enumerate(texts)]
    kept, left_out = cleaned(answers, duplicates="near")
    assert left_out == {"near duplicate": alike}
    assert kept == [text for number, text in enumerate(texts) if number % 3 != 1]
    short = [answer("Yes, it is.", number, question=str(number)) for number in range(3)]
    assert len(cleaned(short, duplicates="near")[0]) == 3


def test_answers_in_another_language_are_left_out() -> None:
    german = "Die Flut kommt zweimal am Tag, weil der Mond das Wasser an sich zieht und die Erde sich dreht."
    code = "```python\ndef flut(mond):\n    return mond.zieht(wasser) and erde.dreht(sich) or nichts\n```"
    answers = [answer(text, number) for number, text in enumerate((PROSE, german, "Ja, genau.", code))]
    kept, left_out = cleaned(answers, languages=["en"])
    assert kept == [PROSE, "Ja, genau.", code] and left_out == {"another language": 1}
    assert len(cleaned(answers, languages=["en", "de"])[0]) == 4
    with pytest.raises(ConfigError, match="holds 'english', expected some of "):
        cleaned(answers, languages=["english"])


def test_a_function_of_one_s_own_weighs_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text(
        "def score(record):\n"
        "    text = record['messages'][-1]['content']\n"
        "    record['messages'].clear()\n"  # it may do what it likes with its copy
        "    return {'a': True, 'b': False, 'c': 0.25, 'd': 0}[text]\n"
        "def bad(record):\n    return 'yes'\n"
        "def failing(record):\n    return 1 / 0\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    answers = [answer(text, number) for number, text in enumerate("abcd")]
    cleaning = Cleaning(CleanConfig(filter="my_rules:score"))
    records = list(cleaning.records(iter(answers)))
    assert [(each["messages"][-1]["content"], each["weight"]) for each in records] == [
        ("a", 1.0),
        ("c", 0.25),
    ]
    assert (
        cleaning.left_out["filter"].count == 2 and cleaning.left_out["filter"].first == "p.jsonl:1, answer 1"
    )
    for name, sentence in (("bad", "returned 'yes' at p.jsonl:1"), ("failing", "division by zero")):
        with pytest.raises(UserError, match=sentence):
            list(Cleaning(CleanConfig(filter=f"my_rules:{name}")).records(iter(answers)))
    for name in ("my_rules:value", "my_rules:nothing", "no_such_module:f"):
        with pytest.raises(ConfigError, match=f"generate.clean.filter={name}"):
            Cleaning(CleanConfig(filter=name))
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("text", "content", "thought"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", "Yes.", "Hm."),
        ("Hm.\n</think>\n\nYes.", "Yes.", "Hm."),  # the template had opened it
        ("<think>\n\n</think>\n\nYes.", "Yes.", None),
        ("Yes.", "Yes.", None),
    ],
)
def test_thoughts_are_told_from_answers(text: str, content: str, thought: str | None) -> None:
    message = message_of(text)
    assert message["content"] == content and message.get("reasoning_content") == thought
    made = {**answer("x"), "answer": message}
    for rationale, kept in (("keep", thought), ("drop", None)):
        record = next(Cleaning(CleanConfig(rationale=rationale)).records(iter([made])))
        assert record["messages"][-1].get("reasoning_content") == kept
