"""Hidden states that a capture keeps: the model's own, projected and rounded, the same when continued."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.projections import projection_of
from sparsekd.logit_store.protocol.reader import open_store
from sparsekd.logit_store.row import is_real, segment_lengths
from sparsekd.logit_store.tools.combine import subset_store
from sparsekd.logit_store.tools.inspect import inspect_text
from sparsekd.logit_store.tools.stats import store_stats
from sparsekd.logit_store.tools.verify import verify_store
from sparsekd.trainer.config.feature_requests import feature_requests
from sparsekd.trainer.run.errors import ConfigError, ModelError
from sparsekd.trainer.teacher.capture import run as capture
from sparsekd.trainer.teacher.verify import run as verify

sys.path.insert(0, str(Path(__file__).parent))
from capture_world import config_for, files_of, make_teacher

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_environment")]

FEATURES = [
    {"layer": 0, "width": 6},
    {"layer": 1, "width": 8, "projection": "pca", "kind": "float16"},
    {"layer": 2, "kind": "float16", "positions": "recorded"},
]


def states_of_documents(model: torch.nn.Module, row, layers: list[int]) -> dict[int, np.ndarray]:
    """What transformers says of each document alone: layer -> [L, H] in float64."""
    parts: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    ends = row.segment_starts + segment_lengths(row)
    for start, end in zip(row.segment_starts, ends, strict=True):
        ids = torch.from_numpy(row.token_ids[start:end].astype(np.int64))[None]
        with torch.no_grad():
            found = model(input_ids=ids, output_hidden_states=True).hidden_states
        for layer in layers:
            parts[layer].append(found[layer][0].double().numpy())
    return {layer: np.concatenate(part) for layer, part in parts.items()}


def test_features_are_the_models_own_hidden_states(tokens: Path, tmp_path: Path, capsys) -> None:
    teacher = make_teacher(tmp_path / "teacher", "llama")
    config = config_for(tokens, teacher, tmp_path / "store", store__features=FEATURES)
    capture(config)
    store = open_store(tmp_path / "store")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    specs = {spec.layer: spec for spec in store.manifest.features}
    assert [spec.width for spec in specs.values()] == [6, 8, 32]
    squares = {layer: np.zeros(2) for layer in specs}
    centred: list[np.ndarray] = []
    for split in ("train", "heldout"):
        for index in range(store.rows(split)):
            row = store.read_row(split, index)
            truth = states_of_documents(model, row, list(specs))
            centred.append(truth[1][is_real(row)])
            for layer, spec in specs.items():
                expected = truth[layer][is_real(row) if spec.positions == "all" else row.recorded]
                if spec.projection != "none":
                    projection = projection_of(store.path, spec)
                    matrix = projection.matrix.astype(np.float64)
                    np.testing.assert_allclose(matrix.T @ matrix, np.eye(spec.width), atol=1e-5)
                    expected = (expected - projection.mean) @ matrix
                found = row.optional[spec.plane]
                squares[layer] += [np.square(found - expected).sum(), np.square(expected).sum()]
    for layer, (difference, size) in squares.items():
        relative = (difference / size) ** 0.5
        assert relative < (0.012 if specs[layer].kind == "int8" else 1e-3), (layer, relative)
        assert relative > 1e-6  # it was rounded: the check can see something
    # The principal directions keep at least what any other eight of that sample do, and the manifest says so.
    sample = np.concatenate(centred)
    variances = np.linalg.eigvalsh(np.cov(sample.T))[::-1]
    assert specs[1].kept == pytest.approx(variances[:8].sum() / variances.sum(), abs=0.05)
    assert specs[0].kept < specs[1].kept < 1 and specs[2].kept == 1
    assert verify_store(store.path).ok
    verify(config, tmp_path / "store", seed=3)
    said = capsys.readouterr().out
    assert "feature_0" in said and "the head on the stored hidden states gives log_rest" in said
    assert "hidden states of layer 1: 8 numbers of 32 (pca" in inspect_text(store.path)
    assert "feature_2: root mean square" in store_stats(store.path).text()


def test_a_second_writer_takes_the_projection_that_is_there(tokens: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", "llama")
    config = config_for(tokens, teacher, tmp_path / "store", store__features=FEATURES)
    capture(config)
    whole = files_of(tmp_path / "store")
    for name in ("INDEX.json", *(name for name in whole if "train/000001" in name or "train/000000" in name)):
        (tmp_path / "store" / name).unlink()
    capture(config)
    assert files_of(tmp_path / "store") == whole
    other = config_for(tokens, teacher, tmp_path / "store", store__features=FEATURES[:2])
    with pytest.raises(StoreError, match="features"):
        capture(other)


def test_a_damaged_projection_is_found(tokens: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", "llama")
    capture(config_for(tokens, teacher, tmp_path / "store", store__features=FEATURES[1:2]))
    place = tmp_path / "store/projections/feature_1.f32"
    good = place.read_bytes()
    place.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    assert "feature_1.f32 is not the projection" in " ".join(verify_store(tmp_path / "store").problems)
    with pytest.raises(StoreError, match=r"feature_1\.f32 is not the projection"):
        subset_store(tmp_path / "store", tmp_path / "part", split="train", rows=[0])
    place.write_bytes(good)
    subset_store(tmp_path / "store", tmp_path / "part", split="train", rows=[0])
    assert verify_store(tmp_path / "part").ok


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (3, "expected the form"),
        ({"width": 3}, "expected the form"),
        ({"layer": 1, "widht": 3}, "expected the form"),
        ({"layer": -1}, "whole number"),
        ({"layer": True}, "whole number"),
        ({"layer": 1, "width": 0}, "whole number"),
        ({"layer": 1, "width": 2.0}, "whole number"),
        ({"layer": 1, "projection": "pca"}, "projection is one of none"),
        ({"layer": 1, "width": 2, "projection": "none"}, "projection is one of orthonormal, pca"),
        ({"layer": 1, "kind": "int4"}, "kind is one of"),
        ({"layer": 1, "positions": "some"}, "positions is one of"),
    ],
)
def test_bad_entries_are_refused(entry: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        feature_requests([entry])
    with pytest.raises(ConfigError, match="twice"):
        feature_requests([{"layer": 1}, {"layer": 1, "width": 2}])


def test_layers_and_widths_that_the_teacher_does_not_have(tokens: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", "llama")
    for entry, sentence in (({"layer": 3}, "the teacher has 2"), ({"layer": 1, "width": 32}, "have 32")):
        with pytest.raises(ModelError, match=sentence):
            capture(config_for(tokens, teacher, tmp_path / "store", store__features=[entry]))
    assert not (tmp_path / "store").exists()
