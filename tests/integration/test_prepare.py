"""`prepare` from files to a sealed token store: every format, equal bytes after a kill, and its refusals."""

import codecs
import csv
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from caught_signals import send_when_caught
from pyarrow import parquet
from transformers import AutoTokenizer

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.logit_store.row import document_of_position
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.corpus.documents import read_documents
from sparsekd.trainer.corpus.prepare import run
from sparsekd.trainer.corpus.split import is_heldout
from sparsekd.trainer.corpus.tokenizer import save_tokenizer, tokenize, train_tokenizer
from sparsekd.trainer.run.errors import ConfigError, DataError
from sparsekd.trainer.run.stop import STOPPED_CODE

pytestmark = pytest.mark.integration

LIBRARY = Path(json.__file__).parent.parent
FILES = sorted(LIBRARY.glob("json/*.py")) + sorted(LIBRARY.glob("concurrent/**/*.py"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "corpus"
    for path in FILES:
        target = folder / path.relative_to(LIBRARY)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "empty.py").write_bytes(b"")
    return folder


def config_for(texts: Path, tokens: Path) -> Config:
    config = Config()
    config.corpus.paths = [str(texts)]
    config.corpus.train_vocabulary_size = 300
    config.corpus.sequence_length = 64
    config.corpus.heldout_fraction = 0.3
    config.store.tokens = str(tokens)
    config.store.rows_per_shard = 50
    return config


def files_of(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()
    }


def tokens_by_document(store: LogitStore, split: str) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for index in range(store.rows(split)):
        row = store.read_row(split, index)
        for token, document in zip(row.token_ids.tolist(), document_of_position(row).tolist(), strict=True):
            found.setdefault(document, []).append(token)
    found.pop(-1, None)
    return found


def test_store_holds_every_document_once_on_its_side(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(texts, tmp_path / "tokens")
    run(config)
    printed = capsys.readouterr().out
    store = open_store(tmp_path / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    sides = {split: tokens_by_document(store, split) for split in ("train", "heldout")}
    assert len(sides["heldout"]) > 0
    for number, document in enumerate(read_documents(config.corpus)):
        held = is_heldout(document.content, fraction=0.3, seed=0)
        side, other = ("heldout", "train") if held else ("train", "heldout")
        assert number not in sides[other]
        if not document.content:
            assert number not in sides[side]
            continue
        assert sides[side][number] == tokenize(tokenizer, [document.text])[0].tolist()
        assert tokenizer.decode(sides[side][number][:-1]) == document.text
    assert len(sides["train"]) + len(sides["heldout"]) == len(FILES)
    # The report's figures, from the rows themselves.
    for split, documents in sides.items():
        tokens = sum(map(len, documents.values()))
        padding = 1 - tokens / (store.rows(split) * 64)
        line = next(line for line in printed.splitlines() if f" {split} " in line)
        assert f"{len(documents)} documents, {tokens:,} tokens, {store.rows(split):,} rows of 64" in line
        assert line.endswith(f"padding {padding:.2%}")
    assert "1 empty ones left out" in printed and "next: sparsekd capture" in printed
    # The tokenizer saw the training split alone.
    train = [
        document.text
        for document in read_documents(config.corpus)
        if document.content and not is_heldout(document.content, fraction=0.3, seed=0)
    ]
    assert tokenizer.get_vocab() == train_tokenizer(train, 300).get_vocab()
    assert store.manifest.record.k == store.manifest.record.n == 0 and store.manifest.teacher is None


def test_every_format_gives_the_same_rows(texts: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    plain = config_for(texts, tmp_path / "text")
    contents = [document.text for document in read_documents(plain.corpus)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in contents))
    parquet.write_table(pa.table({"text": contents}), tmp_path / "d.parquet", row_group_size=3)
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in contents)])
    datasets.Dataset.from_dict({"text": contents}).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub").mkdir()
    shutil.copy(tmp_path / "d.parquet", tmp_path / "hub" / "train.parquet")
    run(plain)
    expected = open_store(tmp_path / "text")
    for format, source in (
        ("jsonl", "d.jsonl"),
        ("csv", "d.csv"),
        ("parquet", "d.parquet"),
        ("dataset", "saved"),
        ("dataset", "hub"),
    ):
        config = config_for(tmp_path / source, tmp_path / f"tokens-{source}")
        config.corpus.format = format
        run(config)
        found = open_store(tmp_path / f"tokens-{source}")
        same = found.manifest.dataset["sources"][0]
        assert same["sha256"] == expected.manifest.dataset["sources"][0]["sha256"]
        for split in ("train", "heldout"):
            assert found.rows(split) == expected.rows(split)
            for index in range(found.rows(split)):
                left, right = found.read_row(split, index), expected.read_row(split, index)
                assert np.array_equal(left.token_ids, right.token_ids)
                assert np.array_equal(left.segment_documents, right.segment_documents)


