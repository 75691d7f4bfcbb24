"""Captures as their projects write them, made by other code than the readers': for the tests of imports.

Every text's tokens are drawn from the teacher's distribution at the position before, so that an import of it
is aligned.

Shapes: T tokens of a text, V vocabulary, k entries.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from sparsekd.logit_store.synthetic import write_synthetic_tokenizer

V = 300
EOS, PAD = 0, V - 1

Text = tuple[np.ndarray, np.ndarray]
"""Tokens int64 [T] and log-probabilities float64 [T, V]; position t speaks of token t + 1."""


def dense(length: int, seed: int) -> Text:
    """Returns a text of a made-up teacher; it holds neither the end-of-text nor the padding token."""
    random = np.random.default_rng([3, seed])
    logits = random.standard_normal((length, V)) * 3
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    tokens = [5]
    for position in range(length - 1):
        inside = np.exp(logprobs[position, 1:-1])
        tokens.append(1 + int(random.choice(V - 2, p=inside / inside.sum())))
    return np.array(tokens), logprobs


def texts(count: int, shortest: int = 5) -> list[Text]:
    """Returns texts of growing length."""
    return [dense(shortest + 3 * number, number) for number in range(count)]


def top(logprobs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids, values) of the k most likely, [T, k] each."""
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    return ids, np.take_along_axis(logprobs, ids, axis=1)


def write_tokenizer(
    folder: Path, *, template: str | None = "{% for m in messages %}{{ m.content }} {% endfor %}"
) -> Path:
    """Writes a tokenizer of V ids that transformers loads and that spells id 17 as `w17`."""
    write_synthetic_tokenizer(folder, V)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": f"w{EOS}",
        "pad_token": f"w{PAD}",
        **({"chat_template": template} if template else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# DistillKit

PLAIN: dict[str, Any] = {"d": V, "k": 6, "exact_k": 6, "residual_bins": [], "delta_encoding": False}
FITTED: dict[str, Any] = {
    "d": V,
    "k": 9,
    "exact_k": 3,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 5, "num_elements": 3},
        {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
    ],
    "delta_encoding": True,
    "normalize_t": False,
}


def bit_string(values: list[int], bits: int) -> bytes:
    """Returns integers as one string of bits, most significant first, filled with zeros to whole bytes."""
    text = "".join(format(int(value), f"0{bits}b") for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[place : place + 8], 2) for place in range(0, len(text), 8))


def _float_bytes(values: Any, dtype: str) -> bytes:
    tensor = torch.as_tensor(np.asarray(values, np.float64)).to(getattr(torch, dtype))
    return tensor.view(torch.uint8).numpy().tobytes()


def rounded(values: Any, dtype: str) -> np.ndarray:
    """Returns float64 values as they are after being stored in a dtype."""
    return torch.as_tensor(np.asarray(values, np.float64)).to(getattr(torch, dtype)).double().numpy()


def _polynomial(coefficients: np.ndarray, terms: list[Any], count: int, dtype: str) -> np.ndarray:
    """Returns the fit [count] as DistillKit computes it: each power and each product in the dtype, their sum
    rounded to it at its end."""
    fit = []
    for place in range(count):
        t = float(rounded(place, dtype))
        powers = [rounded(np.sqrt(t) if e == "sqrt" else t**e, dtype) for e in terms]
        products = [rounded(p * c, dtype) for p, c in zip(powers, coefficients, strict=True)]
        fit.append(rounded(sum(products), dtype))
    return np.array(fit)


def compress(values: np.ndarray, settings: dict[str, Any]) -> tuple[bytes, np.ndarray]:
    """Returns the bytes of one position's values, and what DistillKit decodes them to."""
    exact_k, delta = settings["exact_k"], settings.get("delta_encoding", True)
    values = np.append(values[0], np.diff(values)) if delta else values
    exact_dtype = settings.get("exact_dtype", "float32")
    data = _float_bytes(values[:exact_k], exact_dtype)
    exact = rounded(values[:exact_k], exact_dtype)
    others = values[exact_k:]
    approximate = np.zeros(len(others))
    if settings.get("polynomial_terms"):
        terms, dtype = settings["polynomial_terms"], settings["term_dtype"]
        t = np.arange(len(others), dtype=np.float64)
        powers = np.stack([np.sqrt(t) if e == "sqrt" else t**e for e in terms], axis=1)
        coefficients = rounded(np.linalg.lstsq(powers, others, rcond=None)[0], dtype)
        data += _float_bytes(coefficients, dtype)
        approximate = _polynomial(coefficients, terms, len(others), dtype)
    residual, place = np.zeros(len(others)), 0
    for item in settings["residual_bins"]:
        bits, count = item["element_bits"], item["num_elements"]
        left = (others - approximate)[place : place + count]
        data += _float_bytes([np.abs(left).max() / 2 ** (bits - 1)], item["scale_dtype"])
        scale = rounded(np.abs(left).max() / 2 ** (bits - 1), item["scale_dtype"])
        if bits == 1:
            codes = (left > 0).astype(int)
            residual[place : place + count] = np.where(codes == 1, scale, -scale)
        else:
            low = -(2 ** (bits - 1))
            steps = np.clip(np.round(left / scale), low, -low - 1)
            codes, residual[place : place + count] = (steps - low).astype(int), steps * scale
        data += bit_string(codes.tolist(), bits)
        place += count
    together = np.append(exact, approximate + rounded(residual, exact_dtype))
    return data, rounded(np.cumsum(together), exact_dtype) if delta else together


