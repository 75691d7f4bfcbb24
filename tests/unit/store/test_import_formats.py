"""Each importer on a source written here from the layout's description, by other code than the reader's."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.distillkit import open_distillkit, read_compression
from sparsekd.trainer.importers.document import Document
from sparsekd.trainer.importers.megatron import listed_samples, open_megatron
from sparsekd.trainer.importers.nemo import open_nemo
from sparsekd.trainer.importers.vllm import open_vllm

V = 300


def _dense(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [length] and log-probabilities [length, V]; position t speaks of token t + 1."""
    random = np.random.default_rng([3, seed])
    logits = random.standard_normal((length, V)) * 3
    return random.integers(0, V, length), logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


# DistillKit

PLAIN = {"d": V, "k": 6, "exact_k": 6, "residual_bins": [], "delta_encoding": False}
FITTED = {
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


def _bit_string(values: list[int], bits: int) -> bytes:
    """Returns integers as one string of bits, most significant first, filled with zeros to whole bytes."""
    text = "".join(format(int(value), f"0{bits}b") for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[place : place + 8], 2) for place in range(0, len(text), 8))


def _float_bytes(values: Any, dtype: str) -> bytes:
    tensor = torch.as_tensor(np.asarray(values, np.float64)).to(getattr(torch, dtype))
    return tensor.view(torch.uint8).numpy().tobytes()


def _read_float(data: bytes, dtype: str) -> np.ndarray:
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).to(torch.float64).numpy()


def _compress(values: np.ndarray, settings: dict[str, Any]) -> tuple[bytes, np.ndarray]:
    """Returns the bytes of one position's values, and what they stand for."""
    exact_k, delta = settings["exact_k"], settings.get("delta_encoding", True)
    values = np.append(values[0], np.diff(values)) if delta else values
    exact_dtype = settings.get("exact_dtype", "float32")
    data = _float_bytes(values[:exact_k], exact_dtype)
    exact = _read_float(data, exact_dtype)
    others = values[exact_k:]
    approximate = np.zeros(len(others))
    if settings.get("polynomial_terms"):
        t = np.arange(len(others), dtype=np.float64)
        terms = np.stack([np.sqrt(t) if e == "sqrt" else t**e for e in settings["polynomial_terms"]], axis=1)
        coefficients = np.linalg.lstsq(terms, others, rcond=None)[0]
        stored = _float_bytes(coefficients, settings["term_dtype"])
        data += stored
        approximate = terms @ _read_float(stored, settings["term_dtype"])
    place = 0
    for item in settings["residual_bins"]:
        bits, count = item["element_bits"], item["num_elements"]
        residual = (others - approximate)[place : place + count]
        stored = _float_bytes([np.abs(residual).max() / 2 ** (bits - 1)], item["scale_dtype"])
        scale = _read_float(stored, item["scale_dtype"])[0]
        if bits == 1:
            codes = (residual > 0).astype(int)
            meant = np.where(codes == 1, scale, -scale)
        else:
            low = -(2 ** (bits - 1))
            steps = np.clip(np.round(residual / scale), low, -low - 1)
            codes, meant = (steps - low).astype(int), steps * scale
        data += stored + _bit_string(codes.tolist(), bits)
        approximate[place : place + count] += meant
        place += count
    together = np.append(exact, approximate)
    return data, np.cumsum(together) if delta else together


def _write_distillkit(
    folder: Path, texts: list[tuple[np.ndarray, np.ndarray]], settings: dict[str, Any]
) -> list:
    """Writes two files; returns (ids [T - 1, k], values [T - 1, k]) of each text."""
    folder.mkdir(exist_ok=True)
    expected, lines = [], []
    bits = (settings["d"] - 1).bit_length()
    for tokens, logprobs in texts:
        ids = np.argsort(-logprobs, axis=1)[:-1, : settings["k"]]
        stored = [_compress(values, settings) for values in np.take_along_axis(logprobs[:-1], ids, axis=1)]
        expected.append((ids, np.stack([meant for _, meant in stored])))
        lines.append(
            {
                "input_ids": tokens.tolist(),
                "compressed_logprobs": [list(data) for data, _ in stored],
                "bytepacked_indices": [list(_bit_string(line, bits)) for line in ids.tolist()],
            }
        )
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
            ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ]
    )
    for number, part in enumerate((lines[:2], lines[2:])):
        pq.write_table(pa.Table.from_pylist(part, schema), folder / f"data_{number}.parquet")
    return expected


