"""Long documents come in parts that together are the whole: same ids, whatever the tokenizer and the text."""

import base64
import functools
import hashlib
import json
import random
import subprocess
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsekd.trainer.config.corpus import CorpusConfig
from sparsekd.trainer.corpus import encoding
from sparsekd.trainer.corpus.documents import Document
from sparsekd.trainer.corpus.encoding import Encoder, blocks_of, tokenize_long
from sparsekd.trainer.corpus.findings import Records
from sparsekd.trainer.corpus.tokenizer import END_OF_TEXT, tokenize, train_tokenizer
from sparsekd.trainer.run.errors import DataError

SOURCES = [Path(module.__file__).read_text(encoding="utf-8") for module in (json, hashlib, subprocess)]
CHANCE = random.Random(5)

# How Llama 3 and Qwen part words: line breaks go with the punctuation before them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def wrapped(inner: Tokenizer, trainer: trainers.Trainer) -> PreTrainedTokenizerBase:
    inner.train_from_iterator([line for text in SOURCES for line in text.splitlines(True)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END_OF_TEXT)


def byte_level() -> PreTrainedTokenizerBase:
    return train_tokenizer(SOURCES, 600)


def by_words() -> PreTrainedTokenizerBase:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return wrapped(
        inner,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        ),
    )


