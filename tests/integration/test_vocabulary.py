"""Tokens that a tokenizer has and a model has not are no obstacle where the text has none of them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekd.logit_store.protocol.reader import LogitStore, open_store
from sparsekd.trainer.config.schema import Config, StudentConfig
from sparsekd.trainer.corpus.prepare import run as prepare
from sparsekd.trainer.data.used_ids import UsedIds
from sparsekd.trainer.models.causal_lm import load_config
from sparsekd.trainer.models.source import student_source
from sparsekd.trainer.run.errors import DataError, ModelError
from sparsekd.trainer.run.ranks import Ranks
from sparsekd.trainer.student.model import check_student
from sparsekd.trainer.teacher.capture import _loaded_teacher
from sparsekd.trainer.teacher.capture import run as capture
from sparsekd.trainer.teacher.verify import run as verify

sys.path.insert(0, str(Path(__file__).parent))
from capture_world import SIZES, VOCABULARY, config_for, make_teacher

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_environment")]

EXTRA = "<extra>"


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """The tokenizer of `tokens` with one token more than the teachers have, at their end."""
    folder = tmp_path_factory.mktemp("longer")
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": [EXTRA]})
    tokenizer.save_pretrained(folder)
    return folder


def prepared(folder: Path, tokenizer: Path, **settings: object) -> LogitStore:
    folder.mkdir()
    (folder / "text.txt").write_text("\n".join(f"def name_{index}({index}): {EXTRA}" for index in range(60)))
    config = Config()
    config.corpus.paths = [str(folder / "text.txt")]
    config.corpus.sample_by = "line"
    config.corpus.tokenizer = str(tokenizer)
    config.corpus.sequence_length = 32
    config.corpus.heldout_fraction = 0.2
    config.store.tokens = str(folder / "tokens")
    for name, value in settings.items():
        setattr(config.corpus, name, value)
    prepare(config)
    return open_store(folder / "tokens")


def student_check(store: LogitStore, vocab_size: int, *, reads_records: bool) -> int:
    config = StudentConfig(config={"model_type": "llama", **SIZES, "vocab_size": vocab_size})
    source = student_source(config, store.manifest.tokenizer)
    return check_student(load_config(source, "student"), source, store, reads_records=reads_records)


def test_records_speak_of_the_ids_that_teacher_and_tokenizer_share(
    longer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with Gemma 3: 262,145 entries, 262,144 logits; the remedy was to prepare with that tokenizer."""
    tokens = prepared(tmp_path / "a", longer)
    assert tokens.manifest.tokenizer.vocabulary_size == VOCABULARY + 1
    teacher = make_teacher(tmp_path / "teacher", "llama", vocab_size=VOCABULARY, tokenizer=longer)
    capture(config_for(Path(str(tokens.path)), teacher, tmp_path / "store", store__codec="exact"))
    assert f"the first {VOCABULARY} of the tokenizer's {VOCABULARY + 1} ids" in capsys.readouterr().out
    store = open_store(tmp_path / "store")
    assert store.manifest.tokenizer.vocabulary_size == VOCABULARY == store.manifest.outcome_count
    row = store.read_row("train", 0)
    assert row.teacher is not None and row.recorded is not None
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    ids = torch.from_numpy(row.token_ids[: row.segment_starts[1]].astype(np.int64))[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, 0].log_softmax(-1)  # over all that the teacher has
    assert row.recorded[0]
    assert row.teacher.true_logprob[0] == pytest.approx(float(expected[ids[0, 1]]), abs=1e-5)
    verify(config_for(Path(str(tokens.path)), teacher, tmp_path / "store"), tmp_path / "store", seed=0)
    assert student_check(store, VOCABULARY, reads_records=True) == VOCABULARY


def test_an_id_of_the_text_must_be_the_models(longer: Path, tmp_path: Path) -> None:
    tokens = prepared(tmp_path / "a", longer, split_special_tokens=False)
    teacher = make_teacher(tmp_path / "teacher", "llama", vocab_size=VOCABULARY, tokenizer=longer)
    config = config_for(Path(str(tokens.path)), teacher, tmp_path / "store")
    with pytest.raises(
        ModelError,
        match=rf"has {VOCABULARY} vocabulary entries, .* has {VOCABULARY} \(split .*split_special_tokens",
    ):
        capture(config)
    assert not (tmp_path / "store").exists()
    with pytest.raises(ModelError, match="choose a student that has all of these ids"):
        student_check(tokens, VOCABULARY, reads_records=False)