def _texts(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [_dense(5 + 3 * number, number) for number in range(count)]


@pytest.mark.parametrize("settings", [PLAIN, FITTED], ids=["plain", "fitted"])
def test_distillkit(tmp_path: Path, settings: dict[str, Any]) -> None:
    texts = _texts(4)
    expected = _write_distillkit(tmp_path / "data", texts, settings)
    source = open_distillkit(tmp_path / "data", read_compression(settings, "here"))
    assert source.rest == "derived" and len(source.files) == 2
    documents = list(source.documents())
    assert len(documents) == 4
    for document, (tokens, _), (ids, values) in zip(documents, texts, expected, strict=True):
        np.testing.assert_array_equal(document.token_ids, tokens)
        np.testing.assert_array_equal(document.head_ids[:-1], ids)
        np.testing.assert_allclose(document.head_logprobs[:-1], values, rtol=1e-5, atol=1e-6)
        assert (document.head_ids[-1] == -1).all(), "nothing describes what follows the last token"
        assert document.loss_mask.tolist() == [True] * (len(tokens) - 1) + [False]


def test_distillkit_s_missing_ranks_are_not_listed(tmp_path: Path) -> None:
    tokens, logprobs = _dense(4, 0)
    order = np.argsort(-logprobs, axis=1)
    logprobs[1, order[1, 4] :] = logprobs[1, order[1, 4] :]
    logprobs[1, order[1, 5]] = -np.inf  # what vLLM did not give; its id means nothing
    _write_distillkit(tmp_path / "data", [(tokens, logprobs)], PLAIN)
    (document,) = open_distillkit(tmp_path / "data", read_compression(PLAIN, "here")).documents()
    assert (document.head_ids[1] >= 0).sum() == 6 and (document.head_ids[0] >= 0).sum() == 6
    table = pq.read_table(tmp_path / "data/data_0.parquet").to_pylist()
    table[0]["compressed_logprobs"][1][-4:] = list(np.float32(-np.inf).tobytes())
    table[0]["bytepacked_indices"][1] = list(_bit_string([*order[1, :5].tolist(), order[1, 0]], 9))
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "data/data_0.parquet")
    (document,) = open_distillkit(
        tmp_path / "data/data_0.parquet", read_compression(PLAIN, "here")
    ).documents()
    assert document.head_ids[1].tolist() == [*order[1, :5].tolist(), -1]


