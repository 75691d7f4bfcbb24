"""`prepare` by several processes: the bytes, counts and refusals of one, and nobody left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_templates as templates
import pytest
from chat_templates import chat_tokenizer

from sparsekd.logit_store.places.files import TEMPORARY_PREFIX, files_below
from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.corpus import encoding, workers
from sparsekd.trainer.corpus.documents import Document
from sparsekd.trainer.corpus.findings import Records
from sparsekd.trainer.corpus.prepare import run
from sparsekd.trainer.corpus.tokenizer import END_OF_TEXT, load_tokenizer, save_tokenizer, train_tokenizer
from sparsekd.trainer.corpus.workers import Workers
from sparsekd.trainer.run.errors import DataError
from sparsekd.trainer.run.stop import STOPPED_CODE

pytestmark = pytest.mark.integration

CODE = Path(json.decoder.__file__).read_text()

SCRIPT = """
import json, sys
from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.corpus import encoding
from sparsekd.trainer.corpus.prepare import run
from sparsekd.trainer.run.errors import Stopped
encoding.BATCH_CHARACTERS = 20_000
config = Config()
for key, value in json.loads(sys.argv[1]).items():
    group, name = key.split(".")
    setattr(getattr(config, group), name, value)
try:
    run(config)
except StoreError as error:
    sys.exit(str(error))
except Stopped:
    sys.exit(75)
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(chat_tokenizer(templates.CHATML), folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for text."""
    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(train_tokenizer([CODE], 600), folder)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2000)


def tree(store: Path) -> dict[str, bytes]:
    return {name: (store / name).read_bytes() for name in files_below(store)}


def keys_for(path: Path, tokenizer: Path, store: Path, **corpus: Any) -> dict[str, Any]:
    keys = {"paths": [str(path)], "tokenizer": str(tokenizer), "sequence_length": 64, "heldout_fraction": 0.3}
    return {f"corpus.{name}": value for name, value in (keys | corpus).items()} | {
        "store.tokens": str(store),
        "store.rows_per_shard": 5,
    }


def prepare(keys: dict[str, Any]) -> None:
    config = Config()
    for key, value in keys.items():
        group, name = key.split(".")
        setattr(getattr(config, group), name, value)
    run(config)


def said(printed: str, store: Path) -> str:
    """What was printed, without what differs from run to run."""
    lines = [line for line in printed.splitlines() if not line.endswith("/s")]
    return re.sub(r"after \d+ s", "", "\n".join(lines)).replace(str(store), "STORE")


def chats(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {
            "messages": [
                {"role": "user", "content": f"What is {number}+1? {'<|im_end|>' * (number % 5 == 2)}"},
                {"role": "assistant", "content": f"It is {number + 1}. " * (1 + 9 * (number % 7 == 3))},
            ],
            "w": number % 3,
        }


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_several_processes_write_what_one_writes(
    tmp_path: Path, tokenizer: Path, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text with empty and long documents, and conversations of which some are cut and some cannot be used."""
    texts = [CODE[100 * number : 150 * number] for number in range(60)]
    texts[7] = CODE * (1 + encoding.WINDOW_CHARACTERS // len(CODE))
    texts[20] = END_OF_TEXT
    records = list(chats(60))
    for number in (11, 44):
        records[number]["messages"][0]["role"] = "assistant"
    corpora = {
        "text": (
            write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]),
            {"tokenizer": words},
        ),
        "chat": (
            write_lines(tmp_path / "b.jsonl", records),
            {"truncation": "cut", "weight_field": "w", "invalid": "skip", "chat_template": "gemma.jinja"},
        ),
    }
    (tmp_path / "gemma.jinja").write_text(templates.GEMMA)
    for name, (path, keys) in corpora.items():
        keys = {"format": "jsonl"} | keys
        if "chat_template" in keys:
            keys["chat_template"] = str(tmp_path / keys["chat_template"])
        printed = []
        for jobs in (1, 2):
            store = tmp_path / f"{name}{jobs}"
            prepare(keys_for(path, store=store, jobs=jobs, **{"tokenizer": tokenizer} | keys))
            printed.append(said(capsys.readouterr().out, store))
        assert printed[0] == printed[1]
        assert tree(tmp_path / f"{name}2") == tree(tmp_path / f"{name}1") != {}
        assert len(list((tmp_path / f"{name}1").rglob("*.arrow"))) > 5
        expected = {"text": "spell special tokens", "chat": "2 left out: refused by the chat template"}
        assert expected[name] in printed[1], printed[1]
    assert "documents cut at a row's length, the first b.jsonl:4" in printed[1]


