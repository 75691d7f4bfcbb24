"""`generate`: the same folder whatever an endpoint does and however often the command is killed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from answering_server import Handler, said, serving, slow
from capture_world import SIZES, files_of
from chat_templates import WITH_SYSTEM, chat_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import sparsekd
from sparsekd.trainer.generation.generate import run
from sparsekd.trainer.run.errors import ConfigError, DataError, OwnerError, Stopped, UserError
from sparsekd.trainer.run.stop import StopRequest, StopWatch

pytestmark = pytest.mark.integration


def prompts_in(folder: Path, count: int = 20) -> Path:
    place = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"Question {number}?"}) for number in range(count)]
    place.write_text("\n".join(lines) + "\n")
    return place


def words(folder: Path, address: str, prompts: Path, *more: str) -> list[str]:
    return [
        f"generate.path={folder}",
        f"generate.prompts=[{prompts}]",
        f"generate.endpoint={address}",
        "generate.model=teacher",
        "generate.answers=2",
        "generate.prompts_per_part=6",
        "generate.concurrency=4",
        *more,
    ]


def answers_of(folder: Path) -> list[dict[str, Any]]:
    parts = sorted((folder / "raw").iterdir())
    assert all(part.suffix == ".jsonl" for part in parts)
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def conversations_of(folder: Path) -> list[dict[str, Any]]:
    parts = sorted((folder / "data").iterdir())
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def quiet_files(folder: Path, prompts: Path) -> dict[str, bytes]:
    with serving() as server:
        sparsekd.generate(words(folder, server.address, prompts))
        assert set(server.asked.values()) == {1} and len(server.asked) == 40
    return files_of(folder)


def test_answers_become_conversations_with_their_provenance(tmp_path: Path) -> None:
    prompts = prompts_in(tmp_path)
    files = quiet_files(tmp_path / "a", prompts)
    assert sorted(files) == [
        *("cleaning.json", "data/part-00000.jsonl", "generation.json"),
        *(f"raw/part-0000{part}.jsonl" for part in range(4)),
    ]
    answers = answers_of(tmp_path / "a")
    assert [(each["place"], each["sample"]) for each in answers[:3]] == [
        *(("prompts.jsonl:1", 0), ("prompts.jsonl:1", 1), ("prompts.jsonl:2", 0))
    ]
    assert len({each["seed"] for each in answers}) == 40
    for each in answers:
        question = each["messages"][0]["content"]
        assert each["answer"]["content"] == said(question, each["seed"])
        assert (each["model"], each["finish_reason"], each["tokens"]) == ("served", "stop", 7)
    made = conversations_of(tmp_path / "a")
    assert [one["messages"][-1]["content"] for one in made] == [each["answer"]["content"] for each in answers]
    assert all(one["weight"] == 1 for one in made)


def test_a_bad_endpoint_gives_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It drops connections, refuses for a while, fails, sends nonsense, and answers in any order."""
    prompts = prompts_in(tmp_path)
    wanted = quiet_files(tmp_path / "quiet", prompts)
    nonsense = [
        b"<html>busy</html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 7}}]}',
        b'{"choices": {"message": 1}}', b"[" * 100_000, b'{"choices": [{"message": {"content": "\\ud800"}}]}',
        b'{"choices": [{"message": {"tool_calls": [{"function": 3}]}}]}', b"", b"\xff\xfe",
    ]  # fmt: skip
    dice = random.Random(3)
    monkeypatch.setenv("OF_TEST", "secret-key-1")

    def fault(handler: Handler, question: str, count: int) -> bool:
        time.sleep(dice.random() * 0.02)
        if count > 1:
            return False
        match dice.randrange(6):
            case 0:
                handler.close_connection = True  # without a word
            case 1:
                handler.send(429, b"{}", Retry_After="0.05")
            case 2:
                handler.send(dice.choice([500, 502, 503]), b"oops")
            case 3:
                handler.send(200, dice.choice(nonsense))
            case 4:
                handler.send_response(200)
                handler.send_header("Content-Length", "1000")  # and sends less
                handler.end_headers()
                handler.close_connection = True
            case _:
                return False
        return True

    with serving(fault) as server:
        key = "generate.key_variable=OF_TEST"
        sparsekd.generate(words(tmp_path / "bad", server.address, prompts, key))
        assert 2 in server.asked.values() and server.most_at_once <= 4
        assert all(headers["Authorization"] == "Bearer secret-key-1" for headers, _ in server.requests)
    assert files_of(tmp_path / "bad") == wanted
    assert not any(b"secret-key-1" in data for data in files_of(tmp_path / "bad").values())