def test_distillkit_s_damage_is_named(tmp_path: Path) -> None:
    _write_distillkit(tmp_path / "data", _texts(3), PLAIN)

    def message(settings: dict[str, Any]) -> str:
        with pytest.raises(StoreError) as caught:
            list(open_distillkit(tmp_path / "data", read_compression(settings, "here")).documents())
        return str(caught.value)

    assert "row 0, compressed_logprobs, position 0 has 24 bytes, expected 20" in message(
        {**PLAIN, "k": 5, "exact_k": 5}
    )
    assert "bytepacked_indices, position 0 has 7 bytes, expected 8" in message({**PLAIN, "d": 513})
    assert "lacks exact_k" in message({"d": V, "k": 6})
    assert "older layout" in message({"k": 6, "exact_k": 6, "polynomial_degree": 8})
    assert "unknown wavelet" in message({**PLAIN, "wavelet": True})
    assert "every dtype" in message({**PLAIN, "exact_dtype": "float8"})
    assert "cosine" in message({**PLAIN, "polynomial_terms": ["cosine"]})
    table = pq.read_table(tmp_path / "data/data_1.parquet").to_pylist()
    table[0]["input_ids"].append(3)
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "data/data_1.parquet")
    assert "data_1.parquet, row 0 has 12 input_ids, 10 compressed_logprobs" in message(PLAIN)
    content = (tmp_path / "data/data_0.parquet").read_bytes()
    (tmp_path / "data/data_0.parquet").write_bytes(content[: len(content) // 2])
    assert "cannot be read as Parquet" in message(PLAIN)
    pq.write_table(pa.table({"packed_indices": [1]}), tmp_path / "data/data_0.parquet")
    assert "older layout, which is not read" in message(PLAIN)


# NeMo-Aligner


def _nemo_line(
    length: int, seed: int, padded: int = 0, k: int = 5
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Returns a line, the whole sequence [length + 1] and log-probabilities [length, V]."""
    whole, logprobs = _dense(length + 1, seed)
    logprobs = logprobs[:-1]
    shifted = logprobs - logprobs.max(axis=1, keepdims=True)
    ids = np.argsort(-shifted, axis=1)[:, :k]
    mask = [0.0] * 3 + [1.0] * (length - 3)
    pad = [0] * padded
    line = {
        "tokens": whole[:-1].tolist() + pad,
        "labels": whole[1:].tolist() + pad,
        "loss_mask": mask + [0.0] * padded,
        "topk_logits": np.take_along_axis(shifted, ids, axis=1).tolist() + [[0.0] * k] * padded,
        "topk_token_ids": ids.tolist() + [list(range(k))] * padded,
        "log_sum_exp_logits": np.log(np.exp(shifted).sum(axis=1)).tolist() + [1.0] * padded,
        "index": seed,
    }
    return line, whole, logprobs


def test_nemo(tmp_path: Path) -> None:
    made = [_nemo_line(8, 0, padded=4), _nemo_line(12, 1)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line, _, _ in made))
    source = open_nemo(tmp_path / "lines.jsonl")
    assert source.rest == "derived"
    for document, (_, whole, logprobs) in zip(source.documents(), made, strict=True):
        np.testing.assert_array_equal(document.token_ids, whole)
        assert np.flatnonzero(document.loss_mask).tolist() == list(range(3, len(whole) - 1))
        ids = np.argsort(-logprobs, axis=1)[:, :5]
        np.testing.assert_array_equal(document.head_ids[:-1], ids)
        np.testing.assert_allclose(document.head_logprobs[:-1], np.take_along_axis(logprobs, ids, axis=1))
    for line, _, _ in made:
        del line["log_sum_exp_logits"]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line, _, _ in made))
    source = open_nemo(tmp_path / "lines.jsonl")
    assert source.rest == "unknown" and any("renormalized" in phrase for phrase in source.cannot_give)
    assert len(list(source.documents())) == 2


def test_nemo_s_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    good = json.dumps(_nemo_line(8, 0)[0])

    def message(second: str) -> str:
        file.write_text(good + "\n" + second + "\n")
        with pytest.raises(StoreError) as caught:
            list(open_nemo(file).documents())
        return str(caught.value)

    def changed(**fields: Any) -> str:
        line = _nemo_line(8, 1)[0]
        return message(json.dumps({**line, **fields}))

    assert "line 2 is no JSON" in message(good[:40]) and "cut off" in message(good[:40])
    assert "line 2 holds a list" in message("[1]")
    line = _nemo_line(8, 1)[0]
    assert "labels have 8, 7" in changed(labels=line["labels"][:-1]).replace(
        "tokens, labels, loss_mask, topk_logits and topk_token_ids", "labels"
    )
    assert "position 2: the label is" in changed(labels=[*line["labels"][:2], 299, *line["labels"][3:]])
    assert "loss_mask holds 0.5" in changed(loss_mask=[0.5] * 8)
    assert "topk_logits is no 2-dimensional list" in changed(topk_logits=[[1.0], [1.0, 2.0]])
    assert "tokens is no 1-dimensional list of integers" in changed(tokens=["a"] * 8)
    assert "in some lines and not in others" in message(
        json.dumps({k: v for k, v in line.items() if k[:3] != "log"})
    )
    assert "lacks labels" in message(json.dumps({k: v for k, v in line.items() if k != "labels"}))


# vLLM


def _answer(length: int, seed: int, k: int = 4) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    tokens, logprobs = _dense(length, seed)
    positions: list[Any] = [None]
    for place in range(1, length):
        order = np.argsort(-logprobs[place - 1])
        ranks = {int(token): rank for rank, token in enumerate(order, start=1)}
        listed = [int(tokens[place]), *(int(token) for token in order[:k])]
        positions.append(
            {
                str(token): {
                    "logprob": float(logprobs[place - 1, token]),
                    "rank": ranks[token],
                    "decoded_token": f"w{token}",
                }
                for token in dict.fromkeys(listed)
            }
        )
    return {"prompt_token_ids": tokens.tolist(), "prompt_logprobs": positions}, tokens, logprobs


def _check_answer(document: Document, tokens: np.ndarray, logprobs: np.ndarray, k: int) -> None:
    np.testing.assert_array_equal(document.token_ids, tokens)
    true = logprobs[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(document.true_logprob[:-1], true)
    for place in range(len(tokens) - 1):
        used = document.head_ids[place] >= 0
        found = document.head_ids[place][used]
        order = np.argsort(-logprobs[place])
        # k, or one more where the true token is the next one.
        assert set(found) == set(order[: len(found)]) and len(found) in (k, k + 1)
        np.testing.assert_allclose(document.head_logprobs[place][used], logprobs[place, found])


def test_vllm(tmp_path: Path) -> None:
    made = [_answer(7, 0), _answer(9, 1), _answer(5, 2)]
    completions = {
        "object": "text_completion",
        "choices": [{"index": 0, **made[0][0]}, {"index": 1, **made[1][0]}],
    }
    chat = {"object": "chat.completion", "choices": [{"index": 0}], **made[2][0]}
    (tmp_path / "answers.jsonl").write_text(json.dumps(completions) + "\n\n" + json.dumps(chat) + "\n")
    for document, (_, tokens, logprobs) in zip(open_vllm(tmp_path).documents(), made, strict=True):
        _check_answer(document, tokens, logprobs, 4)
    (tmp_path / "answers.jsonl").unlink()
    (tmp_path / "one.json").write_text(json.dumps([completions, chat], indent=1))
    assert len(list(open_vllm(tmp_path / "one.json").documents())) == 3
    (tmp_path / "one.json").write_text(json.dumps(chat, indent=1))
    assert len(list(open_vllm(tmp_path / "one.json").documents())) == 1


def test_vllm_s_damage_is_named(tmp_path: Path) -> None:
    def message(**changes: Any) -> str:
        answer = {**_answer(7, 0)[0], **changes}
        (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
        with pytest.raises(StoreError) as caught:
            list(open_vllm(tmp_path).documents())
        return str(caught.value)

    answer, tokens, _ = _answer(7, 0)
    positions = answer["prompt_logprobs"]
    assert "return_token_ids" in message(prompt_token_ids=None)
    assert "has no prompt_logprobs" in message(prompt_logprobs=None, choices=[{"index": 0}])
    assert "no answer of vLLM" in message(prompt_logprobs=None)
    assert "7 prompt_token_ids and 6 prompt_logprobs" in message(prompt_logprobs=positions[:-1])
    other = [int(token) for token in tokens]
    other[3] = next(token for token in range(V) if str(token) not in positions[3])
    assert f"prompt_logprobs 3 does not hold its token {other[3]}" in message(prompt_token_ids=other)
    assert "has no logprob or rank" in message(
        prompt_logprobs=[None, {str(tokens[1]): {"rank": 1}}, *positions[2:]]
    )
    huge = {**positions[1], str(2**63): {"logprob": -3.0, "rank": 3}}
    assert f"prompt_logprobs 1, entry '{2**63}' is no id" in message(
        prompt_logprobs=[None, huge, *positions[2:]]
    )
    endless = {str(tokens[1]): {"logprob": -3.0, "rank": float("inf")}}
    assert "has no logprob or rank" in message(prompt_logprobs=[None, endless, *positions[2:]])
    assert f"prompt_token_ids hold {2**63}" in message(
        prompt_token_ids=[2**63, *(int(token) for token in tokens[1:])]
    )


# Megatron-LM

LENGTH, RANKS, MICRO, BATCHES = 6, 2, 2, 2


def _sample(number: int, k: int = 4, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and values [LENGTH, k] of a sample, every third position with one entry fewer."""
    _, logprobs = _dense(LENGTH, 100 + number)
    order = np.argsort(-logprobs, axis=1)[:, :k]
    ids, values = order + offset, np.take_along_axis(logprobs, order, axis=1)
    ids[::3, k - 1], values[::3, k - 1] = -1, -1e4
    return ids, values


def _payload(samples: list[int], version: int, offset: int) -> bytes:
    """Returns what a rank writes for an iteration."""
    parts = [_sample(number, offset=offset) for number in samples]
    ids = torch.from_numpy(np.stack([part for part, _ in parts], axis=1))
    values = torch.from_numpy(np.stack([part for _, part in parts], axis=1)).to(torch.float16)
    whole = {"values": values, "indices_low": (ids & 0xFFFF).to(torch.uint16), "bit_17": (ids >> 16).bool()}
    if version == 1:
        saved: dict[str, Any] = {name: list(tensor.split(MICRO, dim=1)) for name, tensor in whole.items()}
    else:
        saved = {**whole, "format_version": 2}
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())


def _write_tars(folder: Path, iterations: int, version: int, offset: int = 0) -> None:
    folder.mkdir()
    size = RANKS * MICRO * BATCHES
    saver = {"k": 4, "save_dtype": "fp16"}
    if version == 2:
        saver |= {"format_version": 2, "mbs_save": MICRO, "dp_size_save": RANKS, "gbs_save": size}
    meta = json.dumps({"hash": "0" * 32, "identifiers": {"seed": 1}, "saver": saver}).encode()
    for rank in range(RANKS):
        for first in range(0, iterations, 2):  # two iterations in a tar
            inside = range(first, min(first + 2, iterations))
            span = f"{first * size}-{(inside[-1] + 1) * size}" if version == 2 else f"{inside[-1]}"
            name = f"dp{rank}__{span}.tar" if version == 2 else f"cp0_dp{rank}__{span}.tar"
            with tarfile.open(folder / name, "w") as tar:
                members = {"_meta.json": meta}
                for iteration in inside:
                    start = iteration * size
                    samples = [
                        start + (batch * RANKS + rank) * MICRO + sample
                        for batch in range(BATCHES)
                        for sample in range(MICRO)
                    ]
                    member = f"{start}-{start + size}" if version == 2 else f"{iteration}"
                    members[member + ".pt.zst"] = _payload(samples, version, offset)
                for member, data in members.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("version", [1, 2])
def test_megatron_s_samples_come_in_the_order_of_the_run(tmp_path: Path, version: int) -> None:
    # Ids on both sides of 2^16, whose 17th bit lies apart.
    offset = 2**16 - V // 2
    _write_tars(tmp_path / "tars", 3, version, offset)
    found = list(listed_samples(open_megatron(tmp_path / "tars")))
    assert len(found) == 3 * RANKS * MICRO * BATCHES
    for number, listed in enumerate(found):
        ids, values = _sample(number, offset=offset)
        np.testing.assert_array_equal(listed.ids, ids)
        kept = ids >= 0
        np.testing.assert_allclose(listed.values[kept], values[kept], rtol=1e-3)
        assert np.isneginf(listed.values[~kept]).all()


def test_megatron_s_damage_is_named(tmp_path: Path) -> None:
    def message(change: Any, version: int = 2) -> str:
        folder = tmp_path / f"tars{len(list(tmp_path.iterdir()))}"
        _write_tars(folder, 5, version)
        change(folder)
        with pytest.raises(StoreError) as caught:
            list(listed_samples(open_megatron(folder)))
        return str(caught.value)

    def cut(folder: Path) -> None:
        file = folder / "dp1__16-32.tar"
        file.write_bytes(file.read_bytes()[:1500])

    def spoil(folder: Path) -> None:
        file = folder / "dp1__16-32.tar"
        data = bytearray(file.read_bytes())
        place = data.find(b"\x28\xb5\x2f\xfd") + 40
        data[place : place + 60] = bytes(60)
        file.write_bytes(bytes(data))

    assert "which is missing" in message(
        lambda folder: [(folder / f"dp{rank}__16-32.tar").unlink() for rank in (0, 1)]
    )
    assert "a rank lacks one" in message(lambda folder: (folder / "dp1__16-32.tar").unlink())
    assert "ends before" in message(lambda folder: (folder / "dp1__32-40.tar").unlink())
    assert "no tar of data-parallel rank 0" in message(
        lambda folder: [item.unlink() for item in folder.glob("dp0*")]
    )
    assert "2 wrote them" in message(lambda folder: [item.unlink() for item in folder.glob("dp1*")])
    assert "context-parallel rank 1" in message(
        lambda folder: (folder / "cp0_dp0__1.tar").rename(folder / "cp1_dp0__1.tar"), 1
    )
    assert "is no name of" in message(lambda folder: (folder / "other.tar").write_text(""))
    assert "dp1__16-32.tar" in message(cut)
    assert "dp1__16-32.tar" in message(spoil)