def test_students_with_a_smaller_head_get_records_for_it(longer: Path, tmp_path: Path) -> None:
    """As Gemma 3 1B beside a 12B teacher, whose head is padded beyond the tokenizer."""
    tokens = prepared(tmp_path / "a", longer)
    teacher = make_teacher(tmp_path / "teacher", "llama", vocab_size=VOCABULARY + 9, tokenizer=longer)
    place = Path(str(tokens.path))
    capture(config_for(place, teacher, tmp_path / "whole"))
    whole = open_store(tmp_path / "whole")
    assert whole.manifest.tokenizer.vocabulary_size == VOCABULARY + 1
    assert student_check(whole, VOCABULARY, reads_records=False) == VOCABULARY
    remedy = rf"capture again with store\.vocabulary_size={VOCABULARY}, or choose a student"
    with pytest.raises(ModelError, match=remedy):
        student_check(whole, VOCABULARY, reads_records=True)
    capture(config_for(place, teacher, tmp_path / "store", store__vocabulary_size=VOCABULARY))
    assert student_check(open_store(tmp_path / "store"), VOCABULARY, reads_records=True) == VOCABULARY


def test_documents_end_with_the_token_that_is_chosen(longer: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(longer)
    chosen = prepared(tmp_path / "a", longer, end_token=EXTRA)
    plain = prepared(tmp_path / "b", longer)
    by_id = prepared(tmp_path / "c", longer, end_token=str(VOCABULARY))
    assert by_id.digest == chosen.digest != plain.digest
    assert chosen.manifest.tokenizer.digest == plain.manifest.tokenizer.digest  # the files are as they were
    assert chosen.manifest.tokenizer.eos_token_id == VOCABULARY != tokenizer.eos_token_id
    for split in ("train", "heldout"):
        for index in range(chosen.rows(split)):
            mine, other = chosen.read_row(split, index), plain.read_row(split, index)
            where = other.token_ids == tokenizer.eos_token_id
            assert where.any()
            assert np.array_equal(mine.token_ids, np.where(where, VOCABULARY, other.token_ids))
            assert np.array_equal(mine.segment_starts, other.segment_starts)
    with pytest.raises(
        DataError, match=r"corpus\.end_token=<\|im_end\|> is no token .* such as <\|endoftext"
    ):
        prepared(tmp_path / "d", longer, end_token="<|im_end|>")


def test_equal_files_are_the_same_tokenizer_whatever_is_made_of_them(
    tokens: Path, longer: Path, tmp_path: Path
) -> None:
    """transformers takes a qwen2 folder's tokenizer for the class of that type, which cuts otherwise."""
    store = open_store(tokens)
    folder = make_teacher(tmp_path / "teacher", "llama", tokenizer=tokens / "tokenizer")
    place = folder / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "model_type": "qwen2"}))
    made = AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()
    stored = AutoTokenizer.from_pretrained(store.tokenizer_path).backend_tokenizer.to_str()
    assert json.loads(made)["pre_tokenizer"] != json.loads(stored)["pre_tokenizer"]
    student = StudentConfig(path=str(folder))
    source = student_source(student, store.manifest.tokenizer)
    config = load_config(source, "student")
    assert check_student(config, source, store, reads_records=False) == VOCABULARY
    # A token appended to the student's own is nothing to the store.
    AutoTokenizer.from_pretrained(longer).save_pretrained(folder)
    assert check_student(config, source, store, reads_records=False) == VOCABULARY


def test_the_text_is_read_no_further_than_to_the_answer(tokens: Path) -> None:
    store = open_store(tokens)
    places = [(split, row) for split in ("train", "heldout") for row in range(store.rows(split))]
    occurring = np.unique(np.concatenate([store.read_text(*place).token_ids for place in places]))
    missing = sorted(set(range(VOCABULARY)) - set(occurring.tolist()))
    assert missing, "some bytes are in no text"
    used = UsedIds(store)
    assert used.first([]) is None and used.first([VOCABULARY, VOCABULARY + 5]) is None
    first = store.read_text("train", 0).token_ids
    found = used.first(first[3:5].tolist())
    assert found is not None and found.token_id in first[3:5]
    assert first[int(found.place.rpartition(" ")[2])] == found.token_id
    assert used.first(missing) is None
    assert all(used.first([index, *missing]) is not None for index in occurring.tolist())


def test_of_the_ranks_of_a_capture_the_first_alone_looks_for_ids_that_the_teacher_lacks(
    longer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For that it has to read all of the text."""
    tokens = prepared(tmp_path / "a", longer)
    teacher = make_teacher(tmp_path / "teacher", "llama", vocab_size=VOCABULARY, tokenizer=longer)
    config = config_for(Path(str(tokens.path)), teacher, tmp_path / "store")
    reads: list[int] = []
    read = LogitStore.read_planes
    monkeypatch.setattr(LogitStore, "read_planes", lambda *words: reads.append(rank) or read(*words))
    for rank in range(2):
        place = Ranks(rank, rank, 2, torch.device("cpu"))
        used = UsedIds(tokens, looks=place.is_first)
        opened = _loaded_teacher(config, str(teacher), used, place)
        assert opened.transform.vocabulary_size == VOCABULARY
    assert reads.count(0) >= sum(tokens.rows(split) for split in tokens.manifest.splits)
    assert reads.count(1) < reads.count(0) / 2  # for the probe alone