def test_tool_copies_marks_and_compression_change_no_row(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, messy = config_for(texts, tmp_path / "plain"), config_for(texts, tmp_path / "messy")
    folder = tmp_path / "again" / texts.name
    shutil.copytree(texts, folder)
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "a-checkpoint.py").write_text("a copy")
    for name in ("_SUCCESS", "._a.py"):
        (folder / name).write_bytes(b"\0\xff")
    for index, path in enumerate(sorted(folder.rglob("[a-z]*.py"))):
        if index % 2:
            path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
        else:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    messy.corpus.paths, messy.corpus.include = [str(folder)], "*.py"
    run(plain)
    capsys.readouterr()
    run(messy)
    printed = capsys.readouterr().out
    assert (
        "2 hidden files, marks of tools and compressed copies in folders left out, the first .ipynb"
        in printed
    )
    assert files_of(tmp_path / "messy") == files_of(tmp_path / "plain")


def test_two_machines_write_equal_stores(texts: Path, tmp_path: Path) -> None:
    for place in ("here", "there/deeper"):
        shutil.copytree(texts, tmp_path / place / "corpus")
        run(config_for(tmp_path / place / "corpus", tmp_path / place / "tokens"))
    assert files_of(tmp_path / "here" / "tokens") == files_of(tmp_path / "there/deeper" / "tokens")
    manifest = (tmp_path / "here" / "tokens" / "MANIFEST.json").read_text()
    assert str(tmp_path) not in manifest


SCRIPT = """
import json, sys
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.corpus.prepare import run
from sparsekd.trainer.run.errors import Stopped
from sparsekd.trainer.run.stop import STOPPED_CODE
config = Config()
for key, value in json.loads(sys.argv[1]).items():
    group, name = key.split(".")
    setattr(getattr(config, group), name, value)
print("READY", flush=True)
try:
    run(config)
except Stopped as stopped:
    assert "was asked to stop (terminated, SIGTERM)" in str(stopped), stopped
    sys.exit(STOPPED_CODE)
"""