def test_killed_anywhere_it_goes_on(tmp_path: Path) -> None:
    """No answer that is written is asked for again, and the folder is that of a quiet run."""
    prompts = prompts_in(tmp_path)
    wanted = quiet_files(tmp_path / "quiet", prompts)
    folder = tmp_path / "killed"
    kept: set[str] = set()
    with serving(slow(0.1)) as server:
        arguments = words(folder, server.address, prompts)
        command = [sys.executable, "-m", "sparsekd.trainer.door.cli", "generate", *arguments]
        for start, kind in enumerate((signal.SIGKILL, signal.SIGTERM), start=1):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            deadline = time.monotonic() + 60
            while len(lines_in(folder)) < 9 * start and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(kind)
            printed = process.communicate(timeout=60)[0]
            assert process.returncode == (-9 if kind == signal.SIGKILL else 75), printed
            kept |= lines_in(folder)
        # Of a part that is not whole; where all that were begun are, of the next one.
        whole = len(list((folder / "raw").glob("part-*.jsonl")))
        following = folder / "raw" / f"part-{whole:05d}.journal"
        with next((folder / "raw").glob("*.journal"), following).open("a") as file:
            file.write('{"prompt": "torn')
        asked = dict(server.asked)
        sparsekd.generate(arguments)
        for line in kept:
            record = json.loads(line)
            key = record["messages"][0]["content"], record["seed"]
            assert server.asked[key] == asked[key], "an answer that was written was asked for again"
        assert len(kept) < len(server.asked) == 40
    assert files_of(folder) == wanted
    assert lines_in(folder) >= kept


def lines_in(folder: Path) -> set[str]:
    """Answers that stand in a folder whole."""
    found: set[str] = set()
    for place in (folder / "raw").glob("part-*"):
        try:
            text = place.read_text()
        except FileNotFoundError:  # it was written whole meanwhile
            continue
        found |= set(text[: text.rfind("\n") + 1].splitlines())
    return found


def test_requests_say_what_is_asked_for(tmp_path: Path) -> None:
    place = tmp_path / "prompts.jsonl"
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    place.write_text(json.dumps({"prompt": "What time is it?", "tools": tools}) + "\n")
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}

    def fault(handler: Handler, question: str, count: int) -> bool:
        handler.answer({"content": None, "reasoning": "A tool knows.", "tool_calls": [call]}, "tool_calls")
        return True

    with serving(fault) as server:
        more = ["generate.request={top_k: 20, max_tokens: null}", "generate.answers=1", "generate.system=Hi."]
        sparsekd.generate(words(tmp_path / "a", server.address, place, *more))
        [(_, body)] = server.requests
    messages = [{"role": "system", "content": "Hi."}, {"role": "user", "content": "What time is it?"}]
    assert body.pop("seed") == answers_of(tmp_path / "a")[0]["seed"]
    assert body == {
        **{"model": "teacher", "messages": messages, "tools": tools},
        **{"temperature": 0.7, "top_p": 1.0, "top_k": 20},
    }
    answer = {"role": "assistant", "content": "", "reasoning_content": "A tool knows.", "tool_calls": [call]}
    [record] = conversations_of(tmp_path / "a")
    assert record["messages"] == [*messages, answer] and record["tools"] == tools


