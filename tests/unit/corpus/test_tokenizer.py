"""Tokenizers: trained ones are reproducible and lossless, loaded ones begin and end documents properly."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsekd.trainer.corpus.tokenizer import (
    END_OF_TEXT,
    end_token_id,
    load_tokenizer,
    save_tokenizer,
    tokenize,
    tokenizer_identity,
    train_tokenizer,
)
from sparsekd.trainer.run.errors import DataError

TEXTS = [Path(module.__file__).read_text(encoding="utf-8") for module in (json, hashlib, subprocess)]

TRAIN = """
import hashlib, json, subprocess, sys
from pathlib import Path
from sparsekd.trainer.corpus.tokenizer import save_tokenizer, train_tokenizer
texts = [Path(module.__file__).read_text(encoding="utf-8") for module in (json, hashlib, subprocess)]
save_tokenizer(train_tokenizer(texts, 400), Path(sys.argv[1]))
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_training_gives_equal_files_in_any_process(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 400), tmp_path / "here")
    environment = {"RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "11", "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path / "there")], env=environment, check=True)
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")


def test_trained_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 400), tmp_path / "t")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert tokenizer.eos_token == END_OF_TEXT and len(tokenizer) == 400
    text = "def f():\n\treturn '\u00e4\U0001f600\x00'  # " + END_OF_TEXT + "\r\n"
    ids = tokenize(tokenizer, [text])[0]
    assert ids.dtype == np.int32
    # The end-of-text token stands once, at the end: its name inside the text is text.
    assert np.flatnonzero(ids == tokenizer.eos_token_id).tolist() == [len(ids) - 1]
    assert tokenizer.decode(ids[:-1].tolist()) == text


def test_saving_a_loaded_tokenizer_gives_the_same_files(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "a")
    save_tokenizer(load_tokenizer(str(tmp_path / "a"), None), tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "b" / "tokenizer_config.json").read_text()


def test_identity_counts_added_tokens_and_knows_templates(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    save_tokenizer(tokenizer, tmp_path / "a")
    plain = tokenizer_identity(tokenizer, tmp_path / "a", "plain")
    assert (plain.vocabulary_size, plain.eos_token_id, plain.chat_template_digest) == (300, 0, None)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.chat_template = "{{ messages }}"
    save_tokenizer(tokenizer, tmp_path / "b")
    more = tokenizer_identity(tokenizer, tmp_path / "b", "more")
    assert more.vocabulary_size == 301 and more.digest != plain.digest
    assert more.chat_template_digest == hashlib.sha256(b"{{ messages }}").hexdigest()


def test_a_tokenizer_that_begins_texts_begins_documents(tmp_path: Path) -> None:
    inner = Tokenizer.from_str(train_tokenizer(TEXTS, 300).backend_tokenizer.to_str())
    inner.add_special_tokens(["<s>"])
    start = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END_OF_TEXT, bos_token="<s>")
    first, nothing = tokenize(tokenizer, ["import", ""])
    assert first[0] == start and first[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(first[1:-1].tolist()) == "import"
    assert len(nothing) == 0


def test_problems_of_loading_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.tokenizer=.*nothing cannot be loaded as a tokenizer"):
        load_tokenizer(str(tmp_path / "nothing"), None)
    tokenizer = train_tokenizer(TEXTS, 300)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "a")
    bare = load_tokenizer(str(tmp_path / "a"), None)
    with pytest.raises(DataError, match=r"has no end-of-text token.*corpus\.end_token"):
        end_token_id(bare)
    assert end_token_id(bare, END_OF_TEXT) == end_token_id(bare, "0") == end_token_id(tokenizer) == 0
    for nothing in ("300", "<|im_end|>"):
        with pytest.raises(DataError, match="is no token of the tokenizer"):
            end_token_id(bare, nothing)