def test_one_large_file_is_cut_into_documents(texts: Path, tmp_path: Path) -> None:
    whole = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(texts.rglob("*.py")))
    (tmp_path / "all.txt").write_text(whole, encoding="utf-8")
    config = config_for(tmp_path / "all.txt", tmp_path / "tokens")
    config.corpus.heldout_fraction = 0.1
    config.corpus.sample_by = "paragraph"
    run(config)
    store = open_store(tmp_path / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    train, heldout = (tokens_by_document(store, split) for split in ("train", "heldout"))
    assert len(train) > 100 and len(heldout) > 10
    together = dict(sorted((train | heldout).items()))
    texts_found = [tokenizer.decode(ids[:-1]) for ids in together.values()]
    assert texts_found == [part.strip("\n") for part in re.split(r"\n(?:\s*\n)+", whole) if part.strip()]
    config.corpus.sample_by, config.corpus.heldout_fraction = "document", 1e-12  # whatever its hash
    with pytest.raises(DataError, match=r"1 documents holds none out.*corpus\.sample_by, corpus\.separator"):
        run(config)


def test_shredded_chat_text_is_said_and_json_as_text_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(["some text"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    chats = [f"<|im_start|>user\nquestion {number}<|im_end|>\n" for number in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"text": chat}) + "\n" for chat in chats))
    config = config_for(tmp_path / "chats.jsonl", tmp_path / "split")
    config.corpus.tokenizer, config.corpus.train_vocabulary_size = str(tmp_path / "tokenizer"), None
    with pytest.raises(DataError, match=r"1 of 1 documents are JSON, the first chats\.jsonl.*corpus=jsonl"):
        run(config)
    assert not (tmp_path / "split").exists()
    config.corpus.format = "jsonl"
    run(config)
    said = (
        "20 documents spell special tokens of the tokenizer (<|im_end|> in 20, <|im_start|> in 20), the first"
    )
    assert f"prepare: {said} chats.jsonl:1: these stay text" in capsys.readouterr().out
    config.store.tokens, config.corpus.split_special_tokens = str(tmp_path / "parsed"), False
    run(config)
    parsed, split = (open_store(tmp_path / name) for name in ("parsed", "split"))
    assert "special_tokens" in parsed.manifest.dataset and "special_tokens" not in split.manifest.dataset
    for store, texts_of_special in ((parsed, 2), (split, 0)):
        for ids in tokens_by_document(store, "train").values():
            special = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
            assert sum(ids.count(token) for token in special) == texts_of_special
    with pytest.raises(StoreError, match="special_tokens"):  # another choice, another store
        config.store.tokens = str(tmp_path / "split")
        run(config)