DISTILLKIT_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint64())),
        ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
        ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
    ]
)


def write_distillkit(
    folder: Path, made: list[Text], settings: dict[str, Any], *, packed: bool = False
) -> list[Any]:
    """Writes two files and the settings; returns (ids, decoded values), [T - 1, k] each, of every text.

    Args:
        folder: for the files.
        made: the texts.
        settings: of the compression.
        packed: keep a record for the last token, too.
    """
    folder.mkdir(exist_ok=True)
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    expected, lines = [], []
    bits = (settings["d"] - 1).bit_length()
    for tokens, logprobs in made:
        ids, values = top(logprobs if packed else logprobs[:-1], settings["k"])
        stored = [compress(line, settings) for line in values]
        expected.append((ids, np.stack([meant for _, meant in stored])))
        lines.append(
            {
                "input_ids": tokens.tolist(),
                "compressed_logprobs": [list(data) for data, _ in stored],
                "bytepacked_indices": [list(bit_string(line, bits)) for line in ids.tolist()],
            }
        )
    for number, part in enumerate((lines[:2], lines[2:])):
        pq.write_table(pa.Table.from_pylist(part, DISTILLKIT_SCHEMA), folder / f"data_{number}.parquet")
    return expected


# NeMo-Aligner


def nemo_line(text: Text, padded: int = 0, k: int = 5) -> dict[str, Any]:
    """Returns a line of a text whose first three labels are a prompt."""
    whole, logprobs = text
    shifted = logprobs[:-1] - logprobs[:-1].max(axis=1, keepdims=True)
    ids, values = top(shifted, k)
    pad = [0] * padded
    return {
        "tokens": whole[:-1].tolist() + pad,
        "labels": whole[1:].tolist() + pad,
        "loss_mask": [0.0] * 3 + [1.0] * (len(whole) - 4) + [0.0] * padded,
        "topk_logits": values.tolist() + [[0.0] * k] * padded,
        "topk_token_ids": ids.tolist() + [list(range(k))] * padded,
        "log_sum_exp_logits": np.log(np.exp(shifted).sum(axis=1)).tolist() + [1.0] * padded,
        "index": 0,
    }


def write_lines(file: Path, lines: list[Any]) -> None:
    """Writes lines of JSON."""
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


# vLLM


def vllm_answer(text: Text, k: int = 4) -> dict[str, Any]:
    """Returns what the server answers to a text."""
    tokens, logprobs = text
    positions: list[Any] = [None]
    for place in range(1, len(tokens)):
        order = np.argsort(-logprobs[place - 1])
        ranks = {int(token): rank for rank, token in enumerate(order, start=1)}
        shown = [int(tokens[place]), *(int(token) for token in order[:k])]
        positions.append(
            {
                str(token): {
                    "logprob": float(logprobs[place - 1, token]),
                    "rank": ranks[token],
                    "decoded_token": f"w{token}",
                }
                for token in dict.fromkeys(shown)
            }
        )
    return {"prompt_token_ids": tokens.tolist(), "prompt_logprobs": positions}


# APIs


def _named(token: int, logprob: float) -> dict[str, Any]:
    return {"token": f"w{token}", "bytes": list(f"w{token}".encode()), "logprob": float(logprob)}


def api_chat(text: Text, prompt: int, k: int = 5) -> dict[str, Any]:
    """Returns a request and its answer, the text behind its first `prompt` tokens."""
    tokens, logprobs = text
    content = []
    for place in range(prompt, len(tokens)):
        ids, values = top(logprobs[place - 1 : place], k)
        listed = [_named(int(token), value) for token, value in zip(ids[0], values[0], strict=True)]
        own = _named(int(tokens[place]), logprobs[place - 1, tokens[place]])
        content.append({**own, "top_logprobs": listed})
    question = " ".join(f"w{token}" for token in tokens[:prompt])
    return {
        "messages": [{"role": "user", "content": question}],
        "choices": [{"index": 0, "logprobs": {"content": content}, "finish_reason": "stop"}],
        "usage": {},
    }


