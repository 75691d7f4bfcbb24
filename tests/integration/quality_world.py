"""A small world for the tests of evaluate and report: text, tokenizer, teacher, store and two students.

The teacher's records are made here from dense logits in float64, independently of capture.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekd.logit_store.manifest import CodecSpec, Manifest, RecordSpec, TeacherIdentity
from sparsekd.logit_store.manifest_checks import FORMAT_VERSION
from sparsekd.logit_store.protocol.writer import create_store, seal, write_shard
from sparsekd.logit_store.row import NO_ID, PADDING_DOCUMENT, Row, TeacherRecord, position_ids
from sparsekd.trainer.corpus.tokenizer import save_tokenizer, tokenizer_identity, train_tokenizer

GRID = (1.0, 2.0)


def make_documents(count: int, seed: int) -> list[str]:
    """Text with something to learn: sentences of a tiny grammar."""
    generator = np.random.default_rng(seed)
    subjects, verbs = (
        ("a cat", "the dog", "my uncle", "no student"),
        ("sees", "teaches", "follows", "forgets"),
    )
    objects = ("the teacher", "a long list", "every token", "the old store", "its own tail")
    return [
        " ".join(
            f"{generator.choice(subjects)} {generator.choice(verbs)} {generator.choice(objects)}."
            for _ in range(int(generator.integers(3, 14)))
        )
        for _ in range(count)
    ]


def make_rows(documents: list[np.ndarray], length: int, first_number: int) -> list[Row]:
    """Packs whole documents into rows with padding; what does not fit is cut."""
    rows = []
    tokens: list[int] = []
    starts: list[int] = []
    numbers: list[int] = []

    def close() -> None:
        mask = np.zeros(length, np.bool_)
        ends = [*starts[1:], len(tokens)]
        for start, end in zip(starts, ends, strict=True):
            mask[start : end - 1] = True
        padded = len(tokens) < length
        rows.append(
            Row(
                np.array(tokens + [0] * (length - len(tokens)), np.int32),
                mask,
                np.array(starts + ([len(tokens)] if padded else []), np.int32),
                np.array(numbers + ([PADDING_DOCUMENT] if padded else []), np.int64),
                None,
            )
        )
        tokens.clear(), starts.clear(), numbers.clear()

    for number, document in enumerate(documents):
        piece = document[:length]
        if len(tokens) + len(piece) > length:
            close()
        starts.append(len(tokens))
        numbers.append(first_number + number)
        tokens.extend(piece.tolist())
    if tokens:
        close()
    return rows


def make_model(vocabulary: int, *, hidden: int, seed: int, rows: list[Row], steps: int) -> LlamaForCausalLM:
    """A small Llama, trained for a moment with plain torch. Its embedding is padded beyond the vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary + 3,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Padding that would win every argmax if it were not masked.
        model.get_input_embeddings().weight[vocabulary:] += 3.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = [rows[int(index)] for index in generator.choice(len(rows), 4)]
        logits, labels, mask = forward(model, chosen, vocabulary)
        loss = torch.nn.functional.cross_entropy(logits[mask], labels[mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def forward(
    model: LlamaForCausalLM, rows: list[Row], vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model's own logits over the true vocabulary, the next tokens, and the mask; (B, L, V), (B, L)."""
    token_ids = torch.from_numpy(np.stack([row.token_ids for row in rows]).astype(np.int64))
    positions = torch.from_numpy(np.stack([position_ids(row) for row in rows]).astype(np.int64))
    logits = model(input_ids=token_ids, position_ids=positions, use_cache=False).logits[..., :vocabulary]
    mask = torch.from_numpy(np.stack([row.loss_mask for row in rows]))
    return logits, token_ids.roll(-1, 1), mask


def log_probabilities(model: LlamaForCausalLM, rows: list[Row], vocabulary: int) -> np.ndarray:
    """float64 [rows, L, V], one row after another."""
    with torch.no_grad():
        parts = [forward(model, [row], vocabulary)[0].double().log_softmax(-1).numpy() for row in rows]
    return np.concatenate(parts)


def teach(row: Row, log_p: np.ndarray, k: int, n: int, generator: np.random.Generator) -> Row:
    """A row with the record of log-probabilities float64 [L, V]."""
    length, vocabulary = log_p.shape
    order = np.argsort(-log_p.astype(np.float32), axis=1, kind="stable")[:, :k]
    rest = log_p.copy()
    np.put_along_axis(rest, order, -np.inf, 1)
    p_rest = np.exp(rest) / np.exp(rest).sum(1, keepdims=True)
    ids, counts = np.full((length, n), NO_ID, np.int32), np.zeros((length, n), np.int32)
    for position in range(length if n else 0):
        drawn, times = np.unique(generator.choice(vocabulary, n, p=p_rest[position]), return_counts=True)
        ids[position, : len(drawn)], counts[position, : len(drawn)] = drawn, times
    true = log_p[np.arange(length), np.roll(row.token_ids, -1)]
    plogp = np.where(p_rest > 0, p_rest * np.log(np.where(p_rest > 0, p_rest, 1)), 0)
    record = TeacherRecord(
        head_ids=order.astype(np.int32),
        head_logprobs=np.take_along_axis(log_p, order, 1).astype(np.float32),
        tail_ids=ids,
        tail_counts=counts,
        log_rest=np.stack([np.log(np.exp(rest / t).sum(1)) for t in GRID], 1).astype(np.float32),
        rest_entropy=-plogp.sum(1).astype(np.float32),
        true_logprob=true.astype(np.float32),
        entropy=-(np.exp(log_p) * log_p).sum(1).astype(np.float32),
    )
    counted = TeacherRecord(**{name: value[row.loss_mask] for name, value in vars(record).items()})
    return replace(row, teacher=counted, recorded=row.loss_mask)


def make_world(
    folder: Path,
    *,
    k: int,
    n: int,
    documents: int = 60,
    steps: tuple[int, int, int] = (60, 25, 12),
    length: int = 96,
) -> None:
    """Writes folder/store, folder/tokens and the models folder/teacher, folder/kd and folder/ce.

    Args:
        folder: Made where it is absent.
        k: Head of the record.
        n: Draws of the record.
        documents: Documents; a third is held out.
        steps: Training steps of teacher, kd and ce.
        length: Tokens of a row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = make_documents(documents, seed=0)
    tokenizer = train_tokenizer(texts, 300)
    save_tokenizer(tokenizer, folder / "tokenizer")
    identity = tokenizer_identity(tokenizer, folder / "tokenizer", "tiny")
    encoded = [np.array([*tokenizer(text)["input_ids"], 0], np.int32) for text in texts]
    third = documents // 3
    splits = {
        "train": make_rows(encoded[third:], length, third),
        "heldout": make_rows(encoded[:third], length, 0),
    }
    vocabulary = identity.vocabulary_size
    names = {"teacher": (64, steps[0]), "kd": (32, steps[1]), "ce": (32, steps[2])}
    models = {}
    for seed, (name, (hidden, count)) in enumerate(names.items()):
        models[name] = make_model(vocabulary, hidden=hidden, seed=seed, rows=splits["train"], steps=count)
        models[name].save_pretrained(folder / name)
    save_tokenizer(tokenizer, folder / "kd")
    generator = np.random.default_rng(5)
    for store, size, draws in (("store", k, n), ("tokens", 0, 0)):
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            target="next_token",
            sequence_length=length,
            rows_per_shard=8,
            splits=("train", "heldout"),
            dataset={"name": "tiny"},
            tokenizer=identity,
            record=RecordSpec(size, draws, GRID, 1.0, 0),
            teacher=TeacherIdentity("tiny-teacher", None, "0" * 64, "float32", "float32", "transformers", {})
            if size + draws
            else None,
            codec=CodecSpec("exact", {}),
        )
        create_store(folder / store, manifest, folder / "tokenizer")
        for split, plain in splits.items():
            rows = plain
            if size + draws:
                log_p = log_probabilities(models["teacher"], plain, vocabulary)
                rows = [
                    teach(row, one, size, draws, generator) for row, one in zip(plain, log_p, strict=True)
                ]
            for shard in range(math.ceil(len(rows) / 8)):
                write_shard(folder / store, manifest, split, shard, rows[8 * shard : 8 * shard + 8])
        seal(folder / store, {split: math.ceil(len(rows) / 8) for split, rows in splits.items()})