def without_words() -> PreTrainedTokenizerBase:
    """As Llama 2 does it: a mark in front of every text, spaces are marks, no words, unknown bytes."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.ByteFallback()
    special = [END_OF_TEXT, "<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = wrapped(
        inner,
        trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False, max_token_length=12),
    )
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    return made


def word_pieces() -> PreTrainedTokenizerBase:
    """As BERT does it: lower case, without accents, framed on both sides."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [END_OF_TEXT, "[UNK]", "[CLS]", "[SEP]"]
    made = wrapped(
        inner, trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def unigram() -> PreTrainedTokenizerBase:
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    return wrapped(
        inner,
        trainers.UnigramTrainer(
            vocab_size=500, special_tokens=[END_OF_TEXT, "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    made.__name__: functools.cache(made)
    for made in (byte_level, by_words, without_words, word_pieces, unigram)
}

CODE = "".join(SOURCES)[:40_000]
TEXTS = {
    "code": CODE,
    "no line break": CODE.replace("\n", " "),
    "windows": CODE.replace("\n", "\r\n"),
    "spaces": f"{CODE[:3000]}{' ' * 9000}{CODE[3000:9000]}\t{' ' * 2001}x",
    "line breaks": f"{CODE[:3000]}.{chr(10) * 5000}{CODE[:500]}" * 2,
    "one letter": f"{CODE[:2500]}{'a' * 7001}{CODE[:4000]}",
    "one word": f"{CODE[:2500]}{base64.b64encode(CHANCE.randbytes(6000)).decode()}{CODE[:4000]}",
    "scripts": "".join(
        CHANCE.choice(
            "\u00e4\u00f6 \u4e2d\u6587\u3002\U0001f600\U0001f468\u200d\U0001f469 e\u0301\u0915\u093f"
        )
        for _ in range(12_000)
    ),
    "anything": "".join(
        chr(
            CHANCE.choice(
                [CHANCE.randrange(1, 128), CHANCE.randrange(1, 0xD800), CHANCE.randrange(0xE000, 0x20000)]
            )
        )
        for _ in range(12_000)
    ),
    "special names": f"{CODE[:700]}{END_OF_TEXT}<s>[SEP]" * 20,
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_parts_are_the_whole(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS[name]()
    whole = tokenize(tokenizer, [TEXTS[text]])[0]
    for window, overlap in ((2000, 400), (1501, 256)):
        monkeypatch.setattr(encoding, "WINDOW_CHARACTERS", window)
        monkeypatch.setattr(encoding, "OVERLAP_CHARACTERS", overlap)
        parts = list(tokenize_long(tokenizer, TEXTS[text]))
        assert all(part.dtype == np.int32 for part in parts)
        assert np.array_equal(np.concatenate(parts), whole)
        if text == "code":
            assert len(parts) > 10  # seams were found, the text was not encoded as a whole


def test_what_depends_on_the_far_end_is_refused_and_never_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits in groups of three from the right: a window that ends in the run groups them otherwise."""
    digits = "0123456789"
    pairs = [(x, y) for x in digits for y in digits]
    merges = [*pairs, *((x + y, z) for x, y in pairs for z in digits)]
    names = ["</s>", "a", *digits, *("".join(merge) for merge in merges)]
    inner = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*\b)"), "isolated")
    inner.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    monkeypatch.setattr(encoding, "WINDOW_CHARACTERS", 1024)
    monkeypatch.setattr(encoding, "OVERLAP_CHARACTERS", 256)
    refused = 0
    for length in range(1800, 3600, 37):
        text = "".join(CHANCE.choice(digits) for _ in range(length))
        try:
            found = np.concatenate(list(tokenize_long(tokenizer, text)))
        except DataError as error:
            refused += "cannot be encoded in parts" in str(error)
        else:
            assert np.array_equal(found, tokenize(tokenizer, [text])[0])
    assert refused > 10


def test_documents_keep_their_order_and_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "WINDOW_CHARACTERS", 2000)
    monkeypatch.setattr(encoding, "OVERLAP_CHARACTERS", 400)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 3000)
    tokenizer = TOKENIZERS["byte_level"]()
    texts = [CODE[:900], CODE[:5000], "x", CODE[100:1500], CODE[:2000], CODE[:2001], CODE[7:9000]]
    numbered = [(7 * index, Document(text, text.encode(), 0, "")) for index, text in enumerate(texts)]
    found: dict[int, list[int]] = {}
    encoder = Encoder(tokenizer, CorpusConfig())
    for block in blocks_of(numbered):
        for part in chain.from_iterable(encoder.encode(block, Records())):
            found.setdefault(part.number, []).extend(part.token_ids.tolist())
    assert list(found) == [number for number, _ in numbered]
    assert list(found.values()) == [tokenize(tokenizer, [text])[0].tolist() for text in texts]


@pytest.mark.parametrize("truncation", ["split", "cut", "drop"])
def test_documents_longer_than_a_row(truncation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "WINDOW_CHARACTERS", 2000)
    monkeypatch.setattr(encoding, "OVERLAP_CHARACTERS", 400)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 3000)
    tokenizer = TOKENIZERS["byte_level"]()
    texts = [CODE[:9000], CODE[:90], CODE[:1500], CODE[7:9000], "x", CODE[:12_000]]
    whole = [tokenize(tokenizer, [text])[0].tolist() for text in texts]
    length = len(whole[2])  # exactly a row
    records, config = Records(), CorpusConfig(truncation=truncation, sequence_length=length)
    numbered = [(index, Document(text, text.encode(), 0, f"{index}")) for index, text in enumerate(texts)]
    found: dict[int, list[int]] = {}
    encoder = Encoder(tokenizer, config)
    for block in blocks_of(numbered):
        for part in chain.from_iterable(encoder.encode(block, records)):
            found.setdefault(part.number, []).extend(part.token_ids.tolist())
    if truncation == "drop":
        assert found == {number: ids for number, ids in enumerate(whole) if len(ids) <= length}
        assert list(found) == [1, 2, 4] and records.skipped == {"longer than a row": 3}
    else:
        limit = length if truncation == "cut" else None
        assert found == {number: ids[:limit] for number, ids in enumerate(whole)}
        assert (records.cut.count, records.cut.first) == ((3, "0") if truncation == "cut" else (0, ""))


def test_a_tokenizer_without_places_encodes_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["byte_level"]()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    parts = list(tokenize_long(tokenizer, CODE))
    assert len(parts) == 1 and np.array_equal(parts[0], tokenize(tokenizer, [CODE])[0])


def test_text_without_tokens_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "WINDOW_CHARACTERS", 2000)
    monkeypatch.setattr(encoding, "OVERLAP_CHARACTERS", 400)
    assert list(tokenize_long(TOKENIZERS["word_pieces"](), " " * 9000)) == []
