"""`corpus.packing=none`: a document a row, for models in which documents of one row would see each other."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import is_real
from sparsekd.trainer.config.schema import Config
from sparsekd.trainer.corpus.prepare import run as prepare
from sparsekd.trainer.data.inputs import model_inputs
from sparsekd.trainer.run.errors import ModelError
from sparsekd.trainer.teacher.capture import run as capture
from sparsekd.trainer.teacher.verify import run as verify

sys.path.insert(0, str(Path(__file__).parent))
from capture_world import config_for, make_teacher

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_environment")]

LENGTH = 128
"""Twice what a forward pass is a multiple of: most micro-batches are cut behind their longest row."""


def tokens_of(folder: Path, packing: str) -> Path:
    config = Config()
    config.corpus.paths = [str(folder / "text.txt")]
    config.corpus.sample_by = "line"
    config.corpus.train_vocabulary_size = 280
    config.corpus.sequence_length = LENGTH
    config.corpus.heldout_fraction = 0.2
    config.corpus.packing = packing
    config.store.tokens = str(folder / packing)
    prepare(config)
    return folder / packing


def test_rows_of_a_length_pass_the_teacher_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Less padding passes it, the records are those of rows in their order, and `verify` makes them again."""
    words = Path(json.__file__).with_name("decoder.py").read_text().split()
    lines = [" ".join(words[start : start + 2 + 5 * (start % 5)]) for start in range(30)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    tokens = tokens_of(tmp_path, "none")
    teacher = make_teacher(tmp_path / "teacher", "llama", vocab_size=280, max_position_embeddings=LENGTH)
    batches: list[torch.Tensor] = []

    def seen(*words: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = model_inputs(*words)
        batches.append(found[0])
        return found

    monkeypatch.setattr("sparsekd.trainer.teacher.records.model_inputs", seen)
    passes, stores = {}, {}
    for rows in (0, 16):
        batches.clear()
        place = tmp_path / f"sorted-{rows}"
        capture(config_for(tokens, teacher, place, teacher__sort_rows=rows, store__codec="exact"))
        passes[rows], stores[rows] = list(batches), open_store(place)
    positions = {rows: sum(batch.numel() for batch in found) for rows, found in passes.items()}
    assert positions[16] < 0.9 * positions[0]
    assert "sort_rows=16" in stores[16].manifest.teacher.engine
    for split in ("train", "heldout"):
        for index in range(stores[0].rows(split)):
            left, right = (store.read_row(split, index) for store in stores.values())
            assert np.array_equal(left.token_ids, right.token_ids)
            assert left.teacher is not None and right.teacher is not None
            assert np.abs(left.teacher.log_rest - right.teacher.log_rest).max(initial=0) < 2e-5
    batches.clear()
    capsys.readouterr()
    verify(config_for(tokens, teacher, tmp_path / "unused"), tmp_path / "sorted-16")
    told = [line for line in capsys.readouterr().out.splitlines() if "largest deviation" in line]
    assert len(told) == 5 and all("largest deviation 0 nats" in line for line in told)
    assert batches and all(any(torch.equal(again, batch) for batch in passes[16]) for again in batches)


def test_records_are_those_of_each_document_alone(tmp_path: Path) -> None:
    lines = Path(json.__file__).with_name("decoder.py").read_text().splitlines()
    text = [line for line in lines if len(line) > 20][:40]
    (tmp_path / "text.txt").write_text("\n".join([*text, " ".join(text[:8])]))
    packed, alone = tokens_of(tmp_path, "documents"), tokens_of(tmp_path, "none")
    torch.manual_seed(0)
    sizes = {"vocab_size": 280, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    mamba = AutoConfig.for_model("mamba", initializer_range=0.3, **sizes)
    AutoModelForCausalLM.from_config(mamba, dtype=torch.float32).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ModelError, match=r"corpus\.packing=none"):
        capture(config_for(packed, tmp_path / "mamba", tmp_path / "refused"))
    capture(config_for(alone, tmp_path / "mamba", tmp_path / "store", store__codec="exact"))
    store = open_store(tmp_path / "store")
    assert "then padding" in store.manifest.dataset["packing"]
    assert "attention=eager" in store.manifest.teacher.engine  # what transformers picked for `auto`
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mamba", dtype=torch.float64)
    documents: dict[int, int] = {}
    for split in ("train", "heldout"):
        for index in range(store.rows(split)):
            row = store.read_row(split, index)
            size = int(is_real(row).sum())
            assert row.segment_starts.tolist() == ([0] if size == LENGTH else [0, size])
            number = int(row.segment_documents[0])
            documents[number] = documents.get(number, 0) + size
            assert row.recorded is not None and row.teacher is not None
            assert (
                row.recorded.tolist()
                == row.loss_mask.tolist()
                == [place < size - 1 for place in range(LENGTH)]
            )
            ids = torch.from_numpy(row.token_ids[:size].astype(np.int64))[None]
            with torch.no_grad():
                said = model(input_ids=ids).logits[0].log_softmax(-1)[:-1]
            expected = said.gather(1, ids[0, 1:, None])[:, 0].numpy()
            assert np.abs(row.teacher.true_logprob - expected).max(initial=0) < 1e-4
    assert len(documents) == len(text) + 1
    assert max(documents.values()) > LENGTH  # one goes on in another row
    # The same tokens as packed, one document after another.
    counts = [
        sum(
            open_store(place).index(split).counts.tokens
            - open_store(place).index(split).counts.tokens_padding
            for split in ("train", "heldout")
        )
        for place in (packed, alone)
    ]
    assert counts[0] == counts[1]