def test_the_first_document_that_cannot_be_used_is_named(tmp_path: Path, tokenizer: Path) -> None:
    """It ends a long block, and the next one is done long before."""
    records = list(chats(60))
    records[0]["messages"][1]["content"] = "a long answer " * 20_000
    for number in (1, 2, 3, 50):
        records[number]["messages"][0]["role"] = "assistant"
    (tmp_path / "gemma.jinja").write_text(templates.GEMMA)
    path = write_lines(tmp_path / "a.jsonl", records)
    keys = {"format": "jsonl", "chat_template": str(tmp_path / "gemma.jinja"), "jobs": 2}
    with pytest.raises(DataError, match=r"^a\.jsonl:2: the chat template refuses"):
        prepare(keys_for(path, tokenizer, tmp_path / "tokens", **keys))
    assert not (tmp_path / "tokens").exists()


def test_no_more_documents_are_read_than_processes_have_room_for(
    words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of long ones by their length, of short ones by the number of blocks; too long a one goes alone."""
    monkeypatch.setattr(workers, "CHARACTERS_AHEAD", 10_000)
    taken: list[int] = []

    def documents(lengths: list[int]) -> Iterator[tuple[int, Document]]:
        taken.clear()
        for number, length in enumerate(lengths):
            taken.append(number)
            text = (CODE * (1 + length // len(CODE)))[:length]
            yield number, Document(text, text.encode(), 0, "")

    with Workers(load_tokenizer(str(words), None), CorpusConfig(jobs=2)) as several:
        # A block is full with 2,000 characters: 4 waiting blocks for each process, and the one that is next.
        for lengths, most in ([1000] * 60, 18), ([4000] * 40, 6), ([30_000] * 9, 2):
            found = several.encoded(documents(lengths), Records())
            numbers = [part.number for part in next(found)]
            assert len(taken) <= most, lengths[0]
            numbers += [part.number for batch in found for part in batch]
            assert numbers == list(range(len(lengths)))


def children(process: int) -> list[int]:
    """The processes that a process has started to work for it."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(child)
    return found


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, words: Path, tokenizer: Path
) -> dict[str, tuple[dict[str, Any], Path]]:
    """How a store of each kind is made, but by how many and where; and the one that one process makes so."""
    folder = tmp_path_factory.mktemp("whole")
    text = [{"text": f"{number} {CODE}"} for number in range(100)]
    corpora = {"text": (text, words, 100), "chat": (list(chats(1000)), tokenizer, 5)}
    found = {}
    for kind, (records, made, rows) in corpora.items():
        path = write_lines(folder / f"{kind}.jsonl", records)
        keys = keys_for(path, made, folder / kind, format="jsonl") | {"store.rows_per_shard": rows}
        prepare(keys)
        found[kind] = keys, folder / kind
    return found


@pytest.mark.parametrize(
    ("kind", "ended"),
    [("chat", "SIGKILL"), ("text", "SIGTERM to all"), ("text", "SIGKILL to a worker")],
)
def test_ended_and_started_again_gives_the_same_bytes(
    kind: str, ended: str, tmp_path: Path, whole: dict[str, tuple[dict[str, Any], Path]]
) -> None:
    keys, expected = whole[kind]
    wanted = keys | {"corpus.jobs": 2, "store.tokens": str(tmp_path / "tokens")}
    command = [sys.executable, "-c", SCRIPT, json.dumps(wanted)]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not list((tmp_path / "tokens").rglob("*.arrow")):
        time.sleep(0.001)
    helpers = children(process.pid)
    assert len(helpers) == 2, process.poll()
    if ended == "SIGKILL":
        process.kill()
    elif ended == "SIGTERM to all":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(helpers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    if ended == "SIGTERM to all":
        assert process.returncode == STOPPED_CODE, errors
    if ended == "SIGKILL to a worker":
        assert process.returncode == 1
        assert re.search(r"A process of prepare was killed.*with fewer corpus\.jobs than 2; it", errors), (
            errors
        )
        assert "Traceback" not in errors
    deadline = time.monotonic() + 60
    while any(map(is_alive, helpers)):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.05)
    assert not (tmp_path / "tokens" / "INDEX.json").exists(), "ended in time"
    prepare(wanted | {"corpus.jobs": 1})
    assert tree(tmp_path / "tokens") == tree(expected)
    assert not [name for name in files_below(tmp_path / "tokens") if TEMPORARY_PREFIX in name]