@pytest.mark.parametrize(
    ("status", "headers", "sentence"),
    [
        (401, {}, "the key is not accepted"),
        (404, {}, "check generate.endpoint and generate.model"),
        (302, {"Location": "http://127.0.0.1:9/other"}, "redirects are not followed"),
    ],
)
def test_what_no_answer_will_change_ends_at_once(
    tmp_path: Path, status: int, headers: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_TEST", "secret-key-2")

    def fault(handler: Handler, question: str, count: int) -> bool:
        handler.send(status, b"not with secret-key-2", **headers)
        return True

    with serving(fault) as server:
        key = "generate.key_variable=OF_TEST"
        arguments = words(tmp_path / "a", server.address, prompts_in(tmp_path), key)
        with pytest.raises(UserError, match=sentence) as found:
            sparsekd.generate(arguments)
        assert len(server.requests) <= 4
    assert "secret-key-2" not in str(found.value)


def test_a_refused_prompt_is_said_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fault(handler: Handler, question: str, count: int) -> bool:
        if question != "Question 3?":
            return False
        handler.send(400, b"too long")
        return True

    prompts = prompts_in(tmp_path, 6)
    with serving(fault) as server:
        arguments = words(tmp_path / "a", server.address, prompts, "generate.retries=1")
        with pytest.raises(UserError, match=r"2 answers did not come.*prompts.jsonl:4: HTTP 400: too long"):
            sparsekd.generate(arguments)
        assert max(server.asked.values()) == 1 and not (tmp_path / "a" / "data").exists()
        sparsekd.generate([*arguments, "generate.failed=skip"])
        sparsekd.generate(arguments)  # nothing is left to ask
        assert sorted(server.asked.values()) == [1] * 10 + [2] * 2
    assert len(conversations_of(tmp_path / "a")) == 10
    assert "2 answers left out (no answer), the first prompts.jsonl:4, answer 0" in capsys.readouterr().out


def test_an_endpoint_that_is_gone_ends_soon(tmp_path: Path) -> None:
    with serving() as server:
        address = server.address
    arguments = words(tmp_path / "a", address, prompts_in(tmp_path), "generate.retries=0")
    with pytest.raises(UserError, match=r"none of the last 8 answers.*ConnectError"):
        sparsekd.generate([*arguments, "generate.failed=skip"])
    assert not lines_in(tmp_path / "a")


def test_replies_without_an_end_and_late_ones_are_left(tmp_path: Path) -> None:
    sent: list[int] = []

    def fault(handler: Handler, question: str, count: int) -> bool:
        if count > 1:
            return False
        if question == "Question 0?":
            time.sleep(1.5)
            return False
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        for _ in range(80):
            handler.wfile.write(chunk)
            sent.append(len(chunk))
        return True

    with serving(fault) as server:
        sparsekd.generate(
            words(
                tmp_path / "a",
                server.address,
                prompts_in(tmp_path, 2),
                "generate.timeout_seconds=1",
                "generate.answers=1",
            )
        )
        assert set(server.asked.values()) == {2}
    assert len(sent) < 40, "it was read beyond what a reply may have"


@pytest.mark.parametrize("part", ["part-00000.jsonl", "part-00000.journal"])
@pytest.mark.parametrize(
    "line",
    [
        "[1]", "{}", "null", "[" * 100_000, '"text"',
        '{"prompt": "a", "sample": 0, "place": "p", "finish_reason": null, "messages": [3], "answer": null}',
        '{"prompt": "a", "sample": 0, "place": "p", "finish_reason": null, "messages": [],'
        ' "answer": {"role": "assistant", "content": 7}}',
        '{"prompt": "a", "sample": 0, "place": "p", "finish_reason": null, "messages": [], "answer": [1]}',
    ],
    ids=range(8),
)  # fmt: skip
def test_a_stranger_s_answers_are_one_sentence(tmp_path: Path, part: str, line: str) -> None:
    """JSON of another shape, in a file that seems whole and in one that is gone on with."""
    prompts = prompts_in(tmp_path, 2)
    with serving() as server:
        arguments = words(tmp_path / "a", server.address, prompts)
        sparsekd.generate(arguments)
        whole = tmp_path / "a" / "raw" / "part-00000.jsonl"
        lines = whole.read_text().splitlines()
        whole.unlink()
        (whole.parent / part).write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
        with pytest.raises(DataError, match=rf"{part}, line 2 is damaged \(.*again") as refused:
            sparsekd.generate(arguments)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_an_answer_to_another_question_is_not_taken(tmp_path: Path) -> None:
    prompts = prompts_in(tmp_path, 2)
    with serving() as server:
        arguments = words(tmp_path / "a", server.address, prompts)
        sparsekd.generate(arguments)
        whole = tmp_path / "a" / "raw" / "part-00000.jsonl"
        record = json.loads(whole.read_text().splitlines()[0])
        whole.rename(whole.with_suffix(".journal"))
        with whole.with_suffix(".journal").open("a") as file:
            file.write(json.dumps(record | {"prompt": "0" * 64}) + "\n")
        with pytest.raises(DataError, match=r"line 5 is damaged .*answers nothing that is asked for"):
            sparsekd.generate(arguments)


def test_other_settings_and_another_process_are_refused(tmp_path: Path) -> None:
    prompts = prompts_in(tmp_path, 4)
    with serving() as server:
        arguments = words(tmp_path / "a", server.address, prompts)
        sparsekd.generate(arguments)
        with pytest.raises(ConfigError, match=r"temperature is 0\.7 there and 0\.9 now"):
            sparsekd.generate([*arguments, "generate.temperature=0.9"])
        prompts_in(tmp_path, 5)
        with pytest.raises(ConfigError, match="prompts is"):
            sparsekd.generate(arguments)
    with serving(slow(0.3)) as server:
        arguments = words(tmp_path / "b", server.address, prompts)
        command = [sys.executable, "-m", "sparsekd.trainer.door.cli", "generate", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not lines_in(tmp_path / "b"):
            time.sleep(0.01)
        with pytest.raises(OwnerError, match="one process works there at a time"):
            sparsekd.generate(arguments)
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, of random weights: its answers are any tokens."""
    folder = tmp_path_factory.mktemp("chat") / "teacher"
    tokenizer = chat_tokenizer(WITH_SYSTEM)
    torch.manual_seed(5)
    fields = SIZES | {"max_position_embeddings": 200, "initializer_range": 0.2}
    special = {
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer) + 5, **fields, **special)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_process(folder: Path, prompts: Path, teacher: Path, *more: str) -> list[str]:
    return [
        f"generate.path={folder}",
        f"generate.prompts=[{prompts}]",
        f"teacher.path={teacher}",
        "teacher.dtype=float32",
        "generate.answers=2",
        "generate.max_tokens=12",
        "generate.batch_rows=3",
        "generate.prompts_per_part=4",
        "generate.clean.cut_off=keep",
        "launch.device=cpu",
        *more,
    ]


@pytest.mark.usefixtures("own_environment")
def test_a_teacher_in_process_goes_on_after_a_kill_and_prepare_reads_it(
    tmp_path: Path, teacher: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"  # of other lengths, so that some of a batch are padded
    questions = [{"prompt": f"Question {'and so on ' * (number * 5 % 7)}{number}?"} for number in range(6)]
    prompts.write_text("".join(json.dumps(question) + "\n" for question in questions))
    sparsekd.generate(in_process(tmp_path / "quiet", prompts, teacher))
    wanted = files_of(tmp_path / "quiet")
    answers = answers_of(tmp_path / "quiet")
    assert len({each["answer"]["content"] for each in answers}) > 9
    assert {each["finish_reason"] for each in answers} <= {"stop", "length"}
    killed = tmp_path / "killed"
    (killed / "raw").mkdir(parents=True)
    (killed / "generation.json").write_bytes(wanted["generation.json"])
    # As a kill leaves it: the second batch half written, its last line torn.
    lines = wanted["raw/part-00000.jsonl"].splitlines(keepends=True)
    (killed / "raw" / "part-00000.journal").write_bytes(b"".join(lines[:4]) + lines[4][:50])
    sparsekd.generate(in_process(killed, prompts, teacher))
    assert files_of(killed) == wanted
    # An answer's draws are its own: another neighbourhood changes nothing but rounding.
    sparsekd.generate(in_process(tmp_path / "alone", prompts, teacher, "generate.batch_rows=1"))
    assert [each["answer"] for each in answers_of(tmp_path / "alone")] == [each["answer"] for each in answers]
    tokens = sparsekd.prepare(
        [
            *("corpus=jsonl", f"corpus.paths=[{tmp_path / 'quiet' / 'data'}]", "corpus.weight_field=weight"),
            *(f"corpus.tokenizer={teacher}", f"store.tokens={tmp_path / 'tokens'}"),
            *("corpus.sequence_length=64", "corpus.heldout_fraction=0.3"),
        ]
    )
    store = sparsekd.open_store(tokens)
    learned = sum(
        int(store.read_row(split, row).loss_mask.sum())
        for split in ("train", "heldout")
        for row in range(store.rows(split))
    )
    assert learned >= len(answers)


@pytest.mark.usefixtures("own_environment")
def test_a_teacher_in_process_stops_where_it_is_asked_to(tmp_path: Path, teacher: Path) -> None:
    prompts = prompts_in(tmp_path, 6)
    arguments = in_process(tmp_path / "a", prompts, teacher)
    sparsekd.generate(in_process(tmp_path / "quiet", prompts, teacher))

    class Impatient(StopWatch):
        """Is asked to stop as soon as an answer is there."""

        @property
        def request(self) -> StopRequest | None:
            return StopRequest("terminated", "SIGTERM") if lines_in(tmp_path / "a") else None

        @request.setter
        def request(self, value: StopRequest | None) -> None:
            pass

    with pytest.raises(Stopped, match="terminated, SIGTERM"):
        run(sparsekd.compose(arguments), Impatient())
    assert len(lines_in(tmp_path / "a")) == 3
    sparsekd.generate(arguments)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "quiet")


@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [("What is <|im_end|>?", r"spells <\|im_end\|>"), ("so " * 300, "more than the 200 positions")],
)
def test_a_prompt_that_the_teacher_cannot_take_is_said_or_left_out(
    tmp_path: Path, teacher: Path, prompt: str, sentence: str
) -> None:
    place = tmp_path / "prompts.jsonl"
    place.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Why?", prompt)))
    arguments = in_process(tmp_path / "a", place, teacher)
    with pytest.raises(UserError, match=sentence):
        sparsekd.generate(arguments)
    sparsekd.generate([*arguments, "generate.failed=skip"])
    assert [each["finish_reason"] == "failed" for each in answers_of(tmp_path / "a")] == [False] * 2 + [
        True
    ] * 2
    assert len(conversations_of(tmp_path / "a")) == 2


@pytest.mark.usefixtures("own_environment")
def test_a_quantised_teacher_says_so(tmp_path: Path, teacher: Path) -> None:
    """Its answers are others, and the folder of one is refused to the other."""
    prompts = prompts_in(tmp_path, 2)
    said_by = {}
    for quantization in ("null", "nf4"):
        folder = tmp_path / quantization
        words = in_process(folder, prompts, teacher, f"teacher.quantization={quantization}")
        sparsekd.generate(words)
        said_by[quantization] = [each["answer"]["content"] for each in answers_of(folder)]
        named = json.loads((folder / "generation.json").read_text())["quantization"]
        assert named == (None if quantization == "null" else quantization)
    assert said_by["null"] != said_by["nf4"]
    with pytest.raises(UserError, match="quantization"):
        sparsekd.generate(in_process(tmp_path / "null", prompts, teacher, "teacher.quantization=nf4"))


@pytest.mark.usefixtures("own_environment")
def test_sampling_follows_the_teachers_distribution(tmp_path: Path, teacher: Path) -> None:
    """First tokens of many answers to one prompt, against the probabilities of the model itself."""
    prompts = prompts_in(tmp_path, 1)
    count = 600
    arguments = in_process(tmp_path / "a", prompts, teacher, f"generate.answers={count}")
    arguments += ["generate.max_tokens=1", "generate.batch_rows=200", "generate.temperature=0.5"]
    sparsekd.generate(arguments)
    tokenizer = chat_tokenizer(WITH_SYSTEM)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Question 0?"}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1, : len(tokenizer)]
    probabilities = torch.softmax(logits.double() / 0.5, 0)
    drawn = [each["answer"]["content"] for each in answers_of(tmp_path / "a")]
    by_text: dict[str, float] = {}
    for index, share in enumerate(probabilities.tolist()):
        text = tokenizer.decode([index], skip_special_tokens=True)
        by_text[text] = by_text.get(text, 0.0) + share
    likely = sorted(by_text, key=lambda text: -by_text[text])[:5]
    assert by_text[likely[0]] > 0.02
    for text in likely:
        expected = by_text[text]
        deviation = (expected * (1 - expected) / count) ** 0.5
        assert abs(drawn.count(text) / count - expected) < 4.5 * deviation, text