MEMORY = """
import json, resource, sys
from transformers import AutoTokenizer
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.corpus.prepare import run
config = Config()
config.corpus.paths, config.corpus.tokenizer, config.store.tokens = [sys.argv[1]], sys.argv[2], sys.argv[3]
config.corpus.heldout_fraction = 0.0
AutoTokenizer.from_pretrained(config.corpus.tokenizer)("some words " * 100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(config)
print("MB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_one_document_of_twenty_megabytes_takes_little_memory(tmp_path: Path) -> None:
    """Encoded as a whole it took 3.4 GB; its text and the bytes of it are 40 MB."""
    parts = [path.read_text(encoding="utf-8") for path in sorted(LIBRARY.glob("*.py"))]
    save_tokenizer(train_tokenizer(parts[:20], 2000), tmp_path / "tokenizer")
    with (tmp_path / "all.txt").open("w", encoding="utf-8") as file:
        written = 0
        for number in range(1_000_000):
            text = f"# {number}\n{parts[number % len(parts)]}\n\n"
            written += file.write(text)
            if written > 20_000_000:
                break
    names = [str(tmp_path / name) for name in ("all.txt", "tokenizer", "tokens")]
    command = [sys.executable, "-c", MEMORY, *names]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONSAFEPATH": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    assert int(done.stdout.splitlines()[-1].removeprefix("MB ")) < 600


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM])
def test_ended_and_started_again_gives_the_same_bytes(
    texts: Path, tmp_path: Path, ended_by: signal.Signals
) -> None:
    whole = config_for(texts, tmp_path / "whole")
    whole.store.rows_per_shard = 5
    run(whole)
    keys = {
        "corpus.paths": [str(texts)],
        "corpus.train_vocabulary_size": 300,
        "corpus.sequence_length": 64,
        "corpus.heldout_fraction": 0.3,
        "store.tokens": str(tmp_path / "killed"),
        "store.rows_per_shard": 5,
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(keys)]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    shards = len(list((tmp_path / "whole").rglob("*.arrow")))
    wait_for = random.Random(os.getpid()).randrange(1, shards // 2)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "killed").rglob("*.arrow"))) < wait_for:
        time.sleep(0.001)
    process.send_signal(ended_by)
    code = STOPPED_CODE if ended_by == signal.SIGTERM else -ended_by
    assert process.wait() == code, f"it ended before shard {wait_for} of {shards}"
    with pytest.raises(StoreError, match="not finished"):
        open_store(tmp_path / "killed")
    again = config_for(texts, tmp_path / "killed")
    again.store.rows_per_shard = 5
    run(again)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    run(again)  # and once more, when there is nothing left to do
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_stopped_from_its_first_moment_on_it_begins_nothing(texts: Path, tmp_path: Path) -> None:
    """The signal comes while libraries are loaded, or the corpus is read for the first time."""
    words = [
        f"corpus.paths=[{texts}]",
        "corpus.train_vocabulary_size=300",
        f"store.tokens={tmp_path / 'tokens'}",
    ]
    command = [sys.executable, "-m", "sparsekd.trainer.door.cli", "prepare", *words]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    send_when_caught(job, signal.SIGTERM)
    said = job.communicate()[0]
    assert job.returncode == STOPPED_CODE, said
    assert "The corpus was being read when this was asked to stop (terminated, SIGTERM)" in said
    assert not (tmp_path / "tokens").exists()


def test_again_on_a_read_only_disk_it_says_what_is_there(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    made, disk = tmp_path / "made", tmp_path / "disk"
    disk.mkdir()
    run(config_for(texts, made / "tokens"))
    capsys.readouterr()
    for options in ("bind", "remount,bind,ro"):
        mounted = subprocess.run(["mount", "-o", options, str(made), str(disk)], capture_output=True)
        if mounted.returncode != 0:
            pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        run(config_for(texts, disk / "tokens"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert f"{disk / 'tokens'} is sealed" in capsys.readouterr().out


def test_a_loaded_tokenizer_travels_with_the_store(texts: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some other text, some other merges"], 280)
    tokenizer.add_tokens(["<extra>"])
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    config = config_for(texts, tmp_path / "tokens")
    config.corpus.train_vocabulary_size = None
    config.corpus.tokenizer = str(tmp_path / "tokenizer")
    run(config)
    store = open_store(tmp_path / "tokens")
    assert store.manifest.tokenizer.vocabulary_size == len(tokenizer)
    assert store.manifest.tokenizer.name == "tokenizer"
    assert AutoTokenizer.from_pretrained(store.tokenizer_path).get_vocab() == tokenizer.get_vocab()


def test_another_identity_is_refused_by_name(texts: Path, tmp_path: Path) -> None:
    run(config_for(texts, tmp_path / "tokens"))
    before = files_of(tmp_path / "tokens")
    config = config_for(texts, tmp_path / "tokens")
    config.corpus.sequence_length = 32
    with pytest.raises(StoreError, match=r"sequence_length: found 64, wanted 32.*new folder"):
        run(config)
    changed = tmp_path / "changed" / texts.name
    shutil.copytree(texts, changed)
    (changed / "empty.py").write_text("pass\n")
    with pytest.raises(StoreError, match=r"dataset\.sources\[0\]\.sha256"):
        run(config_for(changed, tmp_path / "tokens"))
    assert files_of(tmp_path / "tokens") == before


def test_refusals_say_what_to_do(texts: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.py").write_text("x = 1\n")
    config = config_for(few, tmp_path / "tokens")
    config.corpus.heldout_fraction = 1e-9
    with pytest.raises(DataError, match=r"heldout_fraction=1e-09 of 1 documents holds none out; add doc"):
        run(config)
    config.corpus.heldout_fraction = 0.0
    config.corpus.train_vocabulary_size = None
    with pytest.raises(ConfigError, match=r"corpus\.tokenizer or corpus\.train_vocabulary_size is not set"):
        run(config)
    (few / "a.py").write_text("")
    with pytest.raises(DataError, match="holds 1 documents, all of them empty"):
        run(config)
    (tmp_path / "none.jsonl").write_text("\n")
    config = config_for(tmp_path / "none.jsonl", tmp_path / "tokens")
    config.corpus.format = "jsonl"
    with pytest.raises(DataError, match=r"holds no documents; check corpus\.paths"):
        run(config)
    assert not (tmp_path / "tokens").exists()


def test_without_heldout_documents_by_choice(texts: Path, tmp_path: Path) -> None:
    config = config_for(texts, tmp_path / "tokens")
    config.corpus.heldout_fraction = 0.0
    run(config)
    store = open_store(tmp_path / "tokens")
    assert store.rows("heldout") == 0 and len(tokens_by_document(store, "train")) == len(FILES)
