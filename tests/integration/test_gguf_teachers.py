"""Teachers in llama.cpp's format: one file that holds configuration, tokens and weights."""

import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.trainer.config.schema import TeacherConfig
from sparsekd.trainer.models.causal_lm import load_causal_lm
from sparsekd.trainer.models.gguf_file import gguf_tokens
from sparsekd.trainer.models.source import teacher_source
from sparsekd.trainer.run.errors import ModelError
from sparsekd.trainer.teacher.capture import run as capture
from sparsekd.trainer.teacher.verify import run as verify

sys.path.insert(0, str(Path(__file__).parent))
from capture_world import VOCABULARY, config_for, make_teacher, make_tokens

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_environment")]

LAYERS = 2


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher as transformers saves it."""
    folder = tmp_path_factory.mktemp("saved") / "teacher"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS}
    return make_teacher(folder, "llama", vocab_size=VOCABULARY, **sizes)


def write_gguf(place: Path, saved: Path, words: list[str], *, quantised: bool) -> None:
    """A Llama as llama.cpp's converter writes it: rows of queries and keys in the order of its rotation."""
    place.parent.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(saved)
    config = model.config
    writer = GGUFWriter(place, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, LAYERS)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        weight = value.float().numpy()
        for part, count in heads.items():
            if part in name:
                halves = weight.reshape(count, 2, weight.shape[0] // count // 2, weight.shape[1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
        there = names.get_name(name, try_suffixes=(".weight",))
        if quantised and "layers" in name and weight.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(there, quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(there, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def words_of(tokens: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    return [tokenizer.convert_ids_to_tokens(index) for index in range(VOCABULARY)]


def planes(store: LogitStore, name: str) -> np.ndarray:
    rows = (store.read_row("train", index).teacher for index in range(store.rows("train")))
    return np.concatenate([getattr(record, name) for record in rows])


def test_records_are_those_of_the_weights_in_the_file(
    tokens: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(tokens)
    write_gguf(tmp_path / "whole" / "model.gguf", saved, words, quantised=False)
    write_gguf(tmp_path / "rounded" / "model.gguf", saved, words, quantised=True)
    stores = {}
    for name, teacher in (
        ("saved", saved),
        ("whole", tmp_path / "whole"),
        ("rounded", tmp_path / "rounded"),
    ):
        capture(config_for(tokens, teacher, tmp_path / "stores" / name, store__codec="exact"))
        stores[name] = open_store(tmp_path / "stores" / name)
    far = {
        name: np.abs(planes(stores[name], "true_logprob") - planes(stores["saved"], "true_logprob"))
        for name in ("whole", "rounded")
    }
    assert far["whole"].max() == 0 < far["rounded"].mean() < 0.2
    identity = stores["rounded"].manifest.teacher
    assert identity is not None and "quantization=gguf" in identity.engine
    assert identity.weights_digest != stores["whole"].manifest.teacher.weights_digest
    capsys.readouterr()
    verify(config_for(tokens, tmp_path / "rounded", tmp_path / "unused"), tmp_path / "stores" / "rounded")
    said = capsys.readouterr().out
    assert said.count("largest deviation 0 nats") == 5 and "not those of the manifest" not in said


def test_damaged_headers_are_one_sentence(tokens: Path, saved: Path, tmp_path: Path) -> None:
    """Counts and lengths of a stranger's file lead nowhere, whatever its reader raises at them."""
    write_gguf(tmp_path / "model.gguf", saved, words_of(tokens), quantised=False)
    whole = (tmp_path / "model.gguf").read_bytes()
    chance, refused = random.Random(3), 0
    for _ in range(60):
        damaged, place = bytearray(whole), chance.randrange(4, 3000)
        for byte in range(place, place + chance.choice((1, 4, 8))):
            damaged[byte] ^= chance.choice((0x10, 0x80, 0xFF))
        (tmp_path / "model.gguf").write_bytes(damaged)
        source = teacher_source(TeacherConfig(), str(tmp_path))
        try:
            load_causal_lm(source, "teacher", dtype=torch.float32)
            gguf_tokens(tmp_path / "model.gguf", source.named)
        except ModelError as error:
            refused += 1
            assert "model.gguf" in str(error) and "\n" not in str(error)
    assert refused > 20


def test_what_is_refused(tokens: Path, saved: Path, tmp_path: Path) -> None:
    words = words_of(tokens)
    swapped = [*words[:40], words[41], words[40], *words[42:]]
    write_gguf(tmp_path / "other" / "model.gguf", saved, swapped, quantised=False)
    write_gguf(tmp_path / "several" / "a.gguf", saved, words, quantised=False)
    shutil.copy(tmp_path / "several" / "a.gguf", tmp_path / "several" / "b.gguf")
    (tmp_path / "torn").mkdir()
    whole = (tmp_path / "several" / "a.gguf").read_bytes()
    (tmp_path / "torn" / "model.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "model.gguf").write_bytes(bytes(range(256)) * 40)
    for place, named, match in (
        ("other", None, r"id 4[01] is .* in it and .* in the store's"),
        ("several", None, r"holds 2 files \.gguf, the first a\.gguf; name one as teacher\.gguf_file"),
        ("several", "c.gguf", r"has no file teacher\.gguf_file=c\.gguf"),
        ("several", "../other/model.gguf", r"has no file teacher\.gguf_file=\.\./other/model\.gguf"),
        ("several/a.gguf", None, r"is a file; name its folder, .*several, and the file as .*=a\.gguf"),
        ("torn", None, r"model\.gguf cannot be read as GGUF"),
        ("noise", None, r"model\.gguf cannot be read as GGUF"),
    ):
        config = config_for(tokens, tmp_path / place, tmp_path / "store")
        config.teacher.gguf_file = named
        with pytest.raises(ModelError, match=match):
            capture(config)
        assert not (tmp_path / "store").exists()
    config.teacher.path, config.teacher.gguf_file = str(tmp_path / "several"), "b.gguf"
    capture(config)
