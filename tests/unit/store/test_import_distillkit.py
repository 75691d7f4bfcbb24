"""DistillKit's captures, from files that are written here from the layout's description."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoTokenizer

from sparsekd.logit_store.errors import StoreError
from sparsekd.trainer.importers.distillkit import decode_values, read_compression, read_distillkit
from sparsekd.trainer.importers.document import Document, Options

sys.path.append(str(Path(__file__).parent))
import captures

PLAIN, FITTED = captures.PLAIN, captures.FITTED


@pytest.fixture
def options(tmp_path: Path) -> Options:
    tokenizer = AutoTokenizer.from_pretrained(captures.write_tokenizer(tmp_path / "tokenizer"))
    return Options(tokenizer=lambda: tokenizer)


def read(folder: Path, options: Options) -> list[Document]:
    return list(read_distillkit(folder, options).documents())


@pytest.mark.parametrize("settings", [PLAIN, FITTED], ids=["plain", "fitted"])
def test_texts_come_out_as_they_were_captured(
    tmp_path: Path, options: Options, settings: dict[str, Any]
) -> None:
    made = captures.texts(4)
    expected = captures.write_distillkit(tmp_path / "data", made, settings)
    source = read_distillkit(tmp_path / "data", options)
    assert source.rest == "derived" and len(source.files) == 2
    documents = list(source.documents())
    assert len(documents) == 4
    for document, (tokens, _), (ids, values) in zip(documents, made, expected, strict=True):
        np.testing.assert_array_equal(document.token_ids, tokens)
        np.testing.assert_array_equal(document.head_ids[:-1], ids)
        np.testing.assert_allclose(document.head_logprobs[:-1], values, rtol=1e-5, atol=1e-6)
        assert (document.head_ids[-1] == -1).all(), "nothing describes what follows the last token"
        assert document.loss_mask.tolist() == [True] * (len(tokens) - 1) + [False]


@pytest.mark.parametrize("term_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("delta", [False, True])
def test_short_coefficients_are_decoded_as_distillkit_decodes_them(term_dtype: str, delta: bool) -> None:
    settings = {
        **FITTED,
        "k": 64,
        "exact_k": 8,
        "exact_dtype": "float32",
        "term_dtype": term_dtype,
        "polynomial_terms": [0, 1, 2, "sqrt"],
        "residual_bins": [{"scale_dtype": "float16", "element_bits": 8, "num_elements": 56}],
        "delta_encoding": delta,
    }
    _, values = captures.top(captures.dense(200, 0)[1], 64)
    stored, meant = zip(*(captures.compress(line, settings) for line in values), strict=True)
    found = decode_values(
        np.stack([np.frombuffer(data, np.uint8) for data in stored]), read_compression(settings, "here")
    )
    own_error = np.abs(np.stack(meant) - values).mean()
    # A sum of rounded products may round the other way at its end. Decoded in float64 the error is 3 times
    # DistillKit's own with float16, and 20 times with bfloat16.
    assert np.abs(found - values).mean() < 1.02 * own_error
    assert np.mean(np.abs(found - np.stack(meant)) < 1e-5 * (1 + np.abs(values))) > 0.99


def test_appended_padding_is_left_away(tmp_path: Path, options: Options) -> None:
    made = captures.texts(3, shortest=6)
    for text, last in zip(made, (captures.PAD, captures.EOS, captures.PAD), strict=True):
        text[0][-1] = last
    made[2][0][-2] = captures.PAD
    captures.write_distillkit(tmp_path / "data", made, PLAIN)
    first, second, third = read(tmp_path / "data", options)
    np.testing.assert_array_equal(first.token_ids, made[0][0][:-1])
    assert first.loss_mask.tolist() == [True] * 4 + [False]
    # The end-of-text token is a text's end, whoever put it there.
    np.testing.assert_array_equal(second.token_ids, made[1][0])
    assert second.loss_mask[-2]
    np.testing.assert_array_equal(third.token_ids, made[2][0][:-2])
    for document in (first, second, third):
        assert captures.PAD not in document.token_ids[1:][document.loss_mask[:-1]]


def test_packed_sets_have_a_record_more(tmp_path: Path, options: Options) -> None:
    made = captures.texts(3)
    expected = captures.write_distillkit(tmp_path / "data", made, PLAIN, packed=True)
    for document, (tokens, _), (ids, _) in zip(read(tmp_path / "data", options), made, expected, strict=True):
        np.testing.assert_array_equal(document.token_ids, tokens)
        np.testing.assert_array_equal(document.head_ids[:-1], ids[:-1])
        assert (document.head_ids[-1] == -1).all()


def test_missing_ranks_are_not_listed(tmp_path: Path, options: Options) -> None:
    tokens, logprobs = captures.dense(4, 0)
    order = np.argsort(-logprobs, axis=1)
    captures.write_distillkit(tmp_path / "data", [(tokens, logprobs)], PLAIN)
    file = tmp_path / "data/data_0.parquet"
    table = pq.read_table(file).to_pylist()
    table[0]["compressed_logprobs"][1][-4:] = list(np.float32(-np.inf).tobytes())
    table[0]["bytepacked_indices"][1] = list(
        captures.bit_string([*order[1, :5].tolist(), int(order[1, 0])], 9)
    )
    pq.write_table(pa.Table.from_pylist(table, captures.DISTILLKIT_SCHEMA), file)
    (document,) = read(file, options)
    assert document.head_ids[1].tolist() == [*order[1, :5].tolist(), -1]


def test_damage_is_named(tmp_path: Path, options: Options) -> None:
    folder = tmp_path / "data"
    captures.write_distillkit(folder, captures.texts(3), PLAIN)

    def message(**settings: Any) -> str:
        changed = {name: value for name, value in {**PLAIN, **settings}.items() if value is not None}
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(StoreError) as caught:
            read(folder, options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "row 0, compressed_logprobs, position 0 has 24 bytes, expected 20" in message(k=5, exact_k=5)
    assert "bytepacked_indices, position 0 has 7 bytes, expected 8" in message(d=513)
    assert "lacks exact_k" in message(exact_k=None)
    assert "older layout" in message(polynomial_degree=8)
    assert "unknown wavelet" in message(wavelet=True)
    assert "every dtype" in message(exact_dtype="float8")
    assert "cosine" in message(polynomial_terms=["cosine"])
    assert "exponents up to 64" in message(polynomial_terms=[10**30])
    assert "k at most 1048576" in message(k=1 << 40)
    assert "cannot be read as DistillKit's compression settings" in message(k=float("inf"))
    assert "cannot be read as DistillKit's compression settings" in message(residual_bins=[3])
    table = pq.read_table(folder / "data_1.parquet").to_pylist()
    table[0]["input_ids"] += [3, 4]
    pq.write_table(pa.Table.from_pylist(table, captures.DISTILLKIT_SCHEMA), folder / "data_1.parquet")
    assert "data_1.parquet, row 0 has 13 input_ids, 10 compressed_logprobs" in message()
    content = (folder / "data_0.parquet").read_bytes()
    (folder / "data_0.parquet").write_bytes(content[: len(content) // 2])
    assert "cannot be read as Parquet" in message()
    pq.write_table(pa.table({"packed_indices": [1]}), folder / "data_0.parquet")
    assert "older layout, which is not read" in message()
    (folder / "compression_config.yaml").write_text("k: [")
    (folder / "data_0.parquet").unlink()
    with pytest.raises(StoreError, match="cannot be read as YAML"):
        read(folder, options)