def api_completion(text: Text, k: int = 5) -> dict[str, Any]:
    """Returns an answer that echoes its text, tokens as vLLM names them by their ids."""
    tokens, logprobs = text
    own = [None, *(float(logprobs[place - 1, tokens[place]]) for place in range(1, len(tokens)))]
    listed: list[Any] = [None]
    for place in range(1, len(tokens)):
        ids, values = top(logprobs[place - 1 : place], k)
        shown = dict(zip(ids[0].tolist(), values[0].tolist(), strict=True))
        shown[int(tokens[place])] = own[place]
        listed.append({f"token_id:{token}": value for token, value in shown.items()})
    names = [f"token_id:{token}" for token in tokens]
    return {
        "prompt": [],
        "choices": [{"logprobs": {"tokens": names, "token_logprobs": own, "top_logprobs": listed}}],
    }


def sampled_row(text: Text, m: int = 12) -> dict[str, Any]:
    """Returns a text with m draws at each position."""
    tokens, logprobs = text
    random = np.random.default_rng([5, len(tokens)])
    shares = [np.exp(line) / np.exp(line).sum() for line in logprobs[:-1]]
    return {
        "input_ids": tokens.tolist(),
        "sampled_ids": [random.choice(V, m, p=share).tolist() for share in shares] + [[]],
    }


# Tables of top logits


def topk_row(text: Text, k: int = 7, *, over_list: bool = False, padded: int = 0) -> dict[str, Any]:
    """Returns a row with logits of any constant, and their softmax over the vocabulary or over the list."""
    tokens, logprobs = text
    ids, values = top(logprobs, k)
    probabilities = np.exp(values)
    if over_list:
        probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    pad: list[Any] = [[0.0] * k] * padded
    return {
        "normalized_logits": probabilities.astype(np.float32).astype(float).tolist() + pad,
        "input_ids": tokens.tolist() + [PAD] * padded,
        "attention_mask": [1] * len(tokens) + [0] * padded,
        "token_ids": ids.tolist() + [list(range(k))] * padded,
        "top_values": (values + 11.5).tolist() + pad,
    }


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a Parquet file of these rows."""
    pq.write_table(pa.Table.from_pylist(rows), file)


# axolotl


def axolotl_prepared(text: Text, prompt: int, k: int = 5, *, legacy: bool = False) -> dict[str, Any]:
    """Returns a prepared row whose first `prompt` tokens are not learnt.

    The teacher describes every token but the first; a list that does not hold the text's own token holds it
    in place of its last.
    """
    tokens, logprobs = text
    length = len(tokens)
    described = [with_own(logprobs[place - 1], int(tokens[place]), k) for place in range(1, length)]
    filling = ([0] * k, [-1e9 if not legacy else -np.inf] * k)
    lists = [filling, *described] if legacy else [*described, filling]
    learnt = [place >= prompt for place in range(length)]
    of_row = learnt if legacy else [*learnt[1:], False]
    mask = [[int(flag)] * k for flag in of_row]
    if legacy:
        mask[0] = [0] * k
    return {
        "input_ids": tokens.tolist(),
        "attention_mask": [1] * length,
        "labels": [int(token) if flag else -100 for token, flag in zip(tokens, learnt, strict=True)],
        "target_logprobs": [_renormalised(values) if values[0] > -1e8 else values for _, values in lists],
        "target_token_ids": [ids for ids, _ in lists],
        "target_mask": mask,
    }


def axolotl_offline(text: Text, prompt: int, k: int = 5, *, objects: bool = False) -> dict[str, Any]:
    """Returns a conversation with lists for its answer: of numbers, or of objects."""
    tokens, logprobs = text
    lists = [with_own(logprobs[place - 1], int(tokens[place]), k) for place in range(prompt, len(tokens))]
    spelled = [" ".join(f"w{token}" for token in part) for part in (tokens[:prompt], tokens[prompt:])]
    messages = [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant"), spelled, strict=True)
    ]
    if objects:
        entries = [
            [
                {"logprob": value, "token": f"token_id:{number}", "bytes": None}
                for number, value in zip(ids, values, strict=True)
            ]
            for ids, values in lists
        ]
        return {"messages_combined": messages, "llm_text_generation_vllm_logprobs": entries}
    return {
        "messages": messages,
        "logprobs": [values for _, values in lists],
        "target_token_ids": [ids for ids, _ in lists],
    }


def with_own(logprobs: np.ndarray, own: int, k: int) -> tuple[list[int], list[float]]:
    ids = [own, *(int(token) for token in np.argsort(-logprobs) if token != own)][:k]
    if logprobs[own] >= np.sort(logprobs)[-k]:
        ids.sort(key=lambda token: -logprobs[token])
    return ids, [float(logprobs[token]) for token in ids]


def _renormalised(values: list[float]) -> list[float]:
    return (np.array(values) - np.log(np.exp(values).sum())).tolist()
